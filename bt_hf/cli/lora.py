"""`bt-hf lora`: train a preference LoRA on pairs, so that a pipeline draws one person's way."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, Features, Image, IterableDataset, Value
from trl import unpair_preference_dataset

from bt_hf.cli.training import (
    DataArguments,
    PlotArguments,
    describe_accuracy,
    finish,
    parse_training,
    save,
    speaker,
)
from bt_hf.data.conversion import place_images
from bt_hf.data.formats import unpaired_roles
from bt_hf.data.reading import features_of, open_dataset
from bt_hf.data.rows import undecoded
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.trainer import PreferenceLoRATrainer
from bt_hf.diffusion.validation_images import SHEET
from bt_hf.training.saving import check_output_dir

_DESCRIPTION = """Train a LoRA on a diffusers pipeline, from pairs of images of which one is preferred.

The denoiser learns to denoise the preferred images better than the others, against itself without the LoRA
(Diffusion-DPO). The result is a small folder, which any pipeline of the base loads with load_lora_weights."""
_EPILOG = """examples:
  bt-hf lora --model stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset my-clicks/ --output_dir my-taste-lora
  bt-hf lora --config taste.yaml --learning_rate 5e-5    # options in YAML, and one of them changed

  # taste.yaml
  model: stabilityai/stable-diffusion-xl-base-1.0
  dataset: data-is-better-together/open-image-preferences-v1-binarized
  split: train[:2000]
  eval_split: train[2000:2200]
  eval_strategy: steps
  eval_steps: 50
  bf16: true
  validation_prompts: ["a red apple", "an old house by the sea"]

my-clicks/ is a folder with metadata.csv (columns prompt, chosen, rejected) and the images that it names; so is what
bt-hf pairs writes. With --loss_type kto each pair becomes two rows, one liked and one disliked, as TRL's
unpair_preference_dataset makes them; a dataset with the columns prompt, completion (an image) and label is taken as it
is. Several GPUs: accelerate launch -m bt_hf.cli lora ... All options of transformers.TrainingArguments work too: see
--help_all.
"""
_UNPAIRED = {"prompt", "completion", "label"}


@dataclass
class LoraArguments(DataArguments):
    """Model and pairs; `PreferenceLoRAConfig` says how to train."""

    model: str = field(
        metadata={
            "help": "Hub id or folder of a text-to-image pipeline of diffusers, or of a preference LoRA, from which "
            "training then goes on."
        }
    )

    def load_pairs(self, unpaired: bool = False) -> tuple[Dataset | IterableDataset, Dataset | None]:
        """Load training pairs, or rows of single images if `unpaired`, and held-out pairs or `None`."""
        if not unpaired:
            return super().load_pairs()
        rows = self._load_unpaired_rows()
        return unpair(self.load_training_pairs()) if rows is None else rows, self.load_held_out_pairs()

    def _load_unpaired_rows(self) -> Dataset | IterableDataset | None:
        """Load a dataset of single images, or return `None` if it has pairs."""
        rows, place, label = open_dataset(
            self.dataset, self.split, self.streaming, self.on_bad_rows, self.allow_urls, unpaired_roles
        )
        features = features_of(rows, label)
        if not set(features) >= _UNPAIRED or {"chosen", "rejected"} <= set(features):
            return None
        return place_images(undecoded(rows), "completion", place, label).cast_column("completion", Image())


Options: TypeAlias = tuple[LoraArguments, PlotArguments, PreferenceLoRAConfig]


def parse(argv: Sequence[str]) -> Options:
    """Parse the options of `bt-hf lora`."""
    parts = (LoraArguments, PlotArguments, PreferenceLoRAConfig)
    arguments, plots, config = parse_training("lora", argv, parts, _DESCRIPTION, _EPILOG, "preference-lora")
    return arguments, plots, config


def run(options: Options) -> None:
    """Train, save, and then evaluate and draw."""
    arguments, plots, config = options
    say = speaker(config)
    check_output_dir(config)
    unpaired = config.loss_type == "kto"
    pairs, held_out = arguments.load_pairs(unpaired)
    rows = "liked or disliked images" if unpaired else "pairs"
    count = f"a stream of {rows}" if isinstance(pairs, IterableDataset) else f"{len(pairs)} {rows}"
    say(f"Training on {count}" + (f", {len(held_out)} pairs held out" if held_out is not None else ""))
    trainer = PreferenceLoRATrainer(arguments.model, config, train_dataset=pairs, eval_dataset=held_out)
    trainer.train()
    save(trainer)
    say(f"Saved to {config.output_dir}: the LoRA and its card README.md")
    if config.loss_type != "sft":  # the one without a beta
        say(f"beta {trainer.beta:.4g}" + (", set from the data" if config.beta == "auto" else ""))
    if held_out is not None:
        for line in _summarise(trainer.evaluate(), len(held_out)):
            say(line)
    if trainer.summary.said is not None:
        say(trainer.summary.said)
    for sentence in trainer.warnings_seen:
        say(f"Warning: {sentence}")
    drawn = finish(trainer, plots.plots)
    if trainer.validation.after:
        say(f"Before | after: {Path(config.output_dir) / SHEET}")
    for path in drawn:
        say(f"Drawn to {path}")
    say(f'Next: pipeline.load_lora_weights("{config.output_dir}")')


def _summarise(metrics: Mapping[str, float], count: int) -> Iterator[str]:
    """Yield lines on the held-out pairs."""
    yield f"{count} held-out pairs: {describe_accuracy(metrics, name='implicit accuracy')}"
    base = metrics.get("eval_winner_error_base")
    if base is not None:  # ties have no preferred image
        change = metrics["eval_winner_error_change"] / base
        yield f"Denoising error of the preferred images: {change:+.2%} against the base's {base:.3g}"


def unpair(pairs: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Take pairs apart: one row for each image, with prompt, completion, label, and the other columns."""
    features = {name: feature for name, feature in pairs.features.items() if name not in ("chosen", "rejected")}
    for name in ("chosen", "rejected"):  # encoded images pass as they are
        pairs = pairs.cast_column(name, Image(decode=False))
    features |= {"completion": Image(decode=False), "label": Value("bool")}
    rows = unpair_preference_dataset(pairs, batch_size=16, features=Features(features))
    return rows.cast_column("completion", Image())
