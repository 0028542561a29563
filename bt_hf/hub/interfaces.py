"""LoRA for ComfyUI, A1111 and Forge: names, scales and metadata of the file that they read.

Of a UNet they read the names of kohya's sd-scripts, with an alpha beside each layer; it is the same for all layers,
since diffusers, which reads the file too, loses the alphas of attention layers where they differ. Of a transformer
they read the names of diffusers, in which alpha has no place that all of them know. The weights hold whatever alpha
can't say.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from peft.utils.other import get_pattern_key

from bt_hf.hub.contract import Content, read_content, weights_metadata

BASE = "ss_sd_model_name"  # kohya's key for the base
_PREFIX = "base_model.model."
_HALF = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


def interface_name(run: str) -> str:
    """Return the file name for a run: "<run>_comfyui.safetensors", in letters that every system takes.

    Example:
        >>> interface_name("my taste")
        'my-taste_comfyui.safetensors'
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", run).strip("-._")[:96]
    return f"{plain or 'taste'}_comfyui.safetensors"


def is_plain(config: Mapping[str, Any]) -> bool:
    """True if the config of an adapter is that of a LoRA without DoRA or biases, which all interfaces read alike."""
    return config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("lora_bias")


def interface_tensors(
    adapter: Mapping[str, torch.Tensor], config: Mapping[str, Any], denoiser: str
) -> dict[str, torch.Tensor]:
    """Rename and scale the tensors of a LoRA.

    Key rules: `model_lora_keys_unet` in https://github.com/Comfy-Org/ComfyUI/blob/master/comfy/lora.py, and
    `convert_state_dict_to_kohya` of diffusers, which takes alpha for the rank.

    Args:
        adapter: Tensors as PEFT saves them.
        config: Config of the adapter, see `is_plain`.
        denoiser: "unet" or "transformer".

    Raises:
        ValueError: A tensor is not half of a LoRA's layer.

    Example:
        >>> import torch
        >>> halves = {f"base_model.model.to_q.lora_{half}.weight": torch.eye(2) for half in "AB"}
        >>> found = interface_tensors(halves, {"r": 2, "lora_alpha": 6}, "unet")
        >>> {name: value.tolist() for name, value in found.items() if name.endswith("alpha")}
        {'lora_unet_to_q.alpha': 6.0}
    """
    found: dict[str, torch.Tensor] = {}
    shared = _alpha(config, "", int(config.get("r", 8))) or 1.0
    for name, value in adapter.items():
        match = _HALF.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise ValueError(f"{name!r} is not half of a LoRA's layer, which alone ComfyUI, A1111 and Forge read.")
        layer, down = match["layer"], match["half"] == "A"
        rank = value.shape[0 if down else 1]
        told = shared if denoiser == "unet" else rank
        scaled = value if down else value * (_alpha(config, layer, rank) / told)
        if denoiser == "unet":
            kohya = f"lora_unet_{layer.replace('.', '_')}"
            found[f"{kohya}.lora_{'down' if down else 'up'}.weight"] = scaled.contiguous()
            found[f"{kohya}.alpha"] = torch.tensor(shared)
        else:
            found[f"{denoiser}.{layer}.lora_{match['half']}.weight"] = scaled.contiguous()
    return found


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the number that is divided by the rank of a layer ("" for the others), to give its scale."""
    pattern = config.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), layer), config.get("lora_alpha", 8)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def interface_file(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    run: str,
    base: str | None,
    further: Mapping[str, str],
) -> bytes:
    """Return the safetensors file, the same bytes for the same LoRA.

    Args:
        tensors: Those of `interface_tensors`.
        config: Config of the adapter.
        run: Name of the run, by which A1111 lists the LoRA.
        base: Hub id of the base; `None` if it has none.
        further: Metadata of the family: the architecture by which interfaces sort LoRAs.
    """
    rank = int(config.get("r", 8))
    varied = config.get("rank_pattern")
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic" if varied else str(rank),  # as kohya's scripts say it
        "ss_network_alpha": "Dynamic" if varied else f"{_alpha(config, '', rank):g}",
        "ss_output_name": run,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run,
        "modelspec.usage_hint": "Write prompts as ever: there is no trigger word.",
        **further,
    }
    return _serialized(tensors, metadata | ({BASE: base} if base else {}))


def with_named_base(content: Content, base: str) -> Content:
    """Write the Hub id of the base into the file's metadata, unless it stands there."""
    data = read_content(content)
    metadata = weights_metadata(data)
    if metadata.get(BASE) == base:
        return content
    return _serialized(safetensors.torch.load(data), {**metadata, BASE: base})


def _serialized(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Serialize tensors with sorted metadata, whose order safetensors leaves to chance."""
    data = safetensors.torch.save(dict(tensors), metadata={"format": "pt", **metadata})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]
