"""Open what `bt_hf.data.pairs` is given: a Hub id, a local file or folder, or a loaded dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, IterableDataset

from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.streaming import open_shards, plain_names

_READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}


def open_dataset(
    source: Any, split: str | None, streaming: bool, on_bad_rows: str = "raise"
) -> tuple[Dataset | IterableDataset, Path | None, str]:
    """Return the dataset, the folder that relative image paths start from, and a name for messages."""
    if isinstance(source, Dataset | IterableDataset):
        loaded, folder, label = source, None, "the dataset"
        if split is not None and str(loaded.split) != split:
            raise PreferenceDataError(f"unknown split '{split}': a loaded dataset has no other splits; leave it out")
    elif isinstance(source, dict):
        loaded, folder, label = source, None, "the dataset"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        label = path.name if path.exists() else str(source)
        folder = path if path.is_dir() else path.parent if path.is_file() else None
        try:
            loaded = _load(path, str(source), split, streaming, label, on_bad_rows)
        except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
            raise PreferenceDataError(
                f"{source}: no such local file or folder, and no such dataset on the Hub that you can read; "
                "check the spelling, or log in with `hf auth login` if it is private"
            ) from error
        except datasets.exceptions.DatasetGenerationError as error:
            raise PreferenceDataError(f"{label}: cannot be read ({_one_line(error.__cause__ or error)})") from error
        except PreferenceDataError:
            raise
        except ValueError as error:
            if "corresponds to no data" in str(error):
                raise PreferenceDataError(f"{label}: has no rows; expected at least one pair") from error
            if "split" in str(error).lower():  # the message of `datasets` lists the splits
                raise PreferenceDataError(f"{label}: {_one_line(error)}") from error
            raise
    else:
        raise PreferenceDataError(
            f"expected a Hub id, a local file or folder, or a loaded dataset, found {type(source).__name__}"
        )
    if isinstance(loaded, dict):
        name = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
        if name not in loaded:
            problem = f"unknown split '{split}'" if split else "several splits and none called 'train'"
            raise PreferenceDataError(f"{label}: {problem}; pass split= one of {', '.join(loaded) or '(none)'}")
        loaded = loaded[name]
    if isinstance(loaded, Dataset) and len(loaded) == 0:
        raise PreferenceDataError(f"{label}: has no rows; expected at least one pair")
    if isinstance(loaded, Dataset):
        loaded = plain_names(loaded)
    if streaming and isinstance(loaded, Dataset):
        loaded = loaded.to_iterable_dataset()
    return loaded.with_format(None), folder, label


def _load(path: Path, source: str, split: str | None, streaming: bool, label: str, on_bad_rows: str) -> Any:
    def load(name: str, streaming: bool = streaming, **options: Any) -> Any:
        if not streaming:
            return datasets.load_dataset(name, split=split, **options)
        return open_shards(datasets.load_dataset_builder(name, **options), split, label, on_bad_rows)

    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
            return loaded if isinstance(loaded, dict) else {split or "train": loaded}
        metadata = next((file for file in sorted(path.glob("metadata.*")) if file.suffix in _READERS), None)
        if metadata is None:
            return load(str(path))
        path = metadata
    if path.is_file():
        if path.suffix not in _READERS:
            raise PreferenceDataError(f"{path.name}: expected one of {', '.join(_READERS)}, found '{path.suffix}'")
        options: dict[str, Any] = {}
        if _READERS[path.suffix] == "csv":  # a prompt such as "null" or "NA" is a prompt; only an empty cell is empty
            options = {"keep_default_na": False, "na_values": [""], "sep": "\t" if path.suffix == ".tsv" else ","}
        # A table of text is small, and loading it gives its types; the others may hold the images themselves.
        streaming = streaming and path.suffix in (".parquet", ".tar")
        return load(_READERS[path.suffix], streaming, data_files=str(path), **options)
    if path.suffix in _READERS or path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(source)
    return load(source)


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
