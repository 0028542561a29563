"""Accuracy while clicking, against scipy, prefixes of the clicks, and counts by hand."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from bt_hf.metrics import pairs_needed
from bt_hf.reward.running import Prediction, RunningAccuracy, agree_with_oneself


def clicks(count: int, accuracy: float, base: float = 0.5, seed: int = 0, every: int = 4) -> list[Prediction]:
    """Clicks that a taste and a base predict as often rightly as told; one in `every` is of a random pair."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        preference = float(rng.integers(2))
        side = 2 * preference - 1
        right, base_right = rng.random(2) < (accuracy, base)
        found.append(
            Prediction(
                margin=side * rng.exponential() * (1 if right else -1),
                base_margin=side * rng.exponential() * (1 if base_right else -1),
                preference=preference,
                random=number % every == 0,
            )
        )
    return found


def test_the_share_and_its_interval_against_scipy() -> None:
    predictions = clicks(80, 0.8)
    share = RunningAccuracy(predictions).now
    judged = [prediction for prediction in predictions if prediction.random]
    right = sum((one.margin > 0) == (one.preference == 1) for one in judged)
    expected = binomtest(right, 20).proportion_ci(0.95, method="wilson")
    assert (share.clicks, share.n, share.model) == (80, 20, right / 20)
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high))
    assert share.base == sum((one.base_margin > 0) == (one.preference == 1) for one in judged) / 20


def test_chosen_pairs_count_as_clicks_alone() -> None:
    predictions = clicks(40, 0.7)
    changed = [one if one.random else one._replace(margin=-one.margin, base_margin=0.0) for one in predictions]
    assert RunningAccuracy(changed).now == RunningAccuracy(predictions).now


def test_sides_do_not_matter() -> None:
    predictions = clicks(40, 0.7)
    swapped = [Prediction(-one.margin, -one.base_margin, 1 - one.preference, one.random) for one in predictions]
    assert RunningAccuracy(swapped).now == RunningAccuracy(predictions).now


def test_the_curve_is_what_each_moment_knew() -> None:
    predictions = clicks(40, 0.7)
    predictions[8] = predictions[8]._replace(preference=0.5)  # a tie is not a point of it
    curve = RunningAccuracy(predictions).curve
    assert [share.clicks for share in curve] == [number + 1 for number in range(0, 40, 4) if number != 8]
    assert curve == [RunningAccuracy(predictions[: share.clicks]).now for share in curve]


def test_ties_are_left_out_and_a_margin_of_zero_is_half_right() -> None:
    share = RunningAccuracy(
        [Prediction(1.0, 0.0, 1.0, True), Prediction(5.0, 5.0, 0.5, True), Prediction(0.0, -1.0, 0.0, True)]
    ).now
    assert (share.clicks, share.n, share.model, share.base) == (3, 2, 0.75, 0.75)


def test_without_random_pairs_nothing_is_known() -> None:
    for predictions in ([], [Prediction(1.0, 1.0, 1.0, False)], [Prediction(1.0, 1.0, 0.5, True)]):
        running = RunningAccuracy(predictions)
        share = running.now
        assert math.isnan(share.model)
        assert (share.n, share.low, share.high, running.curve) == (0, 0.0, 1.0, [])
        assert running.clicks_needed is None
        assert running.worth() is None
        assert running.verdict.startswith("Not enough evidence yet")


@pytest.mark.parametrize("prediction", [(math.nan, 0.0, 1.0, True), (0.0, math.inf, 1.0, True), (0.0, 0.0, 1.5, True)])
def test_what_is_not_a_prediction(prediction: tuple[float, float, float, bool]) -> None:
    with pytest.raises(ValueError, match=r"margin|preference"):
        RunningAccuracy([Prediction(*prediction)])


# --- How many more ---


def outcome(better: int, worse: int, both: int, every: int = 4) -> RunningAccuracy:
    """Return random pairs on which the taste alone, the base alone or both are right, one in `every` clicks."""
    kinds = [(1.0, -1.0)] * better + [(-1.0, 1.0)] * worse + [(1.0, 1.0)] * both
    rows = [Prediction(*margins, 1.0, True) for margins in kinds]
    return RunningAccuracy(row for one in rows for row in [one, *[one._replace(random=False)] * (every - 1)])


@pytest.mark.parametrize("every", [1, 4])
def test_clicks_needed_are_those_of_random_pairs(every: int) -> None:
    running = outcome(7, 3, 20, every)
    assert running.clicks_needed == every * pairs_needed(7, 3, 30)
    assert (
        running.worth()
        == f"About {160 if every == 1 else 630} more clicks would tell whether it is better than the base."
    )
    assert "more pairs would tell" not in running.verdict
    assert running.verdict.startswith("Not enough evidence yet: 90 % against 77 % on the same 30 pairs")


def test_no_better_than_the_base_promises_nothing() -> None:
    running = outcome(3, 3, 4)
    assert (running.clicks_needed, running.worth()) == (None, None)


def test_worth_ends_where_people_agree_with_themselves_no_more_often() -> None:
    running = outcome(18, 0, 2)
    assert running.clicks_needed == 0
    assert "hardly worth it" in str(running.worth((8, 0.9)))
    for too_few in (None, (3, 0.9)):
        assert "Pairs that come again will tell" in str(running.worth(too_few))
    lower = RunningAccuracy(clicks(400, 0.75, base=0.3))
    assert lower.now.high < 0.98
    assert str(lower.worth((20, 0.98))).endswith("more clicks are worth it.")
    assert "hardly" not in str(lower.worth((20, 0.98)))


# --- Agreement with oneself ---


def test_agreement_with_oneself() -> None:
    first = [(0, 1, 1.0), (2, 3, 0.0), (4, 5, 0.5)]
    assert agree_with_oneself(first) is None
    assert agree_with_oneself([*first, (1, 0, 0.0), (2, 3, 0.0), (5, 4, 0.5)]) == (3, 1.0)
    assert agree_with_oneself([*first, (1, 0, 1.0)]) == (1, 0.0)
    assert agree_with_oneself([*first, (3, 2, 0.5), (5, 4, 1.0)]) == (2, 0.5)  # a tie once, and once not
    assert agree_with_oneself([*first, (1, 0, None)]) is None  # skipped
    assert agree_with_oneself([*first, (1, 0, 0.0), (0, 1, 0.0)]) == (2, 0.5)  # a third time: against the first


def test_the_first_predictions_do_not_make_clicks_look_random() -> None:
    """A taste that is just being learnt is right by chance at first, however sure the person is."""
    clicks = [Prediction(0.0, 1.0 if number % 2 else -1.0, 1.0, True) for number in range(20)]
    clicks += [Prediction(1.0, -1.0 if number % 2 else 1.0, 1.0, True) for number in range(4)]
    verdict = RunningAccuracy(clicks).verdict
    assert verdict.startswith("Not enough evidence yet: 58 % against 50 %")
    assert "random" not in verdict
