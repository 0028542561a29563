"""The metrics against numbers derived by hand, published examples, SciPy and scikit-learn."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, binomtest, multinomial
from sklearn import metrics as sklearn_metrics

from bt_hf.metrics import (
    agreement,
    brier_score,
    calibration_error,
    clustered_sample_size,
    effective_sample_size,
    log_loss,
    mcnemar_test,
    paired_difference_interval,
    pairs_needed,
    preference_accuracy,
    preference_metrics,
    reliability_bins,
    sign_flip_test,
    verdict_sentence,
    wilson_interval,
)

EARLY = "Not enough evidence yet:"


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, 200), rng.integers(0, 2, 200).astype(float), rng.uniform(0, 2, 200)


def discordant(better, worse, both=0, neither=0):
    """Correctness of two models on pairs that only the first, only the second, both or neither got right."""
    cells = [(1, 0)] * better + [(0, 1)] * worse + [(1, 1)] * both + [(0, 0)] * neither
    return np.array(cells, dtype=float).T


def test_import_is_light():
    code = "import sys, bt_hf.metrics; print(sorted({'torch', 'scipy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Accuracy


def test_accuracy_and_agreement_by_hand():
    """Right, wrong, a coin toss, right about the rejected one, and a tie that is left out: 2.5 of 4."""
    margins, preference = [2.0, -1.0, 0.0, -3.0, 9.0], [1.0, 0.7, 1.0, 0.2, 0.5]
    np.testing.assert_array_equal(agreement(margins, preference), [1, 0, 0.5, 1, np.nan])
    assert preference_accuracy(margins, preference) == 0.625
    assert preference_accuracy(margins, preference, [1, 3, 2, 2, 100]) == (1 + 0 + 1 + 2) / 8


def test_accuracy_agrees_with_scikit_learn(sample):
    margins, preference, weight = sample
    expected = sklearn_metrics.accuracy_score(preference, margins > 0, sample_weight=weight)
    assert preference_accuracy(margins, preference, weight) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("margins", "preference", "weight"), [([], None, None), ([1.0], [0.5], None), ([1.0], None, [0.0])]
)
def test_nothing_to_judge(margins, preference, weight):
    assert math.isnan(preference_accuracy(margins, preference, weight))
    result = preference_metrics(margins, preference, weight)
    assert math.isnan(result["accuracy"])
    assert (result["accuracy_low"], result["accuracy_high"]) == (0.0, 1.0)


# Probabilities


def test_log_loss_and_brier_agree_with_scikit_learn(sample):
    margins, preference, weight = sample
    p = expit(margins)
    for w in (None, weight):
        expected = sklearn_metrics.log_loss(preference, p, sample_weight=w)
        assert log_loss(margins, preference, w) == pytest.approx(expected)
        expected = sklearn_metrics.brier_score_loss(preference, p, sample_weight=w)
        assert brier_score(margins, preference, w) == pytest.approx(expected)


def test_soft_preferences_by_hand():
    """At margin log 3, p = 3/4. Preference 1/2: loss -(log 3/4 + log 1/4) / 2, Brier (1/4)²."""
    assert log_loss([math.log(3)], [0.5]) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert brier_score([math.log(3)], [0.5]) == pytest.approx(1 / 16)


def test_large_margins_stay_finite():
    assert log_loss([1e4, -1e4], [1.0, 0.0]) == 0.0
    assert log_loss([-1e4]) == 1e4
    assert brier_score([-1e4]) == 1.0


def test_calibration_error_by_hand():
    """Two pairs at confidence 0.62, three at 0.92, in bins of width 0.1.

    At 0.62 the favoured image won one of two (margin > 0 and preference 1; margin < 0 and preference 1), at 0.92 two
    of three: the gaps 0.12 and 0.2533 average to (2 * 0.12 + 3 * 0.2533) / 5 = 0.2.
    """
    low, high = math.log(0.62 / 0.38), math.log(0.92 / 0.08)
    margins, preference = [low, -low, high, high, -high], [1.0, 1.0, 1.0, 0.0, 0.0]
    assert calibration_error(margins, preference, bins=5) == pytest.approx(0.2)
    first, second = reliability_bins(margins, preference, bins=5)
    assert (first.low, first.high, first.pairs) == (pytest.approx(0.6), pytest.approx(0.7), 2)
    assert (second.confidence, second.agreement) == (pytest.approx(0.92), pytest.approx(2 / 3))
    assert (second.agreement_low, second.agreement_high) == pytest.approx(wilson_interval(2, 3))


def test_metrics_do_not_depend_on_which_image_is_called_chosen(sample):
    margins, preference, weight = sample
    swap = np.random.default_rng(1).integers(0, 2, 200).astype(bool)
    swapped = np.where(swap, -margins, margins), np.where(swap, 1 - preference, preference), weight
    before, after = preference_metrics(*sample), preference_metrics(*swapped)
    before.pop("margin"), after.pop("margin")
    assert after == pytest.approx(before)


def test_calibrated_model_has_a_small_error():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    wins = (rng.uniform(size=20_000) < expit(margins)).astype(float)
    assert calibration_error(margins, wins) < 0.02
    assert calibration_error(4 * margins, wins) > 0.1  # overconfident
    assert calibration_error(margins, expit(margins)) == pytest.approx(0)


# Intervals


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17, table I
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_published_examples(successes, n, expected):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_by_hand():
    """15 of 20, z² = 3.8415: (0.75 + 0.0960) / 1.1921 = 0.7097, give or take 1.6442 · √0.011776 = 0.1784."""
    assert wilson_interval(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_wilson_agrees_with_scipy(confidence):
    expected = binomtest(7, 9).proportion_ci(confidence, method="wilson")
    assert wilson_interval(7, 9, confidence) == pytest.approx(tuple(expected))


def test_effective_sample_size():
    assert effective_sample_size([0.1] * 7) == pytest.approx(7)
    assert effective_sample_size([1e-200, 1e-200]) == pytest.approx(2)
    assert effective_sample_size([3, 1]) == pytest.approx(16 / 10)
    assert effective_sample_size([]) == 0


def test_equal_weights_change_nothing(sample):
    margins, preference, _ = sample
    assert preference_metrics(margins, preference, [0.3] * 200) == pytest.approx(
        preference_metrics(margins, preference)
    )


# Two models on the same pairs


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (6, 0), (3, 7), (5, 5), (40, 20), (3000, 2800)])
def test_mcnemar_agrees_with_scipy(better, worse):
    result = mcnemar_test(*discordant(better, worse, both=4, neither=3))
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert result == (better, worse, pytest.approx(expected))


def test_ties_are_left_out_and_coin_tosses_count():
    a, b = agreement([1.0, 0.0, 2.0], [1.0, 1.0, 0.5]), agreement([-1.0, -1.0, 3.0], [1.0, 1.0, 0.5])
    assert mcnemar_test(a, b)[:2] == (2, 0)


def test_paired_difference_published_example():
    """Agresti, "Categorical Data Analysis": 1,600 people, 150 changed one way and 86 the other: 0.02 to 0.06."""
    low, high = paired_difference_interval(*discordant(150, 86, both=794, neither=570))
    assert (low, high) == pytest.approx((0.0212, 0.0587), abs=1e-4)


def test_paired_difference_covers_the_truth():
    """The interval holds the true difference of 0.4 - 0.1 in about 95 % of all outcomes of 20 pairs."""
    covered = 0.0
    for better in range(21):
        for worse in range(21 - better):
            low, high = paired_difference_interval(*discordant(better, worse, both=20 - better - worse))
            covered += (low <= 0.3 <= high) * multinomial.pmf(
                [better, worse, 20 - better - worse], 20, [0.4, 0.1, 0.5]
            )
    assert covered == pytest.approx(0.942, abs=1e-3)
    assert paired_difference_interval([], []) == (-1.0, 1.0)


@pytest.mark.parametrize(("better", "worse", "n"), [(7, 3, 30), (5, 0, 10), (12, 6, 40), (2, 0, 4)])
def test_pairs_needed_gives_the_power(better, worse, n):
    """Sum over every outcome of the larger experiment, with the rates that the function assumes."""
    total = n + pairs_needed(better, worse, n)
    p_better, p_worse = (better + 0.5) / (n + 2), (worse + 0.5) / (n + 2)
    power = 0.0
    for unequal in range(total + 1):
        wins = np.arange(unequal // 2 + 1, unequal + 1)
        significant = [2 * binom.sf(k - 1, unequal, 0.5) < 0.05 for k in wins]
        chance = binom.pmf(wins, unequal, p_better / (p_better + p_worse))
        power += binom.pmf(unequal, total, p_better + p_worse) * (chance * significant).sum()
    assert 0.79 <= power <= 0.88


def test_pairs_needed_at_the_edges():
    assert pairs_needed(0, 0, 10) is None
    assert pairs_needed(3, 3, 10) is None
    assert pairs_needed(1, 5, 10) is None
    assert pairs_needed(20, 2, 30) == 0
    assert pairs_needed(7, 3, 30, power=0.95) > pairs_needed(7, 3, 30) > pairs_needed(7, 1, 30)
    with pytest.raises(ValueError, match="at most `n`=5"):
        pairs_needed(5, 2, 5)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((10, 1, 14, 5), "Better than the base: 80 % against 50 % on the same 30 pairs (p = 0.012)."),
        ((1, 10, 14, 5), "Worse than the base: 50 % against 80 % on the same 30 pairs (p = 0.012)."),
        ((40, 0, 0, 0), "Better than the base: 100 % against 0 % on the same 40 pairs (p < 0.001)."),
        ((3, 1, 3, 3), f"{EARLY} 60 % against 40 % on the same 10 pairs (p = 0.62); about 120 more pairs would tell."),
        ((2, 2, 3, 3), f"{EARLY} 50 % against 50 % on the same 10 pairs (p = 1.00); no better than the base so far."),
        ((0, 0, 1, 0), f"{EARLY} 100 % against 100 % on the same 1 pair (p = 1.00); no better than the base so far."),
        ((0, 0, 0, 0), f"{EARLY} there is no pair to compare with the base on."),
    ],
)
def test_verdict(cells, expected):
    correct = discordant(*cells) if sum(cells) else ([], [])
    assert verdict_sentence(*correct) == expected


def test_verdict_names_the_other_model():
    assert verdict_sentence(*discordant(12, 0), other="CLIP").startswith("Better than CLIP: ")


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_loss([[1.0]]), r"`margins` should have the shape \(N,\).*\(1, 1\)"),
        (lambda: log_loss(3.0), r"`margins` should have the shape \(N,\).*\(\)"),
        (lambda: log_loss([1.0, math.nan]), r"`margins\[1\]` is nan"),
        (lambda: log_loss([1.0, 2.0], [1.0]), r"`preference` should have the shape \(2,\).*\(1,\)"),
        (lambda: log_loss([1.0, 2.0], [1.0, 1.5]), r"`preference\[1\]` is 1.5"),
        (lambda: log_loss([1.0], weight=[-1.0]), r"`weight\[0\]` is -1.0"),
        (lambda: calibration_error([1.0], bins=0), "`bins` should be at least 1"),
        (lambda: wilson_interval(3, 2), "3 of 2"),
        (lambda: wilson_interval(1, 2, confidence=95), "`confidence` should be between 0 and 1"),
        (lambda: mcnemar_test([1, 0], [1]), r"same shape \(N,\), but have \(2,\), \(1,\)"),
        (lambda: mcnemar_test([1, math.nan], [1, 0]), r"`correct_a\[1\]` is nan"),
        (lambda: mcnemar_test([1, 0], [1, 2]), r"`correct_b\[1\]` is 2"),
    ],
)
def test_errors_name_the_argument_and_the_place(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Clusters and weights


def brute_force(sums):
    """Share of all signs that reach the observed sum."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(sums))))
    return float((np.abs(signs @ np.abs(sums)) >= abs(sum(sums)) - 1e-9).mean())


@pytest.mark.parametrize(
    "sums", [[1, 1, 1, -1], [2, 1, -0.5, 3], [0.3, 0.7, -0.2, 1.1, 0.4], [1, 2, 3, 4, 5, -6], [0, 0, 1.5]]
)
def test_sign_flips_agree_with_all_signs(sums):
    assert sign_flip_test(sums) == pytest.approx(brute_force([value for value in sums if value]))


def test_random_signs_come_near_the_exact_value():
    """Sums of odd sizes, against multiples of one half."""
    sums = np.array([1.0, 2.0, 3.0] * 7) * np.resize([1, 1, 1, -1], 21)
    assert sign_flip_test(sums * 0.37) == pytest.approx(sign_flip_test(sums), abs=0.005)


@pytest.mark.parametrize(("better", "worse"), [(6, 0), (3, 7), (12, 4)])
def test_copies_prove_nothing(better, worse):
    a, b = discordant(better, worse, both=3, neither=2)
    pairs = np.arange(len(a))
    once = mcnemar_test(a, b)
    for times in (2, 8):
        copied = [np.tile(values, times) for values in (a, b, pairs)]
        assert mcnemar_test(*copied[:2], cluster=copied[2]) == pytest.approx(once)
        assert mcnemar_test(*copied[:2]).p_value < once.p_value
        assert paired_difference_interval(*copied[:2], cluster=copied[2]) == pytest.approx(
            paired_difference_interval(a, b)
        )
        margins = np.where(copied[0] > 0, 1.0, -1.0)
        found, alone = preference_metrics(margins, cluster=copied[2]), preference_metrics(margins[: len(a)])
        assert found["accuracy_low"] == pytest.approx(alone["accuracy_low"])
    verdict = verdict_sentence(*copied[:2], cluster=copied[2])
    assert f"{8 * len(a)} pairs of {len(a)} prompts" in verdict


def test_clusters_keep_the_level():
    """Pairs of one prompt agree: McNemar's test on pairs errs far more often than one in twenty, ours does not."""
    rng = np.random.default_rng(0)
    false = np.zeros(2)
    for _ in range(400):
        sides = np.repeat(rng.integers(0, 2, 15), 6)
        noise = rng.random(90) < 0.2
        a = np.where(noise, 1 - sides, sides).astype(float)
        cluster = np.repeat(np.arange(15), 6)
        false += [mcnemar_test(a, 1 - a).p_value < 0.05, mcnemar_test(a, 1 - a, cluster=cluster).p_value < 0.05]
    assert false[0] / 400 > 0.2
    assert false[1] / 400 < 0.08


def test_weights_count_in_the_sentence_as_in_the_table():
    a, b, weight = [1, 0, 1, 0], [0, 0, 1, 1], [5.0, 1.0, 1.0, 3.0]
    assert verdict_sentence(a, b, weight=weight).startswith(f"{EARLY} 60 % against 40 %")
    assert verdict_sentence(a, b, weight=[5.0, 1.0, 1.0, 0.0]).startswith(f"{EARLY} 86 % against 14 % on the same 3")
    equal = verdict_sentence(a, b, weight=[2.0] * 4)
    assert equal == verdict_sentence(a, b)


def test_clustered_size_is_between_clusters_and_rows():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(10), 5)
    assert clustered_sample_size(rng.integers(0, 2, 50), np.ones(50), cluster) > 15  # little in common
    assert clustered_sample_size(cluster % 2, np.ones(50), cluster) == 10  # all in common
    assert clustered_sample_size(np.ones(50), np.ones(50), cluster) == 10
    assert clustered_sample_size(rng.integers(0, 2, 50), np.ones(50), np.arange(50)) == 50


@pytest.mark.parametrize("n", [20, 60, 400])
def test_random_clicks_are_called_so(n):
    rng = np.random.default_rng(1)
    a, b = rng.permutation(n) % 2, rng.permutation(n) % 2
    verdict = verdict_sentence(a, b)
    assert verdict.startswith("The clicks look random: 50 % against 50 %")
    assert "more pairs" not in verdict
    assert "\n" not in verdict


def test_few_clicks_are_not_called_random():
    assert verdict_sentence([1, 0, 1, 0, 1], [1, 0, 0, 1, 0]).startswith(EARLY)


def test_a_taste_that_the_base_has_is_not_called_random():
    assert verdict_sentence([1] * 18 + [0] * 7, [1] * 17 + [0] * 8).startswith(EARLY)


@pytest.mark.parametrize("column", ["weight", "cluster"])
def test_other_lengths_are_refused(column):
    with pytest.raises(ValueError, match=f"`{column}` should have the shape"):
        mcnemar_test([1, 0], [0, 0], **{column: [1.0]})
