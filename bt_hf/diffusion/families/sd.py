"""Stable Diffusion 1.x and 2.x, and models of the same build."""

import math

import torch
from torch import nn

from bt_hf.diffusion.families.base import Conditions, Family, Size, cast

# Attention and feed-forward layers of the transformers, and the convolutions of the residual blocks: style is texture,
# and much of it is drawn by the convolutions.
UNET_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut"),
]


class StableDiffusion(Family):
    """Family of `StableDiffusionPipeline`."""

    name = "stable-diffusion"
    denoiser = "unet"
    # Diffusion-DPO's for SD 1.5 (https://arxiv.org/abs/2311.12908, section 5.1); the launcher of its code, which has
    # the 1/2 too, says 5000 (https://github.com/SalesforceAIResearch/DiffusionDPO).
    beta = 2000.0
    target_modules = UNET_LAYERS

    @property
    def multiple(self) -> int:
        # The pipelines of this build ask for 8 whatever their VAE; the UNet itself copes with odd sizes.
        return math.lcm(8, self.pixels_per_token)

    def interface_metadata(self) -> dict[str, str] | None:
        if self.module.config.cross_attention_dim != 1024:  # the width of OpenCLIP ViT-H, which 2.x reads
            return {"modelspec.architecture": "stable-diffusion-v1/lora"}
        v_prediction = self.pipeline.scheduler.config.get("prediction_type") == "v_prediction"
        name = "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
        return {"modelspec.architecture": f"{name}/lora", "ss_v2": "True"}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline._execution_device
        embeds, _ = self.pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}  # (N, L, D)

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        inputs = cast({"sample": noisy, "encoder_hidden_states": conditions["prompt_embeds"]}, denoiser)
        return denoiser(timestep=times, **inputs, return_dict=False)[0].float()
