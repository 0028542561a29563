"""Comparison of two models on the same pairs: test, interval, further pairs needed, and a sentence for people."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bt_hf.metrics.columns import Floats, check_values
from bt_hf.metrics.intervals import normal_quantile


class McNemarResult(NamedTuple):
    """Pairs on which two models disagree, and the probability of so lopsided a split by luck alone."""

    n_better: int
    n_worse: int
    p_value: float


def mcnemar_test(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemarResult:
    """McNemar's exact test: do two models differ in accuracy on the same pairs?

    Only pairs on which they differ carry information. If the models were equally good, each would win half of them,
    so the p-value is the two-sided binomial probability of a split at least this uneven.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996.

    Args:
        correct_a: (N,) correctness of the model in question in [0, 1] or booleans, as `agreement` returns it.
            Rows that are nan in both are ties and are left out.
        correct_b: (N,) the same for the model it is compared with, on the same pairs in the same order.

    Returns:
        `McNemarResult(n_better, n_worse, p_value)`, better and worse as seen from model a.

    Raises:
        ValueError: If the two have different lengths, or values that aren't in [0, 1].

    Example:
        >>> n_better, n_worse, p_value = mcnemar_test([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
        >>> n_better, n_worse, round(p_value, 5)
        (6, 0, 0.03125)
    """
    difference = np.subtract(*_paired(correct_a, correct_b))
    n_better, n_worse = int((difference > 0).sum()), int((difference < 0).sum())
    return McNemarResult(n_better, n_worse, _sign_test(n_better, n_worse))


def paired_difference_interval(
    correct_a: ArrayLike, correct_b: ArrayLike, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval for accuracy(a) - accuracy(b) on the same pairs: the adjusted Wald interval of Agresti and Min.

    It adds half a pair to each of the four cells (both right, only a, only b, both wrong) before taking the usual
    interval, which then covers well even for small N. It is not the inversion of `mcnemar_test`; close to the limit
    the two may disagree on whether 0 is possible.

    Source: Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions",
    https://doi.org/10.1002/sim.1781.

    Args:
        correct_a: (N,) correctness of the model in question; see `mcnemar_test`.
        correct_b: (N,) the same for the model it is compared with.
        confidence: Coverage in (0, 1). Default 0.95.

    Returns:
        `(low, high)` within [-1, 1].

    Example:
        >>> low, high = paired_difference_interval([1] * 8 + [0] * 2, [1] * 4 + [0] * 6)
        >>> round(low, 2), round(high, 2)
        (0.02, 0.65)
    """
    z = normal_quantile(confidence)
    difference = np.subtract(*_paired(correct_a, correct_b))
    if not len(difference):
        return -1.0, 1.0
    n = len(difference) + 2
    total = float(difference.sum())
    centre = total / n
    half = z * math.sqrt(float((difference**2).sum()) + 1 - total**2 / n) / n
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


def verdict_sentence(correct_a: ArrayLike, correct_b: ArrayLike, other: str = "the base", alpha: float = 0.05) -> str:
    """One plain sentence: is the model better than the other, worse, or is it too early to tell?

    Args:
        correct_a: (N,) correctness of the model in question; see `mcnemar_test`.
        correct_b: (N,) the same for the model it is compared with.
        other: What to call the latter. Default `"the base"`.
        alpha: Significance level. Default 0.05.

    Returns:
        The sentence.

    Example:
        >>> verdict_sentence([1] * 12 + [0] * 3, [1] * 4 + [0] * 11)
        'Better than the base: 80 % against 27 % on the same 15 pairs (p = 0.008).'
        >>> verdict_sentence([1, 1, 1, 0], [1, 1, 0, 0])
        'Not enough evidence yet: 75 % against 50 % on the same 4 pairs (p = 1.00); about 100 more pairs would tell.'
    """
    a, b = _paired(correct_a, correct_b)
    n = len(a)
    if not n:
        return f"Not enough evidence yet: there is no pair to compare with {other} on."
    better, worse, p = mcnemar_test(a, b)
    p_text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    pairs_text = "1 pair" if n == 1 else f"{n} pairs"
    facts = f"{a.mean():.0%} against {b.mean():.0%} on the same {pairs_text} ({p_text})".replace("%", " %")
    if p < alpha:
        return f"{'Better' if better > worse else 'Worse'} than {other}: {facts}."
    more = pairs_needed(better, worse, n, alpha=alpha)
    if more is None:
        return f"Not enough evidence yet: {facts}; no better than {other} so far."
    return f"Not enough evidence yet: {facts}; about {_two_digits(more)} more pairs would tell."


def _two_digits(value: int) -> int:
    """Rounds up to two leading digits: an estimate shouldn't look more precise than it is."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return math.ceil(value / unit) * unit


def _sign_test(n_better: int, n_worse: int) -> float:
    """Exact two-sided binomial p-value at probability 1/2."""
    from scipy.stats import binomtest  # takes longer to import than everything else here

    return float(binomtest(n_better, n_better + n_worse).pvalue) if n_better + n_worse else 1.0


def _paired(correct_a: ArrayLike, correct_b: ArrayLike) -> tuple[Floats, Floats]:
    """Checks the correctness of two models on the same pairs, and leaves out the ties."""
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"`correct_a` and `correct_b` should have the same shape (N,), but have {a.shape}, {b.shape}."
        )
    ties = np.isnan(a) & np.isnan(b)
    for name, values in (("correct_a", a), ("correct_b", b)):
        check_values(name, values, ties | ((values >= 0) & (values <= 1)), "between 0 and 1")
    return a[~ties], b[~ties]
