"""Frozen features in memory-mapped files instead of memory, for more pairs than memory holds."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset

from bt_hf.data.cache import encode_once, read
from bt_hf.data.images import to_rgb
from bt_hf.reward.collator import labels
from bt_hf.reward.encoders import context_length
from bt_hf.reward.frozen_prefix import CachedPairs, FeatureCache, by_token

_SIDES = ("chosen", "rejected")


class StoredPairs(CachedPairs):
    """Pairs whose frozen features lie in memory-mapped files.

    Args:
        cache: Knows the model; holds no features itself.
        rows: Rows of the contract with numbers instead of images, and `condition`, the number of the prompt.
        images: What the numbers of the images mean.
        prompts: What `condition` means.
    """

    def __init__(self, cache: FeatureCache, rows: Dataset, images: Dataset, prompts: Dataset) -> None:
        self.cache = cache
        self.rows = rows
        self.images = images
        self.prompts = prompts
        self._dtype = next(cache.base.parameters()).dtype

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        columns = self.rows[indices]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """As `FeatureCache.collate`."""
        texts = read(self.prompts, [row["condition"] for row in rows])
        lengths = self.cache.lengths(texts)
        end = None if lengths is None else int(lengths.max())
        texts = {name: value[:, :end] if by_token(name, value) else value for name, value in texts.items()}
        batch = texts | read(self.images, [row[side] for side in _SIDES for row in rows])
        # The files hold float32; the rest of a tower reads what the layers below would have given it.
        given = {name: value.to(self._dtype) for name, value in batch.items() if name.endswith("_hidden")}
        return {**batch, **given, **labels(rows)}

    def select(self, indices: list[int]) -> "StoredPairs":
        return StoredPairs(self.cache, self.rows.select(indices), self.images, self.prompts)


def store_pairs(cache: FeatureCache, pairs: Dataset, cache_dir: str, description: str) -> StoredPairs:
    """Compute the features of the distinct images and prompts of `pairs`, or find what an earlier run has computed.

    Args:
        cache: Computes them; the files are named by its model and processor, too.
        pairs: Rows of the contract.
        cache_dir: Folder of the files: see `encode_once`.
        description: What the progress bars say.

    Raises:
        OSError: The disk is full, or not writable.
        ValueError: An image is unreadable.
    """
    context = context_length(cache.collator.processor)

    def encode_images(images: list[Any], names: list[str]) -> dict[str, torch.Tensor]:
        return cache.encode_images([to_rgb(image, name) for image, name in zip(images, names, strict=True)])

    def encode_prompts(prompts: list[str]) -> dict[str, torch.Tensor]:
        # Padded in full, as the files hold one shape; `collate` cuts to what its batch needs.
        features = cache.encode_prompts(prompts)
        lengths = cache.lengths(features)
        return {
            name: _pad(value, lengths, context, cache.padding(name)) if by_token(name, value) else value
            for name, value in features.items()
        }

    model = cache.fingerprint()
    return StoredPairs(
        cache, *encode_once(pairs, _SIDES, encode_images, encode_prompts, model, cache_dir, description)
    )


def _pad(value: torch.Tensor, lengths: torch.Tensor | None, context: int, padding: int) -> torch.Tensor:
    """(N, L) or (N, L, W) to `context` tokens, of which those behind `lengths` are nothing but padding."""
    more = context - value.shape[1]
    value = F.pad(value, (0, more) if value.ndim == 2 else (0, 0, 0, more), value=padding)
    if lengths is None:
        return value
    behind = torch.arange(context) >= lengths[:, None]  # (N, context)
    return value.masked_fill(behind.view(*behind.shape, *[1] * (value.ndim - 2)), padding)
