"""Stream of files: read one by one, each row with the file that it is from, and files that can't be read."""

from __future__ import annotations

import itertools
import logging
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow
from datasets import Features, IterableDataset, IterableDatasetDict
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from bt_hf.data.archives import archive_stream
from bt_hf.data.formats import PLACE, ROW, SHARD, PreferenceDataError
from bt_hf.data.images import one_line

logger = logging.getLogger(__name__)

# Errors of readers on a first file that is damaged, cut off or gone; not a `ValueError` about splits.
_UNREADABLE = (OSError, EOFError, ValueError, pyarrow.ArrowInvalid, tarfile.TarError)


def open_shards(
    builder: Any, split: str | None, label: str, on_bad_rows: str
) -> IterableDataset | IterableDatasetDict:
    """Stream the files of a `datasets.DatasetBuilder`: each is a shard, which goes to one process and worker.

    Args:
        builder: From `datasets.load_dataset_builder`.
        split: As in `load_dataset`; all of them if `None`.
        label: Name of the data in messages.
        on_bad_rows: "raise" stops at a file that can't be read, "drop" goes on with the next one and says so. Rows
            that stand before the damage are read either way.

    Returns:
        A stream whose rows also have the columns of `formats.PLACE`, or one for each split.

    Raises:
        PreferenceDataError: No file can be read, or the first one can't with "raise": it tells the columns.
    """
    files = builder.config.data_files or {}
    dropped = 0
    while True:
        try:
            opened = _stream(builder, split)
            break
        except _UNREADABLE as error:
            first = next(iter(files), None)  # `datasets` reads the columns off its first file
            if first is None or "split" in str(error).lower():
                raise
            name = os.path.basename(files[first][0])
            if on_bad_rows == "raise" or len(files[first]) == 1:
                raise PreferenceDataError(_unreadable(label, name, 0, error, on_bad_rows)) from error
            dropped += 1
            logger.warning("%s: leaving out %s (%s), %d so far", label, name, _reason(error), dropped)
            files[first] = files[first][1:]
    if isinstance(opened, dict):
        splits = {name: _by_shard(stream, files.get(name, ()), label, on_bad_rows) for name, stream in opened.items()}
        return IterableDatasetDict(splits)
    return _by_shard(opened, files.get(split, ()), label, on_bad_rows)


def is_webdataset(builder: Any) -> bool:
    """True if a builder reads WebDataset archives, for which this library has its own reader."""
    return isinstance(builder, WebDataset)


def _stream(builder: Any, split: str | None) -> IterableDataset | IterableDatasetDict:
    if not is_webdataset(builder):
        return builder.as_streaming_dataset(split)
    files = builder.config.data_files
    if split is not None and split not in files:
        raise ValueError(f"Bad split: {split}. Available splits: {list(files)}")
    if split is not None:
        return archive_stream(list(files[split]), split)
    return IterableDatasetDict({name: archive_stream(list(paths), name) for name, paths in files.items()})


def _by_shard(stream: IterableDataset, files: Any, label: str, on_bad_rows: str) -> IterableDataset:
    # Images stay encoded until a pair is checked, and are not encoded again here.
    stream = stream.decode(False)
    count = stream.num_shards
    names = [os.path.basename(file) for file in files] if len(files) == count else []
    columns = stream.features
    return IterableDataset.from_generator(
        _rows,
        features=columns and Features(columns | PLACE),
        # The only lists are those of the shards: by them `datasets` splits among processes and workers.
        gen_kwargs={
            "shards": list(range(count)),
            "names": names or [f"shard {index} of {label}" for index in range(count)],
            "stream": stream,
            "label": label,
            "on_bad_rows": on_bad_rows,
        },
        split=stream.split or datasets.Split.TRAIN,
    )


def _rows(
    shards: list[int], names: list[str], stream: IterableDataset, label: str, on_bad_rows: str
) -> Iterator[dict[str, Any]]:
    dropped = 0
    for shard, name in zip(shards, names, strict=True):
        # `iter`, unlike iterating, does not split among workers a second time.
        rows = stream.shard(num_shards=stream.num_shards, index=shard).iter(batch_size=1)
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # each format has its own
                if on_bad_rows == "raise":
                    raise PreferenceDataError(_unreadable(label, name, number, error, on_bad_rows)) from error
                dropped += 1
                logger.warning(
                    "%s: leaving out %s from its row %d on (%s), %d so far",
                    label,
                    name,
                    number,
                    _reason(error),
                    dropped,
                )
                break
            if row is None:
                break
            values = {column: values[0] for column, values in row.items()}
            yield values | {SHARD: name, ROW: number}


def _unreadable(label: str, name: str, row: int, error: Exception, on_bad_rows: str) -> str:
    place = f" from its row {row} on" if row else ""
    way_out = "replace it" if on_bad_rows == "drop" else "replace it, or pass on_bad_rows='drop' to go without it"
    return f"{label}: {name} cannot be read{place} ({_reason(error)}); {way_out}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
