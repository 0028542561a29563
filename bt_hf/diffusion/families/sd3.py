"""Stable Diffusion 3 and 3.5."""

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.base import Conditions, Family, Size, cast

# Attention and feed-forward layers of image and text alike: what diffusers' own FLUX script trains.
TRANSFORMER_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]
# From config/dpo.py in https://github.com/yifan123/flow_grpo, which trains SD 3.5 with the same formula of velocities.
# Not thousands, since the error of a velocity is that of the noise divided by (1 - sigma)^2, and the shift samples
# most times where that is large (sigma 0.8: 25 times). For the other flow models it is a starting point from this
# scale.
FLOW_BETA = 100.0


class StableDiffusion3(Family):
    """Family of `StableDiffusion3Pipeline`."""

    name = "stable-diffusion-3"
    denoiser = "transformer"
    beta = FLOW_BETA
    target_modules: ClassVar[str | list[str]] = TRANSFORMER_LAYERS
    optional = frozenset({"text_encoder_3", "tokenizer_3"})  # T5, left out to save memory

    @property
    def pixels_per_token(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    def interface_metadata(self) -> dict[str, str] | None:
        return {"modelspec.architecture": "stable-diffusion-3/lora"}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        # T5 may have been left out to save memory: the pipeline puts zeros in its place.
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.pipeline._execution_device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}  # (N, L, D), (N, D')

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        # T5 reads on where the CLIP encoders have to stop, for so many tokens as the pipeline gives it by default.
        if self.pipeline.text_encoder_3 is not None:
            return self.pipeline.tokenizer_3, 256
        return self.pipeline.tokenizer, self.pipeline.tokenizer_max_length

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        values = cast({"noisy": noisy, **conditions}, denoiser)
        return denoiser(
            hidden_states=values["noisy"],
            timestep=times,
            encoder_hidden_states=values["prompt_embeds"],
            pooled_projections=values["pooled_prompt_embeds"],
            return_dict=False,
        )[0].float()
