"""Digests of models, tokenizers and options, the same in every process, for the names of cache files."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
    """Describe a value in JSON types, the same in every process; tensors, images, configs and the like by a digest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(describe(one)) for one in value)
    if isinstance(value, torch.Tensor):
        return f"tensor {_digest_tensor(value)}"
    if isinstance(value, (bytes, bytearray)):
        return f"bytes {digest(bytes(value))}"
    if isinstance(value, (np.ndarray, Image.Image)):
        array = np.asarray(value)
        content = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        return f"{type(value).__name__} {array.dtype} {array.shape} {digest(content)}"
    config: Any = getattr(value, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config  # models of transformers
    if isinstance(config, Mapping):  # these, and schedulers and models of diffusers
        return f"{type(value).__name__} {digest(json.dumps(_settings(config), sort_keys=True))}"
    if (name := getattr(value, "__qualname__", None)) is not None:  # functions and classes
        return name
    text = repr(value)  # dtypes, devices, enumerations, paths; not what names its place in memory
    return type(value).__qualname__ if " at 0x" in text else text


def describe_tokenizer(tokenizer: Any) -> list[Any]:
    """Describe a tokenizer: its vocabulary with all rules, its truncation and padding.

    Args:
        tokenizer: A tokenizer of transformers, or a processor that has one.
    """
    template = getattr(tokenizer, "chat_template", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = _files_of(tokenizer) if backend is None else json.loads(backend.to_str())
    if backend is not None:
        # State of its last call, which every call decides anew.
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    names = (
        *("model_max_length", "model_input_names", "padding_side", "special_tokens_map", "truncation_side"),
        *("split_special_tokens", "added_tokens_decoder"),
    )
    options = {name: describe(getattr(tokenizer, name, None)) for name in names}
    return [type(tokenizer).__name__, digest(json.dumps(rules, sort_keys=True)), options, describe(template)]


def tokenize_plainly(tokenizer: Any, texts: list[str], limit: int | None = None) -> list[list[int]]:
    """Return the tokens of each text without padding: texts of the same tokens are one to a model.

    Args:
        tokenizer: A tokenizer of transformers, or a processor that has one.
        texts: At least one text.
        limit: Tokens that the model reads. Default: all.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return tokenizer(texts, truncation=limit is not None, max_length=limit, padding=False, verbose=False)["input_ids"]


def _settings(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop a config's notes on saving and loading, since those of diffusers differ in each process."""
    return {
        str(key): _settings(value) if isinstance(value, Mapping) else describe(value)
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _NOTES
    }


def _files_of(tokenizer: Any) -> dict[str, str]:
    """Digest the files of a tokenizer that is written in Python: its vocabulary doesn't tell its merges."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        files = {file.name: digest(file.read_bytes()) for file in sorted(Path(folder).iterdir())}
        return {"vocabulary": digest(json.dumps(tokenizer.get_vocab(), sort_keys=True)), **files}


def digest_weights(values: Iterable[Any]) -> str:
    """Digest the modules among values: every byte of their weights and buffers, and the state of their adapters.

    A name does not tell what was trained into a pipeline, or which LoRA was loaded into it, and a textual inversion
    changes one row of one tensor. Reads some gigabytes a second, several tensors at a time.
    """
    parts: list[str | bytes] = []
    tensors: list[torch.Tensor] = []
    for module in values:
        if not isinstance(module, nn.Module):
            continue
        # Buffers that are saved count too, as FLUX.2's VAE has the statistics of its latents in them; and those that
        # aren't, as rotary frequencies.
        for name, tensor in {**module.state_dict(), **dict(module.named_buffers())}.items():
            if isinstance(tensor, torch.Tensor):
                parts.append(name)
                tensors.append(_loaded(module, name, tensor))
            else:
                parts.append(f"{name} {describe(tensor)}")  # extra state
        for name, child in module.named_modules():
            if isinstance(scaling := getattr(child, "scaling", None), dict) or hasattr(child, "disable_adapters"):
                active = getattr(child, "active_adapters", []), getattr(child, "disable_adapters", False)
                parts.append(f"{name} {scaling} {active} {getattr(child, 'merged_adapters', [])}")
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock; more would hold more copies off the GPU
        parts += pool.map(_digest_tensor, tensors)
    return digest(*parts)


def _loaded(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values where `accelerate` has offloaded them and left an empty one in its place."""
    if not tensor.is_meta:
        return tensor
    owner, _, leaf = name.rpartition(".")
    hook = getattr(module.get_submodule(owner), "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return torch.as_tensor(weights[leaf])
    return tensor


def _digest_tensor(tensor: torch.Tensor) -> str:
    """Digest a tensor of any kind, whole: its type, shape and bytes, or those of the tensors that it is made of."""
    kind = f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}"
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, DTensor and other subclasses
        names, context = tensor.__tensor_flatten__()
        return digest(kind, repr(describe(context)), *(_digest_tensor(getattr(tensor, name)) for name in names))
    if tensor.is_meta:
        return digest(kind, "empty")
    if tensor.is_quantized:
        return digest(kind, _digest_tensor(tensor.int_repr()), _quantisation(tensor))
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return digest(kind, hashlib.sha256(content.data).digest())


def _quantisation(tensor: torch.Tensor) -> str:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return repr((tensor.q_scale(), tensor.q_zero_point()))
    return digest(_digest_tensor(tensor.q_per_channel_scales()), _digest_tensor(tensor.q_per_channel_zero_points()))
