"""Accuracy while clicking: each click is predicted before anything is learnt from it.

Such predictions cost no clicks, and no click is judged by a model that has seen it. Pairs that were chosen for what
they teach are harder than others, so only those count that were drawn at random (`asking.py`). The model learns on
while they come in, so early predictions are a little worse than those of the model that there is now.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bt_hf.metrics import agreement, mcnemar_test, pairs_needed, verdict_sentence, wilson_interval

# Significance level of the verdict.
ALPHA = 0.05
# Repeated pairs from which on a person's agreement with themselves is taken for a ceiling.
ENOUGH_REPEATS = 5


class Prediction(NamedTuple):
    """Click on a pair, with the margins that were predicted before it.

    Attributes:
        margin: Reward of the left image minus that of the right one, by the taste learnt from the clicks before.
        base_margin: The same by the untouched base.
        preference: What was clicked: 1 for the left image, 0 for the right one, 0.5 for a tie.
        random: True if the pair was drawn at random.
    """

    margin: float
    base_margin: float
    preference: float
    random: bool


class Share(NamedTuple):
    """Share of random pairs that were predicted rightly, after so many clicks.

    Attributes:
        clicks: Clicks up to then, on random and on chosen pairs.
        n: Random pairs among them with a preference. Of a tie no prediction is right or wrong, and none is counted.
        model: Share that the taste predicted rightly; nan without pairs. A margin of 0 is half right.
        low, high: Its 95 % interval, by Wilson.
        base: Share that the base predicted rightly.
    """

    clicks: int
    n: int
    model: float
    low: float
    high: float
    base: float


class RunningAccuracy:
    """Accuracy of predictions that were made before each click.

    Args:
        predictions: One a click, in the order of the clicks.

    Raises:
        ValueError: A margin is not finite, or a preference is not between 0 and 1.

    Example:
        >>> from bt_hf.reward.running import Prediction, RunningAccuracy
        >>> clicks = [(0.0, 1.0, 0, True), (2.0, -1.0, 1, False), (-1.0, 1.0, 0, True), (3.0, 1.0, 1, True)]
        >>> running = RunningAccuracy(Prediction(*click) for click in clicks)
        >>> share = running.now
        >>> share.n, round(share.model, 2), round(share.low, 2), round(share.high, 2), round(share.base, 2)
        (3, 0.83, 0.31, 0.98, 0.33)
    """

    def __init__(self, predictions: Iterable[Prediction]) -> None:
        rows = list(predictions)
        columns = np.array([row[:3] for row in rows], dtype=float).reshape(-1, 3)
        random = np.array([row.random for row in rows], dtype=bool)
        margin, base_margin, preference = columns.T
        right, base_right = agreement(margin, preference), agreement(base_margin, preference)
        self.clicks = len(rows)
        self._place = np.flatnonzero(random & (preference != 0.5))
        self._right, self._base_right = right[self._place], base_right[self._place]

    @property
    def now(self) -> Share:
        """Share after all clicks."""
        return self._share(self.clicks, len(self._place))

    @property
    def curve(self) -> list[Share]:
        """Share after each random pair with a preference."""
        return [self._share(int(place) + 1, count) for count, place in enumerate(self._place, 1)]

    def _share(self, clicks: int, n: int) -> Share:
        if not n:
            return Share(clicks, 0, math.nan, 0.0, 1.0, math.nan)
        model, base = float(self._right[:n].mean()), float(self._base_right[:n].mean())
        return Share(clicks, n, model, *wilson_interval(model * n, n), base)

    @property
    def verdict(self) -> str:
        """Sentence about the taste against the base on random pairs, as of `metrics.verdict_sentence`."""
        # The number of further pairs that would tell is left to `worth`, as a random pair takes several clicks.
        found, cut, _ = verdict_sentence(self._right, self._base_right, alpha=ALPHA, learning=True).partition(
            "; about "
        )
        return found + "." if cut else found

    @property
    def clicks_needed(self) -> int | None:
        """About how many more clicks would tell that the taste is better than the base; `None` if nothing says so.

        Of all clicks, only a part is on random pairs; as many will be among further ones. See `metrics.pairs_needed`.
        """
        n = len(self._place)
        better, worse, _ = mcnemar_test(self._right, self._base_right)
        more = pairs_needed(better, worse, n, alpha=ALPHA) if n else None
        return None if more is None else math.ceil(more * self.clicks / n)

    def worth(self, repeated: tuple[int, float] | None = None) -> str | None:
        """Sentence about how many more clicks are worth it; `None` if it is too early to tell.

        Args:
            repeated: Number of repeated pairs and the person's agreement with themselves, of `agree_with_oneself`. No
                model can agree with a person more often than they do.
        """
        share, more = self.now, self.clicks_needed
        if more is None:
            return None
        if more:
            return f"About {_two_digits(more)} more clicks would tell whether it is better than the base."
        if repeated is None or repeated[0] < ENOUGH_REPEATS:
            return "It is better than the base already. Pairs that come again will tell how much is left to learn."
        if share.high >= repeated[1]:
            return "It may predict you as often as you repeat yourself: more clicks are hardly worth it."
        return "It predicts you less often than you repeat yourself: more clicks are worth it."


def agree_with_oneself(answered: Iterable[tuple[int, int, float | None]]) -> tuple[int, float] | None:
    """Count how often a person repeats their answer where a pair comes again, on the same sides or swapped.

    Args:
        answered: Left image, right image and preference of each click, as in `select_pairs`.

    Returns:
        The number of answers to pairs that had been answered before, and the share that agrees with the first answer;
        a tie against a preference agrees by half. `None` without any.

    Example:
        >>> from bt_hf.reward.running import agree_with_oneself
        >>> agree_with_oneself([(0, 1, 1.0), (2, 3, 1.0), (1, 0, 0.0), (3, 2, 0.5)])
        (2, 0.75)
    """
    answers: dict[tuple[int, int], list[float]] = defaultdict(list)
    for left, right, preference in answered:
        if preference is not None:
            answers[min(left, right), max(left, right)].append(preference if left < right else 1 - preference)
    agreeing = [
        1 - abs(np.sign(first - 0.5) - np.sign(other - 0.5)) / 2
        for first, *others in answers.values()
        for other in others
    ]
    return (len(agreeing), float(np.mean(agreeing))) if agreeing else None


def _two_digits(value: int) -> int:
    """Round up to two leading digits."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return math.ceil(value / unit) * unit
