"""Scores of a Bradley-Terry model, computed from its margins.

A margin is `reward(chosen) - reward(rejected)`, one per pair. The model's probability that the chosen image wins is
`sigmoid(margin)`. Optional columns follow the row contract: `preference` in [0, 1] is the probability that the chosen
image wins (default 1.0; 0.5 is a tie) and `weight >= 0` says how much a pair counts (default 1.0). Arrays, lists and
CPU tensors are all accepted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bt_hf.metrics.columns import Floats, read_columns, weighted_mean
from bt_hf.metrics.intervals import clustered_sample_size, effective_sample_size, wilson_interval


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram; only bins that hold pairs are made."""

    low: float  # edges of the bin, on the confidence axis
    high: float
    pairs: int
    weight: float
    confidence: float  # mean of max(p, 1 - p)
    agreement: float  # share of pairs whose favoured image won
    agreement_low: float  # 95 % Wilson interval of `agreement`
    agreement_high: float


def preference_accuracy(
    margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None
) -> float:
    """Share of pairs on which the sign of the margin agrees with the preference.

    A margin of exactly 0 counts one half: the model would toss a coin. Rows with a preference of exactly 0.5 are left
    out, as no answer is right or wrong there; `log_loss` and `brier_score` do judge them.

    Args:
        margins: (N,) reward of the chosen image minus that of the rejected one.
        preference: (N,) probability that the chosen image wins, in [0, 1]. Default 1.0.
        weight: (N,) how much each pair counts, >= 0. Default 1.0.

    Returns:
        `float` in [0, 1], or nan when no row can be judged.

    Raises:
        ValueError: If a column has the wrong shape, a value that isn't finite, or one out of range.

    Example:
        >>> preference_accuracy([1.0, -1.0, 0.0, 5.0], preference=[1.0, 0.0, 1.0, 0.5])  # right, right, half, left out
        0.8333333333333334
    """
    margins, preference, weight = read_columns(margins, preference, weight)
    judged = preference != 0.5
    return weighted_mean(agreement(margins, preference)[judged], weight[judged])


def agreement(margins: ArrayLike, preference: ArrayLike | None = None) -> Floats:
    """Per pair: 1 where the margin agrees with the preference, 0 where it doesn't, 1/2 where the margin is 0.

    This is what `mcnemar_test` and its companions compare between two models.

    Args:
        margins: (N,) margins.
        preference: (N,) in [0, 1]. Default 1.0.

    Returns:
        (N,) floats; nan where the preference is 0.5.

    Example:
        >>> agreement([1.0, -1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 0.5]).tolist()
        [1.0, 0.0, 0.5, nan]
    """
    margins, preference, _ = read_columns(margins, preference, None)
    correct = 0.5 + 0.5 * np.sign(margins) * np.sign(preference - 0.5)
    return np.where(preference == 0.5, np.nan, correct)


def log_loss(margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None) -> float:
    """Mean cross-entropy of `sigmoid(margin)` against the preference, in nats: the Bradley-Terry loss itself.

    A model that knows nothing scores log 2 = 0.693. With soft preferences the best score is their entropy, not 0.

    Args:
        margins, preference, weight: (N,) columns, as for `preference_accuracy`.

    Returns:
        `float`, or nan without rows.

    Example:
        >>> round(log_loss([0.0, 0.0]), 3)
        0.693
    """
    margins, preference, weight = read_columns(margins, preference, weight)
    # -log sigmoid(x) = log(1 + exp(-x)), written so that large margins neither overflow nor round to log(0).
    losses = preference * np.logaddexp(0, -margins) + (1 - preference) * np.logaddexp(0, margins)
    return weighted_mean(losses, weight)


def brier_score(margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None) -> float:
    """Mean squared difference between `sigmoid(margin)` and the preference: 0.25 knows nothing, 0 is perfect.

    Args:
        margins, preference, weight: (N,) columns, as for `preference_accuracy`.

    Returns:
        `float`, or nan without rows.

    Example:
        >>> brier_score([0.0, 0.0])
        0.25
    """
    margins, preference, weight = read_columns(margins, preference, weight)
    return weighted_mean((_sigmoid(margins) - preference) ** 2, weight)


def calibration_error(
    margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None, bins: int = 10
) -> float:
    """Expected calibration error: how far the model's confidence is from how often it is right.

    Swapping the two images of a pair turns p into 1 - p and changes nothing, so the error must not depend on which of
    them is called chosen. Hence each pair enters with the confidence `max(p, 1 - p)` in [0.5, 1] of the image the
    model favours, against the preference for that image (1/2 when the margin is 0). Ties take part as preferences
    of 0.5. The bins have equal width. With few pairs the error is biased upwards, as each bin is noisy: compare models
    on the same pairs, and look at `reliability_bins`.

    Source: Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equation 3.

    Args:
        margins, preference, weight: (N,) columns, as for `preference_accuracy`.
        bins: Number of equal bins on [0.5, 1]. Default 10.

    Returns:
        `float` in [0, 1], or nan without rows.

    Example:
        >>> round(calibration_error([0.0, 0.0, 50.0, -50.0]), 3)  # 50 % sure and half right; 100 % sure and half right
        0.25
    """
    found = reliability_bins(margins, preference, weight, bins)
    total = sum(bin.weight for bin in found)
    return sum(bin.weight * abs(bin.confidence - bin.agreement) for bin in found) / total if total else math.nan


def reliability_bins(
    margins: ArrayLike,
    preference: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bins: int = 10,
    equal_count: bool = False,
) -> list[ReliabilityBin]:
    """Confidence against agreement in bins on [0.5, 1]; see `calibration_error`.

    Args:
        margins, preference, weight: (N,) columns, as for `preference_accuracy`.
        bins: Number of bins on [0.5, 1]. Default 10.
        equal_count: Bins of about as many pairs each, rather than of equal width; for few pairs. Default False.

    Returns:
        The bins with a positive weight, in order of confidence.

    Example:
        >>> [(bin.low, bin.pairs, bin.agreement) for bin in reliability_bins([0.0, 9.0, 9.0, -9.0, 9.0], bins=2)]
        [(0.5, 1, 0.5), (0.75, 4, 0.75)]
        >>> [bin.pairs for bin in reliability_bins([0.1, 0.2, 2.0, 3.0], bins=2, equal_count=True)]
        [2, 2]
    """
    if bins < 1:
        raise ValueError(f"`bins` should be at least 1, but it is {bins}.")
    margins, preference, weight = read_columns(margins, preference, weight)
    confidence = _sigmoid(np.abs(margins))
    agrees = np.select([margins > 0, margins < 0], [preference, 1 - preference], 0.5)
    edges = np.array([0.5 + i / (2 * bins) for i in range(bins + 1)])
    if equal_count and (weight > 0).any():
        inner = np.quantile(confidence[weight > 0], np.arange(1, bins) / bins)
        edges = np.unique([0.5, *inner[inner < 1], 1.0])  # many of one confidence share a bin
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, len(edges) - 2)  # the last bin holds 1.0
    found = []
    for i in range(len(edges) - 1):
        inside = (index == i) & (weight > 0)
        if not inside.any():
            continue
        rate, effective = weighted_mean(agrees[inside], weight[inside]), effective_sample_size(weight[inside])
        found.append(
            ReliabilityBin(
                float(edges[i]),
                float(edges[i + 1]),
                int(inside.sum()),
                float(weight[inside].sum()),
                weighted_mean(confidence[inside], weight[inside]),
                rate,
                *wilson_interval(rate * effective, effective),
            )
        )
    return found


def preference_metrics(
    margins: ArrayLike,
    preference: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    cluster: ArrayLike | None = None,
) -> dict[str, float]:
    """Every metric of this module at once, under the names that the trainers log.

    Args:
        margins, preference, weight: (N,) columns, as for `preference_accuracy`.
        cluster: (N,) label of what belongs together, such as the prompt; makes the interval wider. Default: nothing.

    Returns:
        `accuracy` with its 95 % Wilson interval `accuracy_low` and `accuracy_high` (ties left out; with weights, at
        the effective sample size), `log_loss`, `brier_score`, `calibration_error`, and `margin`, the mean margin.

    Example:
        >>> sorted(preference_metrics([1.0, 2.0]))[:3]
        ['accuracy', 'accuracy_high', 'accuracy_low']
    """
    margins, preference, weight = read_columns(margins, preference, weight)
    accuracy = preference_accuracy(margins, preference, weight)
    judged = preference != 0.5
    effective = effective_sample_size(weight[judged])
    if cluster is not None:
        correct = agreement(margins, preference)[judged]
        effective = clustered_sample_size(correct, weight[judged], np.asarray(cluster)[judged])
    low, high = wilson_interval(accuracy * effective if effective else 0.0, effective)
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": log_loss(margins, preference, weight),
        "brier_score": brier_score(margins, preference, weight),
        "calibration_error": calibration_error(margins, preference, weight),
        "margin": weighted_mean(margins, weight),
    }


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x))
