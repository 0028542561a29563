"""Preference losses of a denoiser: small pure functions, per example, of the same four denoising errors.

Every loss of a pair has one signature, `loss(errors, preference, beta, label_smoothing) -> (B,)`, and is found by its
name in `LOSSES`. Preferences are soft: exchanging the images of a pair and `preference` with 1 - `preference` changes
none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_hf.losses import bradley_terry_loss

# Of `auto_beta`: the standard deviation of beta/2 times the difference of a pair's reference errors. Chosen on
# training prompts of the emoji domain: smaller ones cost more of what the pipeline knows, larger ones teach less.
SPREAD = 20.0
MAPO_SNR = 0.5  # both as in github.com/mapo-t2i/mapo; the paper folds them into its constants
MAPO_TIMESTEPS = 1000


@dataclass(frozen=True)
class Errors:
    """Denoising errors of B pairs, each (B,) float32.

    An error is the mean squared error of the prediction over all non-batch dimensions, with the same noise and the
    same timestep for both images of a pair.

    Args:
        chosen: Errors of the chosen images.
        rejected: Errors of the rejected images.
        reference_chosen: Errors of the chosen images with the adapter off. Default: no reference.
        reference_rejected: The same of the rejected images.

    Raises:
        ValueError: Only one of the two references is given.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.reference_chosen is None) != (self.reference_rejected is None):
            raise ValueError(
                "`Errors` needs the reference errors of both images or of neither, but got only those of the "
                f"{'rejected' if self.reference_chosen is None else 'chosen'} ones."
            )


def denoising_margin(errors: Errors, beta: float) -> Tensor:
    """How much more the denoiser has come to favour the chosen image than the rejected one.

    -beta/2 [(chosen - reference_chosen) - (rejected - reference_rejected)], and -beta/2 (chosen - rejected) where
    there is no reference. Beware of other conventions for beta: without the half the same margin has half the beta.

    Args:
        errors: Errors of B pairs.
        beta: Strength of the hold on the reference; the paper has 2000 for Stable Diffusion 1.5 and 5000 for SDXL.

    Returns:
        (B,) margins: P(chosen preferred to rejected) = sigmoid(margin).

    Source:
        Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization, equation 14
        (https://arxiv.org/abs/2311.12908).
    """
    difference = errors.chosen - errors.rejected
    if errors.reference_chosen is not None and errors.reference_rejected is not None:
        difference = difference - (errors.reference_chosen - errors.reference_rejected)
    return -beta / 2 * difference


def dpo(errors: Errors, preference: Tensor | float, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Diffusion-DPO: the Bradley-Terry loss of the denoising margin, conservative with `label_smoothing`.

    Source:
        Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization
        (https://arxiv.org/abs/2311.12908).
    """
    return bradley_terry_loss(_margin_to_reference(errors, beta, "dpo"), preference, label_smoothing)


def ipo(errors: Errors, preference: Tensor | float, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Identity preference optimisation: the margin of a clear preference is pulled to 1/2 and no further.

    p (margin - 1/2)^2 + (1 - p) (margin + 1/2)^2. With h = margin / beta the paper has (h - 1/(2 beta))^2, which is
    this divided by beta^2. It is the same loss up to that constant, but with the betas of denoising errors, in the
    thousands, its gradients would vanish beside the epsilon of Adam.

    Source:
        Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences
        (https://arxiv.org/abs/2310.12036).
    """
    margin = _margin_to_reference(errors, beta, "ipo")
    target = _smooth(preference, label_smoothing, margin)
    return target * (margin - 0.5) ** 2 + (1 - target) * (margin + 0.5) ** 2


def hinge(errors: Errors, preference: Tensor | float, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Hinge loss of the denoising margin, as in SLiC: a margin of 1 is enough.

    Source:
        Zhao et al., SLiC-HF: Sequence Likelihood Calibration with Human Feedback (https://arxiv.org/abs/2305.10425).
    """
    margin = _margin_to_reference(errors, beta, "hinge")
    target = _smooth(preference, label_smoothing, margin)
    return target * F.relu(1 - margin) + (1 - target) * F.relu(1 + margin)


def bt(errors: Errors, preference: Tensor | float, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry loss of the errors themselves, as stand-ins for likelihoods: no reference, even where given."""
    margin = denoising_margin(Errors(errors.chosen, errors.rejected), beta)
    return bradley_terry_loss(margin, preference, label_smoothing)


def mapo(errors: Errors, preference: Tensor | float, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """MaPO: learn the preferred image, and to tell it from the other, without a reference.

    chosen - beta log sigmoid(T (score(chosen) - score(rejected))), where score(error) = x / (exp(x) - 1),
    x = `MAPO_SNR` error, T = `MAPO_TIMESTEPS`, as in the authors' code; of a soft preference both orders are mixed.
    Its beta weighs two losses against each other: around 0.1, not in the thousands.

    Source:
        Hong et al., Margin-aware Preference Optimization for Aligning Diffusion Models without Reference
        (https://arxiv.org/abs/2406.06424), https://github.com/mapo-t2i/mapo.
    """
    log_odds = MAPO_TIMESTEPS * (_mapo_score(errors.chosen) - _mapo_score(errors.rejected))
    return sft(errors, preference, beta, label_smoothing) + beta * bradley_terry_loss(
        log_odds, preference, label_smoothing
    )


def sft(errors: Errors, preference: Tensor | float, beta: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Supervised fine-tuning on the preferred images: p chosen + (1 - p) rejected. `beta` is not used."""
    target = _smooth(preference, label_smoothing, errors.chosen)
    return target * errors.chosen + (1 - target) * errors.rejected


LOSSES: dict[str, Callable[[Errors, Tensor | float, float, float], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "bt": bt,
    "mapo": mapo,
    "sft": sft,
}
REFERENCE_FREE = frozenset({"bt", "mapo", "sft"})


# --- Single images ---


def kto_baseline(errors: Tensor, reference: Tensor, beta: float, counts: Tensor | None = None) -> Tensor:
    """The point of reference of `kto`: the mean reward of a batch of images, at least 0. A detached scalar.

    Args:
        errors: (N,) errors of images, liked and disliked: their mean reward says how far the denoiser moved at all.
        reference: (N,) their errors with the adapter off.
        beta: As in `denoising_margin`.
        counts: (N,) bool, the images that count; default: all. Without any, 0.
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


# --- The winner-preserving safeguard ---


def safeguard_scale(
    predicted_chosen: Tensor,
    predicted_rejected: Tensor,
    target_chosen: Tensor,
    target_rejected: Tensor,
    mu: float = 0.0,
    preference: Tensor | float = 1.0,
) -> Tensor:
    """How much of the less preferred image's gradient keeps the preferred image's error from growing.

    Pushing the less preferred image away moves the same weights that draw the preferred one. In output space, with
    g = prediction - target of each, a step changes the preferred image's error by -<g_w, g_w - scale g_l>, which is at
    most -mu |g_w|^2 if scale <= (1 - mu) |g_w|^2 / <g_w, g_l>. The paper's code takes one scale for the whole batch;
    here each pair has its own, so that its loss does not depend on the pairs beside it. The promise is of first order
    and for a loss that wants the preferred image's error smaller, which a soft label's does until its margin is
    reached. Which image is preferred is told by `preference`; a tie has none, and its scale is 1.

    Args:
        predicted_chosen: (B, ...) predictions for the chosen images.
        predicted_rejected: (B, ...) predictions for the rejected images.
        target_chosen: (B, ...) what should have been predicted.
        target_rejected: (B, ...) the same for the rejected images.
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
    """The same value, with its gradient multiplied by `scale`."""
    return value.detach() + scale * (value - value.detach())


def with_safeguard(errors: Errors, scale: Tensor, preference: Tensor | float = 1.0) -> Errors:
    """The same errors, with the gradient of the less preferred image's scaled.

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


# --- Beta ---


def auto_beta(reference_chosen: Tensor, reference_rejected: Tensor, spread: float = SPREAD) -> float:
    """A beta that means the same for every model: 2 spread / std(reference_chosen - reference_rejected).

    Errors are as large as a model family makes them, so the same beta is strong for one and weak for another, and
    scripts disagree about the half: 5000 in one is 2500 in another, and in the order of 100 for flow models. This beta
    is in units of what the reference itself says about pairs: errors c times as large make it c times smaller.

    Args:
        reference_chosen: Errors of chosen images with the adapter off, one for each pair and draw of noise; any shape.
        reference_rejected: The same of the rejected images, in the same shape.
        spread: Standard deviation of beta/2 times the differences. Default `SPREAD`.

    Returns:
        The beta, for `denoising_margin`.

    Raises:
        ValueError: The shapes differ, there are fewer than two values, or their differences do not vary or are not
            finite.
    """
    if reference_chosen.shape != reference_rejected.shape:
        raise ValueError(
            "`auto_beta` needs errors of the same pairs and draws, but got the shapes "
            f"{tuple(reference_chosen.shape)} and {tuple(reference_rejected.shape)}."
        )
    difference = (reference_chosen.detach().double() - reference_rejected.detach().double()).flatten()
    if len(difference) < 2:
        raise ValueError(
            f"`auto_beta` needs at least 2 pairs of errors, but got {len(difference)}: give more pairs or draws, or "
            "set beta to a number."
        )
    deviation = difference.std().item()
    rounding = torch.finfo(torch.float32).eps * reference_chosen.detach().double().abs().max().item()
    if not rounding < deviation < float("inf"):  # written so that NaN is refused too
        raise ValueError(
            "`auto_beta` needs reference errors whose differences vary and are finite, but their standard deviation "
            f"is {deviation:.3g}: check that the images of a pair differ and that the denoiser gives finite numbers, "
            "or set beta to a number."
        )
    return 2 * spread / deviation


# --- Shared ---


def _margin_to_reference(errors: Errors, beta: float, name: str) -> Tensor:
    if errors.reference_chosen is None:
        raise ValueError(
            f"The loss {name!r} needs the errors of the reference (the adapter off), but got none: give them, or take "
            f"one of {', '.join(sorted(REFERENCE_FREE))}."
        )
    return denoising_margin(errors, beta)


def _smooth(preference: Tensor | float, label_smoothing: float, like: Tensor) -> Tensor:
    """The target of `bradley_terry_loss`: p (1 - label_smoothing) + (1 - p) label_smoothing."""
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"`label_smoothing` should be in [0, 0.5], but got {label_smoothing}.")
    target = torch.as_tensor(preference, dtype=like.dtype, device=like.device)
    return target * (1 - label_smoothing) + (1 - target) * label_smoothing


def _mapo_score(error: Tensor) -> Tensor:
    """x / (exp(x) - 1) of x = `MAPO_SNR` error >= 0, with finite gradients: 1 at 0, and falling to 0."""
    x = MAPO_SNR * error
    near = x < 0.01  # 0 / 0 at 0, and differences of large numbers in the gradient close to it
    safe = torch.where(near, torch.ones_like(x), x)
    # exp(-x) / (1 - exp(-x)) instead of 1 / (exp(x) - 1): exp(x) overflows.
    return torch.where(near, 1 - x / 2 + x * x / 12, -safe * torch.exp(-safe) / torch.expm1(-safe))
