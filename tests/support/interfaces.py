"""ComfyUI and A1111 as they read a LoRA: which weight a key belongs to, and what is added to it.

Written from the rules of ComfyUI's `comfy/lora.py` and `comfy/utils.py` (https://github.com/Comfy-Org/ComfyUI) and of
A1111's `extensions-builtin/Lora` (https://github.com/AUTOMATIC1111/stable-diffusion-webui), not from our converter.
Weights are named as in the checkpoints of Stability AI and Black Forest Labs, with the rows that a layer takes of a
weight that holds several.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

Place = tuple[str, tuple[int, int] | None]  # name of a weight; its first row and their number, or None for all

RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
DOWN, MIDDLE, UP = "input_blocks", "middle_block", "output_blocks"


# --- Layers of diffusers -> weights of the original checkpoints, as ComfyUI pairs them ---


def comfy_unet(layers: Iterable[str], layers_per_block: int) -> dict[str, Place]:
    """Blocks are counted through: a level has its residual blocks, each with a transformer or without, and then one
    that changes the size; the first block of all is the convolution at the input."""
    found = {}
    for layer in layers:
        parts = layer.split(".")
        if parts[0] == "mid_block":
            block = f"{MIDDLE}.1" if parts[1] == "attentions" else f"{MIDDLE}.{2 * int(parts[2])}"
            rest = parts[3:]
        else:
            level, kind, number = int(parts[1]), parts[2], int(parts[3])
            per_level = layers_per_block + 1
            at = 1 + level * per_level + number if parts[0] == "down_blocks" else level * per_level + number
            block = f"{DOWN if parts[0] == 'down_blocks' else UP}.{at}.{int(kind == 'attentions')}"
            rest = parts[4:]
        end = RESNET.get(rest[0], ".".join(rest))
        found[layer] = (f"{block}.{end}", None)
    return found


def comfy_flux(layers: Iterable[str], hidden: int) -> dict[str, Place]:
    """FLUX.1 and FLUX.2. Queries, keys and values are one weight; in single blocks the feed-forward layer joins it."""
    ends = {
        "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
        "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    }  # fmt: skip
    fused = {f"attn.to_{part}": ("img_attn.qkv", at) for at, part in enumerate("qkv")}
    fused |= {f"attn.add_{part}_proj": ("txt_attn.qkv", at) for at, part in enumerate("qkv")}
    alone = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "proj_out": "linear2"}
    found: dict[str, Place] = {}
    for layer in layers:
        block, number, end = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer).groups()
        if block == "single_transformer_blocks":
            to = f"single_blocks.{number}"
            if end in alone:
                found[layer] = (f"{to}.{alone[end]}", None)
            elif end.startswith("attn.to_"):
                found[layer] = (f"{to}.linear1", ("qkv".index(end[-1]) * hidden, hidden))
        else:
            to = f"double_blocks.{number}"
            if end in fused:
                found[layer] = (f"{to}.{fused[end][0]}", (fused[end][1] * hidden, hidden))
            elif end in ends:
                found[layer] = (f"{to}.{ends[end]}", None)
    return found


def comfy_sd3(layers: Iterable[str], hidden: int) -> dict[str, Place]:
    """ComfyUI takes 64 times the number of blocks for `hidden`, which is so in every SD3."""
    ends = {
        "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    }  # fmt: skip
    fused = {f"attn.to_{part}": ("x_block.attn.qkv", at) for at, part in enumerate("qkv")}
    fused |= {f"attn2.to_{part}": ("x_block.attn2.qkv", at) for at, part in enumerate("qkv")}
    fused |= {f"attn.add_{part}_proj": ("context_block.attn.qkv", at) for at, part in enumerate("qkv")}
    found: dict[str, Place] = {}
    for layer in layers:
        number, end = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer).groups()
        if end in fused:
            name, at = fused[end]
            found[layer] = (f"joint_blocks.{number}.{name}", (at * hidden, hidden))
        elif end in ends:
            found[layer] = (f"joint_blocks.{number}.{ends[end]}", None)
    return found


def comfy_qwen(layers: Iterable[str], hidden: int) -> dict[str, Place]:
    """The names of diffusers are those of the checkpoint."""
    return {layer: (layer, None) for layer in layers}


def comfy_z_image(layers: Iterable[str], hidden: int) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for layer in layers:
        block, end = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)", layer).groups()
        if end in ("attention.to_q", "attention.to_k", "attention.to_v"):
            found[layer] = (f"{block}.attention.qkv", ("qkv".index(end[-1]) * hidden, hidden))
        elif end == "attention.to_out.0":
            found[layer] = (f"{block}.attention.out", None)
        elif re.fullmatch(r"feed_forward\.w[123]", end):
            found[layer] = (f"{block}.{end}", None)
    return found


# --- What is added to a weight ---


def comfy_key(layer: str, denoiser: str) -> str:
    """UNets: kohya's name. Transformers: the name of diffusers."""
    return f"lora_unet_{layer.replace('.', '_')}" if denoiser == "unet" else f"transformer.{layer}"


def comfy_load(
    file: Mapping[str, torch.Tensor], layers: Iterable[str], denoiser: str
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return what ComfyUI adds to each layer at strength 1, (out, in * kernel), and the keys that it does not know."""
    known: set[str] = set()
    added = {}
    for layer in layers:
        key = comfy_key(layer, denoiser)
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
            if f"{key}.{up}.weight" not in file:
                continue
            one, other = file[f"{key}.{up}.weight"], file[f"{key}.{down}.weight"]
            alpha = file.get(f"{key}.alpha")
            scale = 1.0 if alpha is None else alpha.item() / other.shape[0]
            added[layer] = scale * one.flatten(1) @ other.flatten(1)
            known |= {f"{key}.{up}.weight", f"{key}.{down}.weight", f"{key}.alpha"}
            break
    return added, set(file) - known


# --- A1111 ---


def a1111_module(key: str) -> str:
    """Name of the module of a checkpoint, with underscores. It counts two residual blocks to a level."""
    convolutions = {"conv1": "in_layers_2", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"}
    sides = r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)"
    if match := re.fullmatch(sides, key):
        side, level, kind, number, end = match.groups()
        at = int(level) * 3 + int(number) + (side == "down")
        blocks = DOWN if side == "down" else UP
        end = convolutions.get(end, end) if kind == "resnets" else end
        return f"{blocks}_{at}_{int(kind == 'attentions')}_{end}"
    if match := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key):
        kind, number, end = match.groups()
        end = convolutions.get(end, end) if kind == "resnets" else end
        return f"{MIDDLE}_{1 if kind == 'attentions' else 2 * int(number)}_{end}"
    return key


def a1111_version(metadata: Mapping[str, Any]) -> str:
    """Version of Stable Diffusion under which A1111 lists a LoRA; it hides those of another version."""
    if str(metadata.get("ss_base_model_version", "")).startswith("sdxl_"):
        return "SDXL"
    if str(metadata.get("ss_v2", "")) == "True":
        return "SD2"
    return "SD1" if metadata else "Unknown"
