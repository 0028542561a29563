"""Open what `bt_hf.data.pairs` is given: a Hub id, a local file or folder, or a loaded dataset."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, IterableDataset, ReadInstruction, Value, concatenate_datasets

from bt_hf.data.archives import load_archives
from bt_hf.data.clicks import is_session, rows_of_session
from bt_hf.data.formats import NOTES, PreferenceDataError, roles
from bt_hf.data.images import is_address, one_line, short
from bt_hf.data.judged_folders import judged_splits, read_judged_folder, with_judgements_of_folders
from bt_hf.data.places import Place
from bt_hf.data.streaming import is_webdataset, open_shards
from bt_hf.data.tables import TABLES, Roles, read_table
from bt_hf.data.urls import AllowUrls

_SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
_SUFFIXES = (*TABLES, *_SHARDS)
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_THE_DATASET = "the dataset"


def open_dataset(
    source: Any,
    split: str | None,
    streaming: bool,
    on_bad_rows: str = "raise",
    allow_urls: AllowUrls = False,
    roles: Roles = roles,
) -> tuple[Dataset | IterableDataset, Place, str]:
    """Return the dataset, the place of its images, and a name for messages."""
    place, label = Place(allow_urls=allow_urls), _THE_DATASET
    if isinstance(source, Dataset | IterableDataset):
        loaded = _without_ours(source)
        if split is not None and str(loaded.split) != split:
            raise PreferenceDataError(f"unknown split '{split}': a loaded dataset has no other splits; leave it out")
    elif isinstance(source, dict):
        loaded = _without_ours(_pick(source, split, label))
    elif isinstance(source, str | os.PathLike):
        loaded, place, label = _open_path(os.fspath(source), split, streaming, on_bad_rows, allow_urls, roles)
    else:
        raise PreferenceDataError(
            f"expected a Hub id, a local file or folder, or a loaded dataset, found {type(source).__name__}"
        )
    if not isinstance(loaded, Dataset | IterableDataset):
        raise PreferenceDataError(f"{label}: expected a dataset, found {type(loaded).__name__}")
    if isinstance(loaded, Dataset):
        if loaded.format["type"] == "custom":
            raise PreferenceDataError(
                f"{label}: has a transform, which the checks would not see; apply it with dataset.map(...), or set it "
                "on what load_preference_pairs returns"
            )
        if len(loaded) == 0:
            raise PreferenceDataError(f"{label}: has no rows; expected at least one pair")
        loaded = _plain_types(loaded)
    if streaming and isinstance(loaded, Dataset):
        loaded = loaded.to_iterable_dataset()
    return loaded.with_format(None), place, label


def _open_path(
    source: str, split: str | None, streaming: bool, on_bad_rows: str, allow_urls: AllowUrls, roles: Roles
) -> tuple[Any, Place, str]:
    if not source.strip() or "\0" in source or is_address(source):
        raise PreferenceDataError(f"{short(source)}: expected a Hub id, or a local file or folder; download it first")
    try:
        path = Path(source)
        local = path.exists()
    except OSError as error:  # such as a name that is too long
        raise PreferenceDataError(f"{short(source)}: cannot be opened ({error.strerror})") from error
    label = path.name or source if local else source if len(source) < 200 else short(source)
    if local and not path.is_dir() and not path.is_file():
        raise PreferenceDataError(f"{label}: expected a regular file or a folder, found a device, FIFO or socket")
    try:
        return *_load(path, source, split, streaming, label, on_bad_rows, allow_urls, roles), label
    except PreferenceDataError:
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        raise PreferenceDataError(f"{label}: cannot be read ({one_line(error.__cause__ or error)})") from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        if local:
            raise PreferenceDataError(f"{label}: {one_line(error)}; expected a file or folder of pairs") from error
        raise PreferenceDataError(
            f"{label}: no such local file or folder, and no such dataset on the Hub that you can read; "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise PreferenceDataError(f"{label}: has no rows; expected at least one pair") from error
        if local or "split" in str(error).lower():  # the message of `datasets` lists the splits
            raise PreferenceDataError(f"{label}: {one_line(error)}") from error
        raise


def _load(
    path: Path,
    source: str,
    split: str | None,
    streaming: bool,
    label: str,
    on_bad_rows: str,
    allow_urls: AllowUrls,
    roles: Roles,
) -> tuple[Any, Place]:
    part = "train"
    place = Place.folder(path if path.is_dir() else path.parent, allow_urls)
    if path.is_dir():
        if is_session(path):
            return _slice(_read_session(path, label), split, part), place
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded: Any = datasets.load_from_disk(str(path))
            return _pick(loaded if isinstance(loaded, dict) else {split or "train": loaded}, split, label), place
        judged = judged_splits(path)
        if judged and not any(file.suffix.lower() in _SUFFIXES for file in path.iterdir()):
            part, folder = _pick_files(judged, split, label)
            return _slice(read_judged_folder(folder, label), split, part), replace(place, base=folder)
        tables = _tables_of(path)
        if tables:
            part, path = _pick_files(tables, split, label)
            place = replace(place, base=path.parent)
            if not path.is_file():
                raise PreferenceDataError(f"{label}: {path.name} is not a regular file")
            if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in place.roots or ()):
                raise PreferenceDataError(f"{label}: {path.name} is a link out of the folder; copy it there")
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise PreferenceDataError(f"{path.name}: expected one of {', '.join(_SUFFIXES)}, found '{path.suffix}'")
        if suffix in TABLES:  # small, and loading it gives its types; the others may hold the images themselves
            return _read_table(path, split, part, label, roles), replace(place, table=path.name)
        name, options = _SHARDS[suffix], {"data_files": str(path)}
    else:
        if not path.is_dir():
            if path.suffix in _SUFFIXES or path.is_absolute() or source.startswith("."):
                raise FileNotFoundError(source)
            place = Place.of_repo(source, allow_urls)
        name, options = str(path) if path.is_dir() else source, {}
    builder = datasets.load_dataset_builder(name, **options)
    if streaming:
        return _pick(open_shards(builder, split, label, on_bad_rows), split, label), place
    if is_webdataset(builder):
        part, files = _pick_files(builder.config.data_files, split, label)
        return _slice(load_archives(list(files), part), split, part), place
    return _without_ours(_pick(datasets.load_dataset(name, split=split, **options), split, label)), place


def _tables_of(folder: Path) -> dict[str, Path]:
    """Return the tables of a folder by split: `metadata` in it or in its folders, or else the only tables it has."""
    metadata = [file for file in sorted(folder.glob("metadata.*")) if file.suffix.lower() in _SUFFIXES]
    if metadata:
        return {"train": metadata[0]}
    metadata = [file for file in sorted(folder.glob("*/metadata.*")) if file.suffix.lower() in _SUFFIXES]
    if metadata:
        return {file.parent.name: file for file in reversed(metadata)}
    tables = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _SUFFIXES]
    tables = [file for file in tables if file.stem not in ("dataset_infos", "dataset_info")]
    if any(file.suffix.lower() in _SHARDS for file in tables):
        return {}
    if len(tables) == 1:
        return {"train" if tables[0].stem not in _SPLITS else tables[0].stem: tables[0]}
    return {file.stem: file for file in tables} if all(file.stem in _SPLITS for file in tables) else {}


def _read_table(path: Path, split: str | None, name: str, label: str, roles: Roles) -> Dataset:
    if not path.is_file():
        raise PreferenceDataError(f"{label}: {path.name} is not a regular file")
    try:
        table = read_table(path, roles)
    except ValueError as error:
        raise PreferenceDataError(f"{path.name}: cannot be read ({one_line(error)})") from error
    return _slice(with_judgements_of_folders(table), split, name)


def _read_session(folder: Path, label: str) -> Dataset:
    rows = rows_of_session(folder)
    if not rows:
        raise PreferenceDataError(f"{label}: is a session without a click that prefers an image; click first")
    return Dataset.from_list(rows)


def _pick(loaded: Any, split: str | None, label: str) -> Any:
    """Return the split of a dict of them, by its name; anything else as it is."""
    if not isinstance(loaded, dict):
        return loaded
    name = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if name not in loaded:
        problem = f"unknown split '{split}'" if split else "several splits and none called 'train'"
        raise PreferenceDataError(f"{label}: {problem}; pass split= one of {', '.join(map(str, loaded)) or '(none)'}")
    return loaded[name]


def _pick_files(files: dict[str, Any], split: str | None, label: str) -> tuple[str, Any]:
    """Return the name and the files of a split, which may be a slice of one."""
    name = re.split(r"[\[+]", split)[0] if split else None
    found = _pick(files, name, label)
    return next(name for name, value in files.items() if value is found), found


def _slice(dataset: Dataset, split: str | None, name: str) -> Dataset:
    """Cut rows as `datasets` does, such as those of `train[:100]`."""
    if split in (None, name) or len(dataset) == 0:
        return dataset
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(dataset)})
    return concatenate_datasets([dataset.select(range(*slice(p.from_, p.to).indices(len(dataset)))) for p in parts])


def _without_ours(dataset: Any) -> Any:
    """Leave out columns that are called like those that this library adds."""
    if not isinstance(dataset, Dataset):
        return dataset
    return dataset.remove_columns([name for name in dataset.column_names if name in NOTES])


def _plain_types(dataset: Dataset) -> Dataset:
    """Convert columns of views and large texts, as Polars has them, to the types that all else reads."""
    for name, feature in list(dataset.features.items()):
        plain = _plain(feature)
        if plain != feature:
            column = dataset.select_columns([name]).cast(Features({name: plain}))
            dataset = concatenate_datasets([dataset.remove_columns(name), column], axis=1)
    return dataset


def _plain(feature: Any) -> Any:
    if isinstance(feature, Value) and feature.dtype in ("string_view", "large_string"):
        return Value("string")
    if isinstance(feature, Value) and feature.dtype in ("binary_view", "large_binary"):
        return Value("binary")
    if isinstance(feature, dict):
        return type(feature)({name: _plain(part) for name, part in feature.items()})
    if isinstance(feature, datasets.List | datasets.LargeList):
        return datasets.List(_plain(feature.feature), length=getattr(feature, "length", -1))
    return feature


def features_of(dataset: Dataset | IterableDataset, label: str) -> Features:
    """Return the features, from the first row where a stream does not tell them."""
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise PreferenceDataError(f"{label}: has no rows; expected at least one pair")
        return dataset.features
    if dataset.features is not None:
        return dataset.features
    first = next(iter(dataset), None)
    if first is None:
        raise PreferenceDataError(f"{label}: has no rows; expected at least one pair")
    return Dataset.from_list([first]).features
