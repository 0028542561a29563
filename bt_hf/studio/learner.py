"""Learn while the person clicks: embed the images once, fit after each click, and tell what is known so far."""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bt_hf.data.clicks import CHOICES, Asked, Judged, NumberedPair, pairs_of
from bt_hf.data.images import one_line
from bt_hf.reward.asking import select_pairs
from bt_hf.reward.posterior import Taste, fit_taste
from bt_hf.reward.scorer import PreferenceScorer
from bt_hf.reward.taste import EmbeddedPairs
from bt_hf.reward.words import explain_pairs, known_looks
from bt_hf.studio.embeddings import Embeddings
from bt_hf.studio.pool import Pool
from bt_hf.studio.questions import any_pair
from bt_hf.studio.session import Session
from bt_hf.studio.telling import tell

logger = logging.getLogger(__name__)

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
        self._lock = threading.Lock()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self.embeddings = Embeddings(session, pool, scorer, self._wake.set)
        self._random = random.Random()
        self._seed = int.from_bytes(session.id.encode()[:7], "big")
        self._images: _Comparable | None = None
        self._scale = float(scorer.scale)
        self._vocabulary: tuple[list[str], torch.Tensor] | None = None
        self._taste: Taste | None = None
        self._places: dict[int, int] = {}
        self._told: dict[str, Any] = self._nothing()
        works = (self.embeddings.run, self._fit_all)
        self._threads = [threading.Thread(target=self._run, args=(work,), daemon=True) for work in works]

    def _nothing(self) -> dict[str, Any]:
        return {
            "clicks": 0,
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
        self.embeddings.stop()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)

    def notice(self) -> None:
        """Fit anew: the log or the pool has changed."""
        self.look()
        self._wake.set()

    def look(self) -> None:
        """Look for pairs that were put since: they come first."""
        self.embeddings.look()

    def pick(self) -> tuple[int, int, str] | None:
        """Choose a pair to ask about: one that teaches most, or by chance; by chance while few images are embedded."""
        known = self._comparable()
        if len(known.numbers) < min(ENOUGH, 0.9 * known.usable):
            return any_pair(self.pool, self.session.log, self._random)
        answered, weight = self._answered(known)
        vectors = self.embeddings.images(known.numbers)
        share = RANDOM_SHARE if len(answered) >= FIRST_AT_RANDOM else 1.0
        try:
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
        if not self.embeddings.knows_pair(pair):
            return None, None
        embedded = self.embeddings.pairs([NumberedPair(pair.prompt, pair.left, pair.right, 1.0, 1.0)])
        difference = embedded.chosen - embedded.rejected
        base = self._scale * (embedded.text * difference).sum(1)
        taste = self._taste
        model = None if taste is None else float(taste.margins(embedded.text, difference, base))
        return model, float(base)

    def _comparable(self) -> "_Comparable":
        """Return the embedded images of prompts with several; remembered until images come or go."""
        version = (self.pool.version, self.embeddings.count)
        known = self._images
        if known is None or known.version != version:
            groups = self.pool.by_prompt(least=2)
            usable = sum(map(len, groups.values()))
            found = [
                (number, prompt)
                for prompt, group in groups.items()
                for number in group
                if self.embeddings.knows(number)
            ]
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
            return self._told | {"embedded": self.embeddings.count}

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
        known = [pair for pair in pairs if self.embeddings.knows(pair.chosen) and self.embeddings.knows(pair.rejected)]
        found: dict[str, Any] = {"clicks": answers, **tell(clicks)}
        if any(pair.preference != 0.5 for pair in known):
            embedded = self.embeddings.pairs(known)
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

    def _rank(self, taste: Taste) -> list[dict[str, Any]]:
        """Return the images that the person would like best, with the places that each has moved."""
        groups = self.pool.by_prompt()
        numbers = [number for group in groups.values() for number in group if self.embeddings.knows(number)]
        if not numbers:
            return []
        vectors = self.embeddings.images(numbers)
        liked = vectors @ taste.direction.float()
        if taste.by_prompt.any():
            text = self.embeddings.prompts([self.pool.pictures[number].prompt for number in numbers])
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
            self._vocabulary = (words, self.embeddings.words(words))
        names, vectors = self._vocabulary
        found = explain_pairs(pairs, vectors, names, _WORDS)
        return {
            "towards": [lean.word for lean in found if lean.lean > 0],
            "away": [lean.word for lean in reversed(found) if lean.lean < 0],
        }
