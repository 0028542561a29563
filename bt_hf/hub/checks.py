"""Checks of a published adapter: finite weights, their ranks, their fit with the base, hashes, and the card."""

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from bt_hf.hub.card_sections import read_card
from bt_hf.hub.contract import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    INTERFACE_WEIGHTS,
    LORA_WEIGHTS,
    Content,
    read_content,
    weights_metadata,
)
from bt_hf.hub.interfaces import interface_tensors, is_plain
from bt_hf.hub.patterns import check_patterns
from bt_hf.hub.peft_configs import check_config, read_config, shown
from bt_hf.hub.tensors import Shapes, check_names

DENOISERS = ("unet", "transformer")
# Keys that diffusers' copy of a config has for itself.
_OWN_KEYS = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "task_type"})
_PLACEHOLDER = re.compile(r"\[?More Information Needed\]?", re.IGNORECASE)
# Parts of the tensor names of an adapter of a dual encoder.
_DUAL_ENCODER = ("text_model", "vision_model", "text_projection", "visual_projection")


def check_weights(files: Mapping[str, Content], kind: str, source: str) -> dict[str, tuple[int, ...]]:
    """Load all weights and check them.

    Args:
        files: Files of the folder contract, by name.
        kind: A key of `contract.KINDS`.
        source: Name of the adapter in an error.

    Returns:
        Shapes of the adapter's tensors, by name.

    Raises:
        ValueError: A file is not safetensors, has no tensors, or one that is not finite; the adapter is for another
            kind of model than its repo; or the files are not of one training.
    """
    loaded = {
        name: _load_finite(name, content, source) for name, content in files.items() if name.endswith(".safetensors")
    }
    adapter = loaded.get(ADAPTER_WEIGHTS, {})
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter.items()}
    if kind == "lora":
        _check_same_training(adapter, loaded[LORA_WEIGHTS], source)
        config = read_config(files[ADAPTER_CONFIG], source)
        check_lora_metadata(config, files[LORA_WEIGHTS], source)
        denoiser = next(iter(loaded[LORA_WEIGHTS])).partition(".")[0]
        for name in filter(INTERFACE_WEIGHTS.fullmatch, loaded):
            _check_interfaces(name, loaded[name], adapter, config, denoiser, source)
    if kind == "reward" and not any(part in key for key in shapes for part in _DUAL_ENCODER):
        raise ValueError(
            f"{source} is an adapter for another kind of model: its tensors ({next(iter(shapes))}, ...) are not those "
            "of a dual encoder such as CLIP, and it has no "
            f"{LORA_WEIGHTS} as a preference LoRA has."
        )
    if kind != "model":
        check_names(read_config(files[ADAPTER_CONFIG], source), shapes, source)
    return shapes


def _load_finite(name: str, content: Content, source: str) -> dict[str, torch.Tensor]:
    """Load a safetensors file, or raise a `ValueError` if it is damaged, empty or not finite."""
    try:
        tensors = safetensors.torch.load(read_content(content))
    except Exception as error:
        raise ValueError(
            f"{name} of {source} is not a safetensors file ({_first_line(error)}): save the adapter again."
        ) from error
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if broken or not tensors:
        problem = f"values that are not finite in {broken[0]}" if broken else "no tensors"
        raise ValueError(f"{name} of {source} has {problem}: it was cut or diverged; train again, or go back.")
    return tensors


def check_same_lora(adapter: Content, lora: Content, source: str) -> None:
    """Raise a `ValueError` unless PEFT's and diffusers' copies of a LoRA hold the same.

    Args:
        adapter: The file that PEFT reads.
        lora: The file that diffusers reads.
        source: Name of the LoRA in an error.
    """
    _check_same_training(
        _load_finite(ADAPTER_WEIGHTS, adapter, source), _load_finite(LORA_WEIGHTS, lora, source), source
    )


def _check_same_training(adapter: Mapping[str, torch.Tensor], lora: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise a `ValueError` if PEFT's and diffusers' copies of a LoRA differ."""
    # diffusers prefixes each name with that of the denoiser, PEFT with that of its own wrapper.
    theirs = {key.partition(".")[2]: tensor for key, tensor in lora.items()}
    ours = {key.removeprefix("base_model.model."): tensor for key, tensor in adapter.items()}
    prefixes = {key.partition(".")[0] for key in lora}
    other = ours.keys() ^ theirs.keys()
    if other or not prefixes <= set(DENOISERS) or len(prefixes) != 1 or len(theirs) != len(lora):
        name = shown(min(other or prefixes))
        raise ValueError(
            f"{ADAPTER_WEIGHTS} and {LORA_WEIGHTS} of {source} have different tensors ({name} is in one alone): save "
            "the LoRA again."
        )
    if not all(torch.equal(ours[key], theirs[key]) for key in ours):
        raise ValueError(
            f"{ADAPTER_WEIGHTS} and {LORA_WEIGHTS} of {source} are not of the same training: save the LoRA again."
        )


def _check_interfaces(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    adapter: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    denoiser: str,
    source: str,
) -> None:
    """Raise a `ValueError` unless the file for ComfyUI, A1111 and Forge is what the LoRA is converted to."""
    expected: Mapping[str, torch.Tensor] = {}
    if is_plain(config):
        layers = sorted({key.removeprefix("base_model.model.").partition(".lora_")[0] for key in adapter})
        check_patterns(config, layers, source)
        expected = interface_tensors(adapter, config, denoiser)
    if expected.keys() != tensors.keys() or not all(torch.equal(expected[key], tensors[key]) for key in expected):
        raise ValueError(
            f"{name} of {source} is not of the same training as {ADAPTER_WEIGHTS}: take it out, or save again."
        )


def check_lora_metadata(config: Mapping[str, Any], lora: Content, source: str) -> None:
    """Raise a `ValueError` if the config that diffusers reads from a LoRA's file is not PEFT's.

    Args:
        config: PEFT's config.
        lora: The file that diffusers reads.
        source: Name of the LoRA in an error.
    """
    try:
        told = json.loads(weights_metadata(lora).get("lora_adapter_metadata", "{}"))
        inner = {key.partition(".")[2]: value for key, value in told.items()}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{LORA_WEIGHTS} of {source} has metadata that can't be read ({shown(error)}).") from error
    check_config({**config, **inner, "peft_type": config["peft_type"]}, f"{LORA_WEIGHTS} of {source}")
    other = [
        key for key, value in inner.items() if key not in _OWN_KEYS and _sorted(value) != _sorted(config.get(key))
    ]
    if other and any(inner[key] not in (None, False, {}, []) or config.get(key) for key in other):
        raise ValueError(
            f"{LORA_WEIGHTS} of {source} has `{other[0]}` = {shown(inner[other[0]])}, but {ADAPTER_CONFIG} says "
            f"{shown(config.get(other[0]))}: save the LoRA again."
        )


def _sorted(value: Any) -> Any:
    """Order a list, whose order PEFT does not keep."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def check_fit(adapter: Shapes, base: Shapes, source: str, base_name: str) -> None:
    """Raise a `ValueError` if the tensors of a LoRA do not fit the weights of its base.

    Args:
        adapter: Shapes of the LoRA's tensors, by name.
        base: Shapes of the base's weights, by name. Nothing is checked if it is empty, as for a base without
            safetensors.
        source: Name of the adapter in an error.
        base_name: Name of the base in an error.
    """
    found = not base
    ends = {name: shape for name, shape in base.items() if name.endswith("weight")}
    for name, shape in adapter.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if match is None:
            continue
        # A checkpoint may prefix the names of its layers where the loaded model does not, or the other way round.
        weight = f"{match[1]}.weight"
        expected = ends.get(weight) or next(
            (size for key, size in ends.items() if key.endswith(f".{weight}") or weight.endswith(f".{key}")), None
        )
        if expected is None:
            continue
        found = True
        ours, theirs = (shape[1:], expected[1:]) if match[2] == "A" else (shape[:1], expected[:1])
        if ours != theirs:
            raise ValueError(
                f"{source} does not fit its base {base_name}: {match[1]} is {_by(expected)} there, but the adapter "
                f"was made for {'inputs' if match[2] == 'A' else 'outputs'} of {_by(ours)}. Name the base that it was "
                "trained on."
            )
    if not found and any(".lora_A." in name for name in adapter):
        raise ValueError(
            f"{source} does not fit its base {base_name}, which has none of the layers that the adapter changes. Name "
            "the base that it was trained on."
        )


def check_card(text: str) -> None:
    """Raise a `ValueError` if a card has placeholders, or metadata that huggingface_hub can't read."""
    if found := _PLACEHOLDER.search(text):
        raise ValueError(f'{CARD} says "{found[0]}": write what there is to say, or take the line out.')
    data = read_card(text).data
    for name in ("tags", "datasets", "language"):
        value = getattr(data, name, None)
        if value is not None and not isinstance(value, list | str):
            raise ValueError(f"{CARD} has {name}: {value!r} in its metadata, but it should be a list of names.")


def expected_hash(sibling: RepoSibling) -> str | None:
    """Return the hash that the Hub announces for a file: SHA-256 of a large one, git's SHA-1 of a small one."""
    return sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id


def content_hash(content: Content, like: str | None) -> str:
    """Compute a file's hash, of the same kind as the hash `like`."""
    if like is None or len(like) != 64:
        return git_hash(read_content(content))
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        return sha_fileobj(file).hex()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
