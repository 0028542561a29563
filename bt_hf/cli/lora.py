"""`bt-hf lora`: train a preference LoRA on pairs, so that a pipeline draws one person's way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value
from diffusers import DiffusionPipeline
from peft import LoraConfig
from trl import unpair_preference_dataset

from bt_hf.cli.training import DataArguments, draw_plots, parse_training, speaker
from bt_hf.data.reading import features_of, read
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.families.base import family_class
from bt_hf.diffusion.trainer import PreferenceLoRATrainer
from bt_hf.diffusion.validation_images import SHEET
from bt_hf.hub.contract import find_adapter_config
from bt_hf.training.trainer import refuse_to_overwrite

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
    """What to train on what; how, is in `PreferenceLoRAConfig`."""

    model: str = field(
        metadata={
            "help": "Hub id or folder of a text-to-image pipeline of diffusers, or of a preference LoRA, from which "
            "training then goes on."
        }
    )

    def load_pairs(self, unpaired: bool = False) -> tuple[Any, Any]:
        """Training pairs, or rows of single images if they should be unpaired; and held-out pairs or `None`."""
        if not unpaired:
            return super().load_pairs()
        rows = self._unpaired_rows()
        return unpair(self.load_training_pairs()) if rows is None else rows, self.load_held_out_pairs()

    def _unpaired_rows(self) -> Any:
        """The dataset as it is if it has no pairs, else `None`."""
        rows, folder, label = read(self.dataset, self.split, self.streaming)
        features = features_of(rows, label)
        if not set(features) >= _UNPAIRED:
            return None
        if folder is not None and getattr(features["completion"], "dtype", None) in ("string", "large_string"):
            rows = rows.map(lambda path: {"completion": str(folder / path)}, input_columns="completion")
        return rows.cast_column("completion", Image())


@dataclass
class CommandArguments:
    """What the command does beside it."""

    plots: bool = field(default=True, metadata={"help": "Draw the training curve, if Matplotlib is there."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the LoRA; by default its rank."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get a LoRA; by default attention, feed-forward and, of a UNet, convolution layers."
        },
    )

    def peft_config(self, model: str, rank: int) -> LoraConfig | None:
        """The LoRA that the options describe, `None` (the trainer's default) if there are none."""
        modules: Any = self.lora_target_modules
        if modules is None and self.lora_alpha is None:
            return None
        if find_adapter_config(model) is not None:
            raise ValueError(
                f"{model!r} is a LoRA, which is trained on as it is: leave out --lora_alpha and --lora_target_modules."
            )
        if modules is None:
            family = family_class(DiffusionPipeline.load_config(model)["_class_name"])
            # A class without a family is for the trainer to refuse.
            modules = family.target_modules if family else None
        elif len(modules) == 1:  # may be a pattern, or "all-linear"
            modules = modules[0]
        return LoraConfig(r=rank, lora_alpha=self.lora_alpha or rank, target_modules=modules)


Options = tuple[LoraArguments, CommandArguments, PreferenceLoRAConfig]


def parse(argv: Sequence[str]) -> Options:
    """The options of `bt-hf lora`, from the command line over those of `--config` over the defaults."""
    parts = (LoraArguments, CommandArguments, PreferenceLoRAConfig)
    arguments, extra, config = parse_training("lora", argv, parts, _DESCRIPTION, _EPILOG, "preference-lora")
    return arguments, extra, config


def run(options: Options) -> None:
    """Train, evaluate and save."""
    arguments, extra, config = options
    say = speaker(config)
    refuse_to_overwrite(config.output_dir, config.overwrite_output_dir or bool(config.resume_from_checkpoint))
    unpaired = config.loss_type == "kto"
    pairs, held_out = arguments.load_pairs(unpaired)
    rows = "liked or disliked images" if unpaired else "pairs"
    count = f"a stream of {rows}" if isinstance(pairs, IterableDataset) else f"{len(pairs)} {rows}"
    say(f"Training on {count}" + (f", {len(held_out)} pairs held out" if held_out is not None else ""))
    trainer = PreferenceLoRATrainer(
        arguments.model,
        config,
        train_dataset=pairs,
        eval_dataset=held_out,
        peft_config=extra.peft_config(arguments.model, config.lora_rank),
    )
    trainer.train()
    if config.loss_type != "sft":  # which has none
        say(f"beta {trainer.beta:.4g}" + (", set from the data" if config.beta == "auto" else ""))
    if held_out is not None:
        metrics = trainer.evaluate()
        accuracy, low, high, base, change = (
            metrics[f"eval_{name}"]
            for name in ("accuracy", "accuracy_low", "accuracy_high", "winner_error_base", "winner_error_change")
        )
        say(f"{len(held_out)} held-out pairs: implicit accuracy {accuracy:.3f} ({low:.3f} to {high:.3f})")
        say(f"Denoising error of the preferred images: {change / base:+.2%} against the base's {base:.3g}")
    for sentence in trainer.warnings_seen:
        say(f"Warning: {sentence}")
    trainer.save_model(config.output_dir)
    folder = Path(config.output_dir)
    drawn = draw_plots(folder, trainer.state.log_history) if extra.plots and config.process_index == 0 else []
    if drawn:  # so that the card shows them
        trainer.create_model_card()
    say(f"Saved to {config.output_dir}: the LoRA and its card README.md")
    if trainer.validation.after:
        say(f"Before | after: {folder / SHEET}")
    for path in drawn:
        say(f"Drawn to {path}")
    say(f'Next: pipeline.load_lora_weights("{config.output_dir}")')


def unpair(pairs: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """One row for each image of the pairs: prompt, completion, label, and the other columns."""
    features = {name: feature for name, feature in pairs.features.items() if name not in ("chosen", "rejected")}
    for name in ("chosen", "rejected"):  # encoded images pass as they are
        pairs = pairs.cast_column(name, Image(decode=False))
    features |= {"completion": Image(decode=False), "label": Value("bool")}
    rows = unpair_preference_dataset(pairs, batch_size=16, features=Features(features))
    return rows.cast_column("completion", Image())
