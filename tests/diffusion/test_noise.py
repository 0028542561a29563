"""Noise and timesteps: their dependence on seed, row and counter, and their distribution."""

import torch
from scipy import stats

from bt_hf.diffusion.errors import EVAL, sample_noise

ROWS = torch.tensor([3, 11, 2**62])
SHAPE = (4, 8, 8)


def test_a_sample_depends_on_its_row_and_not_on_its_batch() -> None:
    noise, quantiles = sample_noise(7, ROWS, 5, SHAPE)
    for index in range(3):
        alone, quantile = sample_noise(7, ROWS[index : index + 1], 5, SHAPE)
        assert torch.equal(alone[0], noise[index])
        assert torch.equal(quantile[0], quantiles[index])


def test_everything_else_changes_it() -> None:
    first, start = sample_noise(7, ROWS, 5, SHAPE)
    for noise, quantiles in (
        sample_noise(8, ROWS, 5, SHAPE),
        sample_noise(7, ROWS + 1, 5, SHAPE),
        sample_noise(7, ROWS, 6, SHAPE),
        sample_noise(7, ROWS, 5, SHAPE, purpose=EVAL),
    ):
        assert (quantiles != start).all()
        for row, other in zip(first, noise, strict=True):
            assert torch.corrcoef(torch.stack([row.flatten(), other.flatten()]))[0, 1].abs() < 0.25  # 4 deviations


def test_noise_is_standard_normal() -> None:
    noise, _ = sample_noise(0, torch.arange(200), 0, SHAPE)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


def test_quantiles_are_uniform_over_rows_and_even_within_a_row() -> None:
    _, over_rows = sample_noise(0, torch.arange(2000), 3, (1,))
    assert stats.kstest(over_rows.numpy(), "uniform").pvalue > 1e-3
    assert over_rows.min() >= 0
    assert over_rows.max() < 1
    # The largest gap between n points of the golden ratio's steps is below 2 / n (three-distance theorem), where that
    # between independent ones is about log(n) / n.
    for count in (8, 32):
        own = torch.cat([sample_noise(0, torch.tensor([9]), sample, (1,))[1] for sample in range(count)]).sort().values
        gaps = torch.cat([own.diff(), own[:1] + 1 - own[-1:]])
        assert gaps.max() < 2 / count
