"""Cache of frozen features: hidden states of each distinct prompt and image, in memory or in memory-mapped files.

With few pairs, every epoch sees the same images, so whatever lies below the first trained layer is computed once.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from bt_hf.data.cache import CachedPairs, can_be_cached, encode_once, read_tensors, without_format
from bt_hf.data.fingerprint import describe, describe_tokenizer, digest, digest_weights, tokenize_plainly
from bt_hf.data.images import to_rgb
from bt_hf.data.rows import as_stored, image_name
from bt_hf.reward.collator import PreferenceCollator, batch_labels
from bt_hf.reward.encoders import context_length, fills_context, tokenize
from bt_hf.reward.frozen_prefix import FrozenPrefix

logger = logging.getLogger(__name__)

_SIDES = ("chosen", "rejected")


class FeatureCache:
    """Hidden states of every distinct prompt and image of some datasets, behind the frozen prefix of each tower.

    Args:
        model: The dual encoder, with its adapter in place.
        collator: Turns prompts and images into what the towers read.
        max_bytes: `add` refuses (returns `None`) what would take more.
        batch_size: Prompts or images in a batch while computing.

    Attributes:
        computed: How many prompts and images have been computed so far.
        words: What the base says of many words, by their tokens; kept by trainers that share the cache.
    """

    def __init__(
        self, model: nn.Module, collator: PreferenceCollator, max_bytes: float = 4e9, batch_size: int = 64
    ) -> None:
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.collator = collator
        self.max_bytes = max_bytes
        self.batch_size = batch_size
        self.computed = 0
        self.words: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.bytes = 0
        self.text_prefix = FrozenPrefix.find(self.base, "text_model")
        self.image_prefix = FrozenPrefix.find(self.base, "vision_model")
        # By content: the same drawing in two pairs, or in two datasets, is computed once.
        self._texts: dict[bytes, dict[str, torch.Tensor]] = {}  # by tokens: what the model reads
        self._tokens: dict[str, bytes] = {}
        self._images: dict[bytes, dict[str, torch.Tensor]] = {}

    @property
    def useful(self) -> bool:
        """True if a tower has a frozen prefix."""
        return self.text_prefix is not None or self.image_prefix is not None

    def check(self, model: nn.Module) -> None:
        """Raise a `ValueError` unless these features are those of `model` and lie below all that it trains."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        prefixes = tuple(FrozenPrefix.find(base, tower) for tower in ("text_model", "vision_model"))
        if base is not self.base or prefixes != (self.text_prefix, self.image_prefix):
            raise ValueError(
                "`train_dataset` holds features that another model object, or this one with other layers frozen, has "
                "computed: pass the model and the adapter that its cache was made with, or the pairs themselves."
            )

    def add(self, dataset: Dataset, description: str = "Caching frozen features") -> "MemoryPairs | None":
        """Compute what is missing for `dataset`.

        Returns:
            The dataset with cached features; `None` if it would take more than `max_bytes`, or has a transform.
        """
        if not can_be_cached(dataset):
            return None
        dataset = without_format(dataset)
        before = self.bytes
        rows: list[dict[str, Any]] = []
        images: dict[bytes, Any] = {}
        texts: dict[bytes, str] = {}
        for row in tqdm(as_stored(dataset), desc=description, unit="pair", leave=False):
            keys = []
            for column in ("chosen", "rejected"):
                image = to_rgb(row[column], image_name(row, column))
                key = hashlib.blake2b(image.tobytes(), digest_size=16, salt=repr(image.size).encode()[:16]).digest()
                keys.append(key)
                if key not in self._images:
                    images[key] = image
            if row["prompt"] not in self._tokens:
                self._tokens[row["prompt"]] = self.tokens_of([row["prompt"]])[0]
            tokens = self._tokens[row["prompt"]]
            if tokens not in self._texts:
                texts[tokens] = row["prompt"]
            labels = {name: row.get(name, 1.0) for name in ("preference", "weight")}
            rows.append({"prompt": row["prompt"], "images": tuple(keys), **labels})
            if max(len(images), len(texts)) < self.batch_size and len(rows) < len(dataset):
                continue
            self._add_images(images)
            self._add_texts(texts)
            images, texts = {}, {}
            # Said as soon as it can be foreseen, not after hours.
            expected = before + (self.bytes - before) / len(rows) * len(dataset)
            if expected > self.max_bytes:
                logger.warning(
                    "Features of %d pairs would take %.1f GB, more than `cache_max_gb`: going on without a cache.",
                    len(dataset),
                    expected / 1e9,
                )
                return None
        return MemoryPairs(self, rows)

    def fingerprint(self) -> str:
        """Digest all that features depend on besides images and prompts: the frozen layers, and the processor."""
        prefixes = [prefix for prefix in (self.text_prefix, self.image_prefix) if prefix is not None]
        modules = [
            self.base.get_submodule(name)
            for prefix in prefixes
            for name in ((prefix.embeddings, *prefix.skipped) if prefix.embeddings else (prefix.tower,))
        ]
        configs = [describe(self.base.get_submodule(prefix.tower)) for prefix in prefixes]
        processor = self.collator.processor
        options = (
            self.text_prefix,
            self.image_prefix,
            configs,
            describe_tokenizer(processor),
            describe(processor.image_processor.to_dict()),
        )
        return digest(digest_weights(modules), repr(options))

    @torch.no_grad()
    def encode_images(self, images: list[Any]) -> dict[str, torch.Tensor]:
        """Encode images into inputs of the vision tower with hidden states in place of pixels, each (N, ...)."""
        return self._compute(self.image_prefix, self.collator.preprocess(images))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Encode prompts into text inputs (N, L) with hidden states (N, L, W), or (N, W) of a frozen tower."""
        inputs = tokenize(self.collator.processor, prompts)
        return {**inputs, **self._compute(self.text_prefix, inputs)}

    def _add_images(self, images: dict[bytes, Any]) -> None:
        if not images:
            return
        features = self.encode_images(list(images.values()))
        for index, key in enumerate(images):
            self._images[key] = {name: value[index].clone() for name, value in features.items()}
        self._count(self._images[key] for key in images)

    def lengths(self, texts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Count the tokens of each prompt (N,) without padding; `None` if the model wants it padded in full."""
        trims = "attention_mask" in texts and not fills_context(self.collator.processor)
        return texts["attention_mask"].sum(1) if trims else None

    def tokens_of(self, prompts: list[str]) -> list[bytes]:
        """Return the tokens that the text tower reads of each prompt, in bytes."""
        processor = self.collator.processor
        return [repr(ids).encode() for ids in tokenize_plainly(processor, prompts, context_length(processor))]

    def _add_texts(self, prompts: dict[bytes, str]) -> None:
        if not prompts:
            return
        features = self.encode_prompts(list(prompts.values()))
        lengths = self.lengths(features)
        for index, tokens in enumerate(prompts):
            # Without the padding of this batch; `collate` pads again, to the longest of its own.
            end = None if lengths is None else int(lengths[index])
            self._texts[tokens] = {
                name: value[index, :end].clone() if by_token(name, value) else value[index].clone()
                for name, value in features.items()
            }
        self._count(self._texts[tokens] for tokens in prompts)

    def _compute(self, prefix: FrozenPrefix | None, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        side = "text" if "input_ids" in inputs else "image"
        if prefix is None:
            return dict(inputs)
        device = next(self.base.parameters()).device
        training = self.base.training
        self.base.eval()
        hidden = prefix.compute(self.base, {name: value.to(device) for name, value in inputs.items()})
        self.base.train(training)
        # The rest of the tower still reads masks and, for SigLIP 2, shapes.
        kept = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return {**kept, f"{side}_hidden": hidden.cpu()}

    def _count(self, features: Iterable[dict[str, torch.Tensor]]) -> None:
        for values in features:
            self.computed += 1
            self.bytes += sum(value.nbytes for value in values.values())

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn rows of `MemoryPairs` into a batch with hidden states in place of pixels."""
        texts = [self._texts[self._tokens[row["prompt"]]] for row in rows]
        images = [self._images[row["images"][side]] for side in (0, 1) for row in rows]
        batch = {
            name: nn.utils.rnn.pad_sequence([text[name] for text in texts], True, self.padding(name))
            for name in texts[0]
        }
        batch |= {name: torch.stack([image[name] for image in images]) for name in images[0]}
        return {**batch, **batch_labels(rows)}

    def padding(self, name: str) -> int:
        """Padding value of a text input."""
        return getattr(self.collator.processor.tokenizer, "pad_token_id", 0) or 0 if name == "input_ids" else 0

    @contextmanager
    def recall(self, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Let the model, within this context, read hidden states instead of computing them.

        Args:
            inputs: A batch of `collate`, or an uncached one, which passes unchanged.

        Yields:
            What to call the model's `forward` with.
        """
        inputs = dict(inputs)
        with ExitStack() as stack:
            for prefix, side in ((self.text_prefix, "text"), (self.image_prefix, "image")):
                hidden = inputs.pop(f"{side}_hidden", None)
                if hidden is None or prefix is None:
                    continue
                stack.enter_context(prefix.recall(self.base, hidden))
                if side == "image":
                    # Only its shape and dtype may be looked at: the embeddings that would read it are replaced.
                    inputs["pixel_values"] = hidden
            yield inputs


class MemoryPairs(CachedPairs):
    """Pairs whose frozen features a `FeatureCache` holds in memory; a row has keys instead of images."""

    rows: list[dict[str, Any]]

    def __init__(self, cache: FeatureCache, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.cache = cache

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn rows into a batch: as `FeatureCache.collate`."""
        return self.cache.collate(rows)


class FilePairs(CachedPairs):
    """Pairs whose frozen features lie in memory-mapped files.

    Args:
        cache: Knows the model; holds no features itself.
        rows: Rows of the contract with numbers instead of images, and `condition`, the number of the prompt.
        images: Features by the numbers of the images.
        prompts: Features by `condition`.
    """

    def __init__(self, cache: FeatureCache, rows: Dataset, images: Dataset, prompts: Dataset) -> None:
        super().__init__(rows)
        self.cache = cache
        self.images = images
        self.prompts = prompts
        self._dtype = next(cache.base.parameters()).dtype

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Turn rows into a batch: as `FeatureCache.collate`."""
        texts = read_tensors(self.prompts, [row["condition"] for row in rows])
        lengths = self.cache.lengths(texts)
        end = None if lengths is None else int(lengths.max())
        texts = {name: value[:, :end] if by_token(name, value) else value for name, value in texts.items()}
        batch = texts | read_tensors(self.images, [row[side] for side in _SIDES for row in rows])
        # The files hold float32; the rest of a tower reads what the layers below would have given it.
        given = {name: value.to(self._dtype) for name, value in batch.items() if name.endswith("_hidden")}
        return {**batch, **given, **batch_labels(rows)}


def store_pairs(cache: FeatureCache, pairs: Dataset, cache_dir: str, description: str) -> FilePairs:
    """Compute features of the distinct images and prompts of `pairs` into files, or find those of an earlier run.

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

    encode = (encode_images, encode_prompts, cache.fingerprint())
    return FilePairs(cache, *encode_once(pairs, _SIDES, *encode, cache_dir, description, cache.tokens_of))


def by_token(name: str, value: torch.Tensor) -> bool:
    """True if an input of the text tower, (N, ...), has a value for each token, unlike features of a frozen tower."""
    return name != "text_hidden" or value.ndim == 3


def _pad(value: torch.Tensor, lengths: torch.Tensor | None, context: int, padding: int) -> torch.Tensor:
    """Pad (N, L) or (N, L, W) to `context` tokens; those behind `lengths` are masked too."""
    more = context - value.shape[1]
    value = F.pad(value, (0, more) if value.ndim == 2 else (0, 0, 0, more), value=padding)
    if lengths is None:
        return value
    behind = torch.arange(context) >= lengths[:, None]  # (N, context)
    return value.masked_fill(behind.view(*behind.shape, *[1] * (value.ndim - 2)), padding)
