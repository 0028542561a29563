"""Encode images and prompts with a pipeline's own VAE and text encoders."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn

from bt_hf.data.fingerprint import describe, describe_tokenizer, digest, digest_weights, tokenize_plainly
from bt_hf.diffusion.collator import Batch, DiffusionCollator, hash_pixels
from bt_hf.diffusion.families.base import Family
from bt_hf.diffusion.quantization import move


class PairEncoder:
    """Encode images and prompts with a pipeline's own VAE and text encoders.

    Args:
        family: Family around the pipeline.
        collator: Fits images to the size.
        sample_latents: Keep the posterior's standard deviation too, to sample latents from.
        device: Where the encoders run.

    Attributes:
        released: True once the text encoders have left memory, so that nothing more can be encoded.
    """

    def __init__(
        self, family: Family, collator: DiffusionCollator, sample_latents: bool, device: torch.device
    ) -> None:
        self.family = family
        self.pipeline = family.pipeline
        self.collator = collator
        self.sample_latents = sample_latents
        self.device = device
        self._homes = {name: next(module.parameters()).device for name, module in self.modules().items()}
        for module in self.modules().values():
            move(module, device)
        self.released = False

    def modules(self) -> dict[str, nn.Module]:
        """Return the VAE and the text encoders, by their names in the pipeline."""
        return {
            name: module
            for name, module in self.pipeline.components.items()
            if isinstance(module, nn.Module) and (name == "vae" or name.startswith("text_encoder"))
        }

    def fingerprint(self) -> str:
        """Return a digest of encoders, tokenizers and options: all that results depend on but images and prompts."""
        tokenizers = {
            name: describe_tokenizer(component)
            for name, component in self.pipeline.components.items()
            if name.startswith("tokenizer") and component is not None
        }
        modules = self.modules()
        configs = {name: describe(module) for name, module in modules.items()}
        switches = {name: value for name, value in self.pipeline.config.items() if isinstance(value, bool | int)}
        options = (
            self.family.name,
            self.collator.size,
            self.collator.frames,
            self.sample_latents,
            tokenizers,
            configs,
            switches,
        )
        return digest(digest_weights(modules.values()), repr(options))

    def tokens_of(self, prompts: list[str]) -> list[bytes]:
        """Return what the tokenizers make of each prompt, in bytes: the encoders can't tell equal ones apart."""
        # A textual inversion of several vectors stands in for its word.
        written = getattr(self.pipeline, "maybe_convert_prompt", lambda prompts, tokenizer: prompts)
        read = [
            tokenize_plainly(component, written(prompts, component))
            for name, component in self.pipeline.components.items()
            if name.startswith("tokenizer") and component is not None
        ]
        return [repr(ids).encode() for ids in zip(*read, strict=True)] if read else [one.encode() for one in prompts]

    def release(self, keep_vae: bool) -> None:
        """Take the text encoders out of the pipeline, and the VAE unless it is kept to draw with.

        One that the caller holds, in a pipeline of its own, goes back to the device that it was on.
        """
        self.released = True
        for name, module in self.modules().items():
            if name == "vae" and keep_vae:
                continue
            move(module, self._homes[name])
            self.pipeline.register_modules(**{name: None})

    def check_available(self) -> None:
        """Raise a `ValueError` once the encoders are released."""
        if self.released:
            raise ValueError(
                "these pairs aren't encoded, and the text encoders have left memory: pass the pairs to the "
                "constructor, as `eval_dataset` (one of several, if you like), or set `cache_latents=False`."
            )

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode images as `encode_pixels` does, with `digest` (N,) int64, the hashes of their pixels."""
        pixels = self.collator.preprocess(images, names)
        # Cached files have a column of this name.
        return {**self.encode_pixels(pixels), "digest": hash_pixels(pixels)}

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode (N, H, W, 3) uint8 to `latents` (N, C, h, w), with `std` of the same shape if they are sampled.

        Clips are (N, F, H, W, 3).
        """
        signed = pixels.to(self.device).movedim(-1, 1).float() / 127.5 - 1
        mean, std = self.family.encode_images(signed)
        return {"latents": mean, "std": std} if self.sample_latents else {"latents": mean}

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return conditions of the denoiser, each (N, ...), named as the pipeline's arguments."""
        # The pipeline would say of every batch what it truncates; `loading.warn_of_long_prompts` has said it of all.
        verbosity = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity_error()
        try:
            return self.family.encode_prompts(prompts)
        finally:
            diffusers_logging.set_verbosity(verbosity)

    def encode(self, batch: Batch) -> Batch:
        """Return a batch of `DiffusionCollator` with latents in place of pixels, and with `condition_*`."""
        rest = {name: value for name, value in batch.items() if name != "pixels"}
        conditions = self.encode_prompts(batch["prompt"])
        named = {f"condition_{name}": value for name, value in conditions.items()}
        return {**rest, **self.encode_pixels(batch["pixels"]), **named}
