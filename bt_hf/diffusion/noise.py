"""Noise and timesteps as functions of the seed, the row and a counter.

A run's random numbers then don't depend on the order of rows, on the number of processes, or on where it was resumed,
and a draw that comes again need not be stored.
"""

import torch

# Steps of the golden ratio fill [0, 1) more evenly than independent draws do (an additive recurrence).
_GOLDEN_RATIO = 0.6180339887498949
_PRIME, _OTHER_PRIME = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def draw_noise(
    seed: int, rows: torch.Tensor, draw: int, shape: tuple[int, ...], stream: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and a timestep's quantile for each row.

    Args:
        seed: Seed of the run.
        rows: (B,) int64, what identifies each row.
        draw: Which draw of the row it is: 0, 1, 2, ...
        shape: Shape of one row's noise.
        stream: Draws of different streams are independent.

    Returns:
        noise: (B, *shape) float32, standard normal, on the CPU.
        quantiles: (B,) float32, uniform in [0, 1). Those of consecutive draws of one row are spread evenly, so that
            a few draws already see early and late timesteps.

    Example:
        >>> noise, quantiles = draw_noise(0, torch.tensor([7, 8]), 3, (4, 8, 8))
        >>> noise.shape, quantiles.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2]))
    """
    noise, quantiles = [], []
    for row in rows.tolist():
        start = torch.rand((), generator=_generator(seed, row, stream)).item()
        quantiles.append((start + draw * _GOLDEN_RATIO) % 1.0)
        noise.append(torch.randn(shape, generator=_generator(seed, row, stream, draw)))
    # Rounding to float32 may give 1.0, which is no quantile.
    return torch.stack(noise), torch.tensor(quantiles).clamp(max=1 - 2**-24)


def _generator(*key: int) -> torch.Generator:
    state = 0
    for number in key:
        state = ((state ^ (number + 1)) * _PRIME) % 2**64
        state = ((state ^ (state >> 31)) * _OTHER_PRIME) % 2**64
    return torch.Generator().manual_seed(state >> 1)
