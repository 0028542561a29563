"""Stable Diffusion XL, and models of the same build."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bt_hf.diffusion.families import sd
from bt_hf.diffusion.families.base import Size, cast, encode_latents


def encode_images(pipeline: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = encode_latents(pipeline.vae, pixels)
    config = pipeline.vae.config
    scale: float | torch.Tensor = config.scaling_factor
    # Playground v2.5 standardises each channel; SDXL itself has one scale.
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean = mean - mean.new_tensor(config.latents_mean).view(1, -1, 1, 1)
        scale = scale / mean.new_tensor(config.latents_std).view(1, -1, 1, 1)
    return mean * scale, std * scale


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}  # (N, L, D), (N, D')


def encode_negative(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    values = encode_prompts(pipeline, prompts)
    if not pipeline.config.force_zeros_for_empty_prompt:
        return values
    # SDXL guides away from zeros, and not from the embeddings of an empty text.
    return {name: torch.zeros_like(value) for name, value in values.items()}


def predict(
    denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Mapping[str, torch.Tensor], size: Size
) -> torch.Tensor:
    values = cast({"noisy": noisy, **conditions}, denoiser)
    # Original size, top left corner of the crop, target size: as the pipeline says of an image that it draws.
    time_ids = values["noisy"].new_tensor([*size, 0, 0, *size]).expand(len(noisy), -1)  # (N, 6)
    return denoiser(
        values["noisy"],
        times,
        encoder_hidden_states=values["prompt_embeds"],
        added_cond_kwargs={"text_embeds": values["pooled_prompt_embeds"], "time_ids": time_ids},
        return_dict=False,
    )[0].float()


FAMILY = replace(
    sd.FAMILY,
    name="stable-diffusion-xl",
    # Diffusion-DPO's for SDXL (https://arxiv.org/abs/2311.12908, section 5.1), and what the launcher of its code says.
    beta=5000.0,
    encode_images=encode_images,
    encode_prompts=encode_prompts,
    encode_negative=encode_negative,
    predict=predict,
)
