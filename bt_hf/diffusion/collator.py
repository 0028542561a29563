"""Collate rows of preference pairs into batches of pixels."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from bt_hf.data.fingerprint import number_of
from bt_hf.data.images import to_frames
from bt_hf.data.rows import image_name

Row: TypeAlias = Mapping[str, Any]
Batch: TypeAlias = dict[str, Any]  # tensors, and the prompts
PAIRED = ("chosen", "rejected")
UNPAIRED = ("completion",)


def is_unpaired(columns: Collection[str]) -> bool:
    """True for rows of one image each; pairs may have further columns, whatever these are called."""
    return not {"completion", "label"}.isdisjoint(columns) and not set(PAIRED) <= set(columns)


def image_columns(columns: Collection[str]) -> tuple[str, ...]:
    """Return the columns that hold images: `chosen` and `rejected`, or `completion` of unpaired rows."""
    return UNPAIRED if is_unpaired(columns) else PAIRED


class DiffusionCollator:
    """Collate rows into a batch of pixels: B prompts and 2B images, the chosen first, then the rejected.

    For unpaired rows (`prompt`, `completion`, `label`) there are B images.

    Args:
        size: Height and width that images are fitted to: scaled, then cropped in the middle. The same for both images
            of a pair, and without flips, since taste may be about framing.
        smallest: Images with a shorter side are refused: they would be less than one latent pixel.
        frames: Frames of each clip, in which case `pixels` are (N, F, H, W, 3). Default 1: images.

    Example:
        Two rows become

        ```text
        {
            "prompt": ["a red apple", "a zebra"],
            "pixels": ...,  # (4, H, W, 3) uint8: chosen 0, chosen 1, rejected 0, rejected 1
            "row": ...,     # (2,) int64, the same for the same prompt and images
            "preference": tensor([1.0, 0.5]),
            "weight": tensor([1.0, 1.0]),
        }
        ```
    """

    opens_images = True  # rows come to it as they are stored

    def __init__(self, size: tuple[int, int], smallest: int = 1, frames: int = 1) -> None:
        self.size = size
        self.smallest = smallest
        self.frames = frames

    def __call__(self, rows: list[Row]) -> Batch:
        columns = image_columns(list(rows[0]))
        names = [image_name(row, name) for name in columns for row in rows]
        pixels = self.preprocess([row[name] for name in columns for row in rows], names)
        prompts = [row["prompt"] for row in rows]
        hashes = hash_pixels(pixels).view(len(columns), -1)
        return {"prompt": prompts, "pixels": pixels, "row": hash_rows(prompts, hashes), **batch_labels(rows)}

    def preprocess(self, images: Sequence[Any], names: Sequence[str]) -> torch.Tensor:
        """Fit images, in any form that a dataset may hold, to the size: (N, H, W, 3) uint8, of clips (N, F, H, W, 3).

        Raises:
            ValueError: An image is unreadable or too small, or a clip too short; the message begins with its name in
                `names`.
        """
        fitted = []
        for value, name in zip(images, names, strict=True):
            images = to_frames(value, self.frames, name)
            image = images[0]
            if min(image.size) < self.smallest:
                raise ValueError(
                    f"{name}: image too small: {image.width}x{image.height} pixels, but the model's latents have one "
                    f"pixel for {self.smallest}x{self.smallest}; leave the row out, or bring a larger image"
                )
            height, width = self.size
            clip = [np.asarray(ImageOps.fit(one, (width, height), Image.Resampling.LANCZOS)) for one in images]
            fitted.append(np.stack(clip) if self.frames > 1 else clip[0])
        return torch.from_numpy(np.stack(fitted))


def batch_labels(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Return `preference` (or `label` of unpaired rows) and `weight`, float32 (B,); 1 where a row has none.

    TRL labels each chosen image as liked. Where a row still has the `preference` of its pair, that tells how much.
    """
    weight = torch.tensor([float(row.get("weight", 1.0)) for row in rows])
    preference = torch.tensor([float(row.get("preference", 1.0)) for row in rows])
    if not is_unpaired(rows[0].keys()):
        return {"preference": preference, "weight": weight}
    label = torch.tensor([float(row["label"]) for row in rows])
    return {"label": label * preference + (1 - label) * (1 - preference), "weight": weight}


def hash_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Hash images or clips (N, ...) uint8 to (N,) int64, the same for the same pixels."""
    return torch.tensor([number_of(image.numpy().tobytes()) for image in pixels])


def hash_rows(prompts: Sequence[str], hashes: torch.Tensor) -> torch.Tensor:
    """Hash prompts, and hashes (sides, B) of the rows' images, to (B,) int64, from which noise is sampled."""
    columns = zip(prompts, *hashes.tolist(), strict=True)
    return torch.tensor([number_of(repr(values).encode()) for values in columns])
