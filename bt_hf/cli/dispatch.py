"""Run a command in its own module, imported when called, each with `parse(argv)` and `run(options)`."""

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bt_hf.cli.errors import OneLineErrors, describe

COMMANDS = {
    "lora": "train a preference LoRA: make a diffusers pipeline draw one person's way",
    "pairs": "draw images with a pipeline, and rank them into pairs with a reward",
    "pull": "fetch a published adapter into the cache, and check it",
    "push": "publish an adapter on the Hub, after checks",
    "reward": "train a reward: adapt CLIP and its kin to one person's clicks",
    "score": "score images with a reward, and rank them",
    "studio": "open a page to click on, and watch a model learn your taste",
}
_EPILOG = """commands:
{commands}

`bt-hf COMMAND --help` tells more, with an example. Each command also takes --debug: show the traceback of an error,
and what other libraries say.

example:
  bt-hf reward --model openai/clip-vit-base-patch32 --dataset my-clicks/ --output_dir my-taste
  bt-hf score my-taste --prompt "a red apple" photos/
  bt-hf lora --model stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset my-clicks/ --output_dir my-taste-lora
  bt-hf push my-taste me/my-taste
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments, without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code: 0 for success, 2 for an error, which is one line on stderr, 130 if interrupted.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        bt-hf 0.1...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    prog = "bt-hf"
    try:
        if not arguments or arguments[0] not in COMMANDS:
            _parse_without_command(arguments)
            return 0
        prog = f"bt-hf {arguments[0]}"
        _run_command(arguments[0], arguments[1:], debug)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough; Python would complain once more as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{prog}: error: {describe(error, debug)}", file=sys.stderr)
        return 2
    return 0


def _run_command(name: str, arguments: Sequence[str], debug: bool) -> None:
    """Import the command's module, parse and run; other libraries are silent unless `debug`."""
    with ExitStack() as stack:
        if not debug:
            stack.enter_context(_without_warnings())
        command = importlib.import_module(f"bt_hf.cli.{name}")
        options = command.parse(arguments)
        if not debug:
            stack.enter_context(_without_chatter())
        command.run(options)


def _parse_without_command(arguments: Sequence[str]) -> None:
    """Answer `bt-hf --help` and `bt-hf --version`; anything else that names no command is an error."""
    width = max(map(len, COMMANDS))
    parser = OneLineErrors(
        prog="bt-hf",
        usage="bt-hf [--help] [--version] COMMAND ...",
        description="Adapt text-image models to one person's taste from a handful of clicks.",
        epilog=_EPILOG.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = sys.modules["bt_hf"].__version__
    parser.add_argument("--version", action="version", version=f"bt-hf {version}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.parse_args(arguments)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide Python warnings of other libraries, which are for whoever writes code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"bt_hf\b")
        yield


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Show errors only of the loggers of transformers, not that Torchvision is missing, and no loading bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
