"""Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bt_hf.diffusion.families.base import Family, Size, cast, encode_latents
from bt_hf.diffusion.families.schedules import NoiseSchedule, find_schedule

# Attention and feed-forward layers of both streams, image and text: what diffusers' own FLUX script trains.
TRANSFORMER_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]
# Of config/dpo.py in https://github.com/yifan123/flow_grpo, which trains SD 3.5 with the same formula of velocities.
# Not thousands, since the error of a velocity is that of the noise divided by (1 - sigma)^2, and the shift draws most
# times where that is large (sigma 0.8: 25 times). For the other flow models it is a starting point from this scale.
FLOW_BETA = 100.0


def schedule(pipeline: Any, size: Size) -> NoiseSchedule:
    height, width = (side // multiple(pipeline) for side in size)
    return find_schedule(pipeline.scheduler, height * width)


def encode_images(pipeline: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = encode_latents(pipeline.vae, pixels)
    config = pipeline.vae.config
    return (mean - config.shift_factor) * config.scaling_factor, std * config.scaling_factor


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    # T5 may have been left out to save memory: the pipeline puts zeros in its place.
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=pipeline._execution_device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}  # (N, L, D), (N, D')


def longest_prompt(pipeline: Any) -> tuple[Any, int]:
    # T5 reads on where the CLIP encoders have to stop, for so many tokens as the pipeline gives it by default.
    if pipeline.text_encoder_3 is not None:
        return pipeline.tokenizer_3, 256
    return pipeline.tokenizer, pipeline.tokenizer_max_length


def predict(
    denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Mapping[str, torch.Tensor], size: Size
) -> torch.Tensor:
    values = cast({"noisy": noisy, **conditions}, denoiser)
    return denoiser(
        hidden_states=values["noisy"],
        timestep=times,
        encoder_hidden_states=values["prompt_embeds"],
        pooled_projections=values["pooled_prompt_embeds"],
        return_dict=False,
    )[0].float()


def multiple(pipeline: Any) -> int:
    return pipeline.vae_scale_factor * pipeline.patch_size


def default_size(pipeline: Any) -> Size:
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    return side, side


FAMILY = Family(
    name="stable-diffusion-3",
    denoiser="transformer",
    beta=FLOW_BETA,
    target_modules=TRANSFORMER_LAYERS,
    schedule=schedule,
    encode_images=encode_images,
    encode_prompts=encode_prompts,
    longest_prompt=longest_prompt,
    predict=predict,
    multiple=multiple,
    default_size=default_size,
)
