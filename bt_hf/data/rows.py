"""Rows of datasets as they are stored, whose images only `to_rgb` opens, and what to call them in messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from datasets import Dataset, Image, IterableDataset, List

from bt_hf.data.formats import ROW
from bt_hf.data.images import short
from bt_hf.data.places import IMAGE

_COLUMNS = ("prompt", "chosen", "rejected", "completion", "preference", "weight", "label")
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def undecoded(dataset: AnyDataset) -> AnyDataset:
    """Leave images encoded: `datasets` itself would open any format, path and address, and name no row."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image) and feature != IMAGE:
            dataset = dataset.cast_column(name, IMAGE)
        elif isinstance(feature, List) and isinstance(feature.feature, Image) and feature.feature != IMAGE:
            dataset = dataset.cast_column(name, List(IMAGE, length=feature.length))
    return dataset


def image_name(row: Mapping[str, Any], column: str, number: int | None = None) -> str:
    """Return what messages call an image: by the number of its row where that is known, else by its prompt.

    Example:
        >>> image_name({"prompt": "a cat"}, "chosen", 3), image_name({"prompt": "a cat"}, "chosen")
        ('`chosen` of row 3', "`chosen` of the row with the prompt 'a cat'")
    """
    number = row.get(ROW) if number is None else number
    return f"`{column}` of " + (
        f"the row with the prompt {short(row.get('prompt'))}" if number is None else f"row {number}"
    )


def as_stored(dataset: Any) -> Any:
    """Return the rows that a trainer reads, of the columns that it knows, with undecoded images.

    Args:
        dataset: A `Dataset`, whose rows get numbers, or a stream. A transform of the user is kept, as are datasets of
            other kinds.
    """
    if isinstance(dataset, IterableDataset):
        return undecoded(dataset)
    if not isinstance(dataset, Dataset):
        return dataset
    if dataset.format["type"] != "custom":
        kept = [name for name in dataset.column_names if name in _COLUMNS]
        dataset = undecoded(dataset.with_format(None).select_columns(kept))
    return NumberedRows(dataset)


class NumberedRows(torch.utils.data.Dataset):
    """Rows of a dataset with their numbers, which messages name.

    Args:
        dataset: Rows of the contract, or unpaired ones.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.rows = dataset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], ROW: index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__(indices)
        return [{**row, ROW: index} for row, index in zip(rows, indices, strict=True)]
