"""From a name or a loaded pipeline to what the trainer trains."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from bt_hf.data.checks import warn_of_truncation
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.families.base import Family, check_adapter, find_family
from bt_hf.hub.contract import find_adapter_config
from bt_hf.training.lora_options import check_adapter_options


def load_pipeline(model: Any) -> tuple[Any, Family, str | None]:
    """Load a pipeline and find its family.

    Args:
        model: Hub id or folder of a pipeline or of a preference LoRA, which are loaded in float32, or a loaded
            `DiffusionPipeline`, of any dtype.

    Returns:
        The pipeline, without a safety checker, whose denoiser is a `PeftModel` if `model` is a preference LoRA; its
        family; and the name or path that the base was loaded from, if it is known. Of a loaded pipeline it is a copy
        with the same components.

    Raises:
        OSError: The pipeline can't be found.
        TypeError: It is no text-to-image pipeline that is supported.
        ValueError: The adapter doesn't say what its base is.
    """
    if isinstance(model, str | Path):
        config = find_adapter_config(str(model))
        if config is None:
            pipeline = _unchecked(from_pretrained(str(model)))
            return pipeline, find_family(pipeline), str(model)
        base = config.base_model_name_or_path
        if not base:
            raise ValueError(
                f"The adapter {str(model)!r} does not say what its base is: load the base's pipeline, put the adapter "
                "on its denoiser with `PeftModel.from_pretrained(..., is_trainable=True)`, and pass the pipeline."
            )
        pipeline = _unchecked(from_pretrained(base))
        family = find_family(pipeline)
        denoiser = getattr(pipeline, family.denoiser)
        setattr(pipeline, family.denoiser, PeftModel.from_pretrained(denoiser, str(model), is_trainable=True))
        return pipeline, family, base
    if not isinstance(model, DiffusionPipeline):
        raise TypeError(
            f"`model` should be a Hub id, a folder or a loaded `DiffusionPipeline`, but got {type(model).__name__}: "
            "pass the whole pipeline, which also encodes images and prompts."
        )
    # A copy of the shell: what we take out of it, the caller's keeps.
    return _unchecked(copy.copy(model)), find_family(model), model.config.get("_name_or_path") or None


def _unchecked(pipeline: Any) -> Any:
    """The same pipeline without a safety checker: it would take memory through all of the training, to turn validation
    images black."""
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
    return pipeline


def from_pretrained(name_or_path: str) -> Any:
    """A pipeline in float32. Without a dtype, diffusers takes float32 for its own models, but leaves a text encoder in
    what it was saved in (transformers 5), and the two then don't go together."""
    return DiffusionPipeline.from_pretrained(name_or_path, dtype=torch.float32)


def add_adapter(
    pipeline: Any, family: Family, peft_config: LoraConfig | None, args: PreferenceLoRAConfig, base: str | None
) -> PeftModel:
    """Put a fresh LoRA on the pipeline's denoiser, unless it has one, and freeze all else.

    The layers are put into the pipeline's own denoiser, so that the pipeline draws with them.

    Raises:
        ValueError: diffusers can't load an adapter of this `peft_config`, the denoiser has a LoRA loaded already, or
            an option would have no effect (see `check_adapter_options`).
    """
    for component in pipeline.components.values():
        if isinstance(component, nn.Module) and not isinstance(component, PeftModel):
            component.requires_grad_(False).eval()
    denoiser = getattr(pipeline, family.denoiser)
    check_adapter_options(denoiser, args, peft_config)
    if isinstance(denoiser, PeftModel):
        setattr(pipeline, family.denoiser, denoiser.get_base_model())
        model = denoiser
    else:
        if getattr(denoiser, "peft_config", None):
            raise ValueError(
                "`model` has a LoRA loaded already, which switching off ours would switch off as well: fuse it "
                "(`pipeline.fuse_lora(); pipeline.unload_lora_weights()`), or pass its folder to train on from it."
            )
        config = peft_config or args.lora_config(args.lora_target_modules or family.target_modules)
        check_adapter(config)
        model = get_peft_model(denoiser, config)
    model.peft_config[model.active_adapter].base_model_name_or_path = base
    if args.channels_last and family.denoiser == "unet":
        denoiser.to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        # The Trainer asks in the words of transformers, diffusers answers to its own.
        model.gradient_checkpointing_enable = lambda *args, **kwargs: (
            model.get_base_model().enable_gradient_checkpointing()
        )
    return model


def training_size(pipeline: Any, family: Family, resolution: int | None) -> tuple[int, int]:
    """Height and width to train at.

    Raises:
        ValueError: The model can't draw that size.
    """
    height, width = (resolution, resolution) if resolution else family.default_size(pipeline)
    multiple = family.multiple(pipeline)
    if height % multiple or width % multiple:
        nearest = max(multiple, round(height / multiple) * multiple)
        raise ValueError(
            f"`resolution` should be a multiple of {multiple} for {type(pipeline).__name__}, but got {height}: take "
            f"{nearest}, for example."
        )
    return height, width


def count_truncated(pipeline: Any, family: Family, prompts: list[str]) -> int:
    """How many prompts are longer than what the pipeline reads of them; said once, as a warning."""
    if not prompts:
        return 0
    tokenizer, limit = family.longest_prompt(pipeline)
    return warn_of_truncation(tokenizer, prompts, limit, "the pipeline")
