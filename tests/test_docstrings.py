"""Examples in docstrings: each `>>>` and each fenced block of Python runs."""

import ast
import doctest
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from code_examples import fenced_blocks, run_blocks

pytest_plugins = ["hub_fixtures", "workplace"]
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "bt_hf").rglob("*.py"))


class Docstring(NamedTuple):
    """A docstring with the name of what it documents, and the line that it begins on."""

    file: Path
    name: str
    text: str
    line: int

    @property
    def id(self) -> str:
        return f"{self.file.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}:{self.name}"

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.id.partition(":")[0])


def docstrings(file: Path) -> Iterator[Docstring]:
    """Yield every docstring of a file, private and nested ones too."""

    def walk(node: ast.AST, name: str) -> Iterator[Docstring]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{name}.{child.name}".lstrip(".")
                if (text := ast.get_docstring(child, clean=False)) is not None:
                    yield Docstring(file, inner, text, child.body[0].lineno)
                yield from walk(child, inner)
            else:
                yield from walk(child, name)

    tree = ast.parse(file.read_text(encoding="utf-8"))
    if (text := ast.get_docstring(tree, clean=False)) is not None:
        yield Docstring(file, "", text, 1)
    yield from walk(tree, "")


ALL = [docstring for file in FILES for docstring in docstrings(file)]
INTERACTIVE = [docstring for docstring in ALL if ">>>" in docstring.text]
FENCED = [docstring for docstring in ALL if "```python" in docstring.text]


@pytest.mark.parametrize("docstring", INTERACTIVE, ids=lambda docstring: docstring.id)
def test_interactive_example(docstring: Docstring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where `evaluate` finds its modules
    parser, flags = doctest.DocTestParser(), doctest.ELLIPSIS
    names = vars(docstring.module).copy()
    test = parser.get_doctest(docstring.text, names, docstring.id, str(docstring.file), docstring.line - 1)
    printed: list[str] = []
    result = doctest.DocTestRunner(optionflags=flags).run(test, out=printed.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(printed)


@pytest.mark.parametrize("docstring", FENCED, ids=lambda docstring: docstring.id)
def test_fenced_example(docstring: Docstring, workplace: Callable[[str], Path]) -> None:
    workplace(docstring.text)
    found = fenced_blocks(docstring.text, "python")
    blocks = [block._replace(line=docstring.line + block.line - 1) for block in found]  # where the file has them
    assert blocks
    run_blocks(blocks, str(docstring.file), {"__name__": "__main__"})


def test_examples_are_found() -> None:
    # Without the walk, as many: neither a nested docstring nor a text that is none hides an example.
    sources = [file.read_text(encoding="utf-8") for file in FILES]
    fences = sum(source.count("```python") for source in sources)
    assert fences == sum(docstring.text.count("```python") for docstring in FENCED) > 0
    prompts = sum(source.count(">>> ") for source in sources)
    assert prompts == sum(docstring.text.count(">>> ") for docstring in INTERACTIVE) > 0
