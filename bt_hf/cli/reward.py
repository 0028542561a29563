"""`bt-hf reward`: train a reward on pairs, and say honestly what they prove."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from peft import LoraConfig, PeftModel
from torch import nn

from bt_hf.cli.training import DataArguments, draw_plots, parse_training, speaker
from bt_hf.reward import encoders
from bt_hf.reward.config import BradleyTerryConfig
from bt_hf.reward.cross_validation import CrossValidation, cross_validate
from bt_hf.reward.lora import default_lora_config
from bt_hf.reward.trainer import BradleyTerryTrainer
from bt_hf.training.saving import refuse_to_overwrite

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
    """What to train on what; how, is in `BradleyTerryConfig`."""

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


@dataclass
class CommandArguments:
    """What the command does beside it."""

    plots: bool = field(
        default=True, metadata={"help": "Draw the training curve and the reliability diagram, if Matplotlib is there."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the LoRA, 8 by default."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the LoRA; by default its rank."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout of the LoRA, 0 by default."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get a LoRA; by default the last linear layer of both towers."},
    )

    def peft_config(self, model: nn.Module) -> LoraConfig | None:
        """The LoRA that the options describe, `None` (the trainer's default) if there are none."""
        modules = self.lora_target_modules
        given = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        if modules is None and all(value is None for value in given.values()):
            return None
        rank = 8 if self.lora_r is None else self.lora_r
        if modules is None:
            config = default_lora_config(model, rank)
        else:
            # A single one may be a pattern, or "all-linear".
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules[0] if len(modules) == 1 else modules)
        for name, value in given.items():
            if value is not None:
                setattr(config, name, value)
        return config


Options = tuple[RewardArguments, CommandArguments, BradleyTerryConfig]


def parse(argv: Sequence[str]) -> Options:
    """The options of `bt-hf reward`, from the command line over those of `--config` over the defaults."""
    parts = (RewardArguments, CommandArguments, BradleyTerryConfig)
    arguments, extra, config = parse_training("reward", argv, parts, _DESCRIPTION, _EPILOG, "reward-adapter")
    return arguments, extra, config


def run(options: Options) -> None:
    """Cross-validate, train, evaluate and save."""
    arguments, extra, config = options
    say = speaker(config)
    refuse_to_overwrite(config)
    pairs, held_out = arguments.load_pairs()
    model = encoders.load_dual_encoder(arguments.model, is_trainable=True)
    processor = encoders.find_processor(arguments.model, model)
    peft_config = extra.peft_config(model)

    validation: CrossValidation | None = None
    if arguments.cross_validate:
        if reason := _no_cross_validation(model, pairs):
            say(f"No cross-validation: {reason}.")
        else:
            validation = cross_validate(
                model, pairs, config, arguments.cross_validate, processor, peft_config, config.seed
            )
            say(validation)

    trainer = BradleyTerryTrainer(
        model,
        config,
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.verdict = validation.verdict if validation else None
    trainer.train()
    if held_out is not None:
        metrics = trainer.evaluate()
        say(f"{len(held_out)} held-out pairs:")
        for name, prefix in (("base", "eval_base_"), ("adapted", "eval_")):
            accuracy, low, high, log_loss = (
                metrics[prefix + key] for key in ("accuracy", "accuracy_low", "accuracy_high", "log_loss")
            )
            say(f"{name:12}accuracy {accuracy:.3f} ({low:.3f} to {high:.3f}), log-loss {log_loss:.3f}")
    trainer.save_model(config.output_dir)
    drawn = draw(trainer, validation) if extra.plots and config.process_index == 0 else []
    if drawn:
        trainer.create_model_card()  # which shows the diagram
    say(f"Saved to {config.output_dir}: the {'model' if config.full_finetuning else 'adapter'} and its card README.md")
    for path in drawn:
        say(f"Drawn to {path}")
    say(f'Next: bt-hf score {config.output_dir} --prompt "..." IMAGES')


def draw(trainer: BradleyTerryTrainer, validation: CrossValidation | None) -> list[Path]:
    """Draw the training curve and the reliability diagram into the trainer's folder, where there is something to draw.

    The diagram is of the held-out pairs if there are some, else of the cross-validation: training pairs would flatter.

    Returns:
        The pictures. None if Matplotlib is not installed.
    """
    judged = getattr(trainer, "last_evaluation", None)
    if judged is None and validation is not None:
        judged = {name: getattr(validation, name) for name in ("margins", "base_margins", "preference")}
    return draw_plots(Path(trainer.args.output_dir), trainer.state.log_history, judged)


def _no_cross_validation(model: nn.Module, pairs: Any) -> str | None:
    """Why these pairs can't be cross-validated, if they can't."""
    if isinstance(model, PeftModel):
        return "the model has an adapter already, which may have seen these pairs"
    if isinstance(pairs, IterableDataset):
        return "the pairs are a stream"
    if len(set(pairs["prompt"])) < 2:
        return "all pairs have the same prompt, and it may not be trained on and tested on"
    return None
