"""The fit of many small problems at once: each at its own optimum, whatever it is solved beside."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from bt_hf.reward.laplace import leave_out, newton

STRENGTHS = (0.03, 1.0, 8.0, 64.0)


def problems(pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (N, 6), kernels (S, N, N) of several strengths, soft preferences and weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(pairs, 6, generator=generator, dtype=torch.double)
    preference = torch.randint(0, 5, (pairs,), generator=generator) / 4.0
    weight = 0.5 + torch.rand(pairs, generator=generator)
    kernels = torch.stack([strength**2 * rows @ rows.T for strength in STRENGTHS])
    return rows, kernels, preference.double(), weight.double()


@pytest.mark.parametrize("pairs", [1, 5, 60, 300])
def test_dual_weights_meet_the_condition_of_the_optimum(pairs: int) -> None:
    _, kernels, preference, weight = problems(pairs)
    dual, margin = newton(kernels, preference, weight)
    torch.testing.assert_close(dual, weight * (preference - torch.sigmoid(margin)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((kernels @ dual[..., None])[..., 0], margin, atol=1e-9, rtol=1e-9)


def test_it_is_logistic_regression() -> None:
    """By LBFGS on the weights of the rows, with a Gaussian prior."""
    rows, kernels, preference, weight = problems(60)
    _, margin = newton(kernels, preference, weight)
    for strength, found in zip(STRENGTHS, margin, strict=True):
        direction = torch.zeros(6, dtype=torch.double, requires_grad=True)
        search = torch.optim.LBFGS([direction], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss(strength: float = strength, direction: torch.Tensor = direction) -> torch.Tensor:
            value = rows @ direction
            likelihood = weight @ (logsigmoid(value) - (1 - preference) * value)
            return -likelihood + direction.square().sum() / (2 * strength**2)

        def closure(search: torch.optim.Optimizer = search, loss: object = loss) -> torch.Tensor:
            search.zero_grad()
            value = loss()  # type: ignore[operator]
            value.backward()
            return value

        search.step(closure)
        torch.testing.assert_close(rows @ direction.detach(), found, atol=1e-4, rtol=1e-4)


def test_a_problem_is_solved_as_if_it_were_alone() -> None:
    """Problems that are solved first stay where they are while the others go on."""
    _, kernels, preference, weight = problems(60)
    together = newton(kernels, preference, weight)
    for index in range(len(kernels)):
        alone = newton(kernels[index : index + 1], preference, weight)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[index], other[0], atol=1e-9, rtol=1e-9)


def test_left_out_margins_are_near_those_of_fits_without_the_cluster() -> None:
    _, kernels, preference, weight = problems(40, seed=1)
    kernels = kernels[:2]  # to second order, which is far for loose priors
    cluster = torch.arange(40) // 2
    dual, margin = newton(kernels, preference, weight)
    found = leave_out(kernels, dual, margin, weight, cluster)
    for one in range(0, 20, 5):
        kept, gone = (cluster != one).nonzero()[:, 0], (cluster == one).nonzero()[:, 0]
        without, _ = newton(kernels[:, kept][:, :, kept], preference[kept], weight[kept])
        expected = (kernels[:, gone][:, :, kept] @ without[..., None])[..., 0]
        torch.testing.assert_close(found[:, gone], expected, atol=0.1, rtol=0.1)
