"""Formats of preference data: recognise them by their columns, and convert their rows to pairs."""

from __future__ import annotations

import difflib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets

ROW_COLUMNS = ("prompt", "chosen", "rejected", "preference", "weight")
DEFAULTS = {"preference": 1.0, "weight": 1.0}
IMAGE = Image(decode=False)  # images travel as {"bytes", "path"} and are decoded one pair at a time
PLACE = Features({"_shard": Value("string"), "_row": Value("int64")})  # where a pair came from; of one file, no name
NOTES = Features(PLACE | {"_problem": Value("string")})  # and what is wrong with it
_KINDS = {
    "text": "text (string)",
    "number": "numbers",
    "numbers": "lists of numbers",
    "image": "images (datasets.Image, file paths or encoded bytes)",
    "images": "lists of images (datasets.Image, file paths or encoded bytes)",
}
_KNOWN_NAMES = {
    "prompt": ("caption", "text", "instruction", "question", "query", "input"),
    "chosen": ("winner", "preferred", "better", "best", "positive", "image_w", "img_better", "chosen_image"),
    "rejected": ("loser", "dispreferred", "worse", "worst", "negative", "image_l", "img_worse", "rejected_image"),
}


class PreferenceDataError(ValueError):
    """Preference data that cannot be trained on. The message is one line and names the way out."""


@dataclass(frozen=True)
class Layout:
    """One kind of data.

    Attributes:
        name: What messages call it.
        kinds: Column -> a key of `_KINDS`, first the prompt, then the images.
        convert: A row -> its pairs, as mappings with the contract's columns; raises `ValueError` for a bad row.
        group: Where a row is a single image, the column whose equal values make one ranking.
        in_place: A row is a pair: the first three columns are the prompt, the chosen and the rejected image.
        empty: The message when no row gives a pair.
    """

    name: str
    kinds: dict[str, str]
    convert: Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
    group: str | None = None
    in_place: bool = False
    empty: str = "no row prefers one image over another"


def _from_contract(row: dict[str, Any], chosen: str, rejected: str) -> Iterator[dict]:
    yield {
        **{name: _number(row, name) if name in row else default for name, default in DEFAULTS.items()},
        "prompt": row["prompt"],
        "chosen": row[chosen],
        "rejected": row[rejected],
    }


def _from_pick_a_pic(row: dict[str, Any]) -> Iterator[dict]:
    if not row.get("has_label", True):
        return
    labels = _number(row, "label_0"), _number(row, "label_1")
    if min(labels) < 0 or not math.isclose(sum(labels), 1):
        raise ValueError(f"labels out of range: label_0 and label_1 must be shares that sum to 1, found {labels}")
    first, second = ("jpg_0", "jpg_1") if labels[0] >= labels[1] else ("jpg_1", "jpg_0")
    yield {"prompt": row["caption"], "chosen": row[first], "rejected": row[second], "preference": max(labels)}


def _from_ranking(row: dict[str, Any], images: str, ranks: str, lower_is_better: bool = True) -> Iterator[dict]:
    pictures, values = row[images], row[ranks]
    if not isinstance(pictures, list) or not isinstance(values, list) or len(pictures) != len(values):
        raise ValueError(f"images without ranks: '{images}' and '{ranks}' must be lists of one length")
    values = [_number({ranks: value}, ranks) for value in values]
    if any(math.isnan(value) for value in values):
        raise ValueError(f"not a number: '{ranks}' is {values}")
    better = (lambda a, b: a < b) if lower_is_better else (lambda a, b: a > b)
    pairs = [(i, j) for i, j in itertools.permutations(range(len(values)), 2) if better(values[i], values[j])]
    for i, j in pairs:
        pair = {"prompt": row["prompt"], "chosen": pictures[i], "rejected": pictures[j], "weight": 1 / len(pairs)}
        yield pair | {"_row": row["_rows"][i]} if "_rows" in row else pair


def _number(row: dict[str, Any], name: str) -> float:
    try:
        return float(row[name])
    except (TypeError, ValueError):
        raise ValueError(f"not a number: '{name}' is {row[name]!r}") from None


def recognise(features: Features, label: str) -> Layout:
    """Find the layout by the columns, and checks their types."""

    def first(*names: str) -> str | None:
        return next((name for name in names if name in features), None)

    images, ranks = first("image", "images", "image_path", "image_paths", "file_path"), first("rank", "ranking")
    layout = None
    for kind, chosen, rejected in (
        ("preference", "chosen", "rejected"),
        ("preference", "chosen_file_name", "rejected_file_name"),
        ("ImageRewardDB", "img_better", "img_worse"),
    ):
        if layout is None and {"prompt", chosen, rejected} <= features.keys():
            kinds = {"prompt": "text", chosen: "image", rejected: "image"}
            kinds |= {name: "number" for name in DEFAULTS if name in features}
            layout = Layout(kind, kinds, partial(_from_contract, chosen=chosen, rejected=rejected), in_place=True)
    if layout is None and {"caption", "jpg_0", "jpg_1", "label_0", "label_1"} <= features.keys():
        kinds = {"caption": "text", "jpg_0": "image", "jpg_1": "image", "label_0": "number", "label_1": "number"}
        kinds |= {"has_label": "number"} if "has_label" in features else {}
        layout = Layout("Pick-a-Pic", kinds, _from_pick_a_pic, empty="no labelled rows: 'has_label' is never true")
    elif layout is None and "prompt" in features and images and "human_preference" in features:
        kinds = {"prompt": "text", images: "images", "human_preference": "numbers"}
        convert = partial(_from_ranking, images=images, ranks="human_preference", lower_is_better=False)
        layout = Layout("HPDv2", kinds, convert)
    elif layout is None and "prompt" in features and images and ranks:
        convert = partial(_from_ranking, images=images, ranks=ranks)
        if _is_kind(features[images], "images"):
            layout = Layout("ImageRewardDB", {"prompt": "text", images: "images", ranks: "numbers"}, convert)
        else:
            kinds = {"prompt": "text", images: "image", ranks: "number"}
            layout = Layout("ImageRewardDB", kinds, convert, group=first("prompt_id", "prompt"))
    if layout is None:
        raise PreferenceDataError(_missing_columns([name for name in features if name not in PLACE], label))
    check_kinds(features, layout.kinds, label)
    return layout


def check_kinds(features: Features, kinds: dict[str, str], label: str) -> None:
    """Raise a `PreferenceDataError` where a column does not hold its kind, a key of `_KINDS`."""
    for name, kind in kinds.items():
        if not _is_kind(features[name], kind):
            raise PreferenceDataError(
                f"{label}: column '{name}' should hold {_KINDS[kind]}, found {features[name]}; "
                f"convert it, for instance with dataset.cast_column('{name}', ...)"
            )


def _is_kind(feature: Any, kind: str) -> bool:
    if kind.endswith("s"):
        return hasattr(feature, "feature") and _is_kind(feature.feature, kind[:-1])
    dtype = feature.dtype if isinstance(feature, Value) else None
    if dtype == "null":  # nothing is known yet; each row is checked later
        return True
    if kind == "number":
        return dtype is not None and dtype.startswith(("float", "int", "uint", "bool", "decimal"))
    text = dtype in ("string", "large_string")
    if kind == "text":
        return text
    stored_image = isinstance(feature, dict) and bool(feature) and feature.keys() <= {"bytes", "path"}
    return text or dtype in ("binary", "large_binary") or isinstance(feature, Image) or stored_image


def _missing_columns(found: list[str], label: str) -> str:
    missing = [name for name in ROW_COLUMNS[:3] if name not in found]
    hints = []
    for name in missing:
        known = [other for other in found if other.lower() in _KNOWN_NAMES[name]]
        close = known or difflib.get_close_matches(name, [other for other in found if other not in ROW_COLUMNS], n=1)
        hints += [f"rename '{close[0]}' to '{name}'"] if close else []
    advice = ", ".join(hints) or "rename your columns with dataset.rename_columns({...})"
    return (
        f"{label}: expected the columns prompt, chosen and rejected (or those of Pick-a-Pic, HPDv2 or ImageRewardDB), "
        f"found {', '.join(found) or 'none'}; missing: {', '.join(missing)}; {advice}"
    )


# --- From a layout to the contract ---


def to_pairs(
    dataset: Dataset | IterableDataset, features: Features, layout: Layout, folder: Path | None, num_proc: int | None
) -> Dataset | IterableDataset:
    """Turns rows of a layout into unchecked pairs: the contract's columns, plain extra ones, and maybe `NOTES`."""
    extras = {
        name: feature
        for name, feature in features.items()
        if isinstance(feature, Value) and feature.dtype not in ("null", "binary", "large_binary")
        if name not in layout.kinds and name not in (*ROW_COLUMNS, *NOTES) and layout.group in (None, name)
    }
    images, floats = dict.fromkeys(["chosen", "rejected"], IMAGE), dict.fromkeys(DEFAULTS, Value("float64"))
    rewritten = Features({"prompt": Value("string")} | images | floats | extras | NOTES)
    expand = {"convert": layout.convert, "extras": tuple(extras), "folder": folder}
    options = {
        "with_indices": True,
        "batched": True,
        "remove_columns": list(features),
        "features": rewritten,
        "fn_kwargs": expand,
    }
    if isinstance(dataset, IterableDataset):
        if layout.group:
            arguments = expand | {"dataset": dataset, "columns": (layout.group, *layout.kinds)}
            return IterableDataset.from_generator(_stream_groups, features=rewritten, gen_kwargs=arguments)
        return dataset.map(_expand, batch_size=1, **options)  # nothing is read ahead of the row that is asked for
    if layout.group:
        return _join_groups(dataset, layout, folder, rewritten)
    if layout.in_place:
        return _in_place(dataset, layout, folder)
    # The default writer batch would keep the images of a thousand rows in memory.
    sizes = {"batch_size": 16, "writer_batch_size": 64}
    return dataset.map(_expand, num_proc=num_proc, desc="Making pairs", **sizes, **options)


def _in_place(dataset: Dataset, layout: Layout, folder: Path | None) -> Dataset:
    """Rows that already are pairs: renamed and completed, their images not copied."""
    for source, target in zip(list(layout.kinds)[:3], ROW_COLUMNS[:3], strict=True):
        if target != "prompt":
            dataset = _stored(dataset, source, folder)
        if source != target:
            dataset = dataset.rename_column(source, target)
    for name, default in DEFAULTS.items():
        if dataset.features.get(name) != Value("float64"):
            values = dataset[name] if name in dataset.features else [default] * len(dataset)
            values = [None if value is None else float(value) for value in values]
            dataset = dataset.remove_columns([name] if name in dataset.features else [])
            dataset = dataset.add_column(name, values, feature=Value("float64"))
    return dataset


def _stored(dataset: Dataset, name: str, folder: Path | None) -> Dataset:
    feature = dataset.features[name]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null"):
        values = [_encode(value, folder) for value in dataset[name]]
        return dataset.remove_columns(name).add_column(name, values, feature=IMAGE)
    return dataset.cast_column(name, IMAGE)


def _encode(value: Any, folder: Path | None) -> dict[str, Any] | None:
    """Any image value as {"bytes", "path"}; a relative path starts from the folder of the file that names it."""
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        return {"bytes": None, "path": str(folder / path) if folder and path and "://" not in path else path}
    return value if value is None or isinstance(value, dict) else Image().encode_example(value)


def _expand(
    batch: dict[str, list], indices: list[int], convert: Callable, extras: tuple[str, ...], folder: Path | None
) -> dict[str, list]:
    """Convert a batch of rows of some layout to a batch of pairs."""
    pairs = []
    for position, index in enumerate(indices):
        row = {name: values[position] for name, values in batch.items()}
        kept = {name: row[name] for name in extras} | {"_row": row.get("_row", index), "_shard": row.get("_shard")}
        pairs += [kept | pair for pair in _pairs_of(row, convert)]
    columns = {name: [pair[name] for pair in pairs] for name in (*ROW_COLUMNS, *extras, *NOTES)}
    return columns | {name: [_encode(value, folder) for value in columns[name]] for name in ("chosen", "rejected")}


def _pairs_of(row: dict[str, Any], convert: Callable) -> list[dict[str, Any]]:
    """Convert one row to pairs; a problem travels in `_problem` to where bad rows raise or are dropped."""
    blank = dict.fromkeys(ROW_COLUMNS) | DEFAULTS | {"_problem": None}
    try:
        pairs = [blank | pair for pair in convert(row)]
    except ValueError as error:
        return [blank | {"_problem": str(error)}]
    for pair in pairs:
        if not isinstance(pair["prompt"], str):
            pair |= {"prompt": None, "_problem": f"prompt is not text: found {pair['prompt']!r}"}
    return pairs


def _join_groups(dataset: Dataset, layout: Layout, folder: Path | None, features: Features) -> Dataset:
    """Rows of one image each -> pairs: the images of the chosen rows beside those of the rejected rows."""
    prompt, images, ranks = layout.kinds
    light = dataset.select_columns(sorted(name for name in {prompt, ranks, layout.group} if name is not None))
    groups: dict[tuple, list[int]] = {}  # by the prompt too, for identifiers that are empty or used twice
    for row, key in enumerate(zip(light[layout.group], light[prompt], strict=True)):
        groups.setdefault(key, []).append(row)
    pairs = []
    for (key, text), rows in groups.items():
        ranking = {prompt: text, images: rows, ranks: light[rows][ranks], "_rows": rows}
        found = _pairs_of(ranking, layout.convert)  # here an image is the number of its row
        named = {layout.group: key} if layout.group != prompt else {}
        pairs += [{"_row": rows[0], "_shard": None} | pair | named for pair in found]
    plain = Features({name: feature for name, feature in features.items() if name not in ("chosen", "rejected")})
    columns = [Dataset.from_dict({name: [pair[name] for pair in pairs] for name in plain}, features=plain)]
    dataset = _stored(dataset, images, folder).select_columns([images])
    for name in ("chosen", "rejected"):
        rows = [pair["_row"] if pair[name] is None else pair[name] for pair in pairs]
        columns.append(dataset.select(rows).rename_column(images, name))
    return concatenate_datasets(columns, axis=1)


def _stream_groups(
    dataset: IterableDataset, columns: tuple[str, ...], convert: Callable, extras: tuple[str, ...], folder: Path | None
) -> Iterator[dict[str, Any]]:
    """Join groups of a stream, which holds the images of one prompt at a time."""
    group, prompt, images, ranks = columns
    seen: set[tuple] = set()
    # `iter`, unlike iterating, does not split among the workers of a DataLoader: here one of them reads all.
    plain = ({name: values[0] for name, values in batch.items()} for batch in dataset.iter(batch_size=1))
    for key, run in itertools.groupby(enumerate(plain), key=lambda item: (item[1][group], item[1][prompt])):
        numbers, rows = zip(*((row.get("_row", index), row) for index, row in run), strict=True)
        shard = rows[0].get("_shard")
        place = f"row {numbers[0]} of {shard}" if shard else f"row {numbers[0]}"
        if key in seen:
            raise PreferenceDataError(
                f"{place}: {group} {key[0]!r} comes again after others; in a stream the images of a prompt must be "
                "neighbours: sort the data, or load it with streaming=False"
            )
        seen.add(key)
        ranking = {name: [row[name] for row in rows] for name in (images, ranks)}
        ranking |= {group: key[0], prompt: key[1], "_rows": list(numbers), "_shard": shard}
        batch = _expand({name: [value] for name, value in ranking.items()}, [numbers[0]], convert, extras, folder)
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
