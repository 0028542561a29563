"""Keep the rows of a benchmark in a JSON file, with their source, and print its tables.

A file of `docs/results/` holds the command line, the commit, the versions of the libraries, the machine and the date;
`runs`, each written as soon as it is measured, so that a benchmark that was cut goes on where it stopped; and `tables`
made of them, which `tables.py` puts into the documents.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
LIBRARIES = (
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "numpy",
    "scikit-learn",
)
Cell = str | float | int | None
Row = Sequence[Cell]


class Report:
    """A JSON file of `docs/results/`, written after every run.

    Args:
        name: Stem of the file.
        command: Command line that prints its tables, as of `command_line`.
        output_dir: Folder of the file. Default: `docs/results`.
        fresh: Measure again what the file holds already.
        known: Runs of other reports of this process, by key, which are not made again.

    Example:
        >>> with Report("few_pairs_accuracy", "python examples/benchmarks/few_pairs.py --parts accuracy") as report:
        ...     accuracy = report.run("mono, N = 4", lambda: measure("mono", 4))
        ...     report.table("mean", "Accuracy", ["N = 4"], [("mono", accuracy)], ".3f")
    """

    def __init__(
        self,
        name: str,
        command: str,
        output_dir: Path | str = RESULTS,
        fresh: bool = False,
        known: MutableMapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(output_dir) / f"{name}.json"
        self.known = {} if known is None else known
        self.content: dict[str, Any] = {
            "command": command,
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "complete": False,
            "tables": {},
            "runs": {},
        }
        self._printed: dict[str, list[str]] = {}
        if self.path.exists() and not fresh:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = ("command", "commit", "versions", "machine")
            if all(found.get(key) == self.content[key] for key in same):
                self.content["runs"] = found["runs"]
        self.known.update(self.content["runs"])

    @classmethod
    def of_script(
        cls,
        script: str,
        parser: argparse.ArgumentParser,
        args: argparse.Namespace,
        part: str | None = None,
        name: str | None = None,
        known: MutableMapping[str, Any] | None = None,
    ) -> "Report":
        """Return the report of one of the `args.parts` of a script, or of a script without parts.

        The file has the name of the script and of the part, unless there is another `name`.
        """
        changed = {"parts": [part]} if part else {}
        stem = Path(script).stem + (f"_{part}" if part else "")
        return cls(name or stem, command_line(parser, args, script, **changed), args.output_dir, args.fresh, known)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.content["complete"] = kind is None
        self.save()

    def run(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the JSON value of the run `key`; `measure` it unless it is there already."""
        if key not in self.known:
            self.known[key] = rounded(measure())
        if key not in self.content["runs"]:
            self.content["runs"][key] = self.known[key]
            self.save()
        return self.known[key]

    def table(self, name: str, title: str, columns: Sequence[str], rows: Iterable[Row], formats: Any = "") -> None:
        """Keep a table and print it; of one that has grown, print the new rows.

        Args:
            name: Name of the table in the file.
            title: Printed above it.
            columns: Names of all columns but the first.
            rows: The name of each row, and its cells.
            formats: Format specification of numbers, one for all columns or one for each.
        """
        formats = [formats] * len(columns) if isinstance(formats, str) else list(formats)
        table = {"title": title, "columns": list(columns), "formats": formats, "rows": rounded([*map(list, rows)])}
        self.content["tables"][name] = table
        self.save()
        lines, printed = markdown(table).splitlines(), self._printed.get(name, [])
        if not printed or lines[: len(printed)] != printed:
            printed = []
            print(f"\n{title}\n")
        print("\n".join(lines[len(printed) :]), flush=True)
        self._printed[name] = lines

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(dumps(self.content), encoding="utf-8")
        partial.replace(self.path)


def markdown(table: dict[str, Any]) -> str:
    """Return a table of a report as Markdown."""
    lines = [["", *table["columns"]]]
    lines += [
        [cell(name, ""), *(cell(value, spec) for value, spec in zip(cells, table["formats"], strict=True))]
        for name, *cells in table["rows"]
    ]
    left = [all(isinstance(row[column], str) for row in table["rows"]) for column in range(len(lines[0]))]
    lines.insert(1, ["---" if words else "---:" for words in left])
    return "\n".join("|" + "|".join(f" {text} " if text else " " for text in line) + "|" for line in lines)


def cell(value: Cell, spec: str) -> str:
    """Return a number by its format, a string as it is, and nothing for `None`."""
    if value is None:
        return ""
    return value.replace("|", "\\|") if isinstance(value, str) else format(value, spec)


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace, script: str, **changed: Any) -> str:
    """Return the command that runs `script` with these arguments, without those that are defaults.

    Args:
        parser: Parser of the script.
        args: Arguments it parsed.
        script: `__file__` of the script.
        **changed: Arguments to exchange, such as the one part that a report is about.
    """
    words = ["python", Path(script).resolve().relative_to(ROOT).as_posix()]
    for action in parser._actions:
        value = changed.get(action.dest, getattr(args, action.dest, None))
        if action.dest in ("help", "output_dir", "fresh") or action.help == argparse.SUPPRESS:
            continue
        if value == action.default or value is None:
            continue
        words.append(action.option_strings[0])
        if not isinstance(value, bool):
            words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return " ".join(words)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has: where the JSON goes, and whether to start anew."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=RESULTS, type=Path, help="folder of the JSON, by default docs/results")
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON holds already")
    return parser


def commit() -> str | None:
    """Return the commit of this clone, with `-dirty` if its code was changed, or `None` outside of a clone."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "bt_hf", "examples")
        return git("rev-parse", "HEAD")[:12] + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the figures."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """Return the kind of processor, its cores, the threads of torch, and the accelerator if there is one."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    found: dict[str, str | int] = {
        "processor": processor,
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    elif torch.accelerator.is_available():
        found["accelerator"] = torch.accelerator.current_accelerator().type
    return found


def rounded(value: Any) -> Any:
    """Return JSON values of 6 significant digits, arrays and tensors as lists."""
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def dumps(content: dict[str, Any]) -> str:
    """Return JSON with a line for each run and for each row of a table."""

    def lines(value: Any, depth: int, indent: str = "") -> str:
        inner, end = f"\n{indent}  ", f"\n{indent}"
        if depth and value and isinstance(value, dict):
            parts = [f"{json.dumps(key)}: {lines(one, depth - 1, indent + '  ')}" for key, one in value.items()]
            return "{" + inner + f",{inner}".join(parts) + end + "}"
        if depth and value and isinstance(value, list) and isinstance(value[0], list):
            return "[" + inner + f",{inner}".join(lines(one, 0) for one in value) + end + "]"
        return json.dumps(value, ensure_ascii=False)

    depths = {"tables": 3, "runs": 1}
    parts = [f"  {json.dumps(key)}: {lines(value, depths.get(key, 0), '  ')}" for key, value in content.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"
