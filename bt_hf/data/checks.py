"""Check of preference data: columns, prompts, labels and images."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset
from PIL import Image as PILImage

from bt_hf.data.formats import NOTES, ROW, ROW_COLUMNS, SHARD, Layout, PreferenceDataError
from bt_hf.data.images import digest_pixels, short, to_frames, to_rgb
from bt_hf.data.places import PROBLEM
from bt_hf.data.reading import features_of
from bt_hf.data.recognition import check_kinds, recognise
from bt_hf.data.rows import as_stored, image_name, undecoded

logger = logging.getLogger(__name__)

_UNPAIRED = {"prompt": "text", "completion": "image", "label": "number"}
_LARGEST = {"preference": 1.0, "label": 1.0, "weight": float(np.finfo(np.float32).max)}  # the smallest is 0


def check_columns(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Check a dataset without reading its images: its columns and, unless it is a stream, prompts and labels.

    Args:
        dataset: The dataset that goes to a trainer.

    Returns:
        The same dataset.

    Raises:
        PreferenceDataError: Columns are missing or of the wrong type, no rows, a dict of splits, or a row
            that has no prompt or a preference or weight that is out of range.

    Example:
        >>> check_columns(Dataset.from_dict({"prompt": ["a"], "chosen": ["a.png"], "rejected": ["b.png"]})).num_rows
        1
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        hint = f"; pick a split: {', '.join(map(str, dataset))}" if isinstance(dataset, dict) else ""
        raise PreferenceDataError(f"expected a Dataset or IterableDataset, found {type(dataset).__name__}{hint}")
    features = features_of(dataset, "the dataset")
    layout = recognise(dataset, features, "the dataset")
    if not {"prompt", "chosen", "rejected"} <= features.keys():
        raise PreferenceDataError(
            f"the dataset: expected the columns prompt, chosen and rejected, found those of {layout.name} "
            f"({', '.join(features)}); convert it with load_preference_pairs(dataset)"
        )
    _check_values(
        dataset,
        ("preference", "weight"),
        "leave such rows out with load_preference_pairs(dataset, on_bad_rows='drop')",
    )
    return dataset


def check_images(dataset: Dataset) -> None:
    """Open all images of pairs.

    Raises:
        ValueError: An image is missing or unreadable. Names the row and the column.
    """
    for row in as_stored(dataset):
        for name in ("chosen", "rejected"):
            to_rgb(row[name], image_name(row, name))


def check_unpaired(dataset: Dataset | IterableDataset) -> None:
    """Check rows of one image each (prompt, completion, label), as `check_columns` checks pairs.

    Raises:
        PreferenceDataError: Columns are missing or of the wrong type, it has no rows, or a row has no prompt or a
            label or weight that is out of range.
    """
    features = features_of(dataset, "the dataset")
    missing = [name for name in _UNPAIRED if name not in features]
    if missing:
        raise PreferenceDataError(
            f"the dataset: expected the columns {', '.join(_UNPAIRED)}, found {', '.join(features)}; missing: "
            f"{', '.join(missing)}; rename your columns with dataset.rename_columns({{...}})"
        )
    check_kinds(features, _UNPAIRED, "the dataset")
    _check_values(dataset, ("label", "weight"), "leave such rows out with dataset.filter(...)")


def overlapping_rows(train: Dataset | IterableDataset, eval: Dataset | IterableDataset) -> int:
    """Count the rows of `eval` that are also in `train`: same prompt and same two images, in either order.

    Prompts that differ in case or spaces alone are the same. Images are compared by their pixels after `to_rgb`, so
    another file format or name does not hide a copy. Only training rows whose prompt is also in `eval` are decoded.

    Args:
        train: Rows of the contract.
        eval: Rows of the contract; each of its rows counts once.

    Returns:
        The number of rows of `eval` that `train` also has.

    Raises:
        PreferenceDataError: Columns are missing.
        ValueError: An image cannot be read.

    Example:
        >>> from PIL import Image as PILImage
        >>> red, blue = PILImage.new("RGB", (8, 8), "red"), PILImage.new("RGB", (8, 8), "blue")
        >>> rows = Dataset.from_dict({"prompt": ["a flag"], "chosen": [red], "rejected": [blue]})
        >>> overlapping_rows(rows, rows)
        1
    """

    def rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        return undecoded(check_columns(dataset).with_format(None).select_columns(["prompt", "chosen", "rejected"]))

    def key(row: dict[str, Any], index: int) -> tuple[str, ...]:
        return plain(row["prompt"]), *sorted(
            digest_pixels(row[name], image_name(row, name, index)) for name in ("chosen", "rejected")
        )

    def plain(prompt: str) -> str:
        return " ".join(prompt.split()).casefold()

    keys = [key(row, index) for index, row in enumerate(rows(eval))]
    prompts = {prompt for prompt, *_ in keys}
    known = {key(row, index) for index, row in enumerate(rows(train)) if plain(row["prompt"]) in prompts}
    return sum(key in known for key in keys)


def warn_of_truncation(tokenizer: Callable[..., Any], prompts: Iterable[str], limit: int, reader: str) -> int:
    """Count the prompts of more than `limit` tokens, and warn once, naming the `reader`.

    Distinct prompts are tokenized once, 1,000 at a time: tokens of all of them would take 5 kB a prompt.
    """
    counts = Counter(prompts)
    distinct = list(counts)
    truncated = longest = 0
    for start in range(0, len(distinct), 1000):
        part = distinct[start : start + 1000]
        for prompt, ids in zip(part, tokenizer(part, truncation=False, verbose=False)["input_ids"], strict=True):
            longest = max(longest, len(ids))
            truncated += counts[prompt] * (len(ids) > limit)
    if truncated:
        logger.warning(
            "%d of %d prompts are longer than %s's context of %d tokens and are truncated (the longest: %d).",
            truncated,
            counts.total(),
            reader,
            limit,
            longest,
        )
    return truncated


def _check_values(dataset: Dataset | IterableDataset, labels: tuple[str, ...], way_out: str) -> None:
    """Check prompts and labels of a loaded dataset, some thousand rows at a time."""
    if not isinstance(dataset, Dataset):
        return
    columns = ["prompt", *(name for name in labels if name in dataset.column_names)]
    start = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(10_000):
        prompts = pc.utf8_trim_whitespace(table["prompt"].cast(pa.large_string()))
        bad = pc.fill_null(pc.equal(prompts, ""), True).to_numpy()
        for name in columns[1:]:
            values = table[name].cast(pa.float64()).to_numpy()  # None becomes NaN, which is in no range
            bad = bad | ~((values >= 0) & (values <= _LARGEST[name]))
        if bad.any():
            row = int(bad.argmax())
            problem = _value_problem({name: table[name][row].as_py() for name in columns}, labels)
            raise PreferenceDataError(f"row {start + row} of the dataset: {problem}; fix the row, or {way_out}")
        start += len(table)


def _value_problem(row: dict[str, Any], labels: tuple[str, ...]) -> str | None:
    """Describe a problem of a row's prompt, or of those `labels` that it has; None if there is none."""
    if not isinstance(row["prompt"], str):
        return f"prompt is not text: found {short(row['prompt'])}"
    if not row["prompt"].strip():
        return f"empty prompt: found {short(row['prompt'])}, expected what the images were made for"
    for name in labels:
        if name in row and (row[name] is None or not 0 <= row[name] <= _LARGEST[name]):  # NaN fails too
            expected = "from 0 to 1" if _LARGEST[name] == 1 else ">= 0"
            return f"{name} out of range: expected a number {expected}, found {short(row[name])}"
    return None


def _problem(row: dict[str, Any]) -> str | None:
    """Describe a problem of a pair, as `reason: detail`; None if there is none."""
    if row.get(PROBLEM):
        return row[PROBLEM]
    if problem := _value_problem(row, ("preference", "weight")):
        return problem
    pixels = []
    for name in ("chosen", "rejected"):
        try:
            pixels.append(to_rgb(row[name]))
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            return f"{reason}: {name} {detail}"
    if _same([pixels[0]], [pixels[1]]) and _same(*(to_frames(row[name]) for name in ("chosen", "rejected"))):
        return "identical images: chosen and rejected have the same pixels, so there is nothing to prefer"
    return None


def _same(one: list[PILImage.Image], other: list[PILImage.Image]) -> bool:
    """True for clips of the same frames; they may begin with the same one."""
    first, second = ([(frame.size, frame.tobytes()) for frame in frames] for frames in (one, other))
    return first == second


def _note(row: dict[str, Any], index: int, label: str, on_bad_rows: str) -> dict[str, Any]:
    note = {ROW: row.get(ROW, index), PROBLEM: _problem(row)}
    if note[PROBLEM] and on_bad_rows == "raise":
        raise PreferenceDataError(
            f"row {note[ROW]} of {row.get(SHARD) or label}: {note[PROBLEM]}; "
            "fix the row, or pass on_bad_rows='drop' to go without it"
        )
    return note


def check_pairs(pairs: Dataset, layout: Layout, label: str, on_bad_rows: str, num_proc: int | None) -> Dataset:
    if len(pairs) == 0:
        raise PreferenceDataError(f"{label}: {layout.empty}")
    checked = pairs.select_columns([name for name in (*ROW_COLUMNS, *NOTES) if name in pairs.column_names])
    notes = checked.map(
        _note,
        with_indices=True,
        remove_columns=checked.column_names,
        features=Features({ROW: NOTES[ROW], PROBLEM: NOTES[PROBLEM]}),
        fn_kwargs={"label": label, "on_bad_rows": on_bad_rows},
        load_from_cache_file=False,  # image files may have changed since
        keep_in_memory=True,  # a short text a row, and nothing is written beside the user's data
        num_proc=num_proc,
        desc="Checking pairs",
    )
    problems = list(notes[PROBLEM])
    pairs = pairs.remove_columns([name for name in NOTES if name in pairs.column_names])
    good = [index for index, problem in enumerate(problems) if problem is None]
    if len(good) == len(problems):
        return pairs
    counts = Counter(problem.partition(":")[0] for problem in problems if problem)
    summary = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if not good:
        first = next(note for note in notes)
        raise PreferenceDataError(f"{label}: no pair is usable ({summary}); row {first[ROW]}: {first[PROBLEM]}")
    logger.warning("%s: dropped %d of %d pairs (%s)", label, len(problems) - len(good), len(problems), summary)
    return pairs.select(good)


def check_stream(
    pairs: IterableDataset, layout: Layout, label: str, on_bad_rows: str, num_proc: int | None
) -> IterableDataset:
    if next(iter(pairs), None) is None:
        raise PreferenceDataError(f"{label}: {layout.empty}")
    settings = {"label": label, "on_bad_rows": on_bad_rows, "warned": set()}
    checked = pairs.filter(_keep, with_indices=True, fn_kwargs=settings)
    if on_bad_rows == "drop" and next(iter(checked), None) is None:
        raise PreferenceDataError(f"{label}: no pair is usable ({', '.join(sorted(settings['warned']))})")
    return checked.remove_columns(list(NOTES))


def _keep(row: dict[str, Any], index: int, label: str, on_bad_rows: str, warned: set[str]) -> bool:
    note = _note(row, index, label, on_bad_rows)
    if note[PROBLEM] is None:
        return True
    reason = note[PROBLEM].partition(":")[0]
    if reason not in warned:  # a stream may never end, so there is no total
        warned.add(reason)
        place = row.get(SHARD) or label
        logger.warning("%s: dropping row %d (%s), and from here on such rows", place, note[ROW], note[PROBLEM])
    return False
