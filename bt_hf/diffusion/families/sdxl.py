"""Stable Diffusion XL, and models of the same build."""

import torch
from torch import nn

from bt_hf.diffusion.families.base import Conditions, Size, cast, decode, encode_latents
from bt_hf.diffusion.families.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Family of `StableDiffusionXLPipeline`."""

    name = "stable-diffusion-xl"
    # Diffusion-DPO's for SDXL (https://arxiv.org/abs/2311.12908, section 5.1), as the launcher of its code says too.
    beta = 5000.0

    def interface_metadata(self) -> dict[str, str] | None:
        # A1111 takes whatever has no version of SDXL for Stable Diffusion 1, and hides it.
        version = {"ss_base_model_version": "sdxl_base_v1-0"}
        return {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", **version}

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = encode_latents(self.pipeline.vae, pixels)
        config = self.pipeline.vae.config
        scale: float | torch.Tensor = config.scaling_factor
        # Playground v2.5 standardises each channel; SDXL itself has one scale.
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean = mean - mean.new_tensor(config.latents_mean).view(1, -1, 1, 1)
            scale = scale / mean.new_tensor(config.latents_std).view(1, -1, 1, 1)
        return mean * scale, std * scale

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        latents = latents / config.scaling_factor
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            mean, std = (
                latents.new_tensor(value).view(1, -1, 1, 1) for value in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        return decode(self.pipeline.vae, latents)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.pipeline._execution_device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}  # (N, L, D), (N, D')

    def encode_negative(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        values = self.encode_prompts(prompts)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return values
        # SDXL guides away from zeros, and not from the embeddings of an empty text.
        return {name: torch.zeros_like(value) for name, value in values.items()}

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
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
