"""Digests of models, tokenizers and options, the same in every process, for the names of cache files."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

# Fields of transformers' configs that change nothing; the weights tell their dtypes.
_NOTES = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def digest(*parts: str | bytes) -> str:
    """Return 16 hexadecimal digits that tell these parts from others."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        state.update(len(content).to_bytes(8, "big") + content)
    return state.hexdigest()


def number_of(content: bytes) -> int:
    """Return a number below 2^63 that tells this content from others."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def describe(value: Any) -> Any:
    """Describe a value in JSON types, the same in every process; tensors, configs and the like by a digest or type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(one) for one in value]
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {digest(value.detach().cpu().float().numpy().tobytes())}"
    config: Any = getattr(value, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config  # models of transformers
    if isinstance(config, Mapping):  # these, and schedulers and models of diffusers
        return f"{type(value).__name__} {digest(json.dumps(_settings(config), sort_keys=True))}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def describe_tokenizer(tokenizer: Any) -> list[Any]:
    """Describe a tokenizer: its vocabulary with all rules, its truncation and padding.

    Args:
        tokenizer: A tokenizer of transformers, or a processor that has one.
    """
    template = getattr(tokenizer, "chat_template", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        # State of its last call, which every call decides anew.
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    names = ("model_max_length", "model_input_names", "padding_side", "special_tokens_map", "truncation_side")
    options = {name: describe(getattr(tokenizer, name, None)) for name in names}
    return [type(tokenizer).__name__, digest(json.dumps(rules, sort_keys=True)), options, describe(template)]


def _settings(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop a config's notes on saving and loading, since those of diffusers differ in each process."""
    return {
        str(key): _settings(value) if isinstance(value, Mapping) else describe(value)
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _NOTES
    }


def digest_weights(values: Iterable[Any]) -> str:
    """Digest the modules among values: 16 numbers of each tensor, and the strength of each adapter.

    A name does not tell what was trained into a pipeline, or which LoRA was loaded into it. Reading all of T5-XXL
    would take minutes, and a fine-tuned model differs in every tensor.
    """
    parts: list[str | bytes] = []
    for module in values:
        if not isinstance(module, nn.Module):
            continue
        # Buffers that are saved count too: FLUX.2's VAE has the statistics of its latents in them.
        for name, tensor in module.state_dict().items():
            parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
            if not tensor.is_meta:
                step = max(1, tensor.numel() // 16)
                parts.append(tensor.flatten()[::step].cpu().float().numpy().tobytes())
        for name, child in module.named_modules():
            scaling = getattr(child, "scaling", None)
            if isinstance(scaling, dict):
                active = getattr(child, "active_adapters", []), getattr(child, "disable_adapters", False)
                parts.append(f"{name} {scaling} {active}")
    return digest(*parts)
