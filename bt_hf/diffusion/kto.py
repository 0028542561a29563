"""Diffusion-KTO: the loss of single images, liked or disliked."""

import torch
from torch import Tensor


def kto_baseline(errors: Tensor, reference: Tensor, beta: float, counts: Tensor | None = None) -> Tensor:
    """Return the point of reference of `kto`, a detached scalar: the mean reward of a batch of images, at least 0.

    Args:
        errors: (N,) errors of images, liked and disliked: their mean reward says how far the denoiser moved at all.
        reference: (N,) their errors with the adapter off.
        beta: As in `denoising_margin`.
        counts: (N,) bool, the images that count; default: all. Without any, the baseline is 0.
    """
    reward = _kto_reward(errors, reference, beta)
    counts = torch.ones_like(reward, dtype=torch.bool) if counts is None else counts
    return (reward.where(counts, 0.0).sum() / counts.sum().clamp(min=1)).clamp(min=0).detach()


def kto(
    errors: Tensor,
    reference: Tensor,
    desirable: Tensor,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Diffusion-KTO: likes and dislikes of single images, with no pairs.

    With r = -beta/2 (error - reference): weight (1 - sigmoid(r - baseline)) for a desirable image and
    weight (1 - sigmoid(baseline - r)) for an undesirable one.

    Args:
        errors: (N,) errors of images.
        reference: (N,) their errors with the adapter off.
        desirable: (N,) 1 for liked images and 0 for disliked ones; between them a mixture.
        baseline: Scalar, from `kto_baseline`; no gradient flows through it.
        beta: As in `denoising_margin`.
        desirable_weight: Weight of the liked images.
        undesirable_weight: Weight of the disliked images; make up with it for unequal numbers of both.

    Returns:
        (N,) losses, between 0 and the weight.

    Source:
        Li et al., Aligning Diffusion Models by Optimizing Human Utility (https://arxiv.org/abs/2404.04465);
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization (https://arxiv.org/abs/2402.01306).
    """
    reward = _kto_reward(errors, reference, beta)
    surplus = reward - torch.as_tensor(baseline, dtype=reward.dtype, device=reward.device).detach()
    desirable = desirable.to(reward.dtype)
    # 1 - sigmoid(x) = sigmoid(-x)
    liked, disliked = torch.sigmoid(-surplus), torch.sigmoid(surplus)
    return desirable_weight * desirable * liked + undesirable_weight * (1 - desirable) * disliked


def _kto_reward(errors: Tensor, reference: Tensor, beta: float) -> Tensor:
    return -beta / 2 * (errors - reference)
