"""Compute what is frozen once.

With few pairs, every epoch sees the same images. What lies below the first trained layer of a tower gives the same
hidden states each time, so they are computed once for each distinct prompt and image. Later forwards skip these
layers; the model's own `forward` still runs, so DDP, PEFT and gradient checkpointing see nothing unusual.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bt_hf.data.fingerprint import describe, describe_tokenizer, digest, digest_weights
from bt_hf.data.images import to_rgb
from bt_hf.reward.collator import PreferenceCollator, labels
from bt_hf.reward.encoders import fills_context, tokenize

logger = logging.getLogger(__name__)


class _Recall(nn.Module):
    """Stands in for the embeddings: gives the cached hidden states, whatever it is called with."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.hidden


class _RecallTower(_Recall):
    """Stands in for a whole frozen tower."""

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        # Some models project `pooler_output`, others the first token of `last_hidden_state`.
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden[:, None], pooler_output=self.hidden)


class _Skip(nn.Module):
    """Stands in for a frozen layer whose output is already in the hidden states."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


@dataclass
class FrozenPrefix:
    """The frozen beginning of one tower.

    Attributes:
        tower: Name of the tower, `text_model` or `vision_model`.
        embeddings: Name of its embeddings; empty if the whole tower is frozen.
        skipped: Names of the frozen modules between the embeddings and the first trained layer.
        last: Name of the last skipped layer.
    """

    tower: str
    embeddings: str = ""
    skipped: tuple[str, ...] = ()
    last: str = ""

    @classmethod
    def find(cls, base: nn.Module, tower: str) -> "FrozenPrefix | None":
        """The longest frozen prefix of a tower; `None` if it is trained from its first layer on or not understood."""
        module = base.get_submodule(tower)
        if not _trained(module):
            return cls(tower)
        names = {name: child for name, child in module.named_modules() if name}
        stacks = [name for name, child in names.items() if isinstance(child, nn.ModuleList)]
        embeddings = min((name for name in names if name.split(".")[-1] == "embeddings"), key=len, default=None)
        if not stacks or embeddings is None:
            return None
        stack = max(stacks, key=lambda name: len(names[name]))
        norms = [name for name in names if name.split(".")[-1] in ("pre_layrnorm", "pre_layernorm")]
        if any(_trained(names[name]) for name in (embeddings, *norms)):
            return None
        frozen = 0
        while frozen < len(names[stack]) and not _trained(names[stack][frozen]):
            frozen += 1
        if frozen == 0:
            return None
        layers = [f"{tower}.{stack}.{index}" for index in range(len(names[stack]))]
        return cls(
            tower,
            f"{tower}.{embeddings}",
            (*(f"{tower}.{name}" for name in norms), *layers[:frozen]),
            layers[frozen - 1],
        )

    def compute(self, base: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states behind the prefix: (N, tokens, width), or (N, width) if the whole tower is frozen."""
        if not self.embeddings:
            output = base.get_submodule(self.tower)(**inputs)
            return output.pooler_output if output.pooler_output is not None else output.last_hidden_state[:, 0]
        seen: list[torch.Tensor] = []
        with base.get_submodule(self.last).register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        ):
            base.get_submodule(self.tower)(**inputs)
        return seen[0]

    @contextmanager
    def recall(self, base: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
        """Within this context, `base` begins the tower with `hidden` instead of computing it."""
        if not self.embeddings:
            stand_ins: dict[str, nn.Module] = {self.tower: _RecallTower(hidden)}
        else:
            stand_ins = {self.embeddings: _Recall(hidden), **{name: _Skip() for name in self.skipped}}
        originals = {name: base.get_submodule(name) for name in stand_ins}
        try:
            for name, module in stand_ins.items():
                # Stays below its stand-in, uncalled: DDP looks for its buffers.
                module.original = originals[name]
                base.set_submodule(name, module)
            yield
        finally:
            for name, module in originals.items():
                base.set_submodule(name, module)


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class FeatureCache:
    """Hidden states of every distinct prompt and image of some datasets, behind the frozen prefix of each tower.

    Args:
        model: The dual encoder, with its adapter in place.
        collator: Turns prompts and images into what the towers read.
        max_bytes: `add` refuses (returns `None`) what would take more.
        batch_size: Prompts or images in a batch while computing.

    Attributes:
        computed: How many prompts and images have been computed so far.
    """

    def __init__(
        self, model: nn.Module, collator: PreferenceCollator, max_bytes: float = 4e9, batch_size: int = 64
    ) -> None:
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.collator = collator
        self.max_bytes = max_bytes
        self.batch_size = batch_size
        self.computed = 0
        self.bytes = 0
        self.text_prefix = FrozenPrefix.find(self.base, "text_model")
        self.image_prefix = FrozenPrefix.find(self.base, "vision_model")
        # By content: the same drawing in two pairs, or in two datasets, is computed once.
        self._texts: dict[str, dict[str, torch.Tensor]] = {}
        self._images: dict[bytes, dict[str, torch.Tensor]] = {}

    @property
    def useful(self) -> bool:
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

    def add(self, dataset: Dataset, description: str = "Caching frozen features") -> "CachedPairs | None":
        """Compute what is missing for `dataset`.

        Returns:
            The dataset with cached features, or `None` if it would take more than `max_bytes`.
        """
        before = self.bytes
        rows: list[dict[str, Any]] = []
        images: dict[bytes, Any] = {}
        texts: dict[str, None] = {}
        for row in tqdm(dataset, desc=description, unit="pair", leave=False):
            keys = []
            for column in ("chosen", "rejected"):
                image = to_rgb(row[column])
                key = hashlib.blake2b(image.tobytes(), digest_size=16, salt=repr(image.size).encode()[:16]).digest()
                keys.append(key)
                if key not in self._images:
                    images[key] = image
            if row["prompt"] not in self._texts:
                texts[row["prompt"]] = None
            labels_of_row = {name: row.get(name, 1.0) for name in ("preference", "weight")}
            rows.append({"prompt": row["prompt"], "images": tuple(keys), **labels_of_row})
            if max(len(images), len(texts)) < self.batch_size and len(rows) < len(dataset):
                continue
            self._add_images(images)
            self._add_texts(list(texts))
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
        return CachedPairs(self, rows)

    def fingerprint(self) -> str:
        """Tells what features depend on besides images and prompts: the frozen layers, and the processor."""
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
        """What the vision tower reads, with hidden states in place of pixels: each (N, ...)."""
        return self._compute(self.image_prefix, self.collator.preprocess(images))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the text tower reads, (N, L), with hidden states besides: (N, L, W), or (N, W) of a frozen tower."""
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
        """How many tokens of each prompt (N,) are no padding; `None` if the model wants it padded in full."""
        trims = "attention_mask" in texts and not fills_context(self.collator.processor)
        return texts["attention_mask"].sum(1) if trims else None

    def _add_texts(self, prompts: list[str]) -> None:
        if not prompts:
            return
        features = self.encode_prompts(prompts)
        lengths = self.lengths(features)
        for index, prompt in enumerate(prompts):
            # Without the padding of this batch; `collate` pads again, to the longest of its own.
            end = None if lengths is None else int(lengths[index])
            self._texts[prompt] = {
                name: value[index, :end].clone() if by_token(name, value) else value[index].clone()
                for name, value in features.items()
            }
        self._count(self._texts[prompt] for prompt in prompts)

    def _compute(self, prefix: FrozenPrefix | None, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        side = "text" if "input_ids" in inputs else "image"
        if prefix is None:
            return dict(inputs)
        device = next(self.base.parameters()).device
        training = self.base.training
        self.base.eval()
        hidden = prefix.compute(self.base, {name: value.to(device) for name, value in inputs.items()})
        self.base.train(training)
        # What the rest of the tower still reads besides hidden states: masks and, for SigLIP 2, shapes.
        kept = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return {**kept, f"{side}_hidden": hidden.cpu()}

    def _count(self, features: Iterable[dict[str, torch.Tensor]]) -> None:
        for values in features:
            self.computed += 1
            self.bytes += sum(value.nbytes for value in values.values())

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of `CachedPairs` -> a batch with hidden states in place of pixels."""
        texts = [self._texts[row["prompt"]] for row in rows]
        images = [self._images[row["images"][side]] for side in (0, 1) for row in rows]
        batch = {
            name: nn.utils.rnn.pad_sequence([text[name] for text in texts], True, self.padding(name))
            for name in texts[0]
        }
        batch |= {name: torch.stack([image[name] for image in images]) for name in images[0]}
        return {**batch, **labels(rows)}

    def padding(self, name: str) -> int:
        """What a text input is padded with."""
        return getattr(self.collator.processor.tokenizer, "pad_token_id", 0) or 0 if name == "input_ids" else 0

    @contextmanager
    def recall(self, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Within this context, the model reads hidden states instead of computing them.

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


def by_token(name: str, value: torch.Tensor) -> bool:
    """Whether what a text tower reads, (N, ...), has a value for each token: not so the features of a frozen one."""
    return name != "text_hidden" or value.ndim == 3


class CachedPairs(torch.utils.data.Dataset):
    """Pairs whose frozen features a `FeatureCache` holds; a row has keys instead of images."""

    rows: Any  # a list of dicts, or a `datasets.Dataset`

    def __init__(self, cache: FeatureCache, rows: list[dict[str, Any]]) -> None:
        self.cache = cache
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """As `FeatureCache.collate`."""
        return self.cache.collate(rows)

    def select(self, indices: list[int]) -> "CachedPairs":
        """Some of the pairs, on the same cache."""
        return CachedPairs(self.cache, [self.rows[index] for index in indices])
