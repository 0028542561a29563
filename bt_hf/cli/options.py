"""Options of a command as the fields of a dataclass, each with its help in `metadata["help"]`."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from trl import TrlParser

from bt_hf.cli.errors import OneLineErrors
from bt_hf.training.option_checks import did_you_mean

Options = TypeVar("Options")


class PositiveInt(int):
    """A whole number of at least 1; argparse refuses another."""

    def __new__(cls, value: int | str) -> "PositiveInt":
        if not str(value).isdecimal() or int(value) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {value!r}")
        return super().__new__(cls, value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of description and epilog, and tell defaults unless they say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class OptionParser(OneLineErrors, TrlParser):
    """A parser of dataclasses that refuses unknown options in one line.

    Args:
        parts: One dataclass, or several.
        command: Name of the command, as in `bt-hf COMMAND`.
        description: First part of the help.
        epilog: Last part of the help, with examples.
        usage: Short form of a call; default: all options.
    """

    def __init__(
        self, parts: type | Sequence[type], command: str, description: str, epilog: str, usage: str | None = None
    ) -> None:
        TrlParser.__init__(
            self,
            parts,
            prog=f"bt-hf {command}",
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Exit if words are left over, naming the first option among them and the one that was probably meant."""
        if not words:
            return
        option = next((word.split("=")[0] for word in words if word.startswith("-")), None)
        if option is None:
            self.error(f"unexpected argument {words[0]!r}")
        shown = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        near = did_you_mean(option, shown) or did_you_mean(option, self._option_string_actions)
        self.error(f"unknown option {option}{near}")

    def refuse_misspelt(self, argv: Sequence[str]) -> None:
        """Refuse an unknown option before argparse complains of what is missing in its stead."""
        names = (word.split("=")[0] for word in argv if word.startswith("--") and word != "--")
        self.refuse_unknown([name for name in names if " " not in name and name not in self._option_string_actions])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is not among the choices, with the nearest of them."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"expected one of {', '.join(choices)}, but got {value!r}{did_you_mean(str(value), choices)}"
            )


class _CommandParser(OptionParser):
    """A parser where a field with `metadata={"positional": True}` is a positional, and a bool a flag without value."""

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        metadata = {name: value for name, value in field.metadata.items() if name != "positional"}
        if "positional" in field.metadata:
            optional = field.default is None
            nargs = "+" if field.type == list[str] else "?" if optional else None
            parser.add_argument(field.name, nargs=nargs, **metadata)
        elif field.type is bool:  # with a value, a flag would swallow the positional after it
            names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
            parser.add_argument(*names, action="store_true", **metadata)
        else:
            TrlParser._parse_dataclass_field(parser, field)


def parse_options(command: str, options: type[Options], argv: Sequence[str], description: str, epilog: str) -> Options:
    """Parse the arguments of a command that does not train.

    Args:
        command: Its name, as in `bt-hf COMMAND`.
        options: Dataclass of its options, each spelt with underscores or hyphens.
        argv: Its arguments; positionals may stand between options.
        description: First part of the help.
        epilog: Last part of the help, with examples.

    Returns:
        An instance of `options`. A bad argument exits with code 2 and one line, as does a `ValueError` that the
        dataclass raises.
    """
    parser = _CommandParser(options, command, description, epilog)
    parser.refuse_misspelt(argv)
    namespace, unknown = parser.parse_known_intermixed_args(argv)
    parser.refuse_unknown(unknown)
    try:
        return options(**vars(namespace))
    except ValueError as error:
        parser.error(str(error))
