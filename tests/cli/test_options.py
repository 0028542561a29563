"""Options of every command: help for each field, both spellings, and one line for an unknown one."""

import dataclasses
import importlib
import subprocess
import sys
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from transformers import TrainingArguments

from bt_hf.cli import COMMANDS, main
from bt_hf.cli.options import PositiveInt
from bt_hf.cli.training import own_options

REQUIRED = {
    "lora": ["--model", "m", "--dataset", "d"],
    "pairs": ["m", "--scorer", "s", "--prompts", "p"],
    "pull": ["me/x"],
    "push": ["folder", "me/x"],
    "reward": ["--model", "m", "--dataset", "d"],
    "score": ["m", "i.png", "--prompt", "p"],
    "studio": [],
}
# Values of options that are text and have few of them, or say so too late for the parser.
WORDS = {"lr_scheduler_type": "linear", "beta": "auto"}


def parts_of(command: str) -> list[Any]:
    """Parse what a command requires, and return the instances of its dataclasses."""
    options = importlib.import_module(f"bt_hf.cli.{command}").parse(REQUIRED[command])
    return list(options) if isinstance(options, tuple) else [options]


def own_fields(command: str) -> list[dataclasses.Field]:
    parts = [type(part) for part in parts_of(command)]
    return [field for part in parts for field in dataclasses.fields(part) if field.name in own_options(parts)]


def option_for(field: dataclasses.Field, kind: Any) -> tuple[list[str], Any]:
    """Return words that set a field, and the value that they should give."""
    kinds = [kind for kind in get_args(kind) if kind is not NoneType] if NoneType in get_args(kind) else [kind]
    option = f"--{field.name.replace('_', '-')}"
    if kinds[0] is bool and field.default is None:  # needs a word, as the Trainer's own
        return [option, "true"], True
    if kinds[0] is bool:
        return ([option], True) if not field.default else ([option.replace("--", "--no-", 1)], False)
    if get_origin(kinds[0]) is Literal:
        value = get_args(kinds[0])[-1]
        return [option, value], value
    if get_origin(kinds[0]) is list:
        return [option, "a", "b"], ["a", "b"]
    if field.name == "quantization_config":
        return [option, '{"load_in_8bit": true}'], {"load_in_8bit": True}
    if field.name in WORDS or str in kinds:
        value = WORDS.get(field.name, "x")
        return [option, value], value
    value = 0.25 if kinds[0] is float else 2
    return [option, str(value)], value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_help(command: str) -> None:
    assert own_fields(command)
    assert not [field.name for field in own_fields(command) if not field.metadata.get("help")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_field(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    shown = [
        field.metadata.get("metavar") if "positional" in field.metadata else f"--{field.name}"
        for field in own_fields(command)
    ]
    assert not [name for name in shown if name not in text]


# Options that have an effect only beside others.
COMPANIONS = {
    "safeguard_mu": ["--safeguard", "True"],
    "kl_bank_size": ["--kl_weight", "1"],
    "desirable_weight": ["--loss_type", "kto"],
    "undesirable_weight": ["--loss_type", "kto"],
    "validation_batch_size": ["--validation_prompts", "a cat"],
    "validation_images": ["--validation_prompts", "a cat"],
    "validation_inference_steps": ["--validation_prompts", "a cat"],
    "validation_guidance_scale": ["--validation_prompts", "a cat"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_hyphens_are_as_good_as_underscores(command: str) -> None:
    module = importlib.import_module(f"bt_hf.cli.{command}")
    for part in parts_of(command):
        hints = get_type_hints(type(part))
        for field in dataclasses.fields(part):
            if field.name not in own_options([type(part)]) or "positional" in field.metadata:
                continue
            if field.name == "remove_unused_columns":  # refused if it is on
                continue
            words, value = option_for(field, hints[field.name])
            required = REQUIRED[command]
            if (command, field.name) == ("pairs", "dataset"):  # instead of a file of prompts
                required = required[:-2]
            required = [*required, *COMPANIONS.get(field.name, ())]
            for spelling in (words, [words[0].replace("-", "_").replace("__", "--", 1), *words[1:]]):
                options = module.parse([*required, *spelling])
                options = options if isinstance(options, tuple) else (options,)
                found = next(option for option in options if isinstance(option, type(part)))
                assert getattr(found, field.name) == value, spelling


@pytest.mark.parametrize(
    ("command", "wrong", "meant"),
    [
        ("lora", "--lora_rank", "--lora_r"),
        ("reward", "--crossvalidate", "--cross_validate"),
        ("reward", "--learning_rat=1", "--learning_rate"),
        ("pairs", "--candidate", "--candidates"),
        ("pull", "--base_modell", "--base_model"),
        ("push", "--create-prs", "--create-pr"),
        ("score", "--topk", "--top_k"),
    ],
)
def test_unknown_options_are_refused(command: str, wrong: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *REQUIRED[command], *wrong.split("=")]) == 2
    assert capsys.readouterr().err == (
        f"bt-hf {command}: error: unknown option {wrong.split('=')[0]}, did you mean {meant}? "
        f"(see bt-hf {command} --help)\n"
    )


def test_unexpected_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "me/x", "me/y"]) == 2
    assert "unexpected argument 'me/y'" in capsys.readouterr().err
    assert main(["pull", "me/x", "--zzzzzz"]) == 2
    assert "error: unknown option --zzzzzz (see" in capsys.readouterr().err


def test_flags_leave_positionals_alone() -> None:
    options = parts_of("push")[0]
    again = importlib.import_module("bt_hf.cli.push").parse(["--create_pr", "folder", "me/x"])
    assert dataclasses.replace(options, create_pr=True) == again


def test_positionals_stand_between_options() -> None:
    options = importlib.import_module("bt_hf.cli.score").parse(
        ["m", "a.png", "--prompt", "p", "b.png", "--top_k", "1"]
    )
    assert (options.model, options.images, options.prompt, options.top_k) == ("m", ["a.png", "b.png"], "p", 1)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_positive_int(value: str) -> None:
    assert PositiveInt("3") == 3
    with pytest.raises(Exception, match=f"whole number of at least 1, but got '{value}'"):
        PositiveInt(value)


def test_own_options_are_ours() -> None:
    parts = [type(part) for part in parts_of("reward")]
    names = own_options(parts)
    assert {"lora_r", "learning_rate", "prior_weight", "plots", "model", "dataset"} <= names
    assert "output_dir" not in names
    assert {field.name for field in dataclasses.fields(TrainingArguments)} - names


@pytest.mark.parametrize(
    ("argv", "unwanted"),
    [
        (["--help"], ["torch", "transformers", "trl"]),
        (["score", "--help"], ["torch", "transformers"]),
        (["push", "folder"], ["torch", "transformers"]),
    ],
)
def test_help_is_instant(argv: list[str], unwanted: list[str]) -> None:
    code = f"import sys\nfrom bt_hf.cli import main\nmain({argv})\nassert not set({unwanted}) & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
