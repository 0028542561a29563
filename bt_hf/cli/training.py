"""What the commands that train share: data, options from dataclasses and YAML, a short help, plots."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import TrainingArguments
from trl import TrlParser

from bt_hf import plots
from bt_hf.cli import refuse
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.training.config import PreferenceConfig

# Of the many TrainingArguments, those that `--help` shows; `--help_all` shows all.
_SHOWN = {"bf16", "eval_strategy", "hub_model_id", "max_steps", "output_dir", "push_to_hub", "report_to", "seed"}


@dataclass
class DataArguments:
    """What to train on what; how, is in the trainer's own options."""

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

    def load_pairs(self) -> tuple[Any, Any]:
        """Training pairs, and held-out ones or `None`."""
        return self.load_training_pairs(), self.load_held_out_pairs()

    def load_training_pairs(self) -> Any:
        return load_preference_pairs(self.dataset, self.split, self.streaming, self.on_bad_rows)

    def load_held_out_pairs(self) -> Any:
        if self.eval_dataset is None and self.eval_split is None:
            return None
        held_out = self.eval_dataset or self.dataset
        return load_preference_pairs(held_out, self.eval_split, on_bad_rows=self.on_bad_rows)


class _Parser(TrlParser):
    """Dataclass options and YAML, and errors of one line."""

    def error(self, message: str) -> NoReturn:
        refuse(self, message)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" says nothing.
        return action.help if action.default is None else super()._get_help_string(action)


def parse_training(
    command: str,
    argv: Sequence[str],
    parts: Sequence[type],
    description: str,
    epilog: str,
    output_dir: str,
) -> tuple[Any, ...]:
    """The options of a command that trains, from the command line over those of `--config` over the defaults.

    Args:
        command: Its name, as in `bt-hf COMMAND`.
        argv: Its arguments.
        parts: Dataclasses of its options, the trainer's own last. `--help` shows all fields but those that the last
            one inherits, of which it shows a few.
        description: What the help says first.
        epilog: What it says last.
        output_dir: Default of the option.

    Returns:
        An instance of each of `parts`.
    """
    parser = _Parser(
        parts,
        prog=f"bt-hf {command}",
        usage=f"bt-hf {command} --model MODEL --dataset PAIRS [--output_dir FOLDER] [--config FILE.yaml] [OPTION ...]",
        description=description,
        epilog=epilog,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Options in YAML; the command line wins over them.")
    parser.add_argument("--help_all", "--help-all", action="help", help="Show all options of the training, too.")
    parser.set_defaults(output_dir=output_dir)
    if not {"--help_all", "--help-all"} & set(argv):
        *own, config = parts
        shown = _SHOWN | {item.name for part in own for item in fields(part)}
        shown |= {name for part in (config, PreferenceConfig) for name in part.__annotations__}
        for action in parser._actions:
            if action.dest not in shown | {"config", "help", "help_all"}:
                action.help = argparse.SUPPRESS
    # TRL looks for `--config` and its value as two arguments.
    words = [word for argument in argv for word in _split_config(argument)]
    if words[-1:] == ["--config"]:
        parser.error("argument --config: expected one argument")
    return tuple(parser.parse_args_and_config(words)[: len(parts)])


def speaker(config: TrainingArguments) -> Callable[..., None]:
    """`print`, on one of the processes in which `accelerate launch` runs a command; the others say nothing."""
    return print if config.process_index == 0 else _say_nothing


def draw_plots(
    folder: Path, log_history: Sequence[Mapping[str, Any]], judged: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draw the training curve and the reliability diagram into `folder`, where there is something to draw.

    Args:
        folder: Where the pictures go.
        log_history: `trainer.state.log_history`.
        judged: `margins`, `preference` and perhaps `base_margins` of the pairs that the diagram is of.

    Returns:
        The pictures. None if Matplotlib is not installed.
    """
    drawn = []
    try:
        if any("loss" in entry for entry in log_history):
            plots.plot_training_curve(log_history, folder / "training_curve.png")
            drawn.append(folder / "training_curve.png")
        if judged is not None:
            plots.plot_reliability(**judged, path=folder / "reliability.png")
            drawn.append(folder / "reliability.png")
    except ImportError:
        print('No plots without Matplotlib: pip install "bt-hf[plots]"')
    return drawn


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _say_nothing(*values: object) -> None:
    pass
