"""Columns of margins, preferences and weights: checked float64 arrays, and their weighted mean."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def read_columns(
    margins: ArrayLike, preference: ArrayLike | None, weight: ArrayLike | None
) -> tuple[Floats, Floats, Floats]:
    """Checks the three columns and fills in the defaults."""
    margins = finite_column("margins", margins)
    preference = np.ones_like(margins) if preference is None else finite_column("preference", preference, len(margins))
    weight = np.ones_like(margins) if weight is None else finite_column("weight", weight, len(margins))
    check_values("preference", preference, (preference >= 0) & (preference <= 1), "between 0 and 1")
    check_values("weight", weight, weight >= 0, "0 or more")
    return margins, preference, weight


def finite_column(name: str, values: ArrayLike, length: int | None = None) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    expected = "(N,)" if length is None else f"({length},)"
    if array.ndim != 1 or length not in (None, len(array)):
        raise ValueError(f"`{name}` should have the shape {expected}, one number a pair, but has {array.shape}.")
    check_values(name, array, np.isfinite(array), "a finite number")
    return array


def check_values(name: str, values: Floats, good: NDArray[np.bool_], expected: str) -> None:
    if not good.all():
        index = int(np.argmin(good))
        raise ValueError(f"`{name}` should be {expected}, but `{name}[{index}]` is {values[index]}.")


def weighted_mean(values: Floats, weight: Floats) -> float:
    return float(np.average(values, weights=weight)) if weight.sum() > 0 else math.nan
