"""Z-Image; not Z-Image-Turbo, which was distilled to draw in few steps."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.base import Conditions, Family, Size, cast
from bt_hf.diffusion.families.sd3 import FLOW_BETA

LONGEST = 512  # tokens that the pipeline reads by default


class ZImage(Family):
    """Family of `ZImagePipeline`."""

    name = "z-image"
    denoiser = "transformer"
    beta = FLOW_BETA
    # Attention and feed-forward layers, which image and text share, and those of the two refiners.
    target_modules = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]

    @property
    def pixels_per_token(self) -> int:
        return self.pipeline.vae_scale_factor * 2  # patches of 2 x 2

    @property
    def default_size(self) -> Size:
        return 1024, 1024  # the pipeline's, which stands in none of its configs

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        # The pipeline writes its chat into the list that it is given.
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.pipeline._execution_device, do_classifier_free_guidance=False
        )
        lengths = torch.tensor([len(rows) for rows in embeds], device=embeds[0].device)
        blank = embeds[0].new_zeros(LONGEST, embeds[0].shape[1])
        padded = pad_sequence([*embeds, blank], batch_first=True)[:-1]
        mask = torch.arange(LONGEST, device=lengths.device) < lengths[:, None]
        return {"prompt_embeds": padded, "prompt_embeds_mask": mask}  # (N, L, D), (N, L)

    def call_arguments(self, conditions: Conditions) -> dict[str, Any]:
        return {"prompt_embeds": _without_padding(conditions)}

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        # The chat around a prompt takes some of the tokens.
        tokenizer = self.pipeline.tokenizer
        messages = [{"role": "user", "content": ""}]
        around = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return tokenizer, LONGEST - len(tokenizer(around)["input_ids"])

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        values = cast({"noisy": noisy, **conditions}, denoiser)
        # Time runs from noise to image, and so does the velocity.
        predicted = denoiser(
            list(values["noisy"].unsqueeze(2)),  # one frame each
            (1000 - times) / 1000,
            _without_padding(values),
            return_dict=False,
        )[0]
        return -torch.stack(list(predicted)).squeeze(2).float()

    def guides(self, scale: float) -> bool:
        return scale > 0

    def guide(self, prediction: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        return prediction + scale * (prediction - negative)  # its 1 is everybody else's 2

    def advice_if_distilled(self) -> str | None:
        # Neither class nor configs tell Turbo from Z-Image, but its name does.
        names = (self.pipeline.config.get("_name_or_path"), self.module.config.get("_name_or_path"))
        if any("turbo" in Path(str(name or "")).name.lower() for name in names):
            return "Train on Tongyi-MAI/Z-Image: the LoRA loads into both."
        return None

    def interface_metadata(self) -> dict[str, str] | None:
        return {"modelspec.architecture": "z-image/lora"}


def _without_padding(conditions: Conditions) -> list[torch.Tensor]:
    """Return the embeddings of each prompt (L_i, D), as the transformer takes them."""
    pairs = zip(conditions["prompt_embeds"], conditions["prompt_embeds_mask"], strict=True)
    return [embeds[mask.bool()] for embeds, mask in pairs]
