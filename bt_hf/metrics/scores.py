"""Metrics of a Bradley-Terry model, with the intervals and tests that say how far to believe them.

Everything here is a function of margins, `reward(chosen) - reward(rejected)`, one per pair. The model's
probability that the chosen image wins is `sigmoid(margin)`. Optional columns follow the row contract:
`preference` in [0, 1] is the probability that the chosen image wins (default 1.0; 0.5 is a tie) and `weight >= 0`
says how much a pair counts (default 1.0). Arrays, lists and CPU tensors are all accepted.

Example:
    >>> from bt_hf.metrics.scores import preference_metrics
    >>> preference_metrics([2.0, 1.0, -0.5, 0.3])["accuracy"]
    0.75
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram; only bins that hold pairs are made."""

    low: float  # edges of the bin, on the confidence axis
    high: float
    pairs: int
    weight: float
    confidence: float  # mean of max(p, 1 - p)
    agreement: float  # how often the image the model favours won
    agreement_low: float  # 95 % Wilson interval of `agreement`
    agreement_high: float


class McNemarResult(NamedTuple):
    """The pairs on which two models disagree, and the probability of so lopsided a split by luck alone."""

    n_better: int
    n_worse: int
    p_value: float


def preference_accuracy(
    margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None
) -> float:
    """Share of pairs on which the sign of the margin agrees with the preference.

    A margin of exactly 0 counts one half: the model would toss a coin. Rows with a preference of exactly 0.5 are left
    out, as no answer is right or wrong there; [`log_loss`] and [`brier_score`] do judge them.

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
    margins, preference, weight = _columns(margins, preference, weight)
    judged = preference != 0.5
    return _mean(agreement(margins, preference)[judged], weight[judged])


def agreement(margins: ArrayLike, preference: ArrayLike | None = None) -> Floats:
    """Per pair: 1 where the margin agrees with the preference, 0 where it doesn't, 1/2 where the margin is 0.

    This is what [`mcnemar_test`] and its companions compare between two models.

    Args:
        margins: (N,) margins.
        preference: (N,) in [0, 1]. Default 1.0.

    Returns:
        (N,) floats; nan where the preference is 0.5.

    Example:
        >>> agreement([1.0, -1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 0.5]).tolist()
        [1.0, 0.0, 0.5, nan]
    """
    margins, preference, _ = _columns(margins, preference, None)
    correct = 0.5 + 0.5 * np.sign(margins) * np.sign(preference - 0.5)
    return np.where(preference == 0.5, np.nan, correct)


def log_loss(margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None) -> float:
    """Mean cross-entropy of `sigmoid(margin)` against the preference, in nats: the Bradley-Terry loss itself.

    A model that knows nothing scores log 2 = 0.693. With soft preferences the best score is their entropy, not 0.

    Args:
        margins, preference, weight: (N,) columns, as for [`preference_accuracy`].

    Returns:
        `float`, or nan without rows.

    Example:
        >>> round(log_loss([0.0, 0.0]), 3)
        0.693
    """
    margins, preference, weight = _columns(margins, preference, weight)
    # -log sigmoid(x) = log(1 + exp(-x)), written so that large margins neither overflow nor round to log(0).
    losses = preference * np.logaddexp(0, -margins) + (1 - preference) * np.logaddexp(0, margins)
    return _mean(losses, weight)


def brier_score(margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None) -> float:
    """Mean squared difference between `sigmoid(margin)` and the preference: 0.25 knows nothing, 0 is perfect.

    Args:
        margins, preference, weight: (N,) columns, as for [`preference_accuracy`].

    Returns:
        `float`, or nan without rows.

    Example:
        >>> brier_score([0.0, 0.0])
        0.25
    """
    margins, preference, weight = _columns(margins, preference, weight)
    return _mean((_sigmoid(margins) - preference) ** 2, weight)


def calibration_error(
    margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None, bins: int = 10
) -> float:
    """Expected calibration error: how far the model's confidence is from how often it is right.

    Swapping the two images of a pair turns p into 1 - p and changes nothing, so the error must not depend on which of
    them is called chosen. Hence each pair enters with the confidence `max(p, 1 - p)` in [0.5, 1] of the image the
    model favours, against the preference for that image (1/2 when the margin is 0). Ties take part as preferences
    of 0.5. The bins have equal width. With few pairs the error is biased upwards, as each bin is noisy: compare models
    on the same pairs, and look at [`reliability_bins`].

    Source: Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equation 3.

    Args:
        margins, preference, weight: (N,) columns, as for [`preference_accuracy`].
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
    margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None, bins: int = 10
) -> list[ReliabilityBin]:
    """Confidence against agreement in equal bins on [0.5, 1]; see [`calibration_error`].

    Args:
        margins, preference, weight: (N,) columns, as for [`preference_accuracy`].
        bins: Number of equal bins on [0.5, 1]. Default 10.

    Returns:
        The bins with a positive weight, in order of confidence.

    Example:
        >>> [(bin.low, bin.pairs, bin.agreement) for bin in reliability_bins([0.0, 9.0, 9.0, -9.0, 9.0], bins=2)]
        [(0.5, 1, 0.5), (0.75, 4, 0.75)]
    """
    if bins < 1:
        raise ValueError(f"`bins` should be at least 1, but it is {bins}.")
    margins, preference, weight = _columns(margins, preference, weight)
    confidence = _sigmoid(np.abs(margins))
    agrees = np.select([margins > 0, margins < 0], [preference, 1 - preference], 0.5)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)  # the last bin holds 1.0 too
    found = []
    for i in range(bins):
        inside = (index == i) & (weight > 0)
        if not inside.any():
            continue
        rate, effective = _mean(agrees[inside], weight[inside]), effective_sample_size(weight[inside])
        found.append(
            ReliabilityBin(
                0.5 + i / (2 * bins),
                0.5 + (i + 1) / (2 * bins),
                int(inside.sum()),
                float(weight[inside].sum()),
                _mean(confidence[inside], weight[inside]),
                rate,
                *wilson_interval(rate * effective, effective),
            )
        )
    return found


def preference_metrics(
    margins: ArrayLike, preference: ArrayLike | None = None, weight: ArrayLike | None = None
) -> dict[str, float]:
    """Every metric of this module at once, under the names that the trainers log.

    Args:
        margins, preference, weight: (N,) columns, as for [`preference_accuracy`].

    Returns:
        `accuracy` with its 95 % Wilson interval `accuracy_low` and `accuracy_high` (ties left out; with weights, at
        the effective sample size), `log_loss`, `brier_score`, `calibration_error`, and `margin`, the mean margin.

    Example:
        >>> sorted(preference_metrics([1.0, 2.0]))[:3]
        ['accuracy', 'accuracy_high', 'accuracy_low']
    """
    margins, preference, weight = _columns(margins, preference, weight)
    accuracy = preference_accuracy(margins, preference, weight)
    effective = effective_sample_size(weight[preference != 0.5])
    low, high = wilson_interval(accuracy * effective if effective else 0.0, effective)
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": log_loss(margins, preference, weight),
        "brier_score": brier_score(margins, preference, weight),
        "calibration_error": calibration_error(margins, preference, weight),
        "margin": _mean(margins, weight),
    }


def effective_sample_size(weight: ArrayLike) -> float:
    """Number of equally weighted rows that would be as informative: (Σw)² / Σw² (Kish, "Survey Sampling", 1965).

    Example:
        >>> effective_sample_size([1.0, 1.0, 1.0, 0.0])
        3.0
    """
    weight = _finite("weight", weight)
    largest = weight.max(initial=0.0)
    scaled = weight / largest if largest else weight  # so that tiny weights don't vanish when squared
    return float(scaled.sum() ** 2 / (scaled**2).sum()) if largest else 0.0


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
    z = _z(confidence)
    if not (math.isfinite(n) and -1e-9 <= successes <= n + 1e-9):
        raise ValueError(f"`successes` should be between 0 and `n`, but it is {successes} of {n}.")
    if n <= 0:
        return 0.0, 1.0
    rate = min(max(successes / n, 0.0), 1.0)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_test(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemarResult:
    """McNemar's exact test: do two models differ in accuracy on the same pairs?

    Only pairs on which they differ carry information. If the models were equally good, each would win half of them,
    so the p-value is the two-sided binomial probability of a split at least this uneven.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996.

    Args:
        correct_a: (N,) correctness of the model in question in [0, 1] or booleans, as [`agreement`] returns it.
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
    interval, which then covers well even for small N. It is not the inversion of [`mcnemar_test`]; close to the limit
    the two may disagree on whether 0 is possible.

    Source: Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions",
    https://doi.org/10.1002/sim.1781.

    Args:
        correct_a: (N,) correctness of the model in question; see [`mcnemar_test`].
        correct_b: (N,) the same for the model it is compared with.
        confidence: Coverage in (0, 1). Default 0.95.

    Returns:
        `(low, high)` within [-1, 1].

    Example:
        >>> low, high = paired_difference_interval([1] * 8 + [0] * 2, [1] * 4 + [0] * 6)
        >>> round(low, 2), round(high, 2)
        (0.02, 0.65)
    """
    z = _z(confidence)
    difference = np.subtract(*_paired(correct_a, correct_b))
    if not len(difference):
        return -1.0, 1.0
    n = len(difference) + 2
    total = float(difference.sum())
    centre = total / n
    half = z * math.sqrt(float((difference**2).sum()) + 1 - total**2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def pairs_needed(n_better: int, n_worse: int, n: int, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """About how many more pairs would make [`mcnemar_test`] significant, if the difference is as large as it looks.

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
    k = _z(1 - alpha) * math.sqrt(unequal) + NormalDist().inv_cdf(power) * math.sqrt(unequal - d**2)
    total = ((k + math.sqrt(k**2 + 4 * d)) / (2 * d)) ** 2
    return max(1, math.ceil(total) - n)


def verdict_sentence(correct_a: ArrayLike, correct_b: ArrayLike, other: str = "the base", alpha: float = 0.05) -> str:
    """One plain sentence: is the model better than the other, worse, or is it too early to tell?

    Args:
        correct_a: (N,) correctness of the model in question; see [`mcnemar_test`].
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
    """Exact two-sided binomial p-value at probability 1/2, in logarithms so that large counts don't overflow."""
    n, fewer = n_better + n_worse, min(n_better, n_worse)
    k = np.arange(fewer)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n - k) / (k + 1)))])  # log C(n, 0), ..., log C(n, fewer)
    return min(1.0, 2 * float(np.exp(log_choose - n * math.log(2)).sum()))


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` should be between 0 and 1, but it is {confidence}.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x))


def _mean(values: Floats, weight: Floats) -> float:
    return float(np.average(values, weights=weight)) if weight.sum() > 0 else math.nan


def _columns(
    margins: ArrayLike, preference: ArrayLike | None, weight: ArrayLike | None
) -> tuple[Floats, Floats, Floats]:
    """Checks the three columns and fills in the defaults."""
    margins = _finite("margins", margins)
    preference = np.ones_like(margins) if preference is None else _finite("preference", preference, len(margins))
    weight = np.ones_like(margins) if weight is None else _finite("weight", weight, len(margins))
    _check("preference", preference, (preference >= 0) & (preference <= 1), "between 0 and 1")
    _check("weight", weight, weight >= 0, "0 or more")
    return margins, preference, weight


def _paired(correct_a: ArrayLike, correct_b: ArrayLike) -> tuple[Floats, Floats]:
    """Checks the correctness of two models on the same pairs, and leaves out the ties."""
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"`correct_a` and `correct_b` should have the same shape (N,), but have {a.shape}, {b.shape}."
        )
    ties = np.isnan(a) & np.isnan(b)
    for name, values in (("correct_a", a), ("correct_b", b)):
        _check(name, values, ties | ((values >= 0) & (values <= 1)), "between 0 and 1")
    return a[~ties], b[~ties]


def _finite(name: str, values: ArrayLike, length: int | None = None) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    expected = "(N,)" if length is None else f"({length},)"
    if array.ndim != 1 or length not in (None, len(array)):
        raise ValueError(f"`{name}` should have the shape {expected}, one number a pair, but has {array.shape}.")
    _check(name, array, np.isfinite(array), "a finite number")
    return array


def _check(name: str, values: Floats, good: NDArray[np.bool_], expected: str) -> None:
    if not good.all():
        index = int(np.argmin(good))
        raise ValueError(f"`{name}` should be {expected}, but `{name}[{index}]` is {values[index]}.")
