"""Wording rules for docstrings, comments and messages, as patterns."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("bt_hf", "docs", "examples", "tests") for path in (ROOT / folder).rglob("*.py"))

# A docstring or comment begins with a verb or the field's noun.
BEGINNING = re.compile(r"(what|whatever|how|of|whether|which|who|whose|that|those|as nearly)\b", re.IGNORECASE)
# "is not valid JSON", and not "is no JSON"; "there is no file" and "is no longer" are English.
NO_NOUN = re.compile(
    r"(?<![tT]here )\b(is|are|was|were) no (?!longer\b|more\b|less\b|better\b|worse\b|faster\b|slower\b)"
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.lineno, str(first.value.value).strip()


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each comment; lines that follow each other are one comment."""
    before = (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        continues = token.start == (before[0] + 1, before[1]) and token.line.lstrip().startswith("#")
        before = token.start
        text = token.string.lstrip("#! ").strip()
        if text and not continues and not text.startswith(("noqa", "type: ignore", "---")):
            yield token.start[0], text


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string that is not a pattern or one word."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def problems(source: str) -> list[str]:
    """Every place that breaks a rule, as `line: text`."""
    begins = [*docstrings(source), *comments(source)]
    found = [(line, text) for line, text in begins if BEGINNING.match(text)]
    found += [(line, text) for line, text in [*begins, *messages(source)] if NO_NOUN.search(text)]
    return [f"{line}: {text.splitlines()[0]}" for line, text in sorted(set(found))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_wording(file: Path) -> None:
    if file == Path(__file__):
        return  # it spells out what it forbids
    found = problems(file.read_text(encoding="utf-8"))
    assert not found, (
        "begin with a verb or the field's noun, and write 'is not a file' for 'is no file':\n" + "\n".join(found)
    )


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""How processes part."""', 1),
        ('"""Destroy the process group at interpreter exit."""', 0),
        ("BEST = 'a'  # of a checkpoint", 1),
        ("# Keep it,\n# of all things.\nA = 1", 0),
        ('raise ValueError("x is no JSON")', 1),
        ('raise ValueError("there is no file")', 0),
        ('raise ValueError("There is no file")', 0),
        ('def f():\n    """Return it, which is no longer there."""', 0),
    ],
)
def test_rule_finds_its_violations(source: str, count: int) -> None:
    assert len(problems(source)) == count
