"""Tensors of an adapter: those that its file has, those that its config declares, and the difference."""

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn

from bt_hf.hub.contract import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from bt_hf.hub.patterns import check_patterns
from bt_hf.hub.peft_configs import TENSORS, shown

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

PATTERN_SECONDS = 5.0  # for all patterns of a config
_PREFIX = "base_model.model."
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
# Keys of a config that decide how tensors start; drawing them would only cost time here.
_STARTS = {"init_lora_weights": True, "init_weights": True, "init_ia3_weights": True, "inference_mode": False}
_UNUSED = ("peft_type", "runtime_config")


def file_shapes(paths: Iterable[Path]) -> dict[str, Shape]:
    """Read the shapes of all tensors in safetensors files, by name, without reading the tensors."""
    shapes: dict[str, Shape] = {}
    for path in paths:
        with safetensors.safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def adapter_shapes(path: Path, source: str) -> dict[str, Shape]:
    """Read the shapes of an adapter's tensors from the header of their file; nothing else is read or allocated.

    Args:
        path: A safetensors file.
        source: Name of the adapter in an error.

    Raises:
        ValueError: It is not a safetensors file, or has tensors that are not floating.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: found.get_dtype() for name, found in slices.items()}
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
    except Exception as error:  # the parser has its own classes
        raise ValueError(
            f"{path.name} of {source} is not a safetensors file ({shown(error)}): save the adapter again."
        ) from error
    other = next((name for name, dtype in types.items() if dtype not in _FLOATS), None)
    if other is not None:
        raise ValueError(f"{path.name} of {source} has the tensor {shown(other)} of type {types[other]}, not a float.")
    return shapes


def check_names(config: Mapping[str, Any], shapes: Shapes, source: str) -> None:
    """Check the tensors of an adapter as far as its config alone tells.

    Args:
        config: Config of the adapter.
        shapes: Shapes of its tensors, by name.
        source: Name of the adapter in an error.

    Raises:
        ValueError: A tensor is not of the adapter's type, one half of a LoRA's layer is missing, or a rank is not one
            that the config names.
    """
    kind, whole = config["peft_type"], config.get("modules_to_save") or []
    ends = TENSORS[kind]
    layers: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        layer, end = _split(name, kind)
        if layer and ends.fullmatch(end):
            layers.setdefault(layer, set()).add(end)
        elif not (name.startswith(_PREFIX) and any(part in name.split(".") or f".{part}." in name for part in whole)):
            raise ValueError(
                f"{source} has the tensor {shown(name)}, which its config does not declare: it would change the base, "
                "so it is not loaded; save the adapter again."
            )
        if any(size > 2**40 for size in shape):
            raise ValueError(f"{source} has the tensor {shown(name)} of shape {shown(shape)}: it is not loaded.")
    for layer, found in layers.items():
        for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            halves = [any(end.removesuffix(".weight") == half for end in found) for half in (one, other)]
            if halves[0] != halves[1]:
                raise ValueError(f"{source} has one half of {shown(layer)} alone ({', '.join(sorted(found))}).")
    _check_ranks(config, shapes, source)


def _split(name: str, kind: str) -> tuple[str, str]:
    """Split a tensor's name into its layer and its end; no layer if it has not the form of an adapter's name."""
    if not name.startswith(_PREFIX):
        return "", name
    parts = name.removeprefix(_PREFIX).split(".")
    for length in (1, 2):
        end = ".".join(parts[-length:])
        if len(parts) > length and TENSORS[kind].fullmatch(end):
            return ".".join(parts[:-length]), end
    return "", name


def _check_ranks(config: Mapping[str, Any], shapes: Shapes, source: str) -> None:
    """Raise a `ValueError` if the rank of a LoRA's tensors is none that its config names: PEFT could not load it."""
    if config["peft_type"] != "LORA":
        return
    ranks = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
    for name, shape in shapes.items():
        if name.endswith(".lora_A.weight") and (not shape or shape[0] not in ranks):
            named = " or ".join(map(str, sorted(ranks)[:5]))
            raise ValueError(
                f"{source} has tensors of rank {shape[0] if shape else 0}, but its {ADAPTER_CONFIG} says r = {named}: "
                "they are not of the same training; save the adapter again."
            )


def check_tensors(config: Mapping[str, Any], shapes: Shapes, model: nn.Module, source: str) -> None:
    """Raise a `ValueError` unless an adapter has exactly the tensors that its config declares for a model.

    Args:
        config: Config of the adapter, checked by `check_config`.
        shapes: Shapes of the adapter's tensors, by name.
        model: Base; it may lie on the meta device, and stays as it is.
        source: Name of the adapter in an error.

    Example:
        >>> from torch import nn
        >>> config = {"peft_type": "LORA", "r": 2, "target_modules": ["0"]}
        >>> shapes = {f"base_model.model.0.lora_{half}.weight": (2, 2) for half in "AB"}
        >>> check_tensors(config, shapes, nn.Sequential(nn.Linear(2, 2)), "me/my-taste")
    """
    check_names(config, shapes, source)
    name_of = type(model).__name__
    check_patterns(config, [name for name, _ in model.named_modules()], source, PATTERN_SECONDS)
    try:
        declared = declared_shapes(config, model)
    except Exception as error:  # PEFT raises whatever it meets on the way
        problem = shown(error)
        if "not found in the base model" in str(error):
            problem = "its target modules are not found in the base model"
        raise ValueError(f"{source} does not fit its base {name_of}: {problem}.") from error
    for problem, names in (
        ("lacks", declared.keys() - shapes.keys()),
        ("has, beside what its config declares,", shapes.keys() - declared.keys()),
    ):
        if names:
            raise ValueError(
                f"{source} {problem} {shown(min(names))}{_more(names)}: {len(declared)} tensors are declared for "
                f"{name_of}, and {ADAPTER_WEIGHTS} holds {len(shapes)}; it is not loaded. Save the adapter again, or "
                "pass the base that it was trained on."
            )
    other = next((name for name in declared if declared[name] != shapes[name]), None)
    if other is not None:
        raise ValueError(
            f"{source} does not fit its base {name_of}: size mismatch for {shown(other)}, which should be "
            f"{shown(declared[other])} there, but is {shown(shapes[other])}."
        )


def declared_shapes(config: Mapping[str, Any], model: nn.Module) -> dict[str, Shape]:
    """Return the shapes of the tensors that PEFT makes of a config for a model, by name; no memory is taken."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config["peft_type"])]
    known = {key: value for key, value in config.items() if key in cls.__dataclass_fields__ and key not in _UNUSED}
    known |= {key: value for key, value in _STARTS.items() if key in known}
    masks = known.pop("rank_pattern", None) if config["peft_type"] == "ADALORA" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: PeftConfig = cls(**known)
        with torch.device("meta"):
            adapted = get_peft_model(_skeleton(model), made, low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return _kept(shapes, masks) if masks else shapes


def _kept(shapes: dict[str, Shape], masks: Mapping[str, list[bool]]) -> dict[str, Shape]:
    """Shrink the ranks of an AdaLoRA to those that its training has kept."""
    for layer, mask in masks.items():
        for half, at in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            name = f"{_PREFIX}{layer.removesuffix('.default').rpartition('.')[0]}.{half}"
            if name not in shapes or shapes[name][at] != len(mask):
                raise ValueError(f"its `rank_pattern` has {len(mask)} ranks for {shown(layer)}, which has not as many")
            shapes[name] = (*shapes[name][:at], sum(mask), *shapes[name][at + 1 :])
    return shapes


def _skeleton(model: nn.Module) -> nn.Module:
    """Copy a model without its weights: they lie on the meta device, which has no memory."""
    memo: dict[int, Any] = {}
    for value in model.parameters():
        memo[id(value)] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"), requires_grad=False)
    memo |= {id(value): torch.empty(value.shape, dtype=value.dtype, device="meta") for value in model.buffers()}
    return copy.deepcopy(model, memo)


def _more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f" and {count} more" if count else ""
