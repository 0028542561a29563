"""Diffusion-SDPO's safeguard: scale the gradient that would make the preferred image worse."""

from dataclasses import replace

import torch
from torch import Tensor

from bt_hf.diffusion.losses import Errors


def safeguard_scale(
    predicted_chosen: Tensor,
    predicted_rejected: Tensor,
    target_chosen: Tensor,
    target_rejected: Tensor,
    mu: float = 0.0,
    preference: Tensor | float = 1.0,
) -> Tensor:
    """Return the share of the less preferred image's gradient that keeps the preferred image's error from growing.

    Pushing the less preferred image away moves the same weights that draw the preferred one. In output space, with
    g = prediction - target of each, a step changes the preferred image's error by -<g_w, g_w - scale g_l>, which is at
    most -mu |g_w|^2 if scale <= (1 - mu) |g_w|^2 / <g_w, g_l>. The paper's code takes one scale for the whole batch;
    here each pair has its own, so that its loss does not depend on the pairs beside it. The promise is of first order
    and for a loss that wants the preferred image's error smaller, which a soft label's does until its margin is
    reached. Which image is preferred is told by `preference`; a tie has none, and its scale is 1.

    Args:
        predicted_chosen: (B, ...) predictions for the chosen images.
        predicted_rejected: (B, ...) predictions for the rejected images.
        target_chosen: (B, ...) right predictions for the chosen images.
        target_rejected: (B, ...) right predictions for the rejected images.
        mu: Share of the preferred image's own improvement to insist on, in [0, 1]. Default 0: not worse.
        preference: P(chosen preferred to rejected), (B,) or a number. Below 0.5 the `rejected` image is the preferred.

    Returns:
        (B,) scales in [0, 1], float32, detached.

    Raises:
        ValueError: `mu` is outside [0, 1].

    Source:
        Fu et al., Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models
        (https://arxiv.org/abs/2511.03317).
    """
    if not 0.0 <= mu <= 1.0:
        raise ValueError(f"`mu` should be in [0, 1], but got {mu}.")
    chosen = (predicted_chosen.detach().float() - target_chosen.detach().float()).flatten(1)  # (B, D)
    rejected = (predicted_rejected.detach().float() - target_rejected.detach().float()).flatten(1)
    preference = torch.as_tensor(preference, device=chosen.device).expand(len(chosen))  # (B,)
    inner = (chosen * rejected).sum(1)
    norm = torch.where(preference >= 0.5, chosen.square().sum(1), rejected.square().sum(1))
    bound = ((1 - mu) * norm / inner.clamp(min=torch.finfo(inner.dtype).tiny)).clamp(max=1)
    return torch.where((inner > 0) & (preference != 0.5), bound, torch.ones_like(bound))


def scale_gradient(value: Tensor, scale: Tensor | float) -> Tensor:
    """Return the same value, with its gradient multiplied by `scale`."""
    return value.detach() + scale * (value - value.detach())


def with_safeguard(errors: Errors, scale: Tensor, preference: Tensor | float = 1.0) -> Errors:
    """Return the same errors, with the gradient of the less preferred image's scaled.

    Args:
        errors: Errors of B pairs.
        scale: (B,) from `safeguard_scale`, of the same `preference`.
        preference: P(chosen preferred to rejected), (B,) or a number. Below 0.5 the `rejected` image is the preferred.
    """
    chosen_wins = torch.as_tensor(preference, device=scale.device) >= 0.5
    one = torch.ones_like(scale)
    return replace(
        errors,
        chosen=scale_gradient(errors.chosen, torch.where(chosen_wins, one, scale)),
        rejected=scale_gradient(errors.rejected, torch.where(chosen_wins, scale, one)),
    )
