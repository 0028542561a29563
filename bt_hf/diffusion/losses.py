"""Preference losses of pairs: small pure functions, per example, of the same four denoising errors.

Every loss of a pair has one signature, `loss(errors, preference, beta, label_smoothing) -> (B,)`, and is found by its
name in `LOSSES`. Preferences are soft: exchanging the images of a pair and `preference` with 1 - `preference` changes
none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_hf.losses import bradley_terry_loss

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
    """Return the margin by which the denoiser has come to favour the chosen image over the rejected one.

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


def preferred_change(errors: Errors, preference: Tensor | float, label_smoothing: float = 0.0) -> Tensor:
    """Return the logarithm of the factor by which the preferred image's error has risen, |2p - 1| times.

    Of a tie none is preferred. Half of it is the change of the negative log-likelihood of each value of the preferred
    image under normal errors whose variance is fitted: the supervised term of RPO (`rpo_alpha` in TRL), in the same
    units for every model, whatever its errors and beta. A preference loss is content where both errors rise as long
    as the rejected image's rises more; this keeps the denoiser on what is drawn.

    Args:
        errors: Errors of B pairs; without reference, the logarithm of the error is returned, whose gradient is the
            same.
        preference: P(chosen preferred to rejected), (B,) or a number.
        label_smoothing: As in `bradley_terry_loss`.

    Source:
        Liu et al., Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial
        Regularizer (https://arxiv.org/abs/2405.16436).
    """
    target = _smooth(preference, label_smoothing, errors.chosen)
    chosen, rejected = _log(errors.chosen), _log(errors.rejected)
    if errors.reference_chosen is not None and errors.reference_rejected is not None:
        chosen, rejected = chosen - _log(errors.reference_chosen), rejected - _log(errors.reference_rejected)
    return (2 * target - 1).abs() * torch.where(target >= 0.5, chosen, rejected)


def _log(errors: Tensor) -> Tensor:
    return errors.clamp(min=torch.finfo(errors.dtype).tiny).log()


LOSSES: dict[str, Callable[[Errors, Tensor | float, float, float], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "bt": bt,
    "mapo": mapo,
    "sft": sft,
}
REFERENCE_FREE = frozenset({"bt", "mapo", "sft"})


# --- Shared ---


def _margin_to_reference(errors: Errors, beta: float, name: str) -> Tensor:
    if errors.reference_chosen is None:
        raise ValueError(
            f"The loss {name!r} needs the errors of the reference (the adapter off), but got none: give them, or take "
            f"one of {', '.join(sorted(REFERENCE_FREE))}."
        )
    return denoising_margin(errors, beta)


def _smooth(preference: Tensor | float, label_smoothing: float, like: Tensor) -> Tensor:
    """Return the target of `bradley_terry_loss`: p (1 - label_smoothing) + (1 - p) label_smoothing."""
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"`label_smoothing` should be in [0, 0.5], but got {label_smoothing}.")
    target = torch.as_tensor(preference, dtype=like.dtype, device=like.device)
    return target * (1 - label_smoothing) + (1 - target) * label_smoothing


def _mapo_score(error: Tensor) -> Tensor:
    """Return x / (exp(x) - 1) of x = `MAPO_SNR` error >= 0, with finite gradients: 1 at 0, and falling to 0."""
    x = MAPO_SNR * error
    near = x < 0.01  # 0 / 0 at 0, and differences of large numbers in the gradient close to it
    safe = torch.where(near, torch.ones_like(x), x)
    # exp(-x) / (1 - exp(-x)) instead of 1 / (exp(x) - 1): exp(x) overflows.
    return torch.where(near, 1 - x / 2 + x * x / 12, -safe * torch.exp(-safe) / torch.expm1(-safe))
