"""Recognise the format of preference data by its columns, or say what to change, by the values that stand there."""

from __future__ import annotations

import difflib
from itertools import islice
from typing import Any

from datasets import Dataset, Features, IterableDataset

from bt_hf.data.formats import (
    KINDS,
    NOTES,
    PROMPTS,
    ROW_COLUMNS,
    Layout,
    PreferenceDataError,
    find_layout,
    is_kind,
)
from bt_hf.data.images import is_embedded, short
from bt_hf.data.judgements import BEST, LIKES, RANKS, RATINGS
from bt_hf.data.rows import undecoded

_KNOWN_NAMES = {
    "prompt": ("caption", "text", "instruction", "question", "query", "input"),
    "chosen": ("winner", "preferred", "better", "best", "positive", "image_w", "img_better", "chosen_image"),
    "rejected": ("loser", "dispreferred", "worse", "worst", "negative", "image_l", "img_worse", "rejected_image"),
}
_CHOICES = ("winner", "preferred", "better", "best", "choice", "label", "preference", "vote", "human_preference")
_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")


def recognise(dataset: Dataset | IterableDataset, features: Features, label: str, table: str | None = None) -> Layout:
    """Find the layout by the columns, and check their types.

    Args:
        dataset: The rows, of which some are looked at where advice depends on them.
        features: Its features.
        label: What messages call it.
        table: The name of the CSV or JSON file that holds the rows, if one does.

    Raises:
        PreferenceDataError: Columns are missing or of the wrong type.
    """
    layout = find_layout(list(features), lambda name, kind: is_kind(features[name], kind))
    if layout is None:
        raise PreferenceDataError(_missing_columns(dataset, features, label, table))
    check_kinds(features, layout.kinds, label, table)
    return layout


def check_kinds(features: Features, kinds: dict[str, str], label: str, table: str | None = None) -> None:
    """Raise a `PreferenceDataError` where a column does not hold its kind, a key of `KINDS`."""
    for name, kind in kinds.items():
        if not is_kind(features[name], kind):
            way_out = (
                f"change it in {table}" if table else f"convert it, such as with dataset.cast_column('{name}', ...)"
            )
            raise PreferenceDataError(
                f"{label}: column '{name}' should hold {KINDS[kind]}, found {short(features[name])}; {way_out}"
            )


def _missing_columns(dataset: Dataset | IterableDataset, features: Features, label: str, table: str | None) -> str:
    found = [name for name in features if name not in NOTES]
    judged = _judged_without_prompts(features)
    if judged is not None:
        columns = ", ".join(short(name, 60)[1:-1] for name in found[:20])
        return f"{label}: {judged.name} without prompts: expected one of the columns {', '.join(PROMPTS)}, " + (
            f"found {columns}; add it, or pass default_prompt='...' if the images were made without one"
        )
    known = (*RANKS, *RATINGS, *LIKES, *BEST)
    other = next((name for name in found if name not in known and name.strip().lower() in known), None)
    if other is not None and not {"chosen", "rejected"} & set(found):
        return f"{label}: the column {short(other)} judges nothing; rename it to '{other.strip().lower()}'"
    missing = [name for name in ROW_COLUMNS[:3] if name not in found]
    rows = _first_rows(dataset)
    images = [name for name in found if _holds(rows, features, name, "image")]
    hints = []
    for name in missing:
        fitting = [other for other in found if other not in ROW_COLUMNS]
        fitting = [
            other for other in fitting if _holds(rows, features, other, "text" if name == "prompt" else "image")
        ]
        close = [other for other in fitting if other.lower() in _KNOWN_NAMES[name]]
        close = close or difflib.get_close_matches(name, fitting, n=1)
        hints += [f"rename '{close[0]}' to '{name}'"] if close else []
    where = f" in {table}" if table else ""
    advice = ", ".join(hints) + where
    choice = next((name for name in found if name.lower() in _CHOICES and name not in images), None)
    if not hints and choice and len(images) == 2:
        advice = f"make 'chosen' and 'rejected' of '{images[0]}' and '{images[1]}', as '{choice}' tells for each row"
    elif not hints:
        advice = f"name the columns so in {table}" if table else ""
        advice = advice or "rename your columns with dataset.rename_columns({...})"
        if missing == ["prompt"]:
            advice = "pass default_prompt='...' if the images were made without one"
    columns = ", ".join(short(name, 60)[1:-1] for name in found[:20]) + (", ..." if len(found) > 20 else "")
    return (
        f"{label}: expected the columns prompt, chosen and rejected (or those of Pick-a-Pic, HPDv2 or ImageRewardDB), "
        "or prompt, image and one of rating, stars, score, liked, rank; "
        f"found {columns or 'none'}; missing: {', '.join(missing) or 'none of one format'}; {advice}"
    )


def _judged_without_prompts(features: Features) -> Layout | None:
    layout = find_layout([*features, "prompt"], lambda name, kind: name in features and is_kind(features[name], kind))
    return layout if layout and layout.judgement else None


def _first_rows(dataset: Dataset | IterableDataset) -> list[dict[str, Any]]:
    return list(islice(undecoded(dataset.with_format(None)), 5))


def _holds(rows: list[dict[str, Any]], features: Features, name: str, kind: str) -> bool:
    """True if a column holds a kind by its type, and by its values where images are told as text."""
    if not is_kind(features[name], kind):
        return False
    texts = [row[name] for row in rows if isinstance(row.get(name), str)]
    files = [text.lower().endswith(_FILES) or is_embedded(text) for text in texts]
    return not texts or any(files) == (kind == "image")
