"""Print what the default base knows about drawings that it never saw.

python examples/icons/evaluate_base.py
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))

from emoji import STYLE_NAMES, STYLES, load_emoji
from looks import BASE, COLOURS, LOOKS, PHOSPHOR_WEIGHTS, load_looks, tint


class Encoder:
    """Base with its processor: embeds texts and drawings."""

    def __init__(self, model: VisionTextDualEncoderModel, processor: VisionTextDualEncoderProcessor) -> None:
        self.model, self.processor = model.eval(), processor

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Return normalised embeddings (N, D) of texts."""
        tokens = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> torch.Tensor:
        """Return normalised embeddings (N, D) of drawings."""
        chunks = []
        for start in range(0, len(images), 128):
            pixels = self.processor.image_processor(images[start : start + 128], return_tensors="pt")["pixel_values"]
            chunks.append(self.model.get_image_features(pixel_values=pixels).pooler_output)
        return F.normalize(torch.cat(chunks), dim=-1)


def recall(texts: torch.Tensor, images: torch.Tensor, k: int) -> float:
    """Return the share of texts (N, D) whose own image (N, D) is among the `k` nearest."""
    nearest = (texts @ images.T).topk(k).indices
    return (nearest == torch.arange(len(texts))[:, None]).any(1).float().mean().item()


def found_by_name(named: torch.Tensor, images: torch.Tensor) -> list[float]:
    """Return, for each of S looks, the share of captions that name it and whose drawing in it is the nearest.

    Args:
        named: (N, S, D), caption n naming look s.
        images: (N, at least S, D), drawings of the same things; the first S in the looks' order.
    """
    nearest = torch.einsum("nsd,ntd->nst", named, images).argmax(2)
    return (nearest == torch.arange(named.shape[1])).float().mean(0).tolist()


def show(title: str, names: list[str] | tuple[str, ...], values: list[float]) -> None:
    print(f"{title:52}" + " ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True)), end="")
    print(f"  mean {np.mean(values):.3f}", flush=True)


def figures(encoder: Encoder, emoji: Dataset) -> dict[str, list[float]]:
    """Measure what the base knows about emoji, with one figure for each house in every value.

    Args:
        encoder: The base.
        emoji: Rows as `load_emoji` returns them.

    Returns:
        `recall@1`, `recall@5`: the share of bare captions whose drawing is among the nearest, of this house's drawings
        of all concepts. `look by name`: the share of captions naming this house whose drawing by it is the nearest of
        the concept's five. `bare caption prefers`: the share of other houses' drawings of the same concept that are
        farther from the bare caption than this house's (0.5: neutral).
    """
    captions = list(emoji["caption"])[:: len(STYLES)]
    images = encoder.images(list(emoji["image"])).view(len(captions), len(STYLES), -1)
    bare = encoder.texts(captions)
    named = torch.stack([encoder.texts([f"{text}, {STYLE_NAMES[style]}" for text in captions]) for style in STYLES], 1)
    scores = torch.einsum("nd,nsd->ns", bare, images)
    wins = (scores[:, :, None] > scores[:, None]).float().sum(2) / (len(STYLES) - 1)
    return {
        **{f"recall@{k}": [recall(bare, house, k) for house in images.unbind(1)] for k in (1, 5)},
        "look by name": found_by_name(named, images),
        "bare caption prefers": wins.mean(0).tolist(),
    }


def report(title: str, encoder: Encoder, emoji: Dataset) -> None:
    """Print the `figures`, `title` in front of each line."""
    for name, values in figures(encoder, emoji).items():
        show(f"{title}: {name}", STYLES, values)


def report_phosphor(encoder: Encoder) -> None:
    """Print weights and colours by name, of icons of a set that was left out."""
    rows = load_looks("phosphor")
    captions = list(rows["caption"])[:: len(PHOSPHOR_WEIGHTS)]
    drawings, weights = list(rows["image"]), len(PHOSPHOR_WEIGHTS)
    images, bare = encoder.images(drawings).view(len(captions), weights, -1), encoder.texts(captions)
    show("Phosphor: recall@5 of 200", PHOSPHOR_WEIGHTS, [recall(bare, weight, 5) for weight in images.unbind(1)])
    words = [LOOKS[weight] for weight in PHOSPHOR_WEIGHTS[:-1]]  # the last, regular, has no word
    named = torch.stack([encoder.texts([f"{text}, {word}" for text in captions]) for word in words], 1)
    show("Phosphor: weight by name, first of six", words, found_by_name(named, images))
    fills = drawings[PHOSPHOR_WEIGHTS.index("fill") :: weights]
    images = torch.stack([encoder.images([tint(drawing, colour) for drawing in fills]) for colour in COLOURS], 1)
    named = torch.stack([encoder.texts([f"{colour} {text}" for text in captions]) for colour in COLOURS], 1)
    show("Phosphor: colour by name, first of ten", list(COLOURS), found_by_name(named, images))


def load_encoder(folder: Path) -> Encoder:
    """Load a base in float32, with its processor."""
    model = VisionTextDualEncoderModel.from_pretrained(folder, dtype=torch.float32)
    return Encoder(model, VisionTextDualEncoderProcessor.from_pretrained(folder))


def evaluate(folder: Path) -> None:
    """Print all figures of the base in `folder`."""
    encoder = load_encoder(folder)
    report("held-out", encoder, load_emoji("held_out"))
    for house in ("noto_v1", "emojione"):
        rows = load_looks(house)
        found = recall(encoder.texts(list(rows["caption"])), encoder.images(list(rows["image"])), 5)
        show(f"unseen house, recall@5 of {len(rows)}", [house], [found])
    report_phosphor(encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=BASE)
    evaluate(parser.parse_args().folder)


if __name__ == "__main__":
    main()
