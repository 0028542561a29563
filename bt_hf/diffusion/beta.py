"""Beta: the hold of a preference loss on the reference, from the options or from the data."""

import torch
from torch import Tensor

# Standard deviation of beta/2 times the difference of a pair's reference errors. Chosen on training prompts of the
# emoji domain: smaller ones cost more of what the pipeline knows, larger ones teach less.
SPREAD = 20.0
MAPO_BETA = 0.1  # MaPO's own script has it; there it weighs two losses, about which the spread of errors says nothing


def fixed_beta(option: float | str | None, loss_type: str, published: float) -> float | None:
    """Return the beta that the options fix, `None` if it follows from the data.

    Args:
        option: A number, "auto" or "published".
        loss_type: MaPO has a beta of its own for both words.
        published: Published beta of the family.
    """
    if isinstance(option, float):
        return option
    if loss_type == "mapo":
        return MAPO_BETA
    return published if option == "published" else None


def auto_beta(reference_chosen: Tensor, reference_rejected: Tensor, spread: float = SPREAD) -> float:
    """Return a beta that means the same for every model: 2 spread / std(reference_chosen - reference_rejected).

    Errors are as large as a model family makes them, so the same beta is strong for one and weak for another, and
    scripts disagree about the half: 5000 in one is 2500 in another, and in the order of 100 for flow models. This beta
    is in units of what the reference itself says about pairs: errors c times as large make it c times smaller.

    Args:
        reference_chosen: Errors of chosen images with the adapter off, one for each pair and noise sample; any shape.
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
            "`auto_beta` needs errors of the same pairs and noise samples, but got the shapes "
            f"{tuple(reference_chosen.shape)} and {tuple(reference_rejected.shape)}."
        )
    difference = (reference_chosen.detach().double() - reference_rejected.detach().double()).flatten()
    if len(difference) < 2:
        raise ValueError(
            f"`auto_beta` needs at least 2 pairs of errors, but got {len(difference)}: give more pairs or noise "
            "samples, or set beta to a number."
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
