"""Judge drawings in the manner of two houses that neither the pipeline nor `examples/emoji/judge` has ever seen.

There are only drawings of the 234 held-out concepts by Noto's first artists and by EmojiOne, so a person shows 64 of
these, and the pipeline draws others. Whose style a drawing has is told by a linear probe on the judge's features of
real drawings, as they are and through the autoencoder of the pipeline, of concepts that no pair shows.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
sys.path.insert(0, str(Path(__file__).parents[1] / "icons"))
from emoji import STYLES, load_emoji
from judge import Judge, through_autoencoder, to_pixels
from looks import load_looks

UNSEEN = ("noto_v1", "emojione")


class House:
    """Person who prefers an unseen house to the five that the pipeline draws.

    Args:
        name: One of `UNSEEN`.
        count: Pairs.

    Attributes:
        pairs: In the row contract, each of another concept.
        captions: Held-out captions that no pair has.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        rng = random.Random(name)
        own = {row["concept"]: row["image"] for row in load_looks(name)}
        known = load_emoji("held_out")
        concepts, self.captions = list(known["concept"]), []
        rows: dict[str, list] = {"prompt": [], "chosen": [], "rejected": []}
        self._shown: list[tuple[str, Image.Image]] = []  # house and drawing, of the pairs' concepts, and of the others
        self._others: list[tuple[str, Image.Image]] = []
        chosen = set(rng.sample(sorted(own), count))
        for start in range(0, len(known), len(STYLES)):
            concept, caption = concepts[start], known[start]["caption"]
            drawings = [(style, known[start + index]["image"]) for index, style in enumerate(STYLES)]
            drawings += [(name, own[concept])] if concept in own else []
            if concept in chosen:
                rows["prompt"].append(caption)
                rows["chosen"].append(own[concept])
                rows["rejected"].append(rng.choice(drawings[:-1])[1])
                self._shown += drawings
            else:
                self.captions.append(caption)
                self._others += drawings
        self.pairs = Dataset.from_dict(rows)

    def fit_probe(self, judge: Judge) -> float:
        """Fit the probe; return the share of this house's drawings in the pairs that it knows through the decoder."""
        real = to_pixels([drawing for _, drawing in self._others])
        self._judge, names = judge, [house for house, _ in self._others]
        seen = np.concatenate([self._features(real), self._features(through_autoencoder(real))])
        # Fewer concepts were drawn by this house than by the others.
        self._probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced")
        ).fit(seen, names * 2)
        own = to_pixels([drawing for house, drawing in self._shown if house == self.name])
        return float((self._probe.predict(self._features(through_autoencoder(own))) == self.name).mean())

    def share(self, images: Sequence[Image.Image]) -> float:
        """Return the share of images that the probe takes for this house's, among six."""
        return float((self._probe.predict(self._features(to_pixels(images))) == self.name).mean())

    @torch.no_grad()
    def _features(self, pixels: torch.Tensor) -> np.ndarray:
        return torch.cat([self._judge.features(chunk) for chunk in pixels.split(256)]).numpy()
