"""Denoising errors: what a denoiser is asked about a batch, and how wrong its answers are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.families.base import Family, Size
from bt_hf.diffusion.families.schedules import NoiseSchedule
from bt_hf.diffusion.noise import draw_noise

# Streams of random numbers that must not repeat each other: see `draws.draw_noise`.
TRAIN, EVAL, BETA, _LATENTS = range(4)


@dataclass(frozen=True)
class Question:
    """What the denoiser is asked: N = 2B images for B pairs, the chosen first, or N = B unpaired ones.

    Attributes:
        noisy: (N, C, h, w) noisy latents.
        times: (N,) as `Family.predict` takes them.
        conditions: Each (N, ...), the embeddings of the prompts.
        target: (N, C, h, w), the right answer.
        weights: (N,) of the squared errors.
    """

    noisy: torch.Tensor
    times: torch.Tensor
    conditions: dict[str, torch.Tensor]
    target: torch.Tensor
    weights: torch.Tensor


class Denoising:
    """Denoising errors of batches.

    Args:
        family: Family of the pipeline.
        schedule: Its noise.
        size: Height and width of the images.
        args: Options `seed`, `snr_gamma`, `channels_last`.
    """

    def __init__(self, family: Family, schedule: NoiseSchedule, size: Size, args: PreferenceLoRAConfig) -> None:
        self.family = family
        self.schedule = schedule
        self.size = size
        self.args = args

    def ask(self, batch: Mapping[str, Any], draw: int, stream: int) -> Question:
        """The same noise and time for all images of a row.

        Args:
            batch: `latents` (N, C, h, w), `std` of the same shape if latents are sampled, `row` (B,) and
                `condition_*`, each (B, ...).
            draw: Which draw of noise and time it is.
            stream: `TRAIN`, `EVAL` or `BETA`.
        """
        latents, rows = batch["latents"], batch["row"].cpu()
        device, shape, sides = latents.device, tuple(latents.shape[1:]), len(latents) // len(rows)
        noise, quantiles = draw_noise(self.args.seed, rows, draw, shape, stream)
        times = self.schedule.times(quantiles.to(device)).repeat(sides)  # (N,)
        if "std" in batch:
            images = torch.cat([rows ^ side for side in range(sides)])  # each image has a sample of its own
            latents = latents + batch["std"] * draw_noise(self.args.seed, images, draw, shape, _LATENTS)[0].to(device)
        noisy, target = self.schedule.corrupt(latents, noise.to(device).repeat(sides, 1, 1, 1), times)
        if self.args.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        conditions = {
            name.removeprefix("condition_"): value.repeat(sides, *[1] * (value.ndim - 1))
            for name, value in batch.items()
            if name.startswith("condition_")
        }
        gamma = self.args.snr_gamma
        weights = self.schedule.min_snr_weights(times, gamma) if gamma else torch.ones(len(times), device=device)
        return Question(noisy, times, conditions, target, weights)

    def errors(self, model: nn.Module, asked: Question) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors (N,) float32 and predictions (N, C, h, w) float32, through the model's own forward."""
        predicted = self.family.predict(model, asked.noisy, asked.times, asked.conditions, self.size).float()
        return asked.weights * (predicted - asked.target).square().flatten(1).mean(1), predicted
