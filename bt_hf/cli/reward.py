"""`bt-hf reward`: train a reward on pairs, and say honestly what they prove."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers.processing_utils import ProcessorMixin

from bt_hf.cli.training import (
    DataArguments,
    PlotArguments,
    describe_accuracy,
    finish,
    parse_training,
    save,
    speaker,
)
from bt_hf.reward import encoders, verdict
from bt_hf.reward.config import BradleyTerryConfig
from bt_hf.reward.cross_validation import CrossValidation, cross_validate, find_prompts
from bt_hf.reward.trainer import BradleyTerryTrainer
from bt_hf.training.saving import check_output_dir

_DESCRIPTION = """Adapt CLIP and its kin to one person's taste, from pairs of images of which one is preferred.

The pairs are cross-validated first, which tells what so few clicks prove. Then the reward is trained on all of them
and saved: a small adapter with a card, which PEFT loads as it is."""
_EPILOG = """examples:
  bt-hf reward --model openai/clip-vit-base-patch32 --dataset my-clicks/ --output_dir my-taste
  bt-hf reward --config taste.yaml --learning_rate 3e-5    # options in YAML, and one of them changed

  # taste.yaml
  model: google/siglip-base-patch16-224
  dataset: data-is-better-together/open-image-preferences-v1-binarized
  split: train[:2000]
  eval_split: train[2000:2500]
  cross_validate: 0

my-clicks/ is a folder with metadata.csv (columns prompt, chosen, rejected) and the images that it names. Several GPUs:
accelerate launch -m bt_hf.cli reward ... All options of transformers.TrainingArguments work too: see --help_all.
"""


@dataclass
class RewardArguments(DataArguments):
    """Model, pairs and folds; `BradleyTerryConfig` says how to train."""

    model: str = field(
        metadata={
            "help": "Hub id or folder of a dual encoder, or of a reward adapter, from which training then goes on."
        }
    )
    cross_validate: int = field(
        default=5,
        metadata={
            "help": "Folds of the cross-validation before the training, 0 for none. It trains once a fold: seconds "
            "for the hundreds of pairs that need it. None of a stream, which can't be dealt into folds."
        },
    )

    def __post_init__(self) -> None:
        if self.streaming:
            self.cross_validate = 0
        if self.cross_validate < 0 or self.cross_validate == 1:
            raise ValueError(
                f"`cross_validate` should be 0 (none) or at least 2 folds, but got {self.cross_validate}."
            )


Options: TypeAlias = tuple[RewardArguments, PlotArguments, BradleyTerryConfig]


def parse(argv: Sequence[str]) -> Options:
    """Parse the options of `bt-hf reward`."""
    parts = (RewardArguments, PlotArguments, BradleyTerryConfig)
    arguments, plots, config = parse_training("reward", argv, parts, _DESCRIPTION, _EPILOG, "reward-adapter")
    return arguments, plots, config


def run(options: Options) -> None:
    """Cross-validate, train, save, and then evaluate and draw."""
    arguments, plots, config = options
    say = speaker(config)
    check_output_dir(config)
    pairs, held_out = arguments.load_pairs()
    model = encoders.load_dual_encoder(arguments.model, is_trainable=True)
    processor = encoders.find_processor(arguments.model, model)
    validation = _cross_validate(model, processor, pairs, config, arguments.cross_validate, say)
    trainer = BradleyTerryTrainer(
        model, config, train_dataset=pairs, eval_dataset=held_out, processing_class=processor
    )
    trainer.verdict = validation.verdict if validation else None
    trainer.train()
    save(trainer)
    say(f"Saved to {config.output_dir}: the {'model' if config.full_finetuning else 'adapter'} and its card README.md")
    sentence = trainer.in_words()
    if sentence is not None:
        say(f"In words, as the base understands them: {sentence}")
    if held_out is not None:
        metrics = trainer.evaluate()
        say(f"{len(held_out)} held-out pairs:")
        for name, prefix in (("base", "eval_base_"), ("adapted", "eval_")):
            say(f"{name:12}{describe_accuracy(metrics, prefix)}, log-loss {metrics[prefix + 'log_loss']:.3f}")
    for path in finish(trainer, plots.plots, _judged_pairs(trainer, validation)):
        say(f"Drawn to {path}")
    say(f'Next: bt-hf score {config.output_dir} --prompt "..." IMAGES')


def _cross_validate(
    model: nn.Module,
    processor: ProcessorMixin,
    pairs: Dataset | IterableDataset,
    config: BradleyTerryConfig,
    folds: int,
    say: Callable[..., None],
) -> CrossValidation | None:
    """Cross-validate and print the verdict, or why there is none."""
    if not folds:
        return None
    reason = _reason_against_folds(model, processor, pairs)
    if reason is not None:
        say(f"No cross-validation: {reason}.")
        return None
    validation = cross_validate(model, pairs, config, folds=folds, processing_class=processor, seed=config.seed)
    say(validation)
    return validation


def _reason_against_folds(model: nn.Module, processor: ProcessorMixin, pairs: Dataset | IterableDataset) -> str | None:
    """Return the reason that these pairs can't be cross-validated, or `None` if they can."""
    if isinstance(model, PeftModel):
        return "the model has an adapter already, which may have seen these pairs"
    if isinstance(pairs, IterableDataset):
        return "the pairs are a stream"
    if not find_prompts(processor, pairs).any() and not verdict.number_pairs(pairs).any():
        return "all clicks are on one and the same pair, and it may not be trained on and tested on"
    return None


def _judged_pairs(trainer: BradleyTerryTrainer, validation: CrossValidation | None) -> dict[str, np.ndarray] | None:
    """Return margins and labels for the reliability diagram.

    They are of the held-out pairs if there are some, else of the cross-validation: training pairs would flatter.
    """
    judged = getattr(trainer, "last_evaluation", None)
    if judged is None and validation is not None:
        return {name: getattr(validation, name) for name in ("margins", "base_margins", "preference")}
    return judged
