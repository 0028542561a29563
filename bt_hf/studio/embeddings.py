"""Embeddings of a session's images and prompts, made in the background and kept on disk."""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bt_hf.data.atomic import write_file
from bt_hf.data.clicks import Asked, NumberedPair
from bt_hf.data.images import one_line
from bt_hf.reward.scorer import PreferenceScorer
from bt_hf.reward.taste import EmbeddedPairs
from bt_hf.studio.pool import Pool
from bt_hf.studio.session import Session

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings.safetensors"
# Prompts, and images, that are embedded at a time, and after how many the file is written.
_TEXTS, _CHUNK, _SAVE = 32, 16, 2048
# Pairs that were put last, whose images are embedded before others.
_LATEST = 64


class Embeddings:
    """Embeddings by the base, each computed once; those of what was put to the person come first.

    Args:
        session: Keeps them.
        pool: The images.
        scorer: The base, without an adapter.
        changed: Called when there are more.
    """

    def __init__(self, session: Session, pool: Pool, scorer: PreferenceScorer, changed: Callable[[], object]) -> None:
        self.session, self.pool, self.scorer, self.changed = session, pool, scorer, changed
        self._lock, self._model = threading.RLock(), threading.Lock()
        self._more, self._stopped = threading.Event(), threading.Event()
        self._digest = scorer.digest()
        self._vectors = torch.zeros(0, scorer.embed_texts(["a"]).shape[1])  # (images, D), zeros where not embedded
        self._known = np.zeros(0, dtype=bool)
        self._failed: set[int] = set()
        self._texts: dict[str, torch.Tensor] = {}

    @property
    def count(self) -> int:
        """Number of images that are embedded."""
        return int(self._known.sum())

    def knows(self, number: int) -> bool:
        """True if an image is embedded."""
        return number < len(self._known) and bool(self._known[number])

    def knows_pair(self, pair: Asked) -> bool:
        """True if both images and the prompt of a pair are embedded."""
        return self.knows(pair.left) and self.knows(pair.right) and pair.prompt in self._texts

    def images(self, numbers: list[int] | np.ndarray) -> torch.Tensor:
        """Return (N, D) embeddings of images that are known."""
        with self._lock:
            return self._vectors[numbers]

    def prompts(self, prompts: list[str]) -> torch.Tensor:
        """Return (N, D) embeddings of prompts, made now if need be."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for start in range(0, len(missing), _TEXTS):  # a click that waits to be predicted comes in between
            if start:
                time.sleep(0.001)  # else the lock is taken again before the one who waits for it wakes up
            part = missing[start : start + _TEXTS]
            with self._model:
                self._texts |= dict(zip(part, self.scorer.embed_texts(part), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts]) if prompts else self._vectors[:0]

    def pairs(self, pairs: list[NumberedPair]) -> EmbeddedPairs:
        """Return the embeddings of pairs of known images."""
        texts = self.prompts([pair.prompt for pair in pairs])
        chosen, rejected = (
            self.images([getattr(pair, side) for pair in pairs]).double() for side in ("chosen", "rejected")
        )
        preference, weight = (
            torch.tensor([getattr(pair, name) for pair in pairs]).double() for name in ("preference", "weight")
        )
        return EmbeddedPairs(texts.double(), chosen, rejected, preference, weight)

    def words(self, words: list[str]) -> torch.Tensor:
        """Return (N, D) embeddings of words, which are not kept."""
        with self._model:
            return self.scorer.embed_texts(words)

    def look(self) -> None:
        """Look for pairs that were put since: they come first."""
        self._more.set()

    def stop(self) -> None:
        """Let `run` end."""
        self._stopped.set()
        self._more.set()

    def run(self) -> None:
        """Embed the images that are not known, those that were put to the person first."""
        self._load()
        while not self._stopped.is_set():
            usable = self.pool.by_prompt().values()
            missing = [number for numbers in usable for number in numbers if self._lacks(number)]
            fresh = 0
            for start in range(0, max(1, len(missing)), _CHUNK):
                if self._stopped.is_set():
                    break
                self._embed_prompts()
                first = self._shown()
                rest = [one for one in missing[start : start + _CHUNK] if self._lacks(one) and one not in first]
                fresh += self._embed(first + rest)
                if fresh >= _SAVE:
                    self._save()
                    fresh = 0
            if fresh:
                self._save()
            version = self.pool.version
            while self.pool.version == version and not self._shown() and not self._stopped.is_set():
                self._embed_prompts()
                self._more.wait(timeout=1.0)
                self._more.clear()

    def _lacks(self, number: int) -> bool:
        return number not in self._failed and not self.knows(number)

    def _latest(self) -> list[Asked]:
        with self.session.reading():
            return list(itertools.islice(reversed(self.session.log.asked.values()), _LATEST))

    def _embed_prompts(self) -> None:
        """Embed the prompts of what was put to the person."""
        self.prompts([pair.prompt for pair in self._latest()])

    def _shown(self) -> list[int]:
        """Return images that were put to the person and are not embedded."""
        numbers = dict.fromkeys(number for pair in self._latest() for number in (pair.left, pair.right))
        return [number for number in numbers if self._lacks(number)]

    def _embed(self, numbers: list[int]) -> int:
        pictures = {}
        for number in numbers:
            try:
                pictures[number] = self.pool.read(number)
            except (LookupError, ValueError):  # it is left out from now on
                self._failed.add(number)
        if pictures:
            with self._model:
                found = self.scorer.embed_images(list(pictures.values()))
            with self._lock:
                self._grow()
                self._vectors[list(pictures)] = found
                self._known[list(pictures)] = True
            self.changed()
        return len(pictures)

    def _grow(self) -> None:
        more = len(self.pool.pictures) - len(self._known)
        if more > 0:
            self._vectors = torch.cat([self._vectors, torch.zeros(more, self._vectors.shape[1])])
            self._known = np.concatenate([self._known, np.zeros(more, dtype=bool)])

    @property
    def _file(self) -> Path:
        return self.session.folder / EMBEDDINGS

    def _load(self) -> None:
        """Read what an earlier run has embedded with the same base."""
        try:
            with safe_open(self._file, "pt") as file:
                if (file.metadata() or {}).get("model") != self._digest:
                    return
                numbers, vectors = file.get_tensor("numbers"), file.get_tensor("vectors")
        except (OSError, SafetensorError, KeyError):
            return
        with self._lock:
            self._grow()
            if len(numbers) and int(numbers.max()) < len(self._known) and vectors.shape[1] == self._vectors.shape[1]:
                self._vectors[numbers], self._known[numbers.numpy()] = vectors, True
        self.changed()

    def _save(self) -> None:
        with self._lock:
            numbers = torch.from_numpy(np.flatnonzero(self._known))
            tensors = {"numbers": numbers, "vectors": self._vectors[numbers].contiguous()}
        try:
            write_file(self._file, save(tensors, {"model": self._digest}))
        except OSError as error:  # only a cache
            logger.warning("embeddings are not kept: %s", one_line(error))
