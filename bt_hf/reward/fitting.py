"""Fit a processor to its model: the towers tell how many tokens, which ids and which images they read."""

import copy
from typing import Any

import torch
from PIL import Image
from torch import nn

# Tokens that a tower without positions of its own (as T5's) reads, where the tokenizer names no limit either.
UNBOUNDED = 512
# Checkpoints round their vocabulary up by less than a tenth; a larger gap is another tokenizer.
_SHARE = 0.9


def text_positions(tower: nn.Module) -> int | None:
    """Return how many tokens a text tower has positions for; `None` if its build sets no limit.

    Read from the position embeddings, of which some models keep the first ones for padding: RoBERTa and its kin begin
    behind `padding_idx`, BART and OPT at an `offset`. Rotary and relative positions are limited by the config alone.
    """
    found = []
    for name, module in tower.named_modules():
        leaf = name.split(".")[-1]
        if isinstance(module, nn.Embedding) and leaf != "" and ("position" in leaf or leaf == "wpe"):
            first = getattr(module, "offset", None)
            if first is None:
                first = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - first)
    if found:
        return min(found)
    limit = getattr(getattr(tower, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def fit_processor(model: nn.Module, processor: Any) -> Any:
    """Return `processor` with the context length of the model's text tower, once both are known to belong together.

    Args:
        model: The dual encoder, without its adapter.
        processor: Its processor; a copy is changed, and only if the limit of its tokenizer is not the model's.

    Raises:
        ValueError: The processor lacks a tokenizer or an image processor, its tokens are not those of the model, or
            its images are not of the size that the vision tower reads.
    """
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ValueError(
                f"The processor of {type(model).__name__} should have a tokenizer and an image processor, but "
                f"{type(processor).__name__} has no `{part}`: its files are incomplete, or it is another model's."
            )
    _check_tokens(model, processor.tokenizer)
    _check_images(model, processor.image_processor)
    positions = text_positions(model.get_submodule("text_model"))
    told = processor.tokenizer.model_max_length
    limit = min(told, positions or (told if told < 10**6 else UNBOUNDED))
    if limit == told:
        return processor
    processor = copy.copy(processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.model_max_length = limit
    return processor


def _check_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Compare vocabularies: ids beyond the embedding crash, and an invented vocabulary scores all prompts alike."""
    tower: Any = model.get_submodule("text_model")
    try:
        rows = tower.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):  # towers that read no ids of a vocabulary, such as CANINE
        return
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    way_out = "its files are missing or another model's; pass the processor that belongs to the model"
    if highest >= rows or len(vocabulary) < _SHARE * rows:
        raise ValueError(
            f"The text tower of {type(model).__name__} has {rows} tokens, but {type(tokenizer).__name__} has "
            f"{len(vocabulary)}, with ids up to {highest}: {way_out}."
        )
    # CLIP pools the token that its config names; 2 is an old entry, for which it takes the highest id.
    end = getattr(tower, "eos_token_id", 2)
    if isinstance(end, int) and end != 2 and tokenizer.eos_token_id != end:
        raise ValueError(
            f"The text tower of {type(model).__name__} looks for the end of a prompt by token {end}, but "
            f"{type(tokenizer).__name__} ends it with {tokenizer.eos_token_id}: {way_out}."
        )


def _check_images(model: nn.Module, image_processor: Any) -> None:
    """Preprocess one image, and compare what comes out with what the vision tower reads."""
    tower: Any = model.get_submodule("vision_model")
    name = type(image_processor).__name__
    way_out = "look at its preprocessor_config.json, or pass the processor that belongs to the model"
    try:
        pixels = image_processor(
            [Image.linear_gradient("L").convert("RGB").crop((0, 0, 256, 200))], return_tensors="pt"
        )["pixel_values"]
        finite = bool(torch.isfinite(pixels).all())
    except Exception as error:  # libraries don't check their settings, and raise anything
        raise ValueError(f"{name} cannot prepare an image ({_one_line(error)}): {way_out}.") from error
    if not finite:
        raise ValueError(f"{name} makes pixels that are not finite: {way_out}.")
    size = getattr(getattr(tower, "config", None), "image_size", None)
    # Without positions of its own, a tower reads images of any size; NaFlex reads rows of patches.
    learnt = any("position" in name and "relative" not in name for name, _ in tower.named_parameters())
    if pixels.ndim != 4 or size is None or not learnt:
        return
    expected = (size, size) if isinstance(size, int) else tuple(size)
    if tuple(pixels.shape[2:]) != expected:
        raise ValueError(
            f"{name} makes images of {pixels.shape[2]} x {pixels.shape[3]} pixels, but the vision tower of "
            f"{type(model).__name__} reads {expected[0]} x {expected[1]}: {way_out}."
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
