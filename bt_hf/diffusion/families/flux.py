"""FLUX.1 (dev, Krea) and models of the same build; not schnell, which was distilled to draw in few steps."""

import torch
from diffusers import FluxPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.base import Conditions, Size, cast, unwrap
from bt_hf.diffusion.families.sd3 import StableDiffusion3

# FLUX.1-dev takes the strength of guidance as an input. diffusers' DreamBooth guide trains at 1, where the prediction
# is that of the data: a distilled 3.5 would count as an error what guidance adds on purpose. Images are drawn at 3.5
# afterwards all the same.
GUIDANCE = 1.0


class Flux(StableDiffusion3):
    """Family of `FluxPipeline`."""

    name = "flux"

    @property
    def pixels_per_token(self) -> int:
        return self.pipeline.vae_scale_factor * 2  # latents are packed in patches of 2 x 2

    @property
    def default_size(self) -> Size:
        # The transformer's config has no size: the pipeline knows one.
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def interface_metadata(self) -> dict[str, str] | None:
        return {"modelspec.architecture": "flux-1/lora"}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.pipeline._execution_device)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}  # (N, L, D), (N, D')

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        return self.pipeline.tokenizer_2, 512  # T5's, for which it is the pipeline's default

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        values = cast({"noisy": noisy, **conditions}, denoiser)
        count, channels, height, width = noisy.shape
        guidance = conditions.get("guidance", torch.full_like(times, GUIDANCE))
        embeds = values["prompt_embeds"]
        prediction = denoiser(
            hidden_states=FluxPipeline._pack_latents(values["noisy"], count, channels, height, width),
            timestep=times / 1000,
            guidance=guidance if unwrap(denoiser).config.guidance_embeds else None,
            pooled_projections=values["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                count, height // 2, width // 2, embeds.device, embeds.dtype
            ),
            return_dict=False,
        )[0]
        # Sizes in latents, hence a VAE of stride 1.
        return FluxPipeline._unpack_latents(prediction, height, width, vae_scale_factor=1).float()

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return FluxPipeline._pack_latents(latents, *latents.shape)

    def unpack(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        height, width = (side // self.pipeline.vae_scale_factor for side in size)
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor=1)

    def guides(self, scale: float) -> bool:
        return False  # the strength is an input

    def with_guidance(self, conditions: Conditions, scale: float) -> Conditions:
        if not self.module.config.guidance_embeds:
            return conditions
        embeds = conditions["prompt_embeds"]
        return {**conditions, "guidance": torch.full((len(embeds),), scale, device=embeds.device)}

    def advice_if_distilled(self) -> str | None:
        # FLUX.1-schnell has no input for guidance, which models whose distillation was trained out may lack too, and
        # no shift of the times for larger images.
        guided = self.module.config.guidance_embeds
        if not guided and not self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return (
                "Train on FLUX.1-dev: the LoRA loads into both. If this is FLUX.1-schnell with its distillation "
                "trained out, give its scheduler `use_dynamic_shifting=True`."
            )
        return None
