"""Latents of each distinct image and embeddings of each distinct prompt, encoded once."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from bt_hf.data.cache import CachedPairs, encode_once, read_tensors
from bt_hf.diffusion.collator import image_columns, labels, row_numbers
from bt_hf.diffusion.encoder import PairEncoder


class LatentPairs(CachedPairs):
    """Pairs whose latents and prompt embeddings lie in memory-mapped files.

    Args:
        rows: Rows of the contract with numbers instead of images, and `condition`, the number of the prompt.
        images: Latents by the numbers of the images.
        prompts: Embeddings by `condition`.
        reference: (N, samples, 2 or 1) float32 errors of the base at fixed noise samples, if they are known.
    """

    def __init__(
        self, rows: Dataset, images: Dataset, prompts: Dataset, reference: torch.Tensor | None = None
    ) -> None:
        super().__init__(rows)
        self.images = images
        self.prompts = prompts
        self.reference = reference

    def with_reference(self, reference: torch.Tensor | None) -> "LatentPairs":
        """Return the same rows, with these errors of the base."""
        return LatentPairs(self.rows, self.images, self.prompts, reference)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{**row, "index": index} for row, index in zip(super().__getitems__(indices), indices, strict=True)]

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows to a batch: as `PairEncoder.encode` gives it, and `reference` if there is one."""
        columns = image_columns(list(rows[0]))
        images = read_tensors(self.images, [row[name] for name in columns for row in rows])
        digests = images.pop("digest").view(len(columns), -1)
        conditions = read_tensors(self.prompts, [row["condition"] for row in rows])
        batch: dict[str, Any] = {**images, **{f"condition_{name}": value for name, value in conditions.items()}}
        batch["prompt"] = [row["prompt"] for row in rows]  # for messages
        batch["row"] = row_numbers(batch["prompt"], digests)
        if self.reference is not None:
            batch["reference"] = self.reference[[row["index"] for row in rows]]  # (B, draws, sides)
        return {**batch, **labels(rows)}


def cache_pairs(pairs: Dataset, encoder: PairEncoder, cache_dir: str | None, description: str) -> LatentPairs:
    """Encode the distinct images and prompts of `pairs`, or find what an earlier run has encoded: see `encode_once`.

    Args:
        pairs: Rows of the contract, or unpaired ones.
        encoder: Encodes them; the files are named by its weights and options, too.
        cache_dir: Folder of the files; default: `bt_hf` in the cache of `datasets`.
        description: What the progress bars say.

    Raises:
        OSError: The disk is full, or not writable.
        ValueError: An image is unreadable or smaller than what one latent pixel covers.
    """
    columns = image_columns(pairs.column_names)
    model = encoder.fingerprint()
    return LatentPairs(
        *encode_once(pairs, columns, encoder.encode_images, encoder.encode_prompts, model, cache_dir, description)
    )
