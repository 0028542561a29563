"""Code of documents and docstrings."""

import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block of code, and the line that it begins on."""

    language: str
    code: str
    line: int


def fenced_blocks(text: str, language: str) -> Iterator[Block]:
    """Yield the blocks of a language, without their indentation."""
    for match in FENCE.finditer(text):
        if match["language"] == language:
            line = text.count("\n", 0, match.start("code")) + 1
            yield Block(language, textwrap.dedent(match["code"]), line)


def run_blocks(blocks: list[Block], file: str, namespace: dict[str, object]) -> None:
    """Run blocks one after another, so that each finds the names of those before; tracebacks show lines of `file`."""
    for block in blocks:
        exec(compile("\n" * (block.line - 1) + block.code, file, "exec"), namespace)
