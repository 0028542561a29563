"""Dual encoders: load, check, and embed texts and images.

A dual encoder is any model of transformers whose `forward` returns `text_embeds` and `image_embeds`: CLIP, SigLIP,
SigLIP 2, MetaCLIP 2, AltCLIP, Chinese-CLIP and models of the same build.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoProcessor, PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from bt_hf.hub.contract import VOCABULARIES
from bt_hf.hub.loading import find_adapter_config, load_adapter, load_pretrained
from bt_hf.reward.fitting import UNBOUNDED, fit_processor

# Files that tell that a folder means to have a processor.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", *sorted(VOCABULARIES))
_QUIETLY: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
SUPPORTED = "CLIP, SigLIP, SigLIP 2, MetaCLIP 2, AltCLIP, Chinese-CLIP"


def check_dual_encoder(model: nn.Module) -> None:
    """Raise a `TypeError` unless `model` embeds texts and images into one space."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    missing = [
        name
        for name in ("get_text_features", "get_image_features", "logit_scale", "text_model", "vision_model")
        if not hasattr(base, name)
    ]
    if missing:
        raise TypeError(
            f"{type(base).__name__} is not a dual encoder: its forward should give `image_embeds` and `text_embeds`, "
            f"but it has no {', '.join(missing)}. These work: {SUPPORTED}. Load the whole model (for example "
            "`CLIPModel`), not one of its towers."
        )


def load_dual_encoder(
    name_or_path: str | Path,
    base_model: str | nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    is_trainable: bool = False,
) -> nn.Module:
    """Load a dual encoder, or an adapter on top of its base.

    Args:
        name_or_path: Hub id or local folder of a dual encoder or of a PEFT adapter of one.
        base_model: Base of the adapter: Hub id, folder or loaded model. Default: the one that the adapter names.
        revision: Git revision on the Hub, of `name_or_path`.
        token: Access token for the Hub.
        dtype: Floating type of the weights; default float32.
        is_trainable: Whether the adapter's weights require gradients.

    Returns:
        The dual encoder, or a `PeftModel` around it.

    Raises:
        OSError: Nothing is found at `name_or_path`, or the adapter's base can't be loaded.
        TypeError: What is found is not a dual encoder.
        ValueError: The adapter does not fit the base, or `base_model` is given for a whole model.
    """
    name = str(name_or_path)
    dtype = torch.float32 if dtype is None else dtype
    config = find_adapter_config(name, revision, token)
    if config is None:
        if base_model is not None:
            raise ValueError(f"`base_model` is for adapters, but {name!r} has no adapter_config.json: leave it out.")
        try:
            model = load_pretrained(AutoModel, name, revision, token=token, dtype=dtype)
        except OSError as error:
            raise OSError(
                f"No model or adapter can be loaded from {name!r}: it is neither a local folder that holds one nor a "
                f"Hub id that can be reached now. ({str(error).splitlines()[0]})"
            ) from error
        check_dual_encoder(model)
        return model
    base = base_model if base_model is not None else config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {name!r} does not name its base model: pass `base_model`.")
    if not isinstance(base, nn.Module):
        try:
            base = load_pretrained(AutoModel, base, token=token, dtype=dtype)
        except (OSError, ValueError) as error:
            raise OSError(
                f"The base model {base!r} of the adapter {name!r} can't be loaded: pass `base_model` with a Hub id or "
                f"a local folder that holds it. ({str(error).splitlines()[0]})"
            ) from error
    check_dual_encoder(base)
    try:
        return load_adapter(base, name, revision, token, is_trainable)
    except (RuntimeError, ValueError) as error:
        if "size mismatch" not in str(error) and "not found in the base model" not in str(error):
            raise
        raise ValueError(
            f"The adapter {name!r} was trained on {config.base_model_name_or_path!r} and does not fit "
            f"{type(base).__name__}({base_name(base)!r}): pass the `base_model` that it was trained on. "
            f"({str(error).strip().splitlines()[-1].strip()})"
        ) from error


def load_processor(name_or_path: str | Path, token: str | None = None, revision: str | None = None) -> ProcessorMixin:
    """Load the processor (tokenizer and image processor) of a dual encoder or an adapter folder."""
    return load_pretrained(AutoProcessor, name_or_path, revision, token=token)


def find_processor(
    source: Any,
    model: nn.Module,
    processor: ProcessorMixin | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> ProcessorMixin:
    """Load the processor saved beside an adapter or a model, else that of the base; fitted to the model.

    Args:
        source: What the user passed: Hub id, folder or loaded model.
        model: The loaded model.
        processor: One that the user passed; nothing is loaded then.
        revision: Git revision of `source` on the Hub.
        token: Access token for the Hub.

    Raises:
        ValueError: None is found, or one that is damaged or another model's: see `fit_processor`.
    """
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    if processor is not None:
        return fit_processor(base, processor)
    names = [] if isinstance(source, nn.Module) else [(str(source), revision)]
    names += [(name, None) for name in (base_name(model),) if name]
    for name, at in names:
        if not _has_processor(name, token, at):
            continue
        try:
            return fit_processor(base, load_processor(name, token=token, revision=at))
        except Exception as error:  # tokenizers raise bare exceptions on files that they can't parse
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"The processor in {name!r} can't be used: {reason} Mend its files, or pass a processor."
            ) from error
    raise ValueError(
        f"No processor was found for {type(model).__name__} (looked in: "
        f"{', '.join(repr(name) for name, _ in names) or 'nowhere, as the model was built in code'}): pass one."
    )


def _has_processor(name_or_path: str, token: str | None, revision: str | None) -> bool:
    """True if a folder or repo holds a file of a processor; what can't be reached holds none."""
    for file in PROCESSOR_FILES:
        try:
            if cached_file(name_or_path, file, token=token, revision=revision, **_QUIETLY) is not None:
                return True
        except (OSError, ValueError):
            return False
    return False


def base_name(model: nn.Module) -> str:
    """Return the Hub id or path that a model was loaded from; empty for a model built in code."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "name_or_path", "") or ""


def logit_scale(model: nn.Module) -> torch.Tensor:
    """exp(logit_scale): the factor s of r(t, I) = s cos(text(t), image(I)). Frozen, so it is a plain number."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.logit_scale.detach().float().exp().squeeze()


def _embed(output: Any) -> torch.Tensor:
    # float32: in half precision, cosines of two similar images would round to the same number.
    return F.normalize(output.pooler_output.float(), dim=-1)


def embed_texts(model: PreTrainedModel | PeftModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Normalised text embeddings (N, D), float32, of tokenized `inputs`."""
    return _embed(model.get_text_features(**inputs))


def embed_images(model: PreTrainedModel | PeftModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Normalised image embeddings (N, D), float32, of preprocessed `inputs`."""
    return _embed(model.get_image_features(**inputs))


def tokenize(processor: ProcessorMixin, texts: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
    """Tokenize as the model was trained."""
    tokenizer = getattr(processor, "tokenizer", processor)
    options = {"truncation": True, "max_length": context_length(processor), "return_tensors": "pt", **kwargs}
    if fills_context(processor):
        return dict(tokenizer(texts, padding="max_length", **options))
    # On the right, whatever the tokenizer says: positions are counted from the first token, so that padding on the
    # left would let the numbers of a prompt depend on the longest one beside it.
    return dict(tokenizer(texts, padding=True, padding_side="right", **options))


def fills_context(processor: ProcessorMixin) -> bool:
    """True if every prompt is padded to the full context: SigLIP's text towers pool the last token."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return any("siglip" in type(part).__name__.lower() for part in (processor, tokenizer))


def context_length(processor: ProcessorMixin) -> int:
    """Return the number of tokens of a prompt that the text tower reads: `find_processor` has fitted it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    length = tokenizer.model_max_length
    return int(length) if length < 10**6 else UNBOUNDED  # tokenizers without a limit say 10**30
