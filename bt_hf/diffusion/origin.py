"""Origin of a pipeline: load it by name, and tell whether a loaded one is still what its name says."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from bt_hf.diffusion.quantization import is_quantized
from bt_hf.hub.contract import LORA_WEIGHTS
from bt_hf.hub.loading import load_pretrained

logger = logging.getLogger(__name__)

# Errors of diffusers where a pipeline is missing, cut or of another kind.
LOAD_ERRORS = (AttributeError, HfHubHTTPError, KeyError, OSError, TypeError, ValueError)
_VARIANT = re.compile(r".+\.(?P<variant>\w+?)(-\d+-of-\d+)?\.safetensors")
_ROUNDED = (torch.float16, torch.bfloat16)


def from_pretrained(
    name_or_path: str, dtype: torch.dtype = torch.float32, quantization: Any = None
) -> DiffusionPipeline:
    """Load a pipeline in one dtype, also from files of half precision alone (`variant="fp16"`).

    Without a dtype, diffusers takes float32 for its own models, but leaves a text encoder in the dtype that it was
    saved in (transformers 5), and the two then don't go together.

    Args:
        name_or_path: Hub id or folder of a pipeline.
        dtype: Numbers of all its models. Default float32.
        quantization: Config of diffusers by which the denoiser is quantised. Default: as it was saved.

    Raises:
        OSError: There is no pipeline of this name; says what is there instead.
        ValueError: The backend of `quantization` can't work on this machine.
    """
    _refuse_others(name_or_path)
    folder = Path(name_or_path)
    variants = _variants(folder) if folder.is_dir() else [None, "fp16"]
    for variant in variants:
        try:
            config = None if quantization is None else _of_denoisers(name_or_path, quantization)
            return load_pretrained(
                DiffusionPipeline, name_or_path, dtype=dtype, variant=variant, quantization_config=config
            )
        except RuntimeError as error:
            if quantization is None:
                raise
            raise ValueError(f"`quantization_config` can't be followed here: {_one_line(error)}") from error
        except LOAD_ERRORS as error:
            if "asks to run code" in str(error):
                raise
            if variant == variants[0]:
                first = error
    raise OSError(
        f"No pipeline can be loaded from {name_or_path!r}: it is neither a folder that a pipeline's `save_pretrained` "
        f"wrote nor a Hub id of one that can be reached now. ({_one_line(first)})"
    ) from first


def _of_denoisers(name: str, quantization: Any) -> PipelineQuantizationConfig:
    """Quantise the denoiser of a pipeline, or both of two: the encoders leave memory once everything is encoded."""
    config = DiffusionPipeline.load_config(name)
    parts = [part for part in config if part.startswith(("unet", "transformer")) and all(config[part])]
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, quantization))


def _refuse_others(name: str) -> None:
    """Raise an `OSError` for a single file and for a folder of LoRA weights alone."""
    if name.endswith((".safetensors", ".ckpt", ".bin", ".pt", ".gguf")):
        raise OSError(
            f"{name!r} is a single file: load it with diffusers (`StableDiffusionPipeline.from_single_file(...)`, or "
            "the pipeline of its kind), and pass the pipeline."
        )
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file() and list(folder.glob("*.safetensors")):
        kind = "LoRA weights" if (folder / LORA_WEIGHTS).is_file() else "weights"
        raise OSError(
            f"{name!r} holds {kind} without a pipeline (no model_index.json) and without an adapter_config.json: load "
            "the base's pipeline and pass that; a LoRA may be fused into it before "
            "(`pipeline.load_lora_weights(...)`, `fuse_lora()`, `unload_lora_weights()`)."
        )


def _variants(folder: Path) -> list[str | None]:
    """Return what to load of a folder: plain weights, unless a part has those of a variant alone."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = [_VARIANT.fullmatch(file.name) for file in sorted(part.glob("*.safetensors"))]
        if found and all(found):
            return [match["variant"] for match in found if match][:1]
    return [None]


def known_name(pipeline: DiffusionPipeline) -> str | None:
    """Return the name or path that a loaded pipeline comes from; None if that is unknown or true no more.

    Weights are compared with the files, where these are on this machine: a fused LoRA, an exchanged part or other
    tokens change what the LoRA belongs to.
    """
    name = str(pipeline.config.get("_name_or_path") or "") or None
    part = _changed_part(pipeline, name) if name else None
    if part is None:
        return name
    logger.warning(
        "The pipeline's %s is not that of %r any more (a fused LoRA, or an exchanged part), so the card and the "
        "adapter's config name no base. To name one, save the pipeline (`pipeline.save_pretrained(...)`) and pass "
        "that folder's name.",
        part,
        name,
    )
    return None


def _changed_part(pipeline: Any, name: str) -> str | None:
    folder = _local_folder(name)
    modules = {part: module for part, module in pipeline.components.items() if isinstance(module, nn.Module)}
    for part, module in modules.items():
        files = sorted((folder / part).glob("*.safetensors")) if folder else []
        if files and _differs(module, files):
            return part
    if getattr(pipeline, "num_fused_loras", 0):
        return next(part for part in ("unet", "transformer") if part in modules)
    return None


def _local_folder(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


@torch.no_grad()
def _differs(module: nn.Module, files: Iterable[Path]) -> bool:
    """True if a weight of `module` is not that of the same name in one of the files, in any precision."""
    if is_quantized(module):
        return False  # other numbers by intention
    model = module.get_base_model() if isinstance(module, PeftModel) else module
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    same: dict[str, bool] = {}
    for file in files:
        with safe_open(file, "pt") as saved:
            for name in set(saved.keys()).intersection(state):
                if type(state[name]) in (torch.Tensor, nn.Parameter):
                    same[name] = same.get(name, False) or _same(state[name].cpu(), saved.get_tensor(name))
    return not all(same.values())


def _same(now: torch.Tensor, saved: torch.Tensor) -> bool:
    if now.shape != saved.shape:
        return False
    candidates = [saved.to(now.dtype), *(saved.to(dtype).to(now.dtype) for dtype in _ROUNDED)]
    return any(torch.equal(now, candidate) for candidate in candidates)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
