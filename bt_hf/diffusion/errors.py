"""Denoising errors of a batch, at noise and timesteps that are functions of the seed, the row and a counter.

A run's random numbers then don't depend on the order of rows, on the number of processes, or on where it was resumed,
and a noise sample that comes again need not be stored.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bt_hf.diffusion.collator import Batch
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.families.base import Family, Size

# Purposes of random numbers, so that none repeats those of another: see `sample_noise`.
TRAIN, EVAL, BETA, _LATENTS = range(4)
# Steps of the golden ratio fill [0, 1) more evenly than independent numbers do (an additive recurrence).
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class NoisyBatch:
    """Noisy latents with the targets of the denoiser: N = 2B images for B pairs, the chosen first, or N = B unpaired.

    Attributes:
        latents: (N, C, h, w) with their noise.
        times: (N,) as `Family.predict` takes them.
        conditions: Each (N, ...), the embeddings of the prompts.
        target: (N, C, h, w) float32, the right prediction.
        weights: (N,) of the squared errors.
    """

    latents: torch.Tensor
    times: torch.Tensor
    conditions: dict[str, torch.Tensor]
    target: torch.Tensor
    weights: torch.Tensor


class Denoising:
    """Add noise to batches, and measure a denoiser's errors on them.

    Args:
        family: Family of the pipeline.
        size: Height and width of the images.
        args: Options `seed`, `snr_gamma`, `channels_last`.

    Raises:
        TypeError: The pipeline's scheduler is not supported.
        ValueError: Its prediction type is not supported.
    """

    def __init__(self, family: Family, size: Size, args: PreferenceLoRAConfig) -> None:
        self.family = family
        self.schedule = family.schedule(size)
        self.size = size
        self.args = args

    def add_noise(self, batch: Batch, sample: int, purpose: int) -> NoisyBatch:
        """Add the same noise, at the same time, to all images of a row.

        Args:
            batch: `latents` (N, C, h, w), `std` of the same shape if latents are sampled, `row` (B,) and
                `condition_*`, each (B, ...).
            sample: Index of the noise sample: 0, 1, 2, ...
            purpose: `TRAIN`, `EVAL` or `BETA`.
        """
        latents, rows = batch["latents"], batch["row"].cpu()
        device, shape, sides = latents.device, tuple(latents.shape[1:]), len(latents) // len(rows)
        noise, quantiles = sample_noise(self.args.seed, rows, sample, shape, purpose)
        times = self.schedule.times(quantiles.to(device)).repeat(sides)  # (N,)
        if "std" in batch:
            images = torch.cat([rows ^ side for side in range(sides)])  # each image has latents of its own
            own, _ = sample_noise(self.args.seed, images, sample, shape, _LATENTS)
            latents = latents + batch["std"] * own.to(device)
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
        return NoisyBatch(noisy, times, conditions, target, weights)

    def errors(self, model: nn.Module, noisy: NoisyBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return errors (N,) and predictions (N, C, h, w), both float32, through the model's own forward."""
        predicted = self.family.predict(model, noisy.latents, noisy.times, noisy.conditions, self.size).float()
        return noisy.weights * (predicted - noisy.target).square().flatten(1).mean(1), predicted


def sample_noise(
    seed: int, rows: torch.Tensor, sample: int, shape: tuple[int, ...], purpose: int = TRAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample noise and a timestep's quantile for each row.

    Args:
        seed: Seed of the run.
        rows: (B,) int64, hashes of the rows.
        sample: Index of the sample of each row: 0, 1, 2, ...
        shape: Shape of one row's noise.
        purpose: Samples for different purposes are independent. Default `TRAIN`.

    Returns:
        noise: (B, *shape) float32, standard normal, on the CPU.
        quantiles: (B,) float32, uniform in [0, 1). Those of consecutive samples of one row are spread evenly, so that
            a few of them already see early and late timesteps.

    Example:
        >>> import torch
        >>> from bt_hf.diffusion.errors import sample_noise
        >>> noise, quantiles = sample_noise(0, torch.tensor([7, 8]), 3, (4, 8, 8))
        >>> noise.shape, quantiles.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2]))
    """
    noise, quantiles = [], []
    for row in rows.tolist():
        start = torch.rand((), generator=seeded_generator(seed, row, purpose)).item()
        quantiles.append((start + sample * _GOLDEN_RATIO) % 1.0)
        noise.append(torch.randn(shape, generator=seeded_generator(seed, row, purpose, sample)))
    # Rounding to float32 may give 1.0, beyond the last quantile.
    return torch.stack(noise), torch.tensor(quantiles).clamp(max=1 - 2**-24)


def seeded_generator(seed: int, *key: int) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on the seed and the key alone."""
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
