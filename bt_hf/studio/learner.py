"""Learn while the person clicks: embed the images once, fit after each click, and tell what is known so far."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bt_hf.data.atomic import write_file
from bt_hf.data.clicks import CHOICES, Asked, Judged, NumberedPair, pairs_of
from bt_hf.data.images import one_line
from bt_hf.reward.asking import select_pairs
from bt_hf.reward.posterior import Taste, fit_taste
from bt_hf.reward.scorer import PreferenceScorer
from bt_hf.reward.taste import EmbeddedPairs
from bt_hf.reward.words import explain_pairs, known_looks
from bt_hf.studio.pool import Pool
from bt_hf.studio.questions import any_pair
from bt_hf.studio.session import Session
from bt_hf.studio.telling import tell

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings.safetensors"
# Prompts, and images, that are embedded at a time, and after how many the file is written.
_TEXTS, _CHUNK, _SAVE = 32, 16, 2048
# Pairs that were put last, whose images are embedded before others.
_LATEST = 64
SHOWN = 60  # images of the ranking
# Embedded images from which on pairs are chosen, though not all are embedded yet.
ENOUGH = 500
_WORDS = 5
# The first clicks are on random pairs, from which the taste learns as fast (docs/results-asking.md); then each second
# one is, since they alone tell how often the model is right.
FIRST_AT_RANDOM, RANDOM_SHARE = 10, 0.5


@dataclass(frozen=True)
class _Comparable:
    """Embedded images that have company under their prompt.

    Attributes:
        version: Changes with the images.
        usable: How many there are, embedded or not.
        numbers: (M,) their numbers in the pool.
        prompts: M prompts.
        places: Number -> place.
    """

    version: tuple[int, int]
    usable: int
    numbers: np.ndarray
    prompts: list[str]
    places: dict[int, int]


class Learner:
    """Model of the person so far.

    Args:
        session: Their clicks.
        pool: The images.
        scorer: The base, without an adapter.
    """

    def __init__(self, session: Session, pool: Pool, scorer: PreferenceScorer) -> None:
        self.session, self.pool, self.scorer = session, pool, scorer
        self._lock, self._model = threading.RLock(), threading.Lock()
        self._wake, self._more, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._random = random.Random()
        self._seed = int.from_bytes(session.id.encode()[:7], "big")
        self._images: _Comparable | None = None
        self._digest, self._scale = scorer.digest(), float(scorer.scale)
        self._vectors = torch.zeros(0, scorer.embed_texts(["a"]).shape[1])  # (images, D), zeros where not embedded
        self._known = np.zeros(0, dtype=bool)
        self._failed: set[int] = set()
        self._texts: dict[str, torch.Tensor] = {}
        self._vocabulary: tuple[list[str], torch.Tensor] | None = None
        self._taste: Taste | None = None
        self._places: dict[int, int] = {}
        self._told: dict[str, Any] = self._nothing()
        works = (self._embed_all, self._fit_all)
        self._threads = [threading.Thread(target=self._run, args=(work,), daemon=True) for work in works]

    def _nothing(self) -> dict[str, Any]:
        return {
            "clicks": 0,
            "embedded": 0,
            **tell([]),
            "words": {"towards": [], "away": []},
            "ranking": [],
            "fitted_ms": None,
        }

    def start(self) -> None:
        """Embed and fit in the background."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the background work, and wait for it."""
        self._stopped.set()
        self.notice()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)

    def notice(self) -> None:
        """Fit anew: the log or the pool has changed."""
        self.look()
        self._wake.set()

    def look(self) -> None:
        """Look for pairs that were put since: they come first."""
        self._more.set()

    def pick(self) -> tuple[int, int, str] | None:
        """Choose a pair to ask about: one that teaches most, or by chance; by chance while few images are embedded."""
        known = self._comparable()
        if len(known.numbers) < min(ENOUGH, 0.9 * known.usable):
            return any_pair(self.pool, self.session.log, self._random)
        answered, weight = self._answered(known)
        with self._lock:
            vectors = self._vectors[known.numbers]
        try:
            share = RANDOM_SHARE if len(answered) >= FIRST_AT_RANDOM else 1.0
            found = select_pairs(vectors, known.prompts, answered, weight=weight, seed=self._seed, random_share=share)
        except ValueError:  # no two images share a prompt, or all that are left are alike
            found = []
        if not found:
            return any_pair(self.pool, self.session.log, self._random)
        left, right = (int(known.numbers[place]) for place in (found[0].left, found[0].right))
        return left, right, "random" if found[0].random else "asked"

    def predict(self, pair: Asked) -> tuple[float | None, float | None]:
        """Return the margins, left minus right, that the taste so far and the base predict; `None` without one."""
        # Nothing is embedded here: the answer to a click does not wait for it.
        if not (self._knows(pair.left) and self._knows(pair.right) and pair.prompt in self._texts):
            return None, None
        embedded = self._embedded([NumberedPair(pair.prompt, pair.left, pair.right, 1.0, 1.0)])
        difference = embedded.chosen - embedded.rejected
        base = self._scale * (embedded.text * difference).sum(1)
        taste = self._taste
        model = None if taste is None else float(taste.margins(embedded.text, difference, base))
        return model, float(base)

    def _comparable(self) -> "_Comparable":
        """Return the embedded images of prompts with several; remembered until images come or go."""
        version = (self.pool.version, int(self._known.sum()))
        known = self._images
        if known is None or known.version != version:
            groups = self.pool.by_prompt(least=2)
            usable = sum(map(len, groups.values()))
            found = [(number, prompt) for prompt, group in groups.items() for number in group if self._knows(number)]
            numbers = np.array([number for number, _ in found], dtype=int)
            places = {number: place for place, (number, _) in enumerate(found)}
            known = _Comparable(version, usable, numbers, [prompt for _, prompt in found], places)
            self._images = known
        return known

    def _answered(self, known: "_Comparable") -> tuple[list[tuple[int, int, float | None]], list[float]]:
        """Return what was asked so far, as `select_pairs` takes it."""
        answered: list[tuple[int, int, float | None]] = []
        weight = []
        with self.session.reading():
            log = self.session.log
            choices = {click.asked.id: CHOICES[click.choice] for click in log.clicks}
            judged = [pair for one in log.answers.values() if isinstance(one, Judged) for pair in pairs_of(one)]
            asked = [pair for pair in log.asked.values() if pair.kind != "blind"]
        for pair in judged:
            if pair.chosen in known.places and pair.rejected in known.places:
                answered.append((known.places[pair.chosen], known.places[pair.rejected], pair.preference))
                weight.append(pair.weight)
        for put in asked:
            if put.left in known.places and put.right in known.places:
                answered.append((known.places[put.left], known.places[put.right], choices.get(put.id)))
                weight.append(1.0)
        return answered, weight

    def told(self) -> dict[str, Any]:
        """Return what is known so far, as the page shows it."""
        with self._lock:
            return dict(self._told)

    def ranking(self) -> list[int]:
        """Return the images by how much they are liked, best first; none before the first fit."""
        return sorted(self._places, key=self._places.__getitem__)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            logger.exception("the studio has stopped learning")
            with self._lock:
                self._told["verdict"] = f"Nothing more is learnt ({one_line(error)}); clicks are saved all the same."

    # --- Embeddings ---

    def _embed_all(self) -> None:
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
        return number not in self._failed and not self._knows(number)

    def _latest(self) -> list[Asked]:
        with self.session.reading():
            return list(itertools.islice(reversed(self.session.log.asked.values()), _LATEST))

    def _embed_prompts(self) -> None:
        """Embed the prompts of what was put to the person."""
        self._text([pair.prompt for pair in self._latest()])

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
                self._told["embedded"] = int(self._known.sum())
            self._wake.set()
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
                self._told["embedded"] = int(self._known.sum())
        self._wake.set()

    def _save(self) -> None:
        with self._lock:
            numbers = torch.from_numpy(np.flatnonzero(self._known))
            tensors = {"numbers": numbers, "vectors": self._vectors[numbers].contiguous()}
        try:
            write_file(self._file, save(tensors, {"model": self._digest}))
        except OSError as error:  # only a cache
            logger.warning("embeddings are not kept: %s", one_line(error))

    # --- Fit ---

    def _fit_all(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait()
            self._wake.clear()
            if not self._stopped.is_set():
                self._fit()

    def _fit(self) -> None:
        began = time.perf_counter()
        log = self.session.log
        with self.session.reading():
            answers, pairs, clicks = len(log.answers), log.pairs(), log.clicks
        known = [pair for pair in pairs if self._knows(pair.chosen) and self._knows(pair.rejected)]
        found: dict[str, Any] = {"clicks": answers, **tell(clicks)}
        if any(pair.preference != 0.5 for pair in known):
            embedded = self._embedded(known)
            taste = fit_taste(
                embedded.text, embedded.chosen, embedded.rejected, embedded.preference, embedded.weight, self._scale
            )
            self._taste = taste
            found["fitted_ms"] = round(1000 * (time.perf_counter() - began), 1)
            found["ranking"] = self._rank(taste)
            found["words"] = self._in_words(embedded)
        else:
            self._taste = None
            found |= {"ranking": [], "words": self._nothing()["words"], "fitted_ms": None}
        with self._lock:
            self._told |= found

    def _knows(self, number: int) -> bool:
        return number < len(self._known) and bool(self._known[number])

    def _embedded(self, pairs: list[NumberedPair]) -> EmbeddedPairs:
        texts = self._text([pair.prompt for pair in pairs])
        with self._lock:
            chosen, rejected = (
                self._vectors[[getattr(pair, side) for pair in pairs]].double() for side in ("chosen", "rejected")
            )
        preference, weight = (
            torch.tensor([getattr(pair, name) for pair in pairs]).double() for name in ("preference", "weight")
        )
        return EmbeddedPairs(texts.double(), chosen, rejected, preference, weight)

    def _text(self, prompts: list[str]) -> torch.Tensor:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        for start in range(0, len(missing), _TEXTS):  # a click that waits to be predicted comes in between
            if start:
                time.sleep(0.001)  # else the lock is taken again before the one who waits for it wakes up
            part = missing[start : start + _TEXTS]
            with self._model:
                self._texts |= dict(zip(part, self.scorer.embed_texts(part), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts]) if prompts else self._vectors[:0]

    def _rank(self, taste: Taste) -> list[dict[str, Any]]:
        """Return the images that the person would like best, with the places that each has moved."""
        groups = self.pool.by_prompt()
        numbers = [number for group in groups.values() for number in group if self._knows(number)]
        if not numbers:
            return []
        with self._lock:
            vectors = self._vectors[numbers]
        liked = vectors @ taste.direction.float()
        if taste.by_prompt.any():
            text = self._text([self.pool.pictures[number].prompt for number in numbers])
            liked = liked + ((text @ taste.by_prompt.T.float()) * vectors).sum(1)
        liked = liked - liked.mean()
        order = liked.argsort(descending=True, stable=True).tolist()
        places = {numbers[row]: place for place, row in enumerate(order)}
        before, self._places = self._places, places
        return [
            {
                "image": numbers[row],
                "prompt": self.pool.pictures[numbers[row]].prompt,
                "taste": round(float(liked[row]), 3),
                "move": before.get(numbers[row], place) - place,
            }
            for place, row in enumerate(order[:SHOWN])
        ]

    def _in_words(self, pairs: EmbeddedPairs) -> dict[str, list[str]]:
        if self._vocabulary is None:
            words = known_looks(self.scorer.processor.tokenizer)
            with self._model:
                self._vocabulary = (words, self.scorer.embed_texts(words))
        names, vectors = self._vocabulary
        found = explain_pairs(pairs, vectors, names, _WORDS)
        return {
            "towards": [lean.word for lean in found if lean.lean > 0],
            "away": [lean.word for lean in reversed(found) if lean.lean < 0],
        }
