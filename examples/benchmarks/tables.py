"""Write the tables of the documents from the JSON of the benchmarks, or check that they agree.

    python examples/benchmarks/tables.py            # rewrite the tables, and print what is left to do
    python examples/benchmarks/tables.py --check    # only print the differences; the exit status is 1 if there is one

A document names a table of `docs/results/FILE.json` between two comments; the command that prints it, the table and a
link to its source are put there:

    <!-- table: FILE.TABLE -->
    <!-- end -->

The check also wants a finished run behind each table, a table of each JSON, and no other table and no measured figure
in the prose of a document of results.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from results import RESULTS, ROOT, markdown

BLOCK = re.compile(r"<!-- table: (\w+)\.(\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
MARKER = re.compile(r"<!-- (table:.*|end) -->")
NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)
UNITS = "s|ms|seconds|minutes|hours|times|points|MB|MiB|GB|GiB|pairs a second|percent"
FIGURE = re.compile(rf"\b0\.\d+|\d ?%(?! interval)|\b\d+\.\d+ (?:{UNITS})\b|\b\d+ (?:{UNITS})\b")


@cache
def load(file: str) -> dict[str, Any]:
    """Return the content of a JSON file of `docs/results`.

    Raises:
        ValueError: The file does not exist.
    """
    path = RESULTS / f"{file}.json"
    if not path.exists():
        raise ValueError(f"there is no docs/results/{file}.json: run its benchmark")
    return json.loads(path.read_text(encoding="utf-8"))


def block(file: str, table: str, document: Path) -> str:
    """Return the text between the comments of a table.

    Raises:
        ValueError: The file or the table is missing, or the run was not finished.
    """
    content = load(file)
    if table not in content["tables"]:
        raise ValueError(f"docs/results/{file}.json has the tables {', '.join(content['tables'])}, but no {table!r}")
    if not content["complete"]:
        raise ValueError(f"docs/results/{file}.json is of an unfinished run: go on with `{content['command']}`")
    link = os.path.relpath(RESULTS / f"{file}.json", document.parent).replace(os.sep, "/")
    source = f"`{content['command']}` ([rows and source]({link})):"
    return f"{source}\n\n{markdown(content['tables'][table])}\n"


def filled(text: str, document: Path) -> str:
    """Return the text of a document with every table as its JSON has it; of a missing JSON, leave it as it is."""

    def replace(match: re.Match[str]) -> str:
        file, table, _ = match.groups()
        try:
            return f"<!-- table: {file}.{table} -->\n{block(file, table, document)}<!-- end -->"
        except ValueError:
            return match.group()

    return BLOCK.sub(replace, text)


def differences(text: str, document: Path) -> Iterator[str]:
    """Yield problems of a document's tables and, unless it is a README, of its prose."""
    for match in BLOCK.finditer(text):
        file, table, found = match.groups()
        line = text[: match.start()].count("\n") + 1
        try:
            if found != block(file, table, document):
                yield f"{line}: {file}.{table} is not as in the JSON: run `python examples/benchmarks/tables.py`"
        except ValueError as error:
            yield f"{line}: {error}"
    rest = BLOCK.sub(blank, text)
    yield from (f"{number}: a marker without its other half" for number, _ in search(MARKER, rest))
    if BLOCK.search(text) and document.name != "README.md":
        prose = NOT_PROSE.sub(blank, rest)
        yield from (f"{number}: a table without its source" for number, _ in search(re.compile(r"^\|.*\d"), prose))
        yield from (f"{number}: {figure!r} without its source" for number, figure in search(FIGURE, prose))


def blank(match: re.Match[str]) -> str:
    """Return the lines of a match without their text."""
    return "\n" * match.group().count("\n")


def search(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    """Yield the number of each line that matches, and the match."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := pattern.search(line):
            yield number, match.group()


def documents() -> list[Path]:
    """Return the documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def unused() -> list[str]:
    """Return the JSON files that no document shows."""
    shown = {match.group(1) for path in documents() for match in BLOCK.finditer(path.read_text(encoding="utf-8"))}
    return sorted(path.name for path in RESULTS.glob("*.json") if path.stem not in shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    problems = []
    for path in documents():
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        if not args.check and (new := filled(text, path)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"Rewritten: {name}")
            text = new
        problems += [f"{name}:{problem}" for problem in differences(text, path)]
    problems += [f"docs/results/{name}: no document shows it" for name in unused()]
    print("\n".join(problems) or "All tables are as in docs/results.")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
