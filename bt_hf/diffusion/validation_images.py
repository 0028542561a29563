"""Draw the same prompts with the same seeds before and after, to see what training does to the images."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from bt_hf.diffusion.drawing import drawing_arguments
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.pipeline_config import PipelineConfig
from bt_hf.plots import contact_sheet

SHEET = "before_after.png"


class Validation:
    """Images of the validation prompts, before training and at the latest look.

    Prompts are embedded at once, so that the text encoders need not stay.

    Args:
        encoder: Embeds the prompts; its pipeline draws, whose denoiser holds the LoRA.
        args: Options `validation_*`, `seed`.

    Attributes:
        wanted: True if this process draws.
    """

    def __init__(self, encoder: PairEncoder, args: PipelineConfig) -> None:
        self.pipeline = encoder.pipeline
        self.size = encoder.collator.size
        self.family = encoder.family
        self.args = args
        self.prompts = list(args.validation_prompts or [])
        self.wanted = bool(self.prompts) and args.process_index == 0
        self.before: list[list[Image.Image]] = []
        self.after: list[list[Image.Image]] = []
        self._drawn_at = -1
        if self.wanted:
            self._conditions = encoder.encode_prompts(self.prompts)
            self._negative = encoder.family.encode_negative([""])  # as the pipeline where it is given none

    def check_sharding(self, sharded: bool) -> None:
        """Raise a `ValueError` if images are asked for, but the weights are `sharded` among processes."""
        if self.prompts and sharded:
            raise ValueError(
                "`validation_prompts` can't be drawn while FSDP or DeepSpeed divides the weights: leave them out, and "
                "draw with the saved folder."
            )

    def draw_before(self) -> dict[str, float]:
        """Draw with the LoRA switched off by the caller; return the metrics to log, none if it was drawn already."""
        if not self.wanted or self.before:
            return {}
        self.before = self._draw()
        return {"validation_distance_base": mean_pairwise_distance(self.before)}

    def draw_after(self, model: nn.Module, step: int, again: bool = False) -> dict[str, float]:
        """Draw with the LoRA of this step; return the metrics to log, none if it was drawn already and not `again`.

        Args:
            model: The denoiser with its LoRA, in training or not.
            step: Number of the optimizer step.
            again: Draw even if this step has been drawn.
        """
        if not self.wanted or (step == self._drawn_at and not again):
            return {}
        training = model.training
        model.eval()
        try:
            self.after, self._drawn_at = self._draw(), step
        finally:
            model.train(training)
        return {
            "validation_distance": mean_pairwise_distance(self.after),
            "validation_distance_base": mean_pairwise_distance(self.before),
        }

    @torch.no_grad()
    def _draw(self) -> list[list[Image.Image]]:
        """Draw images for each prompt, each with a seed of its own that never changes."""
        pipeline, family, count = self.pipeline, self.family, self.args.validation_images
        steps, guidance = self.args.validation_inference_steps, self.args.validation_guidance_scale
        together = min(self.args.validation_batch_size or count, count)
        bars = getattr(pipeline, "_progress_bar_config", {})
        pipeline.set_progress_bar_config(disable=True)
        images: list[list[Image.Image]] = []
        try:
            for index in range(len(self.prompts)):
                images.append([])
                for start in range(0, count, together):
                    some = range(start, min(start + together, count))
                    conditions = _repeated(self._conditions, index, len(some))
                    negative = _repeated(self._negative, 0, len(some))
                    arguments = drawing_arguments(family, conditions, negative, self.size, steps, guidance)
                    seeds = [self.args.seed + index * count + image for image in some]
                    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                    images[-1] += family.images_of(pipeline(**arguments, generator=generators))
        finally:
            pipeline.set_progress_bar_config(**bars)
        return images

    def sheet(self, path: Path | None = None) -> Image.Image:
        """Draw the sheet before | after, a row for each prompt."""
        return contact_sheet(self.before, self.after, path, self.prompts, columns=self.args.validation_images)

    def save(self, folder: Path) -> None:
        """Write the sheet into `folder`, if both sides are drawn."""
        if self.before and self.after:
            self.sheet(folder / SHEET)

    def show(self, callbacks: Iterable[Any], step: int) -> None:
        """Give the sheet to TensorBoard and Weights & Biases, where the Trainer reports to them."""
        if not (self.before and self.after):
            return
        for callback in callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_image("validation", np.asarray(self.sheet()), step, dataformats="HWC")
            wandb = getattr(callback, "_wandb", None)
            if wandb is not None and getattr(wandb, "run", None) is not None:
                wandb.log({"validation": wandb.Image(self.sheet()), "train/global_step": step})


def _repeated(conditions: Mapping[str, torch.Tensor], index: int, count: int) -> dict[str, torch.Tensor]:
    """Return the conditions of one prompt, as often as there are images of it."""
    return {name: value[index].expand(count, *value.shape[1:]) for name, value in conditions.items()}


def mean_pairwise_distance(images: list[list[Image.Image]]) -> float:
    """Return the mean root-mean-square difference between any two images, at 32x32 pixels with values in [0, 1].

    A model whose images become all alike comes near 0; so does a single image.
    """
    small = [image.convert("RGB").resize((32, 32), Image.Resampling.BOX) for row in images for image in row]
    pixels = np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in small])  # (N, 3072)
    if len(pixels) < 2:
        return 0.0
    squares = (pixels**2).sum(1)
    squared = (squares[:, None] + squares[None] - 2 * pixels @ pixels.T).clip(0) / pixels.shape[1]
    return float(np.sqrt(squared[np.triu_indices(len(pixels), 1)]).mean())
