"""Survey of judgements before their pairs are made: say how they are read, and doubt values that contradict a name."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from bt_hf.data.formats import Layout, PreferenceDataError
from bt_hf.data.images import short
from bt_hf.data.judgements import BEST, LIKES, PARTNERS, RANKS, RATINGS, Judgement, is_place

logger = logging.getLogger(__name__)

_PEEK = 16  # rows of a stream that are looked at
_ON_FIVE = ("rating", "ratings", "rating_value", "user_rating")  # usually 1 to 5


def survey(dataset: Dataset | IterableDataset, layout: Layout, label: str) -> None:
    """Log how judgements of several images a prompt are read, and warn where their values make that doubtful.

    Of a stream, only its first rows are looked at. Nothing is opened.

    Raises:
        PreferenceDataError: Most prompts have "ranks" that can't be places from the best on.
    """
    judgement = layout.judgement
    if judgement is None:
        return
    groups = list(_groups(dataset, layout, judgement))
    values = [judged for _, judged in groups]
    odd = [one for one in values if judgement.kind == "rank" and not _are_places(one)]
    if 2 * len(odd) > sum(len(set(one)) > 1 for one in values):
        raise PreferenceDataError(
            f"{label}: '{judgement.column}' would be read with 1 as the best, but {_shown(odd)} are not places from 1 "
            "on; if larger is better, rename the column to 'rating', else number the images of each prompt 1, 2, 3"
        )
    notes = _doubts(judgement, values)
    if odd:
        notes.append(f"{_shown(odd)} are not places from 1 on; if larger is better, rename it to 'rating'")
    names = dataset.column_names or []
    others = [name for name in (*RANKS, *RATINGS, *LIKES, *BEST) if name in names and name != judgement.column]
    if others:
        notes.append(f"not read: {', '.join(map(repr, others))}; remove the column that is not meant")
    if isinstance(dataset, Dataset):
        notes += _without_pairs(groups)
    level = logging.WARNING if notes else logging.INFO
    if isinstance(dataset, Dataset) and max((size for size, _ in groups), default=0) > PARTNERS + 1:
        notes.append(f"each image is compared with at most {PARTNERS} lower ones of its prompt")
    reading = f"{label}: '{judgement.column}' is read as {layout.name}: {judgement.meaning}"
    logger.log(level, "%s", "; ".join([reading, *notes]))


def _without_pairs(groups: list[tuple[int, list[float]]]) -> list[str]:
    single = sum(size == 1 for size, _ in groups)
    equal = sum(len(one) > 1 and len(set(one)) == 1 for _, one in groups)
    causes = [f"{single} of a single image"] * bool(single) + [f"{equal} of equal values"] * bool(equal)
    total = f"{len(groups)} prompt{'s' * (len(groups) > 1)}"
    return [f"{' and '.join(causes)} of {total} give no pair"] if causes else []


def _groups(
    dataset: Dataset | IterableDataset, layout: Layout, judgement: Judgement
) -> Iterator[tuple[int, list[float]]]:
    """Yield the number of images of each prompt, and what they were judged, if all of that can be read."""
    prompt, images, column = layout.kinds
    rows: Any = dataset.select_columns(sorted({layout.group or prompt, prompt, column}))
    if not isinstance(dataset, Dataset):
        rows = islice(rows, _PEEK)
    if layout.group is None:
        lengths = _lengths(dataset, images) if isinstance(dataset, Dataset) else repeat(None)
        for row, length in zip(rows, lengths, strict=False):
            values = _read(judgement, row[column])
            whole = length is None or judgement.kind == "best" or len(row[column] or ()) == length
            yield (length or 0, values) if whole else (0, [])  # a bad row, reported when its pairs are made
        return
    groups: dict[tuple, list[Any]] = defaultdict(list)
    for row in rows:
        groups[row[layout.group], row[prompt]].append(row[column])
    if not isinstance(dataset, Dataset) and sum(map(len, groups.values())) == _PEEK:
        groups.popitem()  # perhaps cut off
    for members in groups.values():
        yield len(members), [value for one in members for value in _read(judgement, [one])]


def _lengths(dataset: Dataset, images: str) -> Iterator[int | None]:
    for table in dataset.select_columns([images]).with_format("arrow").iter(1000):
        yield from pc.list_value_length(table[images]).to_pylist()


def _read(judgement: Judgement, judged: Any) -> list[float]:
    """Return judgements as they were written, without those that are bad."""
    if judgement.kind in ("best", "order") or not isinstance(judged, list):
        return []
    values = []
    for one in judged:
        try:
            values.append(judgement.value(one))
        except ValueError:
            continue  # reported with its row, where the pairs are made
    return [-value for value in values] if judgement.kind == "rank" else values


def _are_places(values: list[float]) -> bool:
    return len(set(values)) < 2 or all(is_place(value, values) for value in values)


def _shown(odd: list[list[float]]) -> str:
    return (
        f"those of {len(odd)} prompt{'s' * (len(odd) > 1)} (such as {short([f'{one:g}' for one in odd[0]])})".replace(
            "'", ""
        )
    )


def _doubts(judgement: Judgement, groups: list[list[float]]) -> list[str]:
    """Return what makes the direction or the scale of numbers doubtful, and what to do."""
    column, notes = judgement.column, []
    if judgement.kind == "rating" and column != "human_preference":
        several = [one for one in groups if len(one) > 1]
        ranked = [one for one in several if sorted(one) == list(range(1, len(one) + 1))]
        if len(ranked) == len(several) and any(len(one) > 2 for one in ranked):
            notes.append("each prompt has 1, 2, 3 once each, as ranks have; if 1 is the best, rename it to 'rank'")
    if column in _ON_FIVE:
        values = [value for one in groups for value in one]
        beyond = [value for value in values if value > 10]
        if beyond and 2 * sum(value <= 5 for value in values) >= len(values):
            notes.append(f"most are up to 5, but {len(beyond)} are up to {max(beyond):g}: bring them to one scale")
        if 0 in values and all(value == 0 or 1 <= value <= 5 for value in values):
            notes.append(f"0 is the lowest one ({values.count(0)} times); leave out images that were not rated")
    return notes
