"""Prompts to draw: checked, and embedded once."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from bt_hf.data.cache import CachedPairs, encode_once, read_tensors
from bt_hf.data.formats import PreferenceDataError
from bt_hf.diffusion.collator import Batch, Row
from bt_hf.diffusion.encoder import PairEncoder

Prompts = Sequence[str] | Dataset


class PromptRows(CachedPairs):
    """Prompts whose embeddings lie in a memory-mapped file.

    Args:
        rows: Rows with `prompt` and `condition`, the number of its embeddings.
        prompts: Embeddings, one row for each `condition`.
    """

    def __init__(self, rows: Dataset, prompts: Dataset) -> None:
        super().__init__(rows)
        self.prompts = prompts

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{**row, "index": index} for row, index in zip(super().__getitems__(indices), indices, strict=True)]

    def collate(self, rows: list[Row]) -> Batch:
        """Collate rows to `prompt`, `row` (B,) int64, `weight` (B,) of ones, and `condition_*`, each (B, ...)."""
        conditions = read_tensors(self.prompts, [row["condition"] for row in rows])
        return {
            "prompt": [row["prompt"] for row in rows],
            "row": torch.tensor([row["index"] for row in rows]),
            "weight": torch.ones(len(rows)),
            **{f"condition_{name}": value for name, value in conditions.items()},
        }


def list_prompts(prompts: Any) -> Dataset:
    """Return prompts as a dataset with the column `prompt` alone.

    Args:
        prompts: A list of texts, or a `Dataset` with the column `prompt`, whose other columns are left out.

    Raises:
        PreferenceDataError: There are no prompts, or one is not text or empty; names the row.
        TypeError: It is neither.
    """
    if isinstance(prompts, Dataset):
        if "prompt" not in prompts.column_names:
            raise PreferenceDataError(
                f"`train_dataset` should have a column prompt, found {', '.join(prompts.column_names)}: rename yours "
                "with dataset.rename_column(...)"
            )
        texts = list(prompts.with_format(None)["prompt"])
    elif isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes):
        texts = list(prompts)
    else:
        raise TypeError(
            f"`train_dataset` should be a list of prompts or a `Dataset` with a column prompt, but got "
            f"{type(prompts).__name__}" + (": put it into a list." if isinstance(prompts, str) else ".")
        )
    if not texts:
        raise PreferenceDataError("`train_dataset` has no prompts: there is nothing to draw")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise PreferenceDataError(
                f"row {index} of `train_dataset`: expected a prompt, found {text!r:.60}; fix it, or leave it out"
            )
    return Dataset.from_dict({"prompt": texts})


def cache_prompts(prompts: Dataset, encoder: PairEncoder, cache_dir: str | None) -> PromptRows:
    """Embed the distinct prompts, or find what an earlier run has embedded: see `encode_once`."""
    encode = (encoder.encode_images, encoder.encode_prompts, encoder.fingerprint())
    rows, _, conditions = encode_once(prompts, (), *encode, cache_dir, "Encoding prompts", encoder.tokens_of)
    return PromptRows(rows, conditions)
