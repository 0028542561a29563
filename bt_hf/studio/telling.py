"""Accuracy so far, the person's agreement with themselves, and what these say in a sentence."""

import math
from collections.abc import Sequence
from typing import Any

from bt_hf.data.clicks import CHOICES, Click
from bt_hf.reward.running import Prediction, RunningAccuracy, Share, agree_with_oneself

NOTHING = "Nothing to judge by yet: each click is predicted before it is learnt from."
_POINTS = 300  # at most, of the curve


def tell(clicks: Sequence[Click]) -> dict[str, Any]:
    """Return what the predictions that were made before each click say.

    Args:
        clicks: Clicks that stand, in their order, with what was predicted.

    Returns:
        `accuracy` (of now, with its `curve`; `None` before the first random pair), `self` (share of repeated pairs
        that were answered alike; `None` without any), `verdict` and `worth` (sentences).
    """
    clicks = [click for click in clicks if click.asked.kind != "blind" and CHOICES[click.choice] is not None]
    running = RunningAccuracy(
        Prediction(click.model or 0.0, click.base, float(CHOICES[click.choice] or 0.0), click.asked.kind == "random")
        for click in clicks
        if click.base is not None
    )
    repeated = agree_with_oneself((one.asked.left, one.asked.right, CHOICES[one.choice]) for one in clicks)
    return {
        "accuracy": {**_point(running.now), "curve": _thinned(running.curve)} if running.now.n else None,
        "self": None if repeated is None else {"n": repeated[0], "share": repeated[1]},
        "verdict": running.verdict if running.now.n else NOTHING,
        "worth": running.worth(repeated) if running.now.n else None,
    }


def _point(share: Share) -> dict[str, Any]:
    values = share._asdict()
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _thinned(curve: Sequence[Share]) -> list[dict[str, Any]]:
    """Return the points of the curve, the newest among them, and not more than a page can draw."""
    step = max(1, math.ceil(len(curve) / _POINTS))
    return [_point(share) for share in curve[::-1][::step][::-1]]
