"""Drawings that pretraining never saw: two houses of emoji, an icon set in six weights, and words in 30 typefaces."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from PIL import Image

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
PARQUET = FOLDER / "looks64.parquet"
LOOK_SETS = ("noto_v1", "emojione", "phosphor", "typefaces")
PHOSPHOR_WEIGHTS = ("thin", "light", "bold", "fill", "duotone", "regular")
# As captions name the weights; the regular one has no word.
LOOKS = {"thin": "thin", "light": "light", "bold": "bold", "fill": "filled", "duotone": "duotone"}
COLOURS = {
    "black": "#000000",
    "red": "#d32f2f",
    "orange": "#f57c00",
    "yellow": "#fbc02d",
    "green": "#388e3c",
    "blue": "#1976d2",
    "purple": "#7b1fa2",
    "pink": "#e91e63",
    "brown": "#6d4c41",
    "grey": "#757575",
}


@lru_cache(maxsize=8)
def load_looks(name: str) -> Dataset:
    """Read the drawings of one set, ordered by concept, then by look.

    Args:
        name: `"noto_v1"` or `"emojione"` (drawings of the 234 held-out emoji concepts), `"phosphor"` (200 icons in
            `PHOSPHOR_WEIGHTS`) or `"typefaces"` (60 words in 30 families).

    Returns:
        Dataset with the columns `set`, `concept`, `caption`, `look` (house, weight or family), `kind` (of a family:
        `serif`, `sans`, `mono`, `hand` or `display`) and `image` (64x64 RGB on white).

    Raises:
        ValueError: `name` is unknown.
    """
    if name not in LOOK_SETS:
        raise ValueError(f"`name` should be one of {', '.join(LOOK_SETS)}, but got {name!r}.")
    rows = load_dataset("parquet", data_files=str(PARQUET), split="train")
    return rows.select([row for row, of in enumerate(rows["set"]) if of == name])


def tint(drawing: Image.Image, colour: str) -> Image.Image:
    """Draw what is black on white in one of `COLOURS`."""
    paper = np.asarray(drawing.convert("L"), dtype=float)[..., None] / 255  # 1 where nothing is drawn
    ink = np.array([int(COLOURS[colour][at : at + 2], 16) for at in (1, 3, 5)], dtype=float)
    return Image.fromarray((255 * paper + ink * (1 - paper)).round().astype(np.uint8))
