"""Wan 2.1 and Wan 2.2 TI2V-5B: short clips, or single frames."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.base import Conditions, Family, Size, cast, encode_latents, unwrap
from bt_hf.diffusion.families.sd3 import FLOW_BETA

LONGEST = 512  # tokens that the pipeline reads by default
# Words in the names of models that were distilled to draw in few steps; their configs are those of Wan.
_DISTILLED = ("fastwan", "distill", "causvid", "lightning", "turbo")


class Wan(Family):
    """Family of `WanPipeline`.

    Latents are (N, C * f, h, w): the f latent frames of a clip stand beside its channels, as they do in no other
    family, so that noise, errors and cached files need not know of time.
    """

    name = "wan"
    denoiser = "transformer"
    beta = FLOW_BETA
    # Attention to the clip and to the text, and feed-forward layers.
    target_modules = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    task = "text-to-video"

    @property
    def call_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {"num_frames": self.frames, "output_type": "pil"}

    # --- Sizes ---

    @property
    def stride(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    @property
    def pixels_per_token(self) -> int:
        return self.stride * self.module.config.patch_size[1]

    @property
    def multiple(self) -> int:
        return math.lcm(16, self.pixels_per_token)  # the pipeline asks for 16 whatever its VAE

    @property
    def default_size(self) -> Size:
        # The pipeline's own, which stands in none of its configs.
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return parameters["height"].default, parameters["width"].default

    def train_on_clips(self, frames: int) -> None:
        stride = self.pipeline.vae_scale_factor_temporal
        if frames % stride != 1:
            raise ValueError(
                f"`num_frames` should be 1, {stride + 1}, {2 * stride + 1}, ... for {type(self.pipeline).__name__}, "
                f"whose VAE reads {stride} frames at a time after the first, but got {frames}: take "
                f"{max(round((frames - 1) / stride), 0) * stride + 1}, for example."
            )
        self.frames = frames

    # --- Clips and prompts ---

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clips = pixels[:, :, None] if pixels.ndim == 4 else pixels
        # One clip at a time: a VAE of videos takes gigabytes for each.
        found = [encode_latents(self.pipeline.vae, clip) for clip in clips.split(1)]
        mean, std = (torch.cat(values) for values in zip(*found, strict=True))  # (N, C, f, h, w)
        config = self.pipeline.vae.config
        shift, scale = (
            mean.new_tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std)
        )
        return ((mean - shift) / scale).flatten(1, 2), (std / scale).flatten(1, 2)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=LONGEST,
            device=self.pipeline._execution_device,
        )
        return {"prompt_embeds": embeds}  # (N, L, D), zero after the prompt's end

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        return self.pipeline.tokenizer, LONGEST

    def images_of(self, output: Any) -> list[Image.Image]:
        return [clip[len(clip) // 2] for clip in output.frames]

    # --- The denoiser ---

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        values = cast({"noisy": noisy, **conditions}, denoiser)
        predicted = denoiser(
            values["noisy"].unflatten(1, (unwrap(denoiser).config.in_channels, -1)),  # (N, C, f, h, w)
            timestep=times,
            encoder_hidden_states=values["prompt_embeds"],
            return_dict=False,
        )[0]
        return predicted.flatten(1, 2).float()

    # --- Checks ---

    def check(self) -> None:
        if self.pipeline.config.get("boundary_ratio") is not None or self.pipeline.transformer_2 is not None:
            raise ValueError(
                "Wan 2.2 A14B hands over from one transformer to another on the way (`boundary_ratio`), and each "
                "would need a LoRA of its own, which is not supported: train on Wan 2.2 TI2V-5B or Wan 2.1."
            )
        super().check()

    def advice_if_distilled(self) -> str | None:
        names = (self.pipeline.config.get("_name_or_path"), self.module.config.get("_name_or_path"))
        if any(word in Path(str(name or "")).name.lower() for name in names for word in _DISTILLED):
            return "Train on the Wan that it comes from: the LoRA loads into both."
        return None
