"""On-disk cache of latents and prompt embeddings, one entry per distinct image or prompt."""

from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset

from bt_hf.data.cache import CachedPairs, can_be_cached, encode_once, read_tensors
from bt_hf.diffusion.collator import Batch, Row, batch_labels, hash_rows, image_columns
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.training.arguments import map_eval_datasets


class LatentPairs(CachedPairs):
    """Pairs whose latents and prompt embeddings lie in memory-mapped files.

    Args:
        rows: Rows of the contract with numbers instead of images, and `condition`, the number of the prompt.
        images: Latents and hashes, one row for each number of an image.
        prompts: Embeddings, one row for each `condition`.
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
        """Return the same rows with these errors of the base."""
        return LatentPairs(self.rows, self.images, self.prompts, reference)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{**row, "index": index} for row, index in zip(super().__getitems__(indices), indices, strict=True)]

    def collate(self, rows: list[Row]) -> Batch:
        """Collate rows as `PairEncoder.encode` does, with `reference` (B, samples, sides) if it is known."""
        columns = image_columns(list(rows[0]))
        images = read_tensors(self.images, [row[name] for name in columns for row in rows])
        hashes = images.pop("digest").view(len(columns), -1)
        conditions = read_tensors(self.prompts, [row["condition"] for row in rows])
        batch: dict[str, Any] = {**images, **{f"condition_{name}": value for name, value in conditions.items()}}
        batch["prompt"] = [row["prompt"] for row in rows]  # for messages
        batch["row"] = hash_rows(batch["prompt"], hashes)
        if self.reference is not None:
            batch["reference"] = self.reference[[row["index"] for row in rows]]
        return {**batch, **batch_labels(rows)}


Pairs: TypeAlias = Dataset | IterableDataset | LatentPairs
Evaluated: TypeAlias = Pairs | dict[str, Pairs]


def cache_pairs(pairs: Dataset, encoder: PairEncoder, cache_dir: str | None, description: str) -> LatentPairs:
    """Encode the distinct images and prompts of `pairs`, or find what an earlier run has encoded: see `encode_once`.

    Args:
        pairs: Rows of the contract, or unpaired ones.
        encoder: Encodes them; the files are named by its weights and options, too.
        cache_dir: Folder of the files; default: `bt_hf` in the cache of `datasets`.
        description: Text of the progress bars.

    Raises:
        OSError: The disk is full, or not writable.
        ValueError: An image is unreadable or smaller than what one latent pixel covers.
    """
    columns = image_columns(pairs.column_names)
    encode = (encoder.encode_images, encoder.encode_prompts, encoder.fingerprint())
    return LatentPairs(*encode_once(pairs, columns, *encode, cache_dir, description, encoder.tokens_of))


def cache_datasets(
    train: Pairs | None, evaluation: Evaluated | None, encoder: PairEncoder, cache_dir: str | None
) -> tuple[Pairs | None, Evaluated | None]:
    """Encode map-style datasets as `cache_pairs` does.

    Streams, and datasets with a transform, are left as they are, to be encoded at every step.
    """

    def encode(pairs: Any, name: str) -> Any:
        return cache_pairs(pairs, encoder, cache_dir, f"Encoding {name}") if can_be_cached(pairs) else pairs

    held_out = map_eval_datasets(lambda pairs: encode(pairs, "held-out pairs"), evaluation)
    return encode(train, "training pairs"), held_out


def each_dataset(train: Pairs | None, evaluation: Evaluated | None) -> list[Pairs]:
    """List the datasets of a training that are there."""
    sets = [train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    return [pairs for pairs in sets if pairs is not None]
