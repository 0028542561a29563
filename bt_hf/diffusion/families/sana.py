"""Sana."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bt_hf.diffusion.families import sd, sd3
from bt_hf.diffusion.families.base import Family, Size, cast, unwrap
from bt_hf.diffusion.families.schedules import NoiseSchedule, find_schedule

INSTRUCTION = "complex_human_instruction"


def schedule(pipeline: Any, size: Size) -> NoiseSchedule:
    stride = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    return find_schedule(pipeline.scheduler, (size[0] // stride) * (size[1] // stride))


def encode_prompts(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    # The call puts an instruction in front of every prompt; it stands there as a default, and nowhere else.
    return _encode(pipeline, prompts, inspect.signature(type(pipeline).__call__).parameters[INSTRUCTION].default)


def encode_negative(pipeline: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    # It stands in front of no negative prompt.
    return _encode(pipeline, prompts, None)


@torch.no_grad()
def _encode(pipeline: Any, prompts: list[str], instruction: list[str] | None) -> dict[str, torch.Tensor]:
    side = pipeline.tokenizer.padding_side
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        device=pipeline._execution_device,
        **{INSTRUCTION: instruction},
    )
    pipeline.tokenizer.padding_side = side  # which it changes; the names of cached files tell of it
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}  # (N, L, D), (N, L)


def longest_prompt(pipeline: Any) -> tuple[Any, int]:
    # The first of 300 tokens is that of the whole text. The instruction takes none of the others: the space that it
    # ends with becomes one token with the prompt's first word.
    return pipeline.tokenizer, 299 + len(pipeline.tokenizer("")["input_ids"])


def predict(
    denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Mapping[str, torch.Tensor], size: Size
) -> torch.Tensor:
    values = cast({"noisy": noisy, **conditions}, denoiser)
    return denoiser(
        values["noisy"],
        encoder_hidden_states=values["prompt_embeds"],
        encoder_attention_mask=values["prompt_attention_mask"],
        timestep=times * unwrap(denoiser).config.timestep_scale,
        return_dict=False,
    )[0].float()


def multiple(pipeline: Any) -> int:
    # The pipeline asks for 32 whatever its VAE.
    return math.lcm(32, pipeline.vae_scale_factor * pipeline.transformer.config.patch_size)


def default_size(pipeline: Any) -> Size:
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    return side, side


FAMILY = Family(
    name="sana",
    denoiser="transformer",
    beta=sd3.FLOW_BETA,
    # Self-attention (linear), cross-attention, and the pointwise convolutions of what stands for a feed-forward layer.
    target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"],
    schedule=schedule,
    encode_images=sd.encode_images,
    encode_prompts=encode_prompts,
    longest_prompt=longest_prompt,
    encode_negative=encode_negative,
    predict=predict,
    multiple=multiple,
    default_size=default_size,
    # Else the pipeline draws at the nearest size of a list, and resizes; and its default, the text "", would stand
    # beside the embeddings of a negative prompt.
    call_options={"use_resolution_binning": False, "negative_prompt": None},
)
