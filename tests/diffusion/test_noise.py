"""Noise and timesteps: what they depend on, and how they are distributed."""

import torch
from scipy import stats

from bt_hf.diffusion.noise import draw_noise

ROWS = torch.tensor([3, 11, 2**62])
SHAPE = (4, 8, 8)


def test_a_draw_depends_on_its_row_and_not_on_its_batch() -> None:
    noise, quantiles = draw_noise(7, ROWS, 5, SHAPE)
    for index in range(3):
        alone, quantile = draw_noise(7, ROWS[index : index + 1], 5, SHAPE)
        assert torch.equal(alone[0], noise[index])
        assert torch.equal(quantile[0], quantiles[index])


def test_everything_else_changes_it() -> None:
    first, start = draw_noise(7, ROWS, 5, SHAPE)
    for noise, quantiles in (
        draw_noise(8, ROWS, 5, SHAPE),
        draw_noise(7, ROWS + 1, 5, SHAPE),
        draw_noise(7, ROWS, 6, SHAPE),
        draw_noise(7, ROWS, 5, SHAPE, stream=1),
    ):
        assert (quantiles != start).all()
        for row, other in zip(first, noise, strict=True):
            assert torch.corrcoef(torch.stack([row.flatten(), other.flatten()]))[0, 1].abs() < 0.25  # 4 deviations


def test_noise_is_standard_normal() -> None:
    noise, _ = draw_noise(0, torch.arange(200), 0, SHAPE)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


def test_quantiles_are_uniform_over_rows_and_even_within_a_row() -> None:
    _, over_rows = draw_noise(0, torch.arange(2000), 3, (1,))
    assert stats.kstest(over_rows.numpy(), "uniform").pvalue > 1e-3
    assert over_rows.min() >= 0
    assert over_rows.max() < 1
    # The largest gap between n points of the golden ratio's steps is below 2 / n (three-distance theorem), where that
    # between independent ones is about log(n) / n.
    for count in (8, 32):
        own = torch.cat([draw_noise(0, torch.tensor([9]), draw, (1,))[1] for draw in range(count)]).sort().values
        gaps = torch.cat([own.diff(), own[:1] + 1 - own[-1:]])
        assert gaps.max() < 2 / count
