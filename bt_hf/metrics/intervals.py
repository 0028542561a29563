"""Intervals of proportions, and how many rows weighted ones are worth."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from bt_hf.metrics.columns import finite_column


def effective_sample_size(weight: ArrayLike) -> float:
    """Number of equally weighted rows that would be as informative: (Σw)² / Σw² (Kish, "Survey Sampling", 1965).

    Example:
        >>> effective_sample_size([1.0, 1.0, 1.0, 0.0])
        3.0
    """
    weight = finite_column("weight", weight)
    largest = weight.max(initial=0.0)
    scaled = weight / largest if largest else weight  # so that tiny weights don't vanish when squared
    return float(scaled.sum() ** 2 / (scaled**2).sum()) if largest else 0.0


def clustered_sample_size(values: ArrayLike, weight: ArrayLike, cluster: ArrayLike) -> float:
    """Number of independent rows that would tell as much about a mean as these, of which some belong together.

    p (1 - p) over the variance of the mean p that sums of clusters give, as in Korn and Graubard 1998, "Confidence
    intervals for proportions with small expected number of positive counts estimated from survey data"; at least the
    number of clusters (copies of a row tell nothing new), at most the number of rows, both after Kish.

    Args:
        values: (N,) in [0, 1].
        weight: (N,) how much each row counts, >= 0.
        cluster: (N,) label of the cluster of each row.

    Example:
        >>> clustered_sample_size([1.0, 1.0, 0.0, 0.0], [1.0] * 4, ["a", "a", "b", "b"])
        2.0
    """
    values, weight = finite_column("values", values), finite_column("weight", weight)
    rows = effective_sample_size(weight)
    if not weight.sum():
        return rows
    _, labels = np.unique(np.asarray(cluster), return_inverse=True)
    mean = float(np.average(values, weights=weight))
    sums = np.bincount(labels, weights=weight * (values - mean))
    variance = float((sums**2).sum()) / float(weight.sum()) ** 2
    groups = effective_sample_size(np.bincount(labels, weights=weight))
    found = mean * (1 - mean) / variance if variance > 0 else groups
    return min(rows, max(groups, found)) if len(np.unique(labels)) < len(labels) else rows


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion: never leaves [0, 1] and is sound for a handful of pairs.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; recommended by Brown, Cai and DasGupta 2001,
    https://doi.org/10.1214/ss/1009213286.

    Args:
        successes: How many succeeded, between 0 and `n`; may be fractional.
        n: Out of how many; may be fractional, such as an effective sample size.
        confidence: Coverage in (0, 1). Default 0.95.

    Returns:
        `(low, high)`; (0, 1) when `n` is 0.

    Raises:
        ValueError: If `successes` isn't between 0 and `n`, or `confidence` isn't in (0, 1).

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(15, 20)]
        [0.531, 0.888]
    """
    z = normal_quantile(confidence)
    if not (math.isfinite(n) and -1e-9 <= successes <= n + 1e-9):
        raise ValueError(f"`successes` should be between 0 and `n`, but it is {successes} of {n}.")
    if n <= 0:
        return 0.0, 1.0
    rate = min(max(successes / n, 0.0), 1.0)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` should be between 0 and 1, but it is {confidence}.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
