"""Options that every trainer of a pipeline's LoRA takes."""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from bt_hf.diffusion.quantization import read_quantization
from bt_hf.training.config import PreferenceConfig
from bt_hf.training.option_checks import check_bounds
from bt_hf.training.precision import multiplies_bfloat16

logger = logging.getLogger(__name__)

_POSITIVE = ("resolution", "validation_batch_size", "validation_images", "validation_inference_steps")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class PipelineConfig(PreferenceConfig):
    """`PreferenceConfig` with the pipeline's numbers and size, the cache of its encoders, and validation images."""

    # None only stands for an option that is not given: `__post_init__` replaces it.
    max_steps: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Optimizer steps: 200 by default, unless `num_train_epochs` is given."}
    )
    num_train_epochs: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "How often each row is seen, if `max_steps` is not given."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16; the LoRA itself stays in float32. By default where the device multiplies in "
            "it natively (NVIDIA GPUs from Ampere on, CPUs with AMX or AVX512-BF16), unless `fp16` or `deepspeed` is "
            "given. False for float32."
        },
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "Numbers in which a pipeline given by its name is loaded. bfloat16 halves the memory of the base; "
            "the LoRA is trained in float32 all the same."
        },
    )
    quantization_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Quantise the denoiser of a pipeline given by its name: bitsandbytes_4bit, bitsandbytes_8bit, "
            "torchao (8 bits, weights only), or a quantisation config of diffusers as JSON or the path of a JSON file."
        },
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the square that images are cropped to; by default the model's own."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the cache of encoded images and prompts; by default beside that of datasets."},
    )
    channels_last: bool = field(
        default=True,
        metadata={
            "help": "Memory format of a UNet's convolutions, made for tensor cores of GPUs; on a CPU it is no faster."
        },
    )
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts to draw before, at every evaluation and after, with fixed seeds."}
    )
    validation_images: int = field(default=4, metadata={"help": "Images for each validation prompt."})
    validation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Validation images drawn at once, such as 1 to save memory; by default all of a prompt."},
    )
    validation_inference_steps: int = field(default=25, metadata={"help": "Denoising steps of a validation image."})
    validation_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of validation images; by default the pipeline's."}
    )

    def __post_init__(self) -> None:
        self.warn_of_two_lengths()
        if self.max_steps is None:
            self.max_steps = 200 if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # as in `TrainingArguments`
        if isinstance(self.validation_prompts, str):  # one prompt, and not its letters
            self.validation_prompts = [self.validation_prompts]
        if self.quantization_config is not None:
            self.quantization_config = read_quantization(self.quantization_config)
        if self.bf16 is None:
            self._choose_precision()
        super().__post_init__()
        check_positive(self, _POSITIVE)
        check_bounds(self, {"validation_guidance_scale": (0, 1e300, "a finite number of at least 0")})
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` should be one of {', '.join(_DTYPES)}, but got {self.dtype!r}.")
        drawn = (bool(self.validation_prompts), "`validation_prompts`")
        names = ("batch_size", "guidance_scale", "images", "inference_steps")
        self.refuse_without_effect({f"validation_{name}": drawn for name in names})

    def _choose_precision(self) -> None:
        """Compute in bfloat16 where that is fast, and nothing else was asked for."""
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # says no if it was told nothing, too
        self.bf16 = not self.fp16 and not self.deepspeed and launcher == "no" and multiplies_bfloat16(self.use_cpu)
        if self.bf16:
            logger.info("Computing in bfloat16, in which this device is fast: pass `bf16=False` for float32.")


def check_positive(options: Any, names: Iterable[str]) -> None:
    """Raise a `ValueError` for an option that is given, but not a positive number."""
    for name in names:
        if getattr(options, name) is not None:
            positive(name, getattr(options, name))


def positive(name: str, value: float | str | None, otherwise: str = "") -> float:
    """Return an option as a number; raise a `ValueError` unless it is positive.

    Args:
        name: Name of the option.
        value: Its value, which may be text.
        otherwise: Words for what else is allowed.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"`{name}` should be a positive number{otherwise}, but got {value!r}.")
    return number
