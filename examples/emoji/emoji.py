"""The emoji domain: 1,560 concepts, each drawn by five houses of artists.

`load_emoji` reads the drawings; everything that simulates a person lives in `taste.py`.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset

from bt_hf.training.precision import multiplies_bfloat16

FOLDER = Path(__file__).parent
STYLES = ("noto", "twemoji", "fluent", "fluent_3d", "mono")
STYLE_NAMES = {style: style.replace("_", " ") for style in STYLES}  # as captions name them, in pretraining
CLIP_FOLDER = FOLDER / "clip"
DIFFUSION_FOLDER = FOLDER / "diffusion"


def load_emoji(split: str | None = None) -> Dataset:
    """Read the drawings, one row for each concept and style.

    Args:
        split: `"train"` (1,326 concepts), `"held_out"` (234 concepts) or `None` for both.

    Returns:
        Dataset with the columns `concept` (slug), `caption` (CLDR short name), `tags` (list of words),
        `group` (int), `style` (one of `STYLES`) and `image` (64x64 RGB on white). Rows are ordered by
        concept, then by `STYLES`.

    Raises:
        ValueError: `split` is unknown.
    """
    emoji = load_dataset("parquet", data_files=str(FOLDER / "emoji64.parquet"), split="train")
    splits = json.loads((FOLDER / "split.json").read_text())
    if split is not None and split not in splits:
        raise ValueError(f"`split` should be one of {sorted(splits)} or None, but got {split!r}.")
    concepts = set(splits[split] if split else sum(splits.values(), []))
    keys = zip(emoji["concept"], map(STYLES.index, emoji["style"]), range(len(emoji)), strict=True)
    return emoji.select([row for concept, _, row in sorted(keys) if concept in concepts])


def fast_precision() -> torch.autocast:
    """Return a context that computes in bfloat16 if the CPU multiplies in it natively, and else in float32.

    A CPU that emulates bfloat16 is many times slower in it.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16(use_cpu=True))
