"""Simulated people: who prefers which drawings, and the pairs that they click.

    from people import PEOPLE, people_of

    person = PEOPLE["warm"]
    clicks = person.pairs("held_out", 64, seed=0, wrong=0.2)  # one click in five is wrong
    test = person.test("held_out", seed=0)                    # other concepts, no wrong clicks

A person is a utility of drawings, and prefers the drawing of the higher one. Concepts are halved by the seed: clicks
come from one half, the test from the other. Hyper-parameters are chosen on the split `"train"`, tables are measured on
`"held_out"`. Houses, icons and typefaces that pretraining left out have no `"train"`: nothing is to be tuned on them.
"""

import io
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
sys.path.insert(0, str(Path(__file__).parents[1] / "icons"))

from emoji import STYLES, load_emoji
from looks import PHOSPHOR_WEIGHTS, load_looks

SPLITS = ("train", "held_out")
KINDS = ("house", "unseen house", "weight", "typeface", "colour", "mixture", "embedding", "prompt")
# Numbers of emojibase.
GROUPS = {"smileys": 0, "people": 1, "animals": 3, "food": 4, "travel": 5, "activities": 6, "objects": 7, "symbols": 8}
FLAT, SHADED = ("twemoji", "fluent"), ("noto", "fluent_3d")

FEATURES = {
    "prompt": Value("string"),
    "chosen": ImageFeature(),
    "rejected": ImageFeature(),
    "concept": Value("string"),
    "preference": Value("float64"),
}


@dataclass(frozen=True, eq=False)
class Pool:
    """Drawings of one kind, with what a utility may look at; N rows."""

    concepts: list[str]
    captions: list[str]
    looks: np.ndarray  # (N,) house, weight or family
    kinds: np.ndarray  # (N,) kind of typeface
    groups: np.ndarray  # (N,) emojibase's group, -1 for what is not an emoji
    images: list[dict[str, bytes | None]]  # encoded


@lru_cache(maxsize=4)
def pixels_of(pool: Pool) -> np.ndarray:
    """Return the decoded drawings, (N, 64, 64, 3) uint8."""
    return np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in pool.images])


@lru_cache(maxsize=8)
def load_pool(name: str, split: str) -> Pool:
    """Read the drawings that people choose from.

    Args:
        name: `"emoji"` (five houses), `"houses"` (with the two unseen ones), `"phosphor"` or `"typefaces"`.
        split: `"train"` or `"held_out"` concepts.

    Raises:
        ValueError: The drawings are for measuring alone, but `split` is `"train"`; or a name is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` should be one of {', '.join(SPLITS)}, but got {split!r}.")
    if name != "emoji" and split == "train":
        raise ValueError(f"{name!r} is for measuring alone: pass split='held_out', and tune on people of the emoji.")
    if name in ("emoji", "houses"):
        rows = _columns(load_emoji(split).rename_column("style", "look"))
        rows["kind"] = ["emoji"] * len(rows["concept"])
        groups = dict(zip(rows["concept"], rows["group"], strict=True))
        for house in ("noto_v1", "emojione") if name == "houses" else ():
            more = _columns(load_looks(house))
            more["group"] = [groups[concept] for concept in more["concept"]]
            rows = {column: rows[column] + more[column] for column in rows.keys() & more.keys()}
    else:
        rows = _columns(load_looks(name))
        rows["group"] = [-1] * len(rows["concept"])
    return Pool(
        concepts=rows["concept"],
        captions=rows["caption"],
        looks=np.array(rows["look"]),
        kinds=np.array(rows["kind"]),
        groups=np.array(rows["group"]),
        images=rows["image"],
    )


def _columns(rows: Dataset) -> dict[str, list[Any]]:
    return rows.cast_column("image", ImageFeature(decode=False)).with_format("arrow")[:].to_pydict()


Utility = Callable[[Pool], np.ndarray]  # (N,); NaN where the person has no opinion


@dataclass(frozen=True, eq=False)
class Person:
    """Somebody whose taste is known.

    Attributes:
        name: Key in `PEOPLE`.
        kind: One of `KINDS`.
        pool: Drawings to choose from, as in `load_pool`.
        utility: Of each drawing of a pool; NaN where the person has no opinion.
        gap: Two drawings whose utilities differ by less are a tie.
    """

    name: str
    kind: str
    pool: str
    utility: Utility
    gap: float = 0.0

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that this person's drawings have."""
        return SPLITS if self.pool == "emoji" else SPLITS[1:]

    def pairs(self, split: str, n: int, seed: int, wrong: float = 0.0, ties: float = 0.0) -> Dataset:
        """Return `n` clicks, on one half of the concepts.

        Args:
            split: `"train"` or `"held_out"`.
            n: How many pairs; as few as possible are of one concept.
            seed: Which concepts and which drawings.
            wrong: Probability that a click is wrong.
            ties: Share of the pairs that are ties (`preference` 0.5), of the drawings of a concept that this
                person likes most equally.

        Returns:
            Dataset in the row contract: `prompt`, `chosen`, `rejected`, `concept`, and, if `ties`, `preference`.

        Raises:
            ValueError: There are fewer pairs than `n`.
        """
        rng = random.Random(f"{self.name}/{split}/{seed}/clicks")
        tied = round(n * ties)
        chosen = self._draw(split, seed, half=0, n=n - tied, rng=rng)
        chosen = [(b, a) if rng.random() < wrong else (a, b) for a, b in chosen]
        equal = self._draw(split, seed, half=0, n=tied, rng=rng, equal=True) if tied else []
        rows = [(*pair, 1.0) for pair in chosen] + [(*pair, 0.5) for pair in equal]
        rng.shuffle(rows)
        return self._dataset(split, rows, with_preference=ties > 0)

    def test(self, split: str, seed: int, n: int = 400) -> Dataset:
        """Return up to `n` pairs of the concepts that `pairs` leaves alone at this seed, none of them wrong."""
        pairs = self.test_rows(split, seed, n)
        return self._dataset(split, [(*pair, 1.0) for pair in pairs], with_preference=False)

    def test_rows(self, split: str, seed: int, n: int = 400) -> list[tuple[int, int]]:
        """Return the pairs of `test` as rows of the pool, the preferred drawing first."""
        rng = random.Random(f"{self.name}/{split}/{seed}/test")
        return self._draw(split, seed, half=1, n=n, rng=rng, at_most=True)

    def drawings(self, split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the pool that `pairs` draws from at this seed, and this person's utility of each."""
        pool, value = load_pool(self.pool, split), _utility(self, split)
        concepts = _halves(pool, seed)[0]
        rows = np.array([row for row, concept in enumerate(pool.concepts) if concept in concepts])
        rows = rows[~np.isnan(value[rows])]
        return rows, value[rows]

    def _draw(
        self,
        split: str,
        seed: int,
        half: int,
        n: int,
        rng: random.Random,
        equal: bool = False,
        at_most: bool = False,
    ) -> list[tuple[int, int]]:
        pool = load_pool(self.pool, split)
        value = _utility(self, split)
        rows_of: dict[str, list[int]] = {}
        for row, concept in enumerate(pool.concepts):
            if not np.isnan(value[row]):
                rows_of.setdefault(concept, []).append(row)
        options = []
        for concept in _halves(pool, seed)[half]:
            rows = rows_of.get(concept, [])
            pairs = [(a, b) for a in rows for b in rows if a != b]
            rng.shuffle(pairs)
            if equal:
                pairs.sort(key=lambda pair: abs(value[pair[0]] - value[pair[1]]))
            else:
                pairs = [(a, b) for a, b in pairs if value[a] - value[b] > self.gap]
            options.append(pairs)
        rng.shuffle(options)
        # First one pair of each concept, then a second one, and so on.
        longest = max(map(len, options))
        drawn = [pairs[turn] for turn in range(longest) for pairs in options if turn < len(pairs)]
        if len(drawn) < n and not at_most:
            raise ValueError(f"{self.name!r} has {len(drawn)} pairs of this sort in {split!r}, but `n` asks for {n}.")
        return drawn[:n]

    def _dataset(self, split: str, rows: list[tuple[int, int, float]], with_preference: bool) -> Dataset:
        pool = load_pool(self.pool, split)
        columns: dict[str, list[Any]] = {
            "prompt": [pool.captions[a] for a, _, _ in rows],
            "chosen": [pool.images[a] for a, _, _ in rows],
            "rejected": [pool.images[b] for _, b, _ in rows],
            "concept": [pool.concepts[a] for a, _, _ in rows],
            "preference": [preference for _, _, preference in rows],
        }
        if not with_preference:
            del columns["preference"]
        return Dataset.from_dict(columns, features=Features({name: FEATURES[name] for name in columns}))


def _halves(pool: Pool, seed: int) -> tuple[dict[str, None], dict[str, None]]:
    """Return two halves of the concepts, for clicks and for tests; all people of a pool share them."""
    concepts = sorted(set(pool.concepts))
    random.Random(seed).shuffle(concepts)
    return dict.fromkeys(concepts[::2]), dict.fromkeys(concepts[1::2])


@lru_cache(maxsize=64)
def _utility(person: Person, split: str) -> np.ndarray:
    return np.asarray(person.utility(load_pool(person.pool, split)), dtype=float)


def likes_look(look: str) -> Utility:
    """Prefer one house, weight or family to all others."""
    return lambda pool: (pool.looks == look).astype(float)


def likes_kind(kind: str) -> Utility:
    """Prefer all typefaces of a kind to all others."""
    return lambda pool: (pool.kinds == kind).astype(float)


@lru_cache(maxsize=4)
def colours(pool: Pool) -> dict[str, np.ndarray]:
    """Return warmth, darkness and saturation of each drawing, (N,) each, of what is not white, on a scale of 255."""
    pixels = pixels_of(pool).astype(np.int16)
    drawn = pixels.min(axis=3) < 250
    size = np.maximum(drawn.sum(axis=(1, 2)), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return (values * drawn).sum(axis=(1, 2)) / size

    return {
        "warm": mean(pixels[..., 0] - pixels[..., 2]),
        "dark": mean(255 - pixels.mean(axis=3)),
        "saturated": mean(pixels.max(axis=3) - pixels.min(axis=3)),
    }


def likes_colour(name: str) -> Utility:
    """Prefer the warmer, darker or more saturated drawing."""
    return lambda pool: colours(pool)[name]


def likes_mixture(seed: int) -> Utility:
    """Weigh houses and colours at random."""

    def utility(pool: Pool) -> np.ndarray:
        attributes = [*((pool.looks == style).astype(float) for style in STYLES), *colours(pool).values()]
        standardised = np.stack([(values - values.mean()) / values.std() for values in attributes], axis=1)
        return standardised @ np.random.default_rng(seed).normal(size=standardised.shape[1])

    return utility


def likes_embedding(seed: int) -> Utility:
    """Follow a random direction of an embedding that no base shares: random features of small pixels."""

    def utility(pool: Pool) -> np.ndarray:
        small = pixels_of(pool).reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4)).reshape(-1, 768) / 255  # (N, 768)
        rng = np.random.default_rng(0)  # the embedding is one and the same; the direction is the person's
        features = np.maximum((small - small.mean(0)) @ rng.normal(size=(768, 256)), 0)
        value = (features - features.mean(0)) / features.std(0) @ np.random.default_rng(seed).normal(size=256)
        return (value - value.mean()) / value.std()

    return utility


def likes_by_group(houses: dict[str, tuple[str, ...]]) -> Utility:
    """Prefer other houses for each group of concepts, and have no opinion of other groups.

    Args:
        houses: For groups, named with spaces between them, the preferred houses.
    """

    def utility(pool: Pool) -> np.ndarray:
        value = np.full(len(pool.looks), np.nan)
        for groups, preferred in houses.items():
            rows = np.isin(pool.groups, [GROUPS[group] for group in groups.split()])
            value[rows] = np.isin(pool.looks[rows], preferred)
        return value

    return utility


BY_PROMPT = {
    "flat animals, shaded food": {"animals people smileys": FLAT, "food travel activities objects": SHADED},
    "shaded animals, flat food": {"animals people smileys": SHADED, "food travel activities objects": FLAT},
    "mono objects, noto animals": {"objects food symbols": ("mono",), "animals people travel": ("noto",)},
    "fluent travel, 3d food": {"travel objects": ("fluent",), "food animals activities": ("fluent_3d",)},
    "three houses": {"people smileys": ("fluent_3d",), "animals food": ("twemoji",), "objects travel": ("noto",)},
}


def _everyone() -> list[Person]:
    people = [Person(style, "house", "emoji", likes_look(style)) for style in STYLES]
    people += [Person(house, "unseen house", "houses", likes_look(house)) for house in ("noto_v1", "emojione")]
    people += [Person(weight, "weight", "phosphor", likes_look(weight)) for weight in PHOSPHOR_WEIGHTS]
    for kind in ("serif", "sans", "mono", "hand", "display"):
        people.append(Person(f"{kind} typefaces", "typeface", "typefaces", likes_kind(kind)))
    for family in ("lora", "inter", "jetbrains-mono", "caveat", "bungee"):
        people.append(Person(f"the typeface {family}", "typeface", "typefaces", likes_look(family)))
    people += [Person(name, "colour", "emoji", likes_colour(name), gap=20.0) for name in ("warm", "dark", "saturated")]
    people += [Person(f"mixture {seed}", "mixture", "emoji", likes_mixture(seed), gap=0.3) for seed in range(5)]
    people += [Person(f"embedding {seed}", "embedding", "emoji", likes_embedding(seed), gap=0.3) for seed in range(5)]
    people += [Person(name, "prompt", "emoji", likes_by_group(houses)) for name, houses in BY_PROMPT.items()]
    return people


PEOPLE: dict[str, Person] = {person.name: person for person in _everyone()}


def people_of(kind: str) -> list[Person]:
    """Return the people of one of `KINDS`."""
    return [person for person in PEOPLE.values() if person.kind == kind]
