"""Laplace approximation of Gaussian process classifiers: many small problems at once, in one unknown a pair.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 3.4.
"""

import torch
import torch.nn.functional as F


def newton(kernels: torch.Tensor, preference: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximise sum_i weight_i log P(preference_i | margin_i) - dual·margin / 2 with margin = K dual.

    Args:
        kernels: (S, N, N), one problem each.
        preference, weight: (N,).

    Returns:
        `dual` and `margin`, each (S, N). At the optimum, dual = weight (preference - sigmoid(margin)).
    """
    dual, margin = (torch.zeros(kernels.shape[:2], dtype=kernels.dtype) for _ in range(2))
    value = _log_posterior(dual, margin, preference, weight)
    left = torch.arange(len(kernels))  # the problems that are not solved yet: loose priors take longest
    for _ in range(60):
        kernel = kernels if len(left) == len(kernels) else kernels[left]
        curvature = _curvature(margin[left], weight)
        target = curvature * margin[left] + weight * (preference - torch.sigmoid(margin[left]))
        root = curvature.sqrt()
        factor = torch.linalg.cholesky(_symmetric(kernel, root))
        part = torch.cholesky_solve((root * (kernel @ target[..., None])[..., 0])[..., None], factor)[..., 0]
        step = target - root * part - dual[left]
        size = torch.ones(len(left), dtype=kernels.dtype)
        for _ in range(20):  # halve steps that lead down
            moved = dual[left] + size[:, None] * step
            moved_margin = (kernel @ moved[..., None])[..., 0]
            moved_value = _log_posterior(moved, moved_margin, preference, weight)
            worse = moved_value < value[left] - 1e-12 * value[left].abs() - 1e-12
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        gain = (moved_value - value[left]).abs()
        dual[left], margin[left], value[left] = moved, moved_margin, moved_value
        left = left[gain >= 1e-10]
        if not len(left):
            break
    return dual, margin


def _symmetric(kernels: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Return I + root K root, which is symmetric and has no eigenvalue below 1: a Cholesky factor is stable."""
    system = root[:, :, None] * kernels * root[:, None, :]
    system.diagonal(dim1=1, dim2=2).add_(1)
    return system


def _log_posterior(
    dual: torch.Tensor, margin: torch.Tensor, preference: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    likelihood = (F.logsigmoid(margin) - (1 - preference) * margin) @ weight
    return likelihood - 0.5 * (dual * margin).sum(1)


def _curvature(margin: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    win = torch.sigmoid(margin)
    return (weight * win * (1 - win)).clamp(min=1e-10)


def leave_out(
    kernels: torch.Tensor, dual: torch.Tensor, margin: torch.Tensor, weight: torch.Tensor, cluster: torch.Tensor
) -> torch.Tensor:
    """Return the margins (S, N) of pairs in fits without their cluster, to second order.

    With R = (K + W^-1)^-1 and the curvature W at the optimum, the margins of a cluster B become
    margin_B - (R_BB^-1 - W_B^-1) dual_B.
    """
    curvature = _curvature(margin, weight)
    inverse_curvature, root = 1 / curvature, curvature.sqrt()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_symmetric(kernels, root)))
    inverse = root[:, :, None] * inverse * root[:, None, :]
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    left_out = margin - (1 / diagonal - inverse_curvature) * dual
    names, counts = cluster.unique(return_counts=True)
    for name in names[counts > 1]:
        rows = (cluster == name).nonzero()[:, 0]
        own = torch.linalg.solve(inverse[:, rows][:, :, rows], dual[:, rows, None])[..., 0]
        left_out[:, rows] = margin[:, rows] - own + inverse_curvature[:, rows] * dual[:, rows]
    return left_out
