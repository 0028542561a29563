"""Stable Diffusion 1.x and 2.x, and models of the same build."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bt_hf.diffusion.families.base import Family, Size, cast, encode_latents
from bt_hf.diffusion.families.schedules import NoiseSchedule, find_schedule

# Attention and feed-forward layers of the transformers, and the convolutions of the residual blocks: style is texture,
# and much of it is drawn by the convolutions.
UNET_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut"),
]


def schedule(pipeline: Any, size: Size) -> NoiseSchedule:
    height, width = (side // pipeline.vae_scale_factor for side in size)
    return find_schedule(pipeline.scheduler, height * width)


def encode_images(pipeline: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = encode_latents(pipeline.vae, pixels)
    scale = pipeline.vae.config.scaling_factor
    return mean * scale, std * scale


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    embeds, _ = pipeline.encode_prompt(prompts, pipeline._execution_device, 1, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds}  # (N, L, D)


def longest_prompt(pipeline: Any) -> tuple[Any, int]:
    return pipeline.tokenizer, pipeline.tokenizer.model_max_length


def predict(
    denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Mapping[str, torch.Tensor], size: Size
) -> torch.Tensor:
    inputs = cast({"sample": noisy, "encoder_hidden_states": conditions["prompt_embeds"]}, denoiser)
    return denoiser(timestep=times, **inputs, return_dict=False)[0].float()


def multiple(pipeline: Any) -> int:
    # The pipelines of this build ask for 8 whatever their VAE; the UNet itself copes with odd sizes.
    return math.lcm(8, pipeline.vae_scale_factor)


def default_size(pipeline: Any) -> Size:
    sample = pipeline.unet.config.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


FAMILY = Family(
    name="stable-diffusion",
    denoiser="unet",
    # Diffusion-DPO's for SD 1.5 (https://arxiv.org/abs/2311.12908, section 5.1); the launcher of its code, which has
    # the 1/2 too, says 5000 (https://github.com/SalesforceAIResearch/DiffusionDPO).
    beta=2000.0,
    target_modules=UNET_LAYERS,
    schedule=schedule,
    encode_images=encode_images,
    encode_prompts=encode_prompts,
    longest_prompt=longest_prompt,
    predict=predict,
    multiple=multiple,
    default_size=default_size,
)
