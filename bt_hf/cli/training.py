"""Shared parts of the commands that train: data, options from dataclasses and YAML, a short help, the last steps."""

import argparse
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from bt_hf import plots
from bt_hf.cli.config_file import read_config
from bt_hf.cli.options import OptionParser
from bt_hf.data.atomic import replaced
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.training.option_checks import check_types
from bt_hf.training.trainer import PreferenceTrainer

# The few TrainingArguments that `--help` shows; `--help_all` shows all.
_SHOWN = {"bf16", "eval_strategy", "hub_model_id", "max_steps", "output_dir", "push_to_hub", "report_to", "seed"}
_CONFIG = re.compile("--config=")


@dataclass
class DataArguments:
    """Model and pairs; the trainer's own options say how to train."""

    model: str = field(metadata={"help": "Hub id or folder of the model."})
    dataset: str = field(
        metadata={"help": "Preference pairs: Hub id, folder or file (CSV, TSV, JSON, JSONL, Parquet)."}
    )
    split: str | None = field(default=None, metadata={"help": "Split to train on, such as 'train[:1000]'."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out pairs, of the same kinds; `dataset` if only `eval_split` is given."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training pairs as they are needed; set `max_steps` then."}
    )
    on_bad_rows: Literal["raise", "drop"] = field(
        default="raise",
        metadata={
            "help": "Stop at a bad row, or leave bad rows out and say how many (of a stream, the first of each kind)."
        },
    )

    allow_urls: bool = field(
        default=False, metadata={"help": "Fetch images that rows name by http(s) addresses, from public servers."}
    )
    default_prompt: str | None = field(default=None, metadata={"help": "Prompt of rows that have none."})

    def load_pairs(self) -> tuple[Dataset | IterableDataset, Dataset | None]:
        """Load training pairs, and held-out ones or `None`."""
        return self.load_training_pairs(), self.load_held_out_pairs()

    def load_training_pairs(self) -> Dataset | IterableDataset:
        """Load the pairs to train on, as a stream if asked for."""
        return self._load(self.dataset, self.split, self.streaming)

    def load_held_out_pairs(self) -> Dataset | None:
        """Load the pairs to evaluate on, or return `None` if none are named."""
        if self.eval_dataset is None and self.eval_split is None:
            return None
        return self._load(self.eval_dataset or self.dataset, self.eval_split)

    def _load(self, source: str, split: str | None, streaming: bool = False) -> Any:
        return load_preference_pairs(
            source,
            split,
            streaming,
            self.on_bad_rows,
            allow_urls=self.allow_urls,
            default_prompt=self.default_prompt,
        )


@dataclass
class PlotArguments:
    """Pictures beside the adapter."""

    plots: bool = field(
        default=True,
        metadata={"help": "Draw the training curve, and of a reward the reliability diagram, if Matplotlib is there."},
    )


def parse_training(
    command: str,
    argv: Sequence[str],
    parts: Sequence[type],
    description: str,
    epilog: str,
    output_dir: str,
) -> tuple[Any, ...]:
    """Parse the arguments of a command that trains, over those of `--config`, over the defaults.

    Args:
        command: Its name, as in `bt-hf COMMAND`.
        argv: Its arguments.
        parts: Dataclasses of its options, the trainer's own last. `--help` shows all fields of ours, and a few of
            those that `TrainingArguments` add.
        description: First part of the help.
        epilog: Last part of the help.
        output_dir: Default of the option.

    Returns:
        An instance of each of `parts`.
    """
    parser = OptionParser(
        parts,
        command,
        description,
        epilog,
        usage=f"bt-hf {command} --model MODEL --dataset PAIRS [--output_dir FOLDER] [--config FILE.yaml] [OPTION ...]",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Options in YAML; the command line wins over them.")
    parser.add_argument("--help_all", "--help-all", action="help", help="Show all options of the training, too.")
    parser.set_defaults(output_dir=output_dir)
    if not {"--help_all", "--help-all"} & set(argv):
        shown = _SHOWN | {"config", "help", "help_all"} | own_options(parts)
        for action in parser._actions:
            if action.dest not in shown:
                action.help = argparse.SUPPRESS
    parser.refuse_misspelt(argv)
    try:
        config = _config_of(argv)
        if config is not None:
            known = [field.name for part in parts for field in dataclasses.fields(part) if field.init]
            parser.set_defaults_with_config(**read_config(config, known))
        *found, _, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        for part in found:
            check_types(part)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    parser.refuse_unknown(unknown)
    return tuple(found)


def own_options(parts: Sequence[type]) -> set[str]:
    """Return the fields that these dataclasses define or redefine, without those of `TrainingArguments` alone."""
    classes = {cls for part in parts for cls in part.__mro__} - set(TrainingArguments.__mro__)
    return {name for cls in classes for name in inspect.get_annotations(cls)}


def speaker(config: TrainingArguments) -> Callable[..., None]:
    """Return `print` on one of the processes that `accelerate launch` started, and silence on the others."""
    return print if config.process_index == 0 else _say_nothing


def describe_accuracy(metrics: Mapping[str, float], prefix: str = "eval_", name: str = "accuracy") -> str:
    """Return the accuracy of held-out pairs with its interval, or the reason that there is none."""
    accuracy, low, high = (metrics[f"{prefix}{key}"] for key in ("accuracy", "accuracy_low", "accuracy_high"))
    if math.isnan(accuracy):
        return f"no {name}, as all are ties"
    return f"{name} {accuracy:.3f} ({low:.3f} to {high:.3f})"


def save(trainer: PreferenceTrainer) -> None:
    """Save the adapter before anything else may fail; `finish` publishes it, with the figures on its card."""
    trainer.save_model(trainer.args.output_dir, _internal_call=True)


def finish(trainer: PreferenceTrainer, draw: bool, judged: Mapping[str, Any] | None = None) -> list[Path]:
    """Draw plots, renew the card with pictures and figures, and publish if `push_to_hub` says so.

    Args:
        trainer: Trained, evaluated and saved.
        draw: Draw plots.
        judged: As in `draw_plots`.

    Returns:
        The pictures that were drawn.
    """
    folder = Path(trainer.args.output_dir)
    drawn = draw_plots(folder, trainer.state.log_history, judged) if draw and trainer.args.process_index == 0 else []
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return drawn


def draw_plots(
    folder: Path, log_history: Sequence[Mapping[str, Any]], judged: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draw the training curve and the reliability diagram into `folder`, where there is something to draw.

    Args:
        folder: Folder of the pictures.
        log_history: `trainer.state.log_history`.
        judged: `margins`, `preference` and perhaps `base_margins` of the pairs in the diagram.

    Returns:
        The pictures. None if Matplotlib is not installed, and no diagram of few pairs.
    """
    with replaced(folder) as scratch:
        try:
            if any("loss" in entry for entry in log_history):
                plots.plot_training_curve(log_history, scratch / "training_curve.png")
            if judged is not None and len(judged["margins"]) < plots.FEWEST_PAIRS:
                count = len(judged["margins"])
                print(f"No reliability diagram: {count} pairs are too few ({plots.FEWEST_PAIRS} are not).")
            elif judged is not None:
                plots.plot_reliability(**judged, path=scratch / "reliability.png")
        except ImportError:
            print("No plots without Matplotlib: pip install matplotlib")
        drawn = sorted((file.name for file in scratch.iterdir()), reverse=True)
    return [folder / name for name in drawn]


def _config_of(argv: Sequence[str]) -> str | None:
    """Return the value of `--config`; the parser says where it has none."""
    words = [word for argument in argv for word in (argument.split("=", 1) if _CONFIG.match(argument) else [argument])]
    places = [index for index, word in enumerate(words[:-1]) if word == "--config"]
    if len(places) > 1:
        raise ValueError("--config stands there twice: put the options into one file")
    return words[places[0] + 1] if places else None


def _say_nothing(*values: object) -> None:
    pass
