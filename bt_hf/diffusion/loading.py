"""Wrap a pipeline in its family, put a LoRA on its denoiser, and check that both fit the options and the rows."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from torch import nn

from bt_hf.data.cache import without_format
from bt_hf.data.checks import check_unpaired, warn_of_truncation
from bt_hf.diffusion.cache import Evaluated, LatentPairs, Pairs
from bt_hf.diffusion.collator import is_unpaired
from bt_hf.diffusion.families.base import Family, check_adapter, check_tensors, find_family
from bt_hf.diffusion.origin import LOAD_ERRORS, from_pretrained, known_name
from bt_hf.diffusion.pipeline_config import PipelineConfig
from bt_hf.diffusion.quantization import is_quantized, model_quantization, move, read_quantization
from bt_hf.hub.loading import find_adapter_config, load_adapter
from bt_hf.training.adapters import put_on, saved_names, take_over, train_in_float32, unwrapped
from bt_hf.training.arguments import check_datasets, check_kind
from bt_hf.training.lora_options import check_adapter_options


def load_family(
    model: str | Path | DiffusionPipeline, dtype: str = "float32", quantization: Any = None
) -> tuple[Family, str | None]:
    """Load a pipeline and wrap it in its family.

    Args:
        model: Hub id or folder of a pipeline or of a preference LoRA, or a loaded `DiffusionPipeline`.
        dtype: Numbers in which a pipeline is loaded by its name; one that is loaded keeps its own. Default "float32".
        quantization: Config by which the denoiser of such a pipeline is quantised, as `read_quantization` takes it.
            Default: none.

    Returns:
        The family around the pipeline, which has no safety checker, and whose denoiser is a `PeftModel` if `model` is
        a preference LoRA; and the name or path that the base was loaded from, if it is known. Of a loaded pipeline it
        is a copy with the same components.

    Raises:
        ImportError: The backend of the quantisation is not installed.
        OSError: The pipeline, or the adapter's base, can't be found.
        TypeError: It is not a text-to-image pipeline that is supported.
        ValueError: A dtype or a quantisation is asked of a loaded pipeline, or can't be had; or the adapter doesn't
            say what its base is, or doesn't fit.
    """
    if isinstance(model, str | Path):
        config = None if quantization is None else model_quantization(read_quantization(quantization), dtype)
        return _load_by_name(str(model), getattr(torch, dtype), config)
    if quantization is not None:
        raise ValueError(
            "`quantization_config` is for a pipeline given by its name: give the name, or load it quantised with "
            "`DiffusionPipeline.from_pretrained(..., quantization_config=...)`, and leave the option out."
        )
    if dtype != "float32":
        raise ValueError(f"`dtype={dtype!r}` is for a pipeline given by its name: this one keeps the dtype it has.")
    if not isinstance(model, DiffusionPipeline):
        raise TypeError(
            f"`model` should be a Hub id, a folder or a loaded `DiffusionPipeline`, but got {type(model).__name__}: "
            "pass the whole pipeline, which also encodes images and prompts."
        )
    # A copy of the shell: what we take out of it, the caller's keeps.
    pipeline = _without_safety_checker(copy.copy(model))
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and (inner := unwrapped(component)) is not component:
            setattr(pipeline, name, inner)
    return find_family(pipeline), known_name(pipeline)


def _load_by_name(name: str, dtype: torch.dtype, quantization: Any) -> tuple[Family, str]:
    """Load a pipeline, or the base of a preference LoRA and the LoRA onto its denoiser."""
    config = find_adapter_config(name)
    if config is None:
        return find_family(_without_safety_checker(from_pretrained(name, dtype, quantization))), name
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter {name!r} does not say what its base is: load the base's pipeline, put the adapter on its "
            "denoiser with `PeftModel.from_pretrained(..., is_trainable=True)`, and pass the pipeline."
        )
    try:
        pipeline = from_pretrained(base, dtype, quantization)
    except OSError as error:
        raise OSError(
            f"The base {base!r} of the adapter {name!r} can't be loaded; if it has moved, load its pipeline from "
            "where it is, put the adapter on its denoiser with `PeftModel.from_pretrained(..., is_trainable=True)`, "
            f"and pass the pipeline. ({error})"
        ) from error
    family = find_family(_without_safety_checker(pipeline))
    setattr(family.pipeline, family.denoiser, _load_adapter(family, name, base))
    return family, base


def _load_adapter(family: Family, name: str, base: str) -> PeftModel:
    """Load a trainable LoRA onto the pipeline's denoiser; raise a `ValueError` if it does not fit."""
    try:
        return load_adapter(family.module, name, is_trainable=True)
    except (*LOAD_ERRORS, RuntimeError) as error:
        raise ValueError(
            f"The LoRA {name!r} does not fit the {family.denoiser} of {base!r} ({type(family.pipeline).__name__}): "
            "it belongs to another kind or size of model, or is incomplete. Pass the base that it was trained on. "
            f"({' '.join(str(error).split())[:300]})"
        ) from error


def _without_safety_checker(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Take out the safety checker, which would take memory through all of the training, to turn validation images
    black."""
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
    return pipeline


def add_adapter(family: Family, peft_config: LoraConfig | None, args: PipelineConfig, base: str | None) -> PeftModel:
    """Return the pipeline's denoiser with a fresh LoRA, or with the one that it has; all else is frozen.

    The layers are put into the pipeline's own denoiser, so that the pipeline draws with them.

    Raises:
        ValueError: `peft_config` is not a LoRA that diffusers can load, the denoiser has a LoRA loaded already, an
            option would have no effect (see `check_adapter_options`), or switching the LoRA off would not give the
            base back (see `training.adapters`).
    """
    pipeline = family.pipeline
    for component in pipeline.components.values():
        if isinstance(component, nn.Module) and not isinstance(component, PeftModel):
            component.requires_grad_(False).eval()
    denoiser = getattr(pipeline, family.denoiser)
    if is_quantized(denoiser):
        move(denoiser, args.device)  # the Trainer would leave it where it was loaded
    check_adapter_options(denoiser, args, peft_config)
    if isinstance(denoiser, PeftModel):
        take_over(denoiser)
        check_adapter(denoiser.active_peft_config)
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
        model = put_on(denoiser, config)
    check_tensors(saved_names(model))
    train_in_float32(model)
    model.peft_config[model.active_adapter].base_model_name_or_path = base
    model.get_base_model()._hf_peft_config_loaded = True  # else diffusers would not switch, fuse or unload it
    if args.gradient_checkpointing:
        # The Trainer asks in the words of transformers (the latter from 5.23), diffusers answers to its own.
        def enable(*args: Any, **kwargs: Any) -> None:
            model.get_base_model().enable_gradient_checkpointing()

        model.gradient_checkpointing_enable = model.activation_checkpointing_enable = enable
    return model


def set_memory_format(family: Family, model: PeftModel, channels_last: bool) -> None:
    """Set the memory format of a UNet's convolutions; a transformer has none."""
    if family.denoiser != "unet":
        return
    model.get_base_model().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if model.active_peft_config.use_dora:  # PEFT views its weights as matrices
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.data = value.data.contiguous()


def leave_as_loaded(family: Family, model: PeftModel) -> None:
    """Leave denoiser and VAE as diffusers loads them: in evaluation mode, contiguous, no gradient checkpointing."""
    set_memory_format(family, model, channels_last=False)
    model.eval()
    if model.get_base_model().is_gradient_checkpointing:
        model.get_base_model().disable_gradient_checkpointing()
    vae = family.pipeline.vae
    if vae is not None and vae.is_gradient_checkpointing:
        vae.disable_gradient_checkpointing()


def training_size(family: Family, resolution: int | None) -> tuple[int, int]:
    """Return height and width to train at.

    Raises:
        ValueError: The model can't draw that size.
    """
    height, width = (resolution, resolution) if resolution else family.default_size
    multiple = family.multiple
    if height % multiple or width % multiple:
        nearest = max(multiple, round(height / multiple) * multiple)
        raise ValueError(
            f"`resolution` should be a multiple of {multiple} for {type(family.pipeline).__name__}, but got {height}: "
            f"take {nearest}, for example."
        )
    return height, width


def warn_of_long_prompts(family: Family, datasets: Iterable[Pairs], further: Iterable[str] | None) -> None:
    """Warn once, with their number, of prompts of which the pipeline reads only the beginning.

    Args:
        family: Family around the pipeline.
        datasets: Streams and encoded rows among them are not looked at.
        further: Prompts beside theirs.
    """
    stored = [without_format(pairs) for pairs in datasets if isinstance(pairs, Dataset)]
    prompts = [prompt for pairs in stored for prompt in pairs["prompt"]]
    prompts += further or []
    if prompts:
        tokenizer, limit = family.longest_prompt()
        warn_of_truncation(tokenizer, prompts, limit, "the pipeline")


def check_rows(loss_type: str, train: Pairs | None, evaluation: Evaluated | None) -> None:
    """Check that the rows fit the loss, and the row contract where they are plain datasets.

    Raises:
        PreferenceDataError: A dataset is not in the row contract, or has no rows.
        ValueError: The loss takes pairs and the rows are unpaired, or the other way round.
    """
    if train is not None:
        check_kind(train, "`train_dataset`")
    unpaired = isinstance(train, Dataset | IterableDataset) and is_unpaired(train.column_names or ())
    if unpaired != (loss_type == "kto") and train is not None and not isinstance(train, LatentPairs):
        raise ValueError(
            "`loss_type='kto'` takes unpaired rows (prompt, completion, label): make them with "
            "`trl.unpair_preference_dataset`, or choose a loss for pairs."
            if not unpaired
            else f"`train_dataset` has unpaired rows, but `loss_type={loss_type!r}` compares two images: pass "
            "`loss_type='kto'`, or pairs (prompt, chosen, rejected)."
        )
    if unpaired:
        check_unpaired(train)
    check_datasets(None if unpaired else train, evaluation)
