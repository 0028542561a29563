"""Read CSV, TSV, JSON and JSONL files as they are written: texts stay texts, and a bad row spoils itself alone."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from bt_hf.data.images import one_line, short
from bt_hf.data.places import PROBLEM

TABLES = (".csv", ".tsv", ".json", ".jsonl")
_OURS = "_bt_hf_"  # begins the names of columns that this library adds, such as `PROBLEM`
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")  # not "007", and never more than 64 bits hold
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)", re.IGNORECASE)
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
Rows = list[dict[str, Any]]
Roles = Callable[[Collection[str]], Mapping[str, str]]


def read_table(path: Path, roles: Roles) -> Dataset:
    """Read a table of text into memory.

    Args:
        path: A `.csv`, `.tsv`, `.json` (a list of rows, rows as lines, or columns) or `.jsonl` file, in UTF-8, or in
            UTF-16 with a byte order mark. A CSV may use commas, semicolons, tabs or bars.
        roles: The names of the columns -> "text", "image" or "number" (or their plurals) for each that matters. Of a
            CSV, a text or image stays text, whatever it looks like. Columns without a role are numbers or booleans
            where all of their cells are.

    Returns:
        The rows, and with them the column `PROBLEM` if a row can't be read.

    Raises:
        ValueError: The file is not such text, or has no row that can be read.
    """
    try:
        content = _decode(path.read_bytes())
        if path.suffix.lower() in (".csv", ".tsv"):
            rows = _read_csv(content, "\t" if path.suffix.lower() == ".tsv" else ",", roles)
        else:
            rows = _read_json(content, path.suffix.lower())
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8, found other bytes at {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    names = dict.fromkeys(name for row in rows for name in row if name != PROBLEM)
    problems = [row.get(PROBLEM) for row in rows]
    if rows and not names:
        raise ValueError(next((f"row {row}: {one}" for row, one in enumerate(problems) if one), "the rows are empty"))
    known = roles(names)
    arrays = {name: _column([row.get(name) for row in rows], name, name in known, problems) for name in names}
    if any(problems):
        arrays[PROBLEM] = pa.array(problems, pa.string())
    return Dataset(pa.table(arrays))


def _decode(content: bytes) -> str:
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # as Excel writes "Unicode text"
    return content.decode("utf-16" if wide else "utf-8-sig")


# --- CSV ---


def _read_csv(content: str, usual: str, roles: Roles) -> Rows:
    declared = re.match(r"sep=(.)\r?\n", content)  # a line that Excel writes and reads
    if declared:
        content = content[declared.end() :]
    delimiter = declared[1] if declared else _delimiter(content, usual)
    limit = csv.field_size_limit(sys.maxsize)  # the process has one; a cell may hold an image in Base64
    try:
        lines = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(one_line(error)) from error
    finally:
        csv.field_size_limit(limit)
    lines = [line for line in lines if line]
    header = [name.strip() or f"unnamed_{number}" for number, name in enumerate(lines[0])] if lines else []
    header = [name.removeprefix(_OURS) for name in header]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"two columns are called {short(twice)}")
    rows: Rows = []
    for line in lines[1:]:
        rows.append({name: cell or None for name, cell in zip(header, line, strict=False)})
        if len(line) != len(header):
            rows[-1] = {
                PROBLEM: f"wrong number of fields: found {len(line)}, expected {len(header)}; put a text that has a "
                f"{delimiter!r} into double quotes"
            }
    known = roles(header)
    for name in header:
        if known.get(name, "number").startswith("number"):
            _infer(rows, name, name in known, "," if delimiter == ";" else ".")
    return rows


def _delimiter(content: str, usual: str) -> str:
    """Return what separates most columns in the first line."""
    head = content.lstrip("\r\n").split("\n", 1)[0]
    count = {
        mark: len(next(csv.reader([head], delimiter=mark), [])) for mark in dict.fromkeys((usual, ",", ";", "\t", "|"))
    }
    return max(count, key=lambda mark: count[mark])


def _infer(rows: Rows, name: str, known: bool, point: str) -> None:
    """Convert a column of cells to numbers or booleans: if all of them are, or if it has to hold `known` numbers."""

    def decimal(cell: str) -> float | None:
        return _float(cell.replace(point, "."))

    rows = [row for row in rows if row.get(name) is not None]
    for parse in (_BOOLEANS.get, _integer, decimal):
        values: list[Any] = [parse(row[name]) for row in rows]
        if None not in values:
            break
    else:
        values = [_BOOLEANS.get(row[name], decimal(row[name])) for row in rows]
        if not known or not any(value is not None for value in values):
            return
        values = [None if value is None else float(value) for value in values]
    for row, value in zip(rows, values, strict=True):
        if value is None:
            row[PROBLEM] = row.get(PROBLEM) or f"not a number: '{name}' is {short(row[name])}"
        row[name] = value


def _integer(cell: str) -> int | None:
    return int(cell) if _INTEGER.fullmatch(cell) else None


def _float(cell: str) -> float | None:
    return float(cell) if _FLOAT.fullmatch(cell.strip()) and not re.fullmatch(r"0\d+", cell) else None


# --- JSON ---


def _read_json(content: str, suffix: str) -> Rows:
    if suffix == ".json":
        try:
            return _whole(json.loads(content))
        except json.JSONDecodeError as error:
            if "Extra data" not in str(error):  # rows as lines give that
                raise ValueError(f"not valid JSON: {one_line(error)}") from error
        except ValueError as error:  # a number of thousands of digits
            raise ValueError(f"not valid JSON: {one_line(error)}") from error
    return list(_lines(content.split("\n")))


def _whole(value: Any) -> Rows:
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        (first, *_), lengths = value.values(), {len(one) for one in value.values()}
        if len(value) == 1 and any(isinstance(one, dict) for one in first):  # such as {"data": [rows]}
            value = first
        elif len(lengths) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return [_row(one) for one in (value if isinstance(value, list) else [value])]


def _lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip():
            try:
                yield _row(json.loads(line))
            except RecursionError:
                yield {PROBLEM: "not a row: nested too deeply"}
            except ValueError as error:
                yield {PROBLEM: f"not a row: not valid JSON ({one_line(error)})"}


def _row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {PROBLEM: f"not a row: expected a JSON object, found {short(value)}"}
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return {PROBLEM: f"not a row: a text is not valid Unicode in {short(value)}"}
    if "" in value or any(name.startswith(_OURS) for name in value):
        value = {name or "unnamed": one for name, one in value.items() if not name.startswith(_OURS)}
    return value


# --- Columns ---


def _column(values: list[Any], name: str, known: bool, problems: list[str | None]) -> pa.Array:
    """Return values of one type; others are problems of their rows where the column matters, else all become text."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        array = None
    if array is not None and not (_has_empty_struct(array.type) and not known):
        return array
    if not known:
        return pa.array([one if one is None or isinstance(one, str) else json.dumps(one) for one in values])
    kind = _kind(next(value for value in values if value is not None))
    for row, value in enumerate(values):
        try:
            wrong = value is not None and _kind(value) != kind
            values[row] = None if wrong else float(value) if kind == "a number" and value is not None else value
        except OverflowError:
            wrong, values[row] = True, None
        if wrong:
            problems[row] = problems[row] or f"not {kind}: '{name}' is {short(value)}"
    try:
        return pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"the column '{name}' has values of several types ({one_line(error)})") from error


def _kind(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return "a number"
    return {"str": "a text", "list": "a list", "dict": "an object"}[type(value).__name__]


def _has_empty_struct(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(field.type) for field in kind)
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)
