"""MkDocs hooks: render the help of each command, and bring the pictures of the examples along."""

import contextlib
import io
import os
import re
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from bt_hf.cli import main

PICTURES = Path(__file__).parents[1] / "examples" / "images"
# `<!-- bt-hf lora --help -->` on a line of its own stands for what that command prints.
COMMAND = re.compile(r"^<!-- bt-hf (.*--help) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of `examples/images/` as `images/`."""
    for picture in sorted(PICTURES.glob("*.png")):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Replace each command in a comment by the help that it prints."""
    return COMMAND.sub(lambda match: f"```text\n{command_help(match[1].split())}```", markdown)


def command_help(arguments: list[str]) -> str:
    """Return the help of a command, 80 columns wide.

    Raises:
        RuntimeError: The command does not end well.
    """
    printed = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": "80"}), contextlib.redirect_stdout(printed):
        code = main(arguments)
    if code != 0:
        raise RuntimeError(f"`bt-hf {' '.join(arguments)}` ended with code {code}.")
    return printed.getvalue()
