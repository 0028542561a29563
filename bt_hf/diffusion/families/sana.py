"""Sana."""

import inspect
import math
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.base import Conditions, Family, Size, cast, unwrap
from bt_hf.diffusion.families.sd3 import FLOW_BETA

INSTRUCTION = "complex_human_instruction"


class Sana(Family):
    """Family of `SanaPipeline`."""

    name = "sana"
    denoiser = "transformer"
    beta = FLOW_BETA
    # Self-attention (linear), cross-attention, and the pointwise convolutions of what stands for a feed-forward layer.
    target_modules = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
    # Else the pipeline draws at the nearest size of a list, and resizes; and its default, the text "", would stand
    # beside the embeddings of a negative prompt.
    call_options = MappingProxyType({"use_resolution_binning": False, "negative_prompt": None})

    @property
    def pixels_per_token(self) -> int:
        return self.pipeline.vae_scale_factor * self.module.config.patch_size

    @property
    def multiple(self) -> int:
        return math.lcm(32, self.pixels_per_token)  # the pipeline asks for 32 whatever its VAE

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        # The call puts an instruction in front of every prompt; it stands there as a default, and nowhere else.
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return self._encode(prompts, parameters[INSTRUCTION].default)

    def encode_negative(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return self._encode(prompts, None)  # without the instruction, as the call does

    @torch.no_grad()
    def _encode(self, prompts: list[str], instruction: list[str] | None) -> dict[str, torch.Tensor]:
        tokenizer = self.pipeline.tokenizer
        side = tokenizer.padding_side
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.pipeline._execution_device,
            **{INSTRUCTION: instruction},
        )
        tokenizer.padding_side = side  # undo its change; the names of cached files tell of the side
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}  # (N, L, D), (N, L)

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        # The first of 300 tokens is that of the whole text. The instruction takes none of the others: the space that
        # it ends with becomes one token with the prompt's first word.
        tokenizer = self.pipeline.tokenizer
        return tokenizer, 299 + len(tokenizer("")["input_ids"])

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        values = cast({"noisy": noisy, **conditions}, denoiser)
        return denoiser(
            values["noisy"],
            encoder_hidden_states=values["prompt_embeds"],
            encoder_attention_mask=values["prompt_attention_mask"],
            timestep=times * unwrap(denoiser).config.timestep_scale,
            return_dict=False,
        )[0].float()
