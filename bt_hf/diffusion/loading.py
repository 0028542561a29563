"""Load a pipeline, put a LoRA on its denoiser, and check that both fit the options and the rows."""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from bt_hf.data.checks import check_unpaired, warn_of_truncation
from bt_hf.diffusion.cache import Evaluated, LatentPairs, Pairs
from bt_hf.diffusion.collator import UNPAIRED
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.families.base import Family, check_adapter, find_family
from bt_hf.hub.loading import find_adapter_config, load_adapter, load_pretrained
from bt_hf.training.lora_options import check_adapter_options
from bt_hf.training.trainer import check_datasets


def load_family(model: str | Path | DiffusionPipeline) -> tuple[Family, str | None]:
    """Load a pipeline and wrap it in its family.

    Args:
        model: Hub id or folder of a pipeline or of a preference LoRA, which are loaded in float32, or a loaded
            `DiffusionPipeline`, of any dtype.

    Returns:
        The family around the pipeline, which has no safety checker, and whose denoiser is a `PeftModel` if `model` is
        a preference LoRA; and the name or path that the base was loaded from, if it is known. Of a loaded pipeline it
        is a copy with the same components.

    Raises:
        OSError: The pipeline can't be found.
        TypeError: It is not a text-to-image pipeline that is supported.
        ValueError: The adapter doesn't say what its base is.
    """
    if isinstance(model, str | Path):
        return _load_by_name(str(model))
    if not isinstance(model, DiffusionPipeline):
        raise TypeError(
            f"`model` should be a Hub id, a folder or a loaded `DiffusionPipeline`, but got {type(model).__name__}: "
            "pass the whole pipeline, which also encodes images and prompts."
        )
    # A copy of the shell: what we take out of it, the caller's keeps.
    return find_family(_without_safety_checker(copy.copy(model))), model.config.get("_name_or_path") or None


def _load_by_name(name: str) -> tuple[Family, str]:
    """Load a pipeline, or the base of a preference LoRA and the LoRA onto its denoiser."""
    config = find_adapter_config(name)
    if config is None:
        return find_family(_without_safety_checker(from_pretrained(name))), name
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter {name!r} does not say what its base is: load the base's pipeline, put the adapter on its "
            "denoiser with `PeftModel.from_pretrained(..., is_trainable=True)`, and pass the pipeline."
        )
    family = find_family(_without_safety_checker(from_pretrained(base)))
    adapted = load_adapter(family.module, name, is_trainable=True)
    setattr(family.pipeline, family.denoiser, adapted)
    return family, base


def _without_safety_checker(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Take out the safety checker, which would take memory through all of the training, to turn validation images
    black."""
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
    return pipeline


def from_pretrained(name_or_path: str) -> DiffusionPipeline:
    """Load a pipeline in float32.

    Without a dtype, diffusers takes float32 for its own models, but leaves a text encoder in the dtype that it was
    saved in (transformers 5), and the two then don't go together.
    """
    return load_pretrained(DiffusionPipeline, name_or_path, dtype=torch.float32)


def add_adapter(
    family: Family, peft_config: LoraConfig | None, args: PreferenceLoRAConfig, base: str | None
) -> PeftModel:
    """Return the pipeline's denoiser with a fresh LoRA, or with the one that it has; all else is frozen.

    The layers are put into the pipeline's own denoiser, so that the pipeline draws with them.

    Raises:
        ValueError: `peft_config` is not a LoRA that diffusers can load, the denoiser has a LoRA loaded already, or an
            option would have no effect (see `check_adapter_options`).
    """
    pipeline = family.pipeline
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
    prompts = [prompt for pairs in datasets if isinstance(pairs, Dataset) for prompt in pairs["prompt"]]
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
    unpaired = isinstance(train, Dataset | IterableDataset) and set(UNPAIRED) <= set(train.column_names or ())
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
