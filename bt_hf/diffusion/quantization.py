"""Quantised bases: read the option, and let diffusers load the denoiser by it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Backends by their names in diffusers, each with the settings that people train LoRAs beside.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bitsandbytes_4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes_8bit": {"load_in_8bit": True},
    "torchao": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    },
}


def read_quantization(option: Any) -> dict[str, Any]:
    """Read a quantisation config of diffusers.

    Args:
        option: Name of a backend in `DEFAULTS`; a config of diffusers, such as `BitsAndBytesConfig`; or its values as
            a dictionary, as JSON, or as the path of a JSON file. The keys are those of `quantization_config` in the
            `config.json` of a quantised model. Those of bitsandbytes need no `quant_method`, as in
            `--bnb_quantization_config_path` of the scripts of diffusers.

    Returns:
        Values that JSON can hold.

    Raises:
        ValueError: It is none of them.

    Example:
        >>> read_quantization("bitsandbytes_4bit")
        {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'}
    """
    if isinstance(option, str) and option in DEFAULTS:
        return dict(DEFAULTS[option])
    values = option.to_dict() if hasattr(option, "to_dict") else option
    try:
        if isinstance(values, str | Path):
            text = str(values) if str(values).lstrip().startswith("{") else Path(values).read_text()
        else:
            text = json.dumps(values)  # configs name their backend by an enum
        values = json.loads(text)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"`quantization_config` should be {', '.join(DEFAULTS)}, a quantisation config of diffusers, its values, "
            f"or the path of a JSON file with them, but got {option!r} ({error})."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"`quantization_config` should be a JSON object, but got {option!r}.")
    return values


def model_quantization(values: Mapping[str, Any], dtype: str) -> Any:
    """Return the config with which diffusers quantises a model as it loads it, such as a `BitsAndBytesConfig`.

    Args:
        values: As `read_quantization` gives them.
        dtype: Numbers of all that is not quantised. bitsandbytes computes in it unless it is told otherwise.

    Raises:
        ImportError: The backend is not installed.
        ValueError: The backend does not take these values.
    """
    from diffusers.quantizers.auto import DiffusersAutoQuantizer  # an optional dependency

    values = dict(values)
    if values.get("load_in_4bit"):
        values.setdefault("bnb_4bit_compute_dtype", dtype)
    method = values.get("quant_method") or "bitsandbytes"
    try:
        return DiffusersAutoQuantizer.from_dict(values)
    except ImportError as error:
        raise ImportError(f"`quantization_config` asks for {method}: install it (`pip install {method}`).") from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`quantization_config` is not one that diffusers takes ({' '.join(str(error).split())}): give "
            f"{', '.join(DEFAULTS)}, or the `quantization_config` in the config.json of a quantised model."
        ) from error


def is_quantized(model: nn.Module) -> bool:
    """Return True if diffusers or transformers have loaded a model with a quantisation config."""
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None


def describe_quantization(model: nn.Module) -> str | None:
    """Return backend and bits of a quantised model in words, for the card; `None` for any other."""
    if not is_quantized(model):
        return None
    method = getattr(model, "quantization_method", None)
    bits = next((f", {bits} bits" for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), "")
    return f"{getattr(method, 'value', method)}{bits}"


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module, unless it is there: bitsandbytes refuses to move one of 8 bits even to where it is."""
    if next(module.parameters()).device != device:
        module.to(device)


def check_unsharded(model: nn.Module, sharded: bool) -> None:
    """Raise a `ValueError` if a quantised model's weights are to be divided among processes."""
    if sharded and is_quantized(model):
        raise ValueError(
            "A quantised denoiser can't be divided by FSDP or DeepSpeed, which know nothing of packed weights: train "
            "without them (each process then holds all of it), or load it without quantisation (`dtype='bfloat16'`)."
        )
