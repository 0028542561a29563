"""Rows of preference pairs to batches for a dual encoder."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin

from bt_hf.data.checks import warn_of_truncation
from bt_hf.data.images import to_rgb
from bt_hf.data.rows import image_name
from bt_hf.reward.encoders import context_length, tokenize


class PreferenceCollator:
    """Turn rows of the contract into a batch: B prompts and 2B images, the chosen first, then the rejected.

    Args:
        processor: Processor of the dual encoder.

    Example:
        Two rows become

        ```text
        {
            "input_ids": ...,       # (2, L)
            "attention_mask": ...,  # (2, L), if the tokenizer gives one
            "pixel_values": ...,    # (4, 3, H, W): chosen 0, chosen 1, rejected 0, rejected 1
            "preference": tensor([1.0, 0.5]),
            "weight": tensor([1.0, 1.0]),
        }
        ```
    """

    opens_images = True  # rows come to it as they are stored

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        places = [(row, side) for side in ("chosen", "rejected") for row in rows]
        images = [to_rgb(row[side], image_name(row, side)) for row, side in places]
        return {
            **tokenize(self.processor, [row["prompt"] for row in rows]),  # (B, L)
            **self.preprocess(images),  # (2B, 3, H, W)
            **batch_labels(rows),
        }

    def preprocess(self, images: list[Any]) -> dict[str, torch.Tensor]:
        """Images in any form that a dataset may hold -> what the vision tower reads."""
        return dict(self.processor.image_processor([to_rgb(image) for image in images], return_tensors="pt"))


def batch_labels(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """`preference` and `weight` of each row as float32 (B,); 1 where a row has none."""
    return {name: torch.tensor([float(row.get(name, 1.0)) for row in rows]) for name in ("preference", "weight")}


def count_truncated(processor: ProcessorMixin, prompts: list[str]) -> int:
    """Count the prompts longer than the text tower's context, and warn once."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return warn_of_truncation(tokenizer, prompts, context_length(processor), "the model")
