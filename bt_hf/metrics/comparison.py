"""Comparison of two models on the same pairs: test, interval, further pairs needed, and a sentence for people."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bt_hf.metrics.columns import Floats, check_values, finite_column
from bt_hf.metrics.intervals import effective_sample_size, normal_quantile

_ENOUGH = 20  # clusters on which a clear taste would have shown


class McNemarResult(NamedTuple):
    """Pairs on which two models disagree, and the probability of so lopsided a split by luck alone."""

    n_better: int
    n_worse: int
    p_value: float


def mcnemar_test(
    correct_a: ArrayLike, correct_b: ArrayLike, weight: ArrayLike | None = None, cluster: ArrayLike | None = None
) -> McNemarResult:
    """McNemar's exact test: do two models differ in accuracy on the same pairs?

    Only pairs on which they differ carry information. If the models were equally good, each would win half of them,
    so the p-value is the two-sided binomial probability of a split at least this uneven.

    Pairs of one cluster (copies of a pair, pairs of one prompt) stand or fall together and are one piece of evidence.
    Given `cluster` or unequal weights, the statistic is the weighted sum of differences, as in Durkalski et al., and
    its exact distribution is that under a change of sign of whole clusters. Clusters of one pair with equal weights
    give McNemar's test itself.

    Sources: McNemar 1947, https://doi.org/10.1007/BF02295996; Durkalski, Palesch, Lipsitz and Rust 2003, "Analysis of
    clustered matched-pair data", https://doi.org/10.1002/sim.1438; its distribution by Fisher's randomization of signs
    ("The Design of Experiments", 1935, section 21), above 20 unequal clusters by 99,999 random ones as in Phipson and
    Smyth 2010, https://doi.org/10.2202/1544-6115.1585.

    Args:
        correct_a: (N,) correctness of the model in question in [0, 1] or booleans, as `agreement` returns it.
            Rows that are nan in both are ties and are left out.
        correct_b: (N,) the same for the model it is compared with, on the same pairs in the same order.
        weight: (N,) how much each pair counts, >= 0. Default: all alike.
        cluster: (N,) label of the cluster of each pair. Default: each pair is one.

    Returns:
        `McNemarResult(n_better, n_worse, p_value)`, better and worse as seen from model a, counted in clusters.

    Raises:
        ValueError: If the columns have different lengths, or values that aren't in [0, 1].

    Example:
        >>> n_better, n_worse, p_value = mcnemar_test([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
        >>> n_better, n_worse, round(p_value, 5)
        (6, 0, 0.03125)
        >>> mcnemar_test([1] * 8, [0] * 8, cluster=[1, 1, 1, 1, 2, 2, 2, 2])  # two pairs, four times each
        McNemarResult(n_better=2, n_worse=0, p_value=0.5)
    """
    a, b, weight, cluster = _paired(correct_a, correct_b, weight, cluster)
    sums = _cluster_sums(weight * (a - b), cluster)
    if len(sums) == len(a) and (weight == weight[:1]).all():
        sums = np.sign(sums)
    return McNemarResult(int((sums > 0).sum()), int((sums < 0).sum()), sign_flip_test(sums))


def paired_difference_interval(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    confidence: float = 0.95,
    weight: ArrayLike | None = None,
    cluster: ArrayLike | None = None,
) -> tuple[float, float]:
    """Interval for accuracy(a) - accuracy(b) on the same pairs: the adjusted Wald interval of Agresti and Min.

    It adds half a pair to each of the four cells (both right, only a, only b, both wrong) before taking the usual
    interval, which then covers well even for small N. It is not the inversion of `mcnemar_test`; close to the limit
    the two may disagree on whether 0 is possible. Clusters and weights make pairs worth fewer (Kish, "Survey
    Sampling", 1965), and the variance is that of the sums of clusters.

    Source: Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions",
    https://doi.org/10.1002/sim.1781.

    Args:
        correct_a: (N,) correctness of the model in question; see `mcnemar_test`.
        correct_b: (N,) the same for the model it is compared with.
        confidence: Coverage in (0, 1). Default 0.95.
        weight, cluster: (N,) as in `mcnemar_test`.

    Returns:
        `(low, high)` within [-1, 1].

    Example:
        >>> low, high = paired_difference_interval([1] * 8 + [0] * 2, [1] * 4 + [0] * 6)
        >>> round(low, 2), round(high, 2)
        (0.02, 0.65)
    """
    z = normal_quantile(confidence)
    a, b, weight, cluster = _paired(correct_a, correct_b, weight, cluster)
    weights = _cluster_sums(weight, cluster)
    if not weights.sum():
        return -1.0, 1.0
    size = effective_sample_size(weights)
    scale = size / weights.sum()
    weights, sums = scale * weights, scale * _cluster_sums(weight * (a - b), cluster)
    n, total = size + 2, float(sums.sum())
    centre = total / n
    half = z * math.sqrt(max(0.0, float((sums**2).sum()) + 1 - centre * float((weights * sums).sum()))) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def pairs_needed(n_better: int, n_worse: int, n: int, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """About how many more pairs would make `mcnemar_test` significant, if the difference is as large as it looks.

    The number of pairs is the one that gives the test the wanted power (Connor 1987, "Sample size for testing
    differences in proportions for the paired-sample design", https://doi.org/10.2307/2531961), with two changes. The
    rates at which one model beats the other are estimated with half a pair added to each cell, as a streak on few
    pairs exaggerates. And a continuity correction (solve n·d - 1 = √n·k instead of n·d = √n·k) accounts for the exact
    test, which asks for a little more than the normal approximation.

    Collect them, then test once. Testing after every pair until p falls below `alpha` finds differences that aren't
    there.

    Args:
        n_better: Pairs on which only the model in question is right.
        n_worse: Pairs on which only the other one is right.
        n: All pairs compared so far, including those on which both agree.
        power: Probability that the larger test is significant, in (0, 1). Default 0.8.
        alpha: Significance level, in (0, 1). Default 0.05.

    Returns:
        The number of further pairs; 0 if the difference is significant already; None if the model is no better so
        far, as then nothing says that more pairs would help.

    Raises:
        ValueError: If a count is negative, or there are more unequal pairs than pairs.

    Example:
        >>> pairs_needed(n_better=7, n_worse=3, n=30)
        156
    """
    if min(n_better, n_worse) < 0 or n_better + n_worse > n:
        raise ValueError(f"`n_better` and `n_worse` should add up to at most `n`={n}, got {n_better} and {n_worse}.")
    if n_better <= n_worse:
        return None
    if _sign_test(n_better, n_worse) < alpha:
        return 0
    unequal = (n_better + n_worse + 1) / (n + 2)
    d = (n_better - n_worse) / (n + 2)
    k = normal_quantile(1 - alpha) * math.sqrt(unequal) + NormalDist().inv_cdf(power) * math.sqrt(unequal - d**2)
    total = ((k + math.sqrt(k**2 + 4 * d)) / (2 * d)) ** 2
    return max(1, math.ceil(total) - n)


def verdict_sentence(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    other: str = "the base",
    alpha: float = 0.05,
    weight: ArrayLike | None = None,
    cluster: ArrayLike | None = None,
    cluster_name: str = "prompts",
    learning: bool = False,
) -> str:
    """One plain sentence: is the model better than the other, worse, or is it too early to tell?

    Args:
        correct_a: (N,) correctness of the model in question; see `mcnemar_test`.
        correct_b: (N,) the same for the model it is compared with.
        other: What to call the latter. Default `"the base"`.
        alpha: Significance level. Default 0.05.
        weight: (N,) as in `mcnemar_test`; the accuracies are weighted, too.
        cluster: (N,) as in `mcnemar_test`.
        cluster_name: What the sentence calls clusters, in the plural. Default `"prompts"`.
        learning: The model was still learning when it predicted these pairs. Default False.

    Returns:
        The sentence. From 20 clusters on, where neither model is significantly better than a coin, it says that the
        clicks look random, instead of how many more would tell; not of a model that was learning, as its first
        predictions are no better than a coin whatever the clicks.

    Example:
        >>> verdict_sentence([1] * 12 + [0] * 3, [1] * 4 + [0] * 11)
        'Better than the base: 80 % against 27 % on the same 15 pairs (p = 0.008).'
        >>> verdict_sentence([1, 1, 1, 0], [1, 1, 0, 0])
        'Not enough evidence yet: 75 % against 50 % on the same 4 pairs (p = 1.00); about 100 more pairs would tell.'
    """
    a, b, weight, cluster = _paired(correct_a, correct_b, weight, cluster)
    if not weight.sum():
        return f"Not enough evidence yet: there is no pair to compare with {other} on."
    better, worse, p = mcnemar_test(a, b, weight, cluster)
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    groups = len(np.unique(cluster))
    pairs_text = "1 pair" if len(a) == 1 else f"{len(a)} pairs"
    if groups < len(a):
        pairs_text += f" of {groups} {cluster_name if groups > 1 else cluster_name.removesuffix('s')}"
    rates = [float(np.average(values, weights=weight)) for values in (a, b)]
    facts = f"{rates[0]:.0%} against {rates[1]:.0%} on the same {pairs_text} ({p_text})".replace("%", " %")
    if p < alpha:
        return f"{'Better' if rates[0] > rates[1] else 'Worse'} than {other}: {facts}."
    chance = [sign_flip_test(_cluster_sums(weight * (2 * values - 1), cluster)) for values in (a, b)]
    if groups >= _ENOUGH and min(chance) >= alpha and not learning:
        return (
            f"The clicks look random: {facts}, and neither is significantly better than a coin. Look whether chosen "
            "and rejected were mixed up, or the pictures differ in nothing that matters to you; more of the same "
            "clicks would not help."
        )
    more = pairs_needed(better, worse, groups, alpha=alpha)
    if more is None:
        return f"Not enough evidence yet: {facts}; no better than {other} so far."
    unit = "pairs" if groups == len(a) else cluster_name
    return f"Not enough evidence yet: {facts}; about {_two_digits(more)} more {unit} would tell."


def sign_flip_test(sums: ArrayLike) -> float:
    """Two-sided probability that independent sums, each with a random sign, add up to at least as much.

    Exact for sums of one size (where it is the binomial test), for multiples of one half, and for up to 20 others;
    else by 99,999 random signs. Sources: see `mcnemar_test`.

    Args:
        sums: (M,) sums of independent groups; zeros say nothing.

    Returns:
        The p-value, 1 without sums.

    Example:
        >>> sign_flip_test([1, 1, 1, 1]), sign_flip_test([8, 8, 8, 8])
        (0.125, 0.125)
    """
    found = finite_column("sums", sums)
    largest = np.abs(found).max(initial=0.0)
    found = found[np.abs(found) > 1e-12 * largest]
    sizes, observed = np.abs(found), abs(float(found.sum())) - 1e-9 * largest
    if not len(found) or np.ptp(sizes) <= 1e-9 * largest:
        return _sign_test(int((found > 0).sum()), int((found < 0).sum()))
    steps = np.rint(2 * sizes).astype(int)
    if np.abs(2 * sizes - steps).max() < 1e-9 and steps.sum() <= 10**5:
        reached = np.ones(1)  # probability of each sum, from -total to total by 2
        for step in steps:
            after = np.zeros(len(reached) + step)
            after[: len(reached)] += reached / 2
            after[step:] += reached / 2
            reached = after
        values = np.arange(len(reached)) - (len(reached) - 1) / 2
        return min(1.0, float(reached[np.abs(values) >= observed].sum()))
    if len(sizes) <= 20:
        totals = np.zeros(1)
        for size in sizes:
            totals = np.concatenate([totals + size, totals - size])
        return float((np.abs(totals) >= observed).mean())
    rng, count, drawn = np.random.default_rng(0), 0, 99_999
    for start in range(0, drawn, 1000):
        signs = rng.integers(0, 2, (min(1000, drawn - start), len(sizes))) * 2 - 1
        count += int((np.abs(signs @ sizes) >= observed).sum())
    return (count + 1) / (drawn + 1)


def _two_digits(value: int) -> int:
    """Rounds up to two leading digits: an estimate shouldn't look more precise than it is."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return math.ceil(value / unit) * unit


def _sign_test(n_better: int, n_worse: int) -> float:
    """Exact two-sided binomial p-value at probability 1/2."""
    from scipy.stats import binomtest  # takes longer to import than everything else here

    return float(binomtest(n_better, n_better + n_worse).pvalue) if n_better + n_worse else 1.0


def _cluster_sums(values: Floats, cluster: NDArray[np.int_]) -> Floats:
    return np.bincount(cluster, weights=values).astype(np.float64) if len(values) else np.zeros(0)


def _paired(
    correct_a: ArrayLike, correct_b: ArrayLike, weight: ArrayLike | None, cluster: ArrayLike | None
) -> tuple[Floats, Floats, Floats, NDArray[np.int_]]:
    """Checks the columns, leaves out ties and pairs without weight, and numbers the clusters."""
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"`correct_a` and `correct_b` should have the same shape (N,), but have {a.shape}, {b.shape}."
        )
    ties = np.isnan(a) & np.isnan(b)
    for name, values in (("correct_a", a), ("correct_b", b)):
        check_values(name, values, ties | ((values >= 0) & (values <= 1)), "between 0 and 1")
    weight = np.ones(len(a)) if weight is None else finite_column("weight", weight, len(a))
    check_values("weight", weight, weight >= 0, "0 or more")
    labels = np.arange(len(a)) if cluster is None else np.asarray(cluster)
    if labels.shape != a.shape:
        raise ValueError(f"`cluster` should have the shape ({len(a)},), one label a pair, but has {labels.shape}.")
    counts = ~ties & (weight > 0)
    return a[counts], b[counts], weight[counts], np.unique(labels[counts], return_inverse=True)[1]
