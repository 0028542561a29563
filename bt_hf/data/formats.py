"""Formats of preference data: recognise them by their columns, and convert their rows to pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Features, Image, Value

from bt_hf.data.images import short
from bt_hf.data.judgements import BEST, LIKES, RANKS, RATINGS, Judgement, weighted_pairs
from bt_hf.data.places import PROBLEM

ROW_COLUMNS = ("prompt", "chosen", "rejected", "preference", "weight")
DEFAULTS = {"preference": 1.0, "weight": 1.0}
SHARD, ROW = "_bt_hf_shard", "_bt_hf_row"
ROWS = "_bt_hf_rows"  # numbers of the rows that a ranking was made of
PLACE = Features({SHARD: Value("string"), ROW: Value("int64")})  # where a pair came from; of one file, no name
NOTES = Features(PLACE | {PROBLEM: Value("string")})  # and what is wrong with it
KINDS = {
    "text": "text (string)",
    "number": "numbers",
    "texts": "lists of file names, or of numbers",
    "like": "likes: true and false, 1 and 0, or 'like' and 'dislike'",
    "likes": "lists of likes: true and false, 1 and 0, or 'like' and 'dislike'",
    "best": "the best image, by its index or its file name",
    "numbers": "lists of numbers",
    "image": "images (datasets.Image, file paths or encoded bytes)",
    "images": "lists of images (datasets.Image, file paths or encoded bytes)",
}
_PAIRS = (
    ("preference", "chosen", "rejected"),
    ("preference", "chosen_file_name", "rejected_file_name"),
    ("ImageRewardDB", "img_better", "img_worse"),
)
# `file_name` is that of metadata beside images, as `datasets` reads them too.
PROMPTS = ("prompt", "caption", "text")
_NAMES = {"rank": "rankings", "order": "rankings", "rating": "ratings", "like": "likes", "best": "best of several"}
_IMAGES = ("image", "images", "image_path", "image_paths", "file_path", "file_name", "file_names")


class PreferenceDataError(ValueError):
    """Preference data that cannot be trained on. The message is one line and names the way out."""


@dataclass(frozen=True)
class Layout:
    """One kind of data.

    Attributes:
        name: What messages call it.
        kinds: Column -> a key of `KINDS`, first the prompt, then the images.
        convert: A row -> its pairs, as mappings with the contract's columns; raises `ValueError` for a bad row.
        group: Where a row is a single image, the column whose equal values make one ranking.
        in_place: A row is a pair: the first three columns are the prompt, the chosen and the rejected image.
        empty: The message when no row gives a pair.
        judgement: The column that judges several images of a prompt, if one does.
    """

    name: str
    kinds: dict[str, str]
    convert: Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
    group: str | None = None
    in_place: bool = False
    empty: str = "no row prefers one image over another"
    judgement: Judgement | None = None


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
        raise ValueError(
            f"labels out of range: label_0 and label_1 must be shares that sum to 1, found {short(labels)}"
        )
    first, second = ("jpg_0", "jpg_1") if labels[0] >= labels[1] else ("jpg_1", "jpg_0")
    yield {"prompt": row["caption"], "chosen": row[first], "rejected": row[second], "preference": max(labels)}


def _from_judgements(row: dict[str, Any], prompt: str, images: str, judgement: Judgement) -> Iterator[dict]:
    values = judgement.values(row, images)
    for better, worse, weight in weighted_pairs(values):
        pictures = row[images]
        pair = {"prompt": row[prompt], "chosen": pictures[better], "rejected": pictures[worse], "weight": weight}
        yield pair | {ROW: row[ROWS][better]} if ROWS in row else pair


def _number(row: dict[str, Any], name: str) -> float:
    try:
        return float(row[name])
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"not a number: '{name}' is {short(row[name])}") from None


def find_layout(names: Collection[str], holds: Callable[[str, str], bool]) -> Layout | None:
    """Find the layout by the names of the columns, and where these leave it open by whether one `holds` a kind."""

    def first(*candidates: str) -> str | None:
        return next((name for name in candidates if name in names), None)

    if "prompt" in names:
        for kind, chosen, rejected in _PAIRS:
            if chosen in names and rejected in names:
                kinds = {"prompt": "text", chosen: "image", rejected: "image"}
                kinds |= {name: "number" for name in DEFAULTS if name in names}
                return Layout(kind, kinds, partial(_from_contract, chosen=chosen, rejected=rejected), in_place=True)
    if set(names) >= {"caption", "jpg_0", "jpg_1", "label_0", "label_1"}:
        kinds = {"caption": "text", "jpg_0": "image", "jpg_1": "image", "label_0": "number", "label_1": "number"}
        kinds |= {"has_label": "number"} if "has_label" in names else {}
        return Layout("Pick-a-Pic", kinds, _from_pick_a_pic, empty="no labelled rows: 'has_label' is never true")
    return _find_judgements(names, first, holds)


def _find_judgements(
    names: Collection[str], first: Callable[..., str | None], holds: Callable[[str, str], bool]
) -> Layout | None:
    """Find the layout of judgements of several images a prompt, in lists or with one image a row."""
    prompt, images = first(*PROMPTS), first(*_IMAGES)
    column = first(*RANKS, *RATINGS, *LIKES, *BEST)
    if "human_preference" in names and (column is None or holds("human_preference", "numbers")):
        column = "human_preference"
    if prompt is None or images is None or column is None:
        return None
    lists = holds(images, "images") or column == "human_preference"
    judgement = _judgement(column, lists, holds)
    kind = {"rank": "number", "rating": "number", "order": "text"}.get(judgement.kind, judgement.kind)
    kinds = {prompt: "text", images: "images" if lists else "image"}
    return Layout(
        "HPDv2" if column == "human_preference" else _NAMES[judgement.kind],
        kinds | {column: kind + "s" if lists and kind != "best" else kind},
        partial(_from_judgements, prompt=prompt, images=images, judgement=judgement),
        group=None if lists else "prompt_id" if "prompt_id" in names and holds("prompt_id", "plain") else prompt,
        empty=f"no row prefers one image over another: '{column}' is equal for all images of each prompt",
        judgement=judgement,
    )


def _judgement(column: str, lists: bool, holds: Callable[[str, str], bool]) -> Judgement:
    if column in RANKS:
        names = lists and holds(column, "texts") and not holds(column, "numbers")
        return Judgement(column, "order" if names else "rank")
    if column in BEST:
        return Judgement(column, "best" if lists else "like")  # beside a single image, true for the best
    words = column == "likes" and (holds(column, "text") or holds(column, "texts")) and not holds(column, "number")
    if column in LIKES or words:
        return Judgement(column, "like")
    return Judgement(column, "rating", *RATINGS.get(column, ()))


def prompt_column(features: Mapping[str, Any]) -> str:
    """Return the column that holds the prompts, or should."""
    layout = find_layout(list(features), lambda name, kind: is_kind(features[name], kind))
    if layout is not None:
        return next(iter(layout.kinds))
    others = [name for name in PROMPTS[:2] if name in features]
    return others[0] if others else "prompt"


def roles(names: Collection[str]) -> dict[str, str]:
    """Return what the columns of these names hold, for readers of files that don't tell: name -> "text" and so on."""
    layout = find_layout([*names, "prompt"], lambda name, kind: False)
    return dict.fromkeys(PROMPTS, "text") | (layout.kinds if layout else {})


def unpaired_roles(names: Collection[str]) -> dict[str, str]:
    """Return the same for files of single images: text of a CSV stays text."""
    return roles(names) | {"completion": "image", "label": "number"}


def is_kind(feature: Any, kind: str) -> bool:
    """True if a column of this feature holds a kind, a key of `KINDS`."""
    if kind.endswith("s"):
        return hasattr(feature, "feature") and is_kind(feature.feature, kind[:-1])
    dtype = feature.dtype if isinstance(feature, Value) else None
    if dtype == "null":  # nothing is known yet; each row is checked later
        return True
    if kind == "plain":
        return dtype is not None
    if kind == "number":
        return dtype is not None and dtype.startswith(("float", "int", "uint", "bool", "decimal"))
    text = dtype in ("string", "large_string", "string_view")
    if kind in ("like", "best"):
        return text or is_kind(feature, "number")
    if kind == "text":
        return text
    stored_image = isinstance(feature, dict) and bool(feature) and feature.keys() <= {"bytes", "path"}
    binary = dtype is not None and "binary" in dtype
    return text or binary or isinstance(feature, Image) or stored_image
