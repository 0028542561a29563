"""FLUX.2 (klein, dev)."""

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.diffusion.families.base import Conditions, Size, cast, decode, encode_latents, unwrap
from bt_hf.diffusion.families.flux import GUIDANCE, Flux

# Attention and feed-forward layers of image and text alike, which the single blocks keep in two layers. A pattern,
# since PEFT takes the names of a list as endings: the layer "to_out" of the single blocks would stand for the double
# blocks' "to_out" too, which is not a layer but a list of them.
TRANSFORMER_LAYERS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)


class Flux2(Flux):
    """Family of `Flux2KleinPipeline` and `Flux2Pipeline`.

    The schedule is FLUX.1's, from the scheduler's config. The pipeline draws with another shift,
    `compute_empirical_mu`, which is larger the fewer the steps; at its 200 steps it is the config's, 0.5 at 256 tokens
    and 1.15 at 4,096, which is also how FLUX.2 was trained, as reported in
    https://github.com/Nerogar/OneTrainer/pull/1516.
    """

    name = "flux2"
    target_modules = TRANSFORMER_LAYERS

    def interface_metadata(self) -> dict[str, str] | None:
        return {"modelspec.architecture": "flux-2/lora"}

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The latents of the denoiser are patches of 2 x 2 latents of the VAE, standardised channel by channel.
        encoded = encode_latents(self.pipeline.vae, pixels)
        mean, std = (self.pipeline._patchify_latents(latents) for latents in encoded)
        shift, scale = self._shift_and_scale()
        return (mean - shift) / scale, std / scale  # (N, 4 C, h / 2, w / 2)

    def _shift_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.pipeline.vae.bn
        return (
            norm.running_mean.float().view(1, -1, 1, 1),
            (norm.running_var.float() + norm.eps).sqrt().view(1, -1, 1, 1),
        )

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        shift, scale = self._shift_and_scale()
        return decode(self.pipeline.vae, self.pipeline._unpatchify_latents(latents * scale + shift))

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return Flux2KleinPipeline._pack_latents(latents)

    def unpack(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        height, width = (side // self.pixels_per_token for side in size)
        return latents.transpose(1, 2).unflatten(2, (height, width))

    def guides(self, scale: float) -> bool:
        return scale > 1 and not self.module.config.guidance_embeds

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        embeds, _ = self.pipeline.encode_prompt(prompts, device=self.pipeline._execution_device)
        return {"prompt_embeds": embeds}  # (N, L, D)

    def longest_prompt(self) -> tuple[PreTrainedTokenizerBase, int]:
        # The pipeline reads 512 tokens by default, of which the chat around a prompt takes some.
        chat = self.pipeline.tokenizer.apply_chat_template
        if hasattr(self.pipeline, "system_message"):  # FLUX.2-dev
            around = chat(format_input([""], self.pipeline.system_message)[0], tokenize=False)
        else:
            messages = [{"role": "user", "content": ""}]
            around = chat(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        # The tokenizer of FLUX.2-dev is inside a processor.
        tokenizer = getattr(self.pipeline.tokenizer, "tokenizer", self.pipeline.tokenizer)
        taken = len(tokenizer(around, add_special_tokens=False)["input_ids"])
        return tokenizer, 512 - taken + len(tokenizer("")["input_ids"])

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions, size: Size
    ) -> torch.Tensor:
        values = cast({"noisy": noisy, **conditions}, denoiser)
        latents, embeds = values["noisy"], values["prompt_embeds"]
        # FLUX.2-dev takes the strength of guidance as an input, klein does not.
        guidance = conditions.get("guidance", torch.full_like(times, GUIDANCE))
        prediction = denoiser(
            hidden_states=Flux2KleinPipeline._pack_latents(latents),
            timestep=times / 1000,
            guidance=guidance if unwrap(denoiser).config.guidance_embeds else None,
            encoder_hidden_states=embeds,
            # Places are the same in every row.
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds[:1]).to(embeds.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(latents[:1]).to(embeds.device),
            return_dict=False,
        )[0]  # (N, h w, C)
        return prediction.transpose(1, 2).reshape(noisy.shape).float()

    def advice_if_distilled(self) -> str | None:
        # Black Forest Labs advise the same: https://github.com/black-forest-labs/flux2
        if self.pipeline.config.get("is_distilled"):
            return (
                "Train on the model that it was distilled from, as FLUX.2-klein-base-4B for FLUX.2-klein-4B: the LoRA "
                "loads into both."
            )
        return None
