"""Simulate people: pairs of drawings of one concept, chosen by a taste that is known.

A taste is the name of a style ("this person prefers the Fluent drawings") or `"warm"` (warmer colours).
"""

import random
from functools import lru_cache

import numpy as np
from datasets import Dataset, Image

from emoji import STYLES, load_emoji

TASTES = STYLES


@lru_cache(maxsize=2)
def warmth(split: str) -> tuple[float, ...]:
    """Return the warmth of each drawing of a split: mean of red minus blue over the pixels that are not white."""
    values = []
    for image in load_emoji(split)["image"]:
        pixels = np.asarray(image, dtype=float)
        drawn = pixels.min(axis=2) < 250
        values.append(float((pixels[..., 0] - pixels[..., 2])[drawn].mean()) if drawn.any() else 0.0)
    return tuple(values)


@lru_cache(maxsize=4)
def _emoji(split: str) -> Dataset:
    # Encoded bytes: rows of a pair point to the same bytes, and decoding is left to whoever reads the pair.
    return load_emoji(split).cast_column("image", Image(decode=False))


def preference_pairs(
    taste: str,
    count: int | None = None,
    split: str = "train",
    seed: int = 0,
    flipped: float = 0.0,
    exclude: frozenset[str] = frozenset(),
) -> Dataset:
    """Return pairs of drawings of one concept, as a person with this taste would click them.

    Args:
        taste: One of `STYLES` (that style over another one) or `"warm"` (the warmer of two drawings).
        count: How many pairs, each of another concept; `None` for all pairs of all concepts of the split.
        split: `"train"` or `"held_out"`.
        seed: Which concepts and which drawings.
        flipped: Probability that a click is wrong.
        exclude: Concepts to leave out.

    Returns:
        Dataset in the row contract: `prompt`, `chosen`, `rejected`, and `concept`.
    """
    rng = random.Random(f"{taste}/{seed}")
    drawings = _emoji(split)
    images, concepts, captions = drawings["image"], list(drawings["concept"]), list(drawings["caption"])
    heat = warmth(split) if taste == "warm" else None
    starts = [start for start in range(0, len(drawings), len(STYLES)) if concepts[start] not in exclude]
    if count is not None:
        starts = rng.sample(starts, count)
    pairs = []
    for start in starts:
        if heat is None:
            others = [style for style in range(len(STYLES)) if STYLES[style] != taste]
            options = [(start + STYLES.index(taste), start + style) for style in others]
        else:
            every = [(a, b) for a in range(start, start + 5) for b in range(start, start + 5)]
            options = [(a, b) for a, b in every if heat[a] - heat[b] > 20]  # on a scale of 255
        if count is not None:
            options = [rng.choice(options)] if options else []
        pairs += options
    pairs = [(b, a) if rng.random() < flipped else (a, b) for a, b in pairs]
    rows = {
        "prompt": [captions[a] for a, _ in pairs],
        "chosen": [images[a] for a, _ in pairs],
        "rejected": [images[b] for _, b in pairs],
        "concept": [concepts[a] for a, _ in pairs],
    }
    return Dataset.from_dict(rows).cast_column("chosen", Image()).cast_column("rejected", Image())
