"""Options of `PreferenceLoRATrainer`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bt_hf.training.config import PreferenceConfig
from bt_hf.training.option_checks import check_bounds

_POSITIVE = [
    "num_noise_samples",
    "num_eval_noise_samples",
    "validation_batch_size",
    "validation_images",
    "validation_inference_steps",
    "resolution",
    "snr_gamma",
    "desirable_weight",
    "undesirable_weight",
]
# Chosen on training prompts of the emoji domain: a larger one keeps more of the captions, and learns less of a style.
RPO_ALPHA = 0.05
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class PreferenceLoRAConfig(PreferenceConfig):
    """Options of `PreferenceLoRATrainer`: those of `transformers.TrainingArguments`, with defaults for few pairs.

    With dpo, the default, the loss is the mean over pairs of

        bradley_terry_loss(-beta / 2 [(err(chosen) - err_ref(chosen)) - (err(rejected) - err_ref(rejected))])

    where err is the mean squared error of the denoiser with the LoRA on and err_ref with it off, at the same noise and
    the same timestep for both images (Diffusion-DPO, https://arxiv.org/abs/2311.12908, eq. 14).

    Noise and timestep of a pair depend on the seed, the pair and how often it was seen, and on nothing else: neither
    resuming nor another number of processes changes them.

    Example:
        >>> from bt_hf import PreferenceLoRAConfig
        >>> PreferenceLoRAConfig(output_dir="my-taste-lora", report_to="none").loss_type
        'dpo'
    """

    # None only stands for an option that is not given: `__post_init__` replaces it.
    max_steps: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Optimizer steps: 200 by default, unless `num_train_epochs` is given."}
    )
    num_train_epochs: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "How often each pair is seen, if `max_steps` is not given."}
    )
    learning_rate: float = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Peak learning rate of AdamW. By default it begins at 1e-4 and finds itself, see `adapt_rate`."
        },
    )
    adapt_rate: bool | None = field(
        default=None,
        metadata={
            "help": "Steer the learning rate by the margins of the training pairs, up to ten times up or down: it "
            "rises while they lag behind a plan that reaches 10 at the last step, and falls where they lead. By "
            "default with dpo and AdamW, if no `learning_rate` is given."
        },
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Pairs in a batch on each device; the denoiser sees twice as many images."}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Pairs in a batch of evaluation."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps over which the learning rate rises."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Weight decay of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    loss_type: Literal["dpo", "ipo", "hinge", "bt", "mapo", "sft", "kto"] = field(
        default="dpo",
        metadata={
            "help": "dpo, ipo and hinge compare errors against the base's, bt, mapo and sft do without it, kto takes "
            "unpaired rows (prompt, completion, label), as TRL's unpair_preference_dataset makes them."
        },
    )
    # None only stands here so that the command line reads a word as well as a number.
    beta: float | str | None = field(
        default="auto",
        metadata={
            "help": "How much a difference of errors counts. auto: by the spread of the base's error differences, so "
            "that it means the same for every model. published: the published one for the kind of model, 2000 for "
            "Stable Diffusion, 5000 for SDXL, 100 for flow models (all others). Or a number, with the 1/2 of the "
            "formula: scripts without it, such as those of diffusers, mean twice as much by theirs."
        },
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the supervised term, which keeps captions: beta / 2 times the change of the preferred "
            "image's error, as TRL's option of this name adds its likelihood (RPO, arXiv 2405.16436). By default "
            f"{RPO_ALPHA:g} with dpo, and 0, which is off, with the other losses."
        },
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of liked images in the kto loss, to make up for unequal numbers."}
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of disliked images in the kto loss, to make up for unequal numbers."}
    )
    safeguard: bool = field(
        default=False,
        metadata={
            "help": "Scale the rejected image's gradient down where it would raise the chosen one's error "
            "(Diffusion-SDPO, arXiv 2511.03317)."
        },
    )
    safeguard_mu: float = field(
        default=0.0, metadata={"help": "mu of Diffusion-SDPO in [0, 1]: the larger, the safer for the chosen image."}
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Min-SNR-gamma weights of the timesteps (arXiv 2303.09556), such as 5."}
    )
    num_noise_samples: int | None = field(
        default=None,
        metadata={
            "help": "Fix that many samples of noise and timestep for each pair. With more epochs than samples they "
            "come again, so that the base's errors are computed once: a forward pass less at each step. By default "
            "every epoch has new ones."
        },
    )
    num_eval_noise_samples: int = field(
        default=8,
        metadata={"help": "Samples of noise and timestep for each held-out pair, the same at every evaluation."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "Numbers in which a pipeline given by its name is loaded. bfloat16 halves the memory of the base; "
            "the LoRA is trained in float32 all the same."
        },
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the square that images are cropped to; by default the model's own."}
    )
    sample_latents: bool = field(
        default=False, metadata={"help": "Sample latents from the VAE's posterior instead of taking its mean."}
    )
    cache_latents: bool = field(
        default=True,
        metadata={
            "help": "Encode each distinct image and prompt once, into a memory-mapped file that later runs find; "
            "VAE and text encoders then leave memory. Off for streams."
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where that file goes; by default beside the cache of datasets."}
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
    guards: bool = field(
        default=True,
        metadata={
            "help": "Watch for the usual failures of few pairs: the chosen images' error rises, held-out accuracy "
            "falls while training accuracy is near 1 (stops, and goes back to the best), images become all alike."
        },
    )

    def __post_init__(self) -> None:
        self.warn_of_two_lengths()
        if self.max_steps is None:
            self.max_steps = 200 if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # as in `TrainingArguments`
        if isinstance(self.validation_prompts, str):  # one prompt, and not its letters
            self.validation_prompts = [self.validation_prompts]
        given = self.learning_rate is not None
        if not given:
            self.learning_rate = PreferenceConfig.learning_rate
        super().__post_init__()
        if self.adapt_rate is None:
            self.adapt_rate = not given and self._can_adapt_rate()
        if isinstance(self.validation_prompts, str):  # one prompt, and not its letters
            self.validation_prompts = [self.validation_prompts]
        if self.rpo_alpha is None:
            self.rpo_alpha = RPO_ALPHA if self.loss_type == "dpo" else 0.0
        if self.beta not in ("auto", "published"):
            self.beta = _positive("beta", self.beta, ", 'auto' or 'published'")
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        amount = (0, 1e300, "a finite number of at least 0")
        amounts = dict.fromkeys(("rpo_alpha", "validation_guidance_scale"), amount)
        check_bounds(self, {"safeguard_mu": (0, 1, "in [0, 1]"), **amounts})
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` should be one of {', '.join(_DTYPES)}, but got {self.dtype!r}.")
        self._check_effects()

    def _can_adapt_rate(self) -> bool:
        """True if margins mean what `MarginRate` takes them for, and the rate can be changed on the way."""
        schedule = self.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy")
        return self.loss_type == "dpo" and self.optim.value.startswith("adamw") and schedule and not self.deepspeed

    def _check_effects(self) -> None:
        """Raise a `ValueError` for an option that would have no effect beside the others."""
        kto = (self.loss_type == "kto", "`loss_type='kto'`")
        drawn = (bool(self.validation_prompts), "`validation_prompts`")
        adaptable = "`loss_type='dpo'`, AdamW without DeepSpeed, and a schedule that is constant or falls"
        self.refuse_without_effect(
            {
                "adapt_rate": (not self.adapt_rate or self._can_adapt_rate(), adaptable),
                "beta": (self.loss_type != "sft", "another loss: `loss_type='sft'` has no beta"),
                "cache_dir": (self.cache_latents, "`cache_latents=True`"),
                "desirable_weight": kto,
                "undesirable_weight": kto,
                "label_smoothing": (self.loss_type != "kto", "a loss of pairs, and not `loss_type='kto'`"),
                "safeguard_mu": (self.safeguard, "`safeguard=True`"),
                "validation_batch_size": drawn,
                "validation_guidance_scale": drawn,
                "validation_images": drawn,
                "validation_inference_steps": drawn,
            }
        )
        if self.rpo_alpha and self.loss_type in ("sft", "mapo", "kto"):
            raise ValueError(
                f"`rpo_alpha` adds the preferred image's error to a loss of pairs, but `{self.loss_type}` "
                + ("has no pairs" if self.loss_type == "kto" else "holds it already")
                + ": leave it out, or choose another `loss_type`."
            )
        if self.safeguard and self.loss_type in ("sft", "kto"):
            raise ValueError(
                f"`safeguard` scales the gradient of a pair's rejected image, but `{self.loss_type}` has no such "
                "pair: leave it out, or choose another `loss_type`."
            )


def _positive(name: str, value: float | str | None, otherwise: str = "") -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"`{name}` should be a positive number{otherwise}, but got {value!r}.")
    return number
