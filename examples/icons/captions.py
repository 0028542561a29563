"""Captions of drawings for pretraining: a name, often with looks, and which drawings each caption fits."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))

from emoji import load_emoji

# Phrases for the looks of the five houses, its name first.
HOUSES = {
    "noto": ["noto", "emoji", "colour"],
    "twemoji": ["twemoji", "emoji", "flat", "colour"],
    "fluent": ["fluent", "emoji", "flat", "colour"],
    "fluent_3d": ["fluent 3d", "emoji", "shaded", "colour"],
    "mono": ["mono", "emoji", "black and white"],
}
HOUSE_FIRST = 0.4  # share of the captions with looks that surely name the house


@dataclass
class Drawings:
    """Features of drawings, and what captions can say about each."""

    features: torch.Tensor  # (N, WIDTH)
    names: list[str]
    looks: list[list[str]]
    tags: list[list[str]]

    @classmethod
    def of_emoji(cls, features: torch.Tensor, split: str) -> "Drawings":
        rows = load_emoji(split).remove_columns("image")
        names = [caption.lower() for caption in rows["caption"]]
        return cls(features, names, [HOUSES[style] for style in rows["style"]], list(rows["tags"]))

    @classmethod
    def of_icons(cls, features: torch.Tensor, file: Path) -> "Drawings":
        icons = json.loads(file.read_text(encoding="utf-8"))
        looks = [icon["looks"] + [icon["colour"]] * (icon["colour"] is not None) for icon in icons]
        return cls(features, [icon["name"] for icon in icons], looks, [[] for _ in icons])

    def __add__(self, other: "Drawings") -> "Drawings":
        lists = (getattr(self, name) + getattr(other, name) for name in ("names", "looks", "tags"))
        return Drawings(torch.cat([self.features, other.features]), *lists)

    def select(self, rows: list[int]) -> "Drawings":
        lists = ([getattr(self, name)[row] for row in rows] for name in ("names", "looks", "tags"))
        return Drawings(self.features[rows], *lists)


class Captions:
    """Writes captions of drawings, and knows which drawings each of them fits."""

    def __init__(self, drawings: Drawings) -> None:
        self.drawings = drawings
        phrases = sorted({look for looks in drawings.looks for look in looks})
        self.columns = {phrase: column for column, phrase in enumerate(phrases)}
        numbers = {name: number for number, name in enumerate(dict.fromkeys(drawings.names))}
        self.names = torch.tensor([numbers[name] for name in drawings.names])
        self.looks = self._multi_hot(drawings.looks)  # (N, phrases)

    def _multi_hot(self, looks: list[list[str]]) -> torch.Tensor:
        hot = torch.zeros(len(looks), len(self.columns))
        for row, phrases in enumerate(looks):
            hot[row, [self.columns[phrase] for phrase in phrases]] = 1
        return hot

    def write(self, row: int) -> tuple[str, list[str]]:
        """Return a caption, and the looks that it tells."""
        drawings = self.drawings
        words, tags = drawings.names[row], drawings.tags[row]
        if tags and random.random() < 0.35:
            some = " ".join(random.sample(tags, min(len(tags), random.randint(1, 3))))
            words = some if random.random() < 0.3 else f"{words}, {some}"
        if random.random() < 0.4:
            form = random.random()
            return (words if form < 0.8 else f"an icon of {words}" if form < 0.9 else f"a drawing of {words}"), []
        looks = random.sample(drawings.looks[row], random.randint(1, min(3, len(drawings.looks[row]))))
        if random.random() < HOUSE_FIRST:
            house = drawings.looks[row][0]
            looks = [house, *(look for look in looks[1:] if look != house)]
        form = random.random()
        if form < 0.5:
            return f"{words}, {', '.join(looks)}", looks
        if form < 0.75:
            return f"{' '.join(looks)} {words}", looks
        return (f"{' '.join(looks)} of {words}" if form < 0.9 else f"{words} in {looks[0]} style, {looks[-1]}"), (
            looks if form < 0.9 else [looks[0], looks[-1]]
        )

    def fitting(self, of: list[int], told: list[list[str]], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (captions, rows) twice: has the drawing the caption's name, and has it all looks told, too."""
        same_name = self.names[of][:, None] == self.names[rows][None]
        missing = self._multi_hot(told) @ (1 - self.looks[rows]).T
        return same_name, same_name & (missing == 0)
