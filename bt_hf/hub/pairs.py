"""Pairs as they are published: the columns of the row contract, texts checked, and the pixels of images alone."""

import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value

from bt_hf.data.checks import check_columns
from bt_hf.data.images import to_rgb
from bt_hf.data.rows import undecoded
from bt_hf.hub.contract import PAIRS
from bt_hf.hub.privacy import check_text, encode_picture, known_tokens

_IMAGES = ("chosen", "rejected")


def publishable_pairs(pairs: Dataset, token: str | None = None) -> Dataset:
    """Return pairs as they may leave this machine, with images encoded anew.

    Args:
        pairs: Pairs in the row contract; further columns stay here.
        token: Access token of the upload, which no prompt may contain.

    Raises:
        ValueError: A prompt contains a token, a password or a path, or the pairs are not in the row contract.
    """
    check_columns(pairs)
    secrets = known_tokens(token)
    numbers = [name for name in ("preference", "weight") if name in pairs.column_names]
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt", *_IMAGES, *numbers)}
    for row, pair in enumerate(undecoded(pairs.with_format(None).select_columns(list(columns)))):
        check_text(pair["prompt"], f"the prompt of row {row} of `pairs`", secrets)
        for name, values in columns.items():
            value = pair[name]
            values.append(
                {"bytes": encode_picture(to_rgb(value, f"`{name}` of row {row}")), "path": None}
                if name in _IMAGES
                else value
            )
    features = {"prompt": Value("string"), **dict.fromkeys(_IMAGES, Image())}
    return Dataset.from_dict(columns, features=Features({**features, **dict.fromkeys(numbers, Value("float32"))}))


def to_parquet(pairs: Dataset) -> bytes:
    """Write pairs as a Parquet file with their images in it."""
    with tempfile.TemporaryDirectory() as folder:
        pairs.to_parquet(Path(folder) / PAIRS)
        return (Path(folder) / PAIRS).read_bytes()
