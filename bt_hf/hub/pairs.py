"""Pairs as they are published: the columns of the row contract, texts checked, and the pixels of images alone."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value

from bt_hf.data.checks import check_columns
from bt_hf.data.images import to_frames
from bt_hf.data.rows import undecoded
from bt_hf.hub.contract import PAIRS
from bt_hf.hub.privacy import check_text, encode_picture, known_tokens

logger = logging.getLogger(__name__)

_IMAGES = ("chosen", "rejected")


def publishable_pairs(pairs: Dataset, token: str | None = None) -> Dataset:
    """Return pairs as they may leave this machine, with images encoded anew; of clips, the first frames.

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
    clips = 0
    for row, pair in enumerate(undecoded(pairs.with_format(None).select_columns(list(columns)))):
        check_text(pair["prompt"], f"the prompt of row {row} of `pairs`", secrets)
        for name in _IMAGES:
            frames = to_frames(pair[name], name=f"`{name}` of row {row}")
            columns[name].append({"bytes": encode_picture(frames[0]), "path": None})
            clips += len(frames) > 1
        for name in ("prompt", *numbers):
            columns[name].append(pair[name])
    if clips:
        logger.warning(
            "%d images of `pairs` are clips, of which the first frames are published: upload clips yourself.", clips
        )
    features = {"prompt": Value("string"), **dict.fromkeys(_IMAGES, Image())}
    return Dataset.from_dict(columns, features=Features({**features, **dict.fromkeys(numbers, Value("float32"))}))


def to_parquet(pairs: Dataset) -> bytes:
    """Write pairs as a Parquet file with their images in it."""
    with tempfile.TemporaryDirectory() as folder:
        pairs.to_parquet(Path(folder) / PAIRS)
        return (Path(folder) / PAIRS).read_bytes()
