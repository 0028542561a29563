"""Read WebDataset archives: members of one key are a row, and images may have any extension."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any

import fsspec
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value
from PIL import Image as PILImage

from bt_hf.data.images import one_line, short
from bt_hf.data.places import IMAGE, PROBLEM

_TEXTS = ("txt", "text", "caption")
_MEMBER = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]+)")


def archive_stream(files: list[str], split: str) -> IterableDataset:
    """Stream the rows of archives, local ones or of the Hub; each is a shard.

    Raises:
        tarfile.TarError, OSError: The first one can't be read, which tells the columns.
    """
    features = _features(files)
    arguments = {"files": files, "features": features}
    return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments, split=split)


def load_archives(files: list[str], split: str) -> Dataset:
    """Load the rows of archives into the cache of `datasets`; archives that have changed are read again."""
    features = _features(files)
    local = [os.stat(file) for file in files if os.path.exists(file)]
    stamps = repr([(status.st_size, status.st_mtime_ns) for status in local])
    arguments = {"files": files, "features": features, "stamps": stamps}
    return Dataset.from_generator(_rows, features=features, gen_kwargs=arguments, split=split)


def _features(files: list[str]) -> Features:
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(islice(_samples(files[0]), 5))
    except (tarfile.TarError, OSError, EOFError):
        if not rows:
            raise
    if not rows:
        raise tarfile.ReadError("it has no rows: members should be called such as 1.chosen.jpg, 1.rejected.jpg, 1.txt")
    names = dict.fromkeys(name for row in rows for name in row if name != PROBLEM)
    features: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if any(isinstance(value, dict) and value.keys() == {"bytes", "path"} for value in values):
            features[name] = IMAGE
            continue
        kind = pa.array(values).type
        features[name] = Features.from_arrow_schema(pa.schema({name: kind}))[name]
    return Features(features | {PROBLEM: Value("string")})


def _rows(files: list[str], features: Features, stamps: str = "") -> Iterator[dict[str, Any]]:
    for file in files:
        for row in _samples(file):
            yield {name: row.get(name) for name in features}


def _samples(file: str) -> Iterator[dict[str, Any]]:
    with fsspec.open(file, "rb") as content, tarfile.open(fileobj=content, mode="r|*") as archive:
        members = ((_MEMBER.fullmatch(member.name), member) for member in archive if member.isreg())
        named = ((match[1], match[2], member) for match, member in members if match)
        for _, parts in groupby(named, key=lambda part: part[0]):
            row: dict[str, Any] = {}
            for _, field, member in parts:
                reader = archive.extractfile(member)
                assert reader is not None  # regular members have one
                try:
                    for name, value in _columns(field, reader.read()):
                        if name in row and not field.endswith("json"):
                            raise ValueError(f"two members for one column: {name}")
                        row.setdefault(name, value)
                except ValueError as error:
                    row[PROBLEM] = str(error)
            yield row


def _columns(field: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """Columns of a member: `chosen.jpg`, `prompt.txt` and `json` become `chosen`, `prompt` and what it holds."""
    name, _, extension = field.lower().rpartition(".")
    name = name.partition(".")[0]
    if extension == "json":
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {short(field)} ({one_line(error)})") from error
        if name or not isinstance(value, dict):
            yield name or "json", value
        else:
            yield from value.items()
    elif extension in _TEXTS:
        try:
            yield name or "prompt", content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not text in UTF-8: {short(field)}") from error
    elif f".{extension}" in PILImage.registered_extensions():
        yield name or "image", {"bytes": content, "path": None}
    else:
        yield name or extension, content
