"""Qwen-Image."""

import torch
from diffusers import QwenImagePipeline
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.base import Conditions, Family, Size, cast, decode, encode_latents
from bt_hf.diffusion.families.sd3 import FLOW_BETA

# Attention and feed-forward layers of the image, and what it attends to of the text. Not what the text becomes: the
# last block throws that away, and distributed training would wait for gradients that never come.
TRANSFORMER_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
    *("img_mlp.net.0.proj", "img_mlp.net.2"),
]
LONGEST = 512  # tokens that the pipeline reads by default


class QwenImage(Family):
    """Family of `QwenImagePipeline`."""

    name = "qwen-image"
    denoiser = "transformer"
    beta = FLOW_BETA
    target_modules = TRANSFORMER_LAYERS
    guidance_option = "true_cfg_scale"  # `guidance_scale` is for distilled models

    @property
    def pixels_per_token(self) -> int:
        return self.pipeline.vae_scale_factor * 2  # latents are packed in patches of 2 x 2

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim * 4

    @property
    def default_size(self) -> Size:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The VAE is one of videos: an image has one frame. Each channel is standardised.
        mean, std = (value[:, :, 0] for value in encode_latents(self.pipeline.vae, pixels[:, :, None]))
        shift, scale = self._shift_and_scale(mean)
        return (mean - shift) / scale, std / scale

    def _shift_and_scale(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.pipeline.vae.config
        return (
            like.new_tensor(config.latents_mean).view(1, -1, 1, 1),
            like.new_tensor(config.latents_std).view(1, -1, 1, 1),
        )

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        shift, scale = self._shift_and_scale(latents)
        return decode(self.pipeline.vae, (latents * scale + shift)[:, :, None])[:, :, 0]

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return QwenImagePipeline._pack_latents(latents, *latents.shape)

    def unpack(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        height, width = (side // self.pipeline.vae_scale_factor for side in size)
        return QwenImagePipeline._unpack_latents(latents, height, width, vae_scale_factor=1)[:, :, 0]

    def guide(self, prediction: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        guided = super().guide(prediction, negative, scale)
        return guided * (prediction.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.pipeline._execution_device, max_sequence_length=LONGEST
        )
        # There is no mask where all prompts are of one length.
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        missing = LONGEST - embeds.shape[1]
        # (N, L, D), (N, L)
        return {"prompt_embeds": pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": pad(mask, (0, missing))}

    def encode_negative(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        # Without a negative prompt the pipeline draws without guidance; the card of Qwen-Image guides away from " ".
        return self.encode_prompts([prompt or " " for prompt in prompts])

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        # The chat around a prompt counts, but for its beginning, which is cut off.
        tokenizer, pipeline = self.pipeline.tokenizer, self.pipeline
        around = len(tokenizer(pipeline.prompt_template_encode.format(""))["input_ids"])
        return tokenizer, LONGEST - (around - pipeline.prompt_template_encode_start_idx)

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        values = cast({"noisy": noisy, **conditions}, denoiser)
        count, channels, height, width = noisy.shape
        longest = int(values["prompt_embeds_mask"].sum(1).max())  # padding costs time
        prediction = denoiser(
            hidden_states=QwenImagePipeline._pack_latents(values["noisy"], count, channels, height, width),
            timestep=times / 1000,
            encoder_hidden_states=values["prompt_embeds"][:, :longest],
            encoder_hidden_states_mask=values["prompt_embeds_mask"][:, :longest],
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        # Sizes in latents, hence a VAE of stride 1.
        return QwenImagePipeline._unpack_latents(prediction, height, width, vae_scale_factor=1)[:, :, 0].float()

    def advice_if_distilled(self) -> str | None:
        if self.module.config.guidance_embeds:
            return "Train on Qwen-Image: the LoRA loads into both."
        return None

    def interface_metadata(self) -> dict[str, str] | None:
        return {"modelspec.architecture": "qwen-image/lora"}
