"""Folders that judge the images in them: `liked` and `disliked`, or `1` to `5` stars."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image as PILImage

from bt_hf.data.formats import PROMPTS, PreferenceDataError, find_layout, roles
from bt_hf.data.images import one_line, short
from bt_hf.data.rows import AnyDataset
from bt_hf.data.tables import TABLES, read_table

logger = logging.getLogger(__name__)

_LIKED = {"liked": True, "like": True, "likes": True, "good": True, "disliked": False, "dislike": False}
_LIKED |= {"dislikes": False, "bad": False}
_STARS = re.compile(r"([1-5])(?:[ _-]?stars?)?")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def judged_splits(folder: Path) -> dict[str, Path]:
    """Return the folders whose own folders judge images, by split: this one, or `train` and so on in it."""
    if _judgements(folder):
        return {"train": folder}
    return {one.name: one for one in _folders(folder) if one.name in _SPLITS and _judgements(one)}


def read_judged_folder(folder: Path, label: str) -> Dataset:
    """List the images of folders that judge them, with their prompts where these are known.

    A prompt is that of `metadata.csv` (`.jsonl`, ...) in such a folder, with `file_name` and `prompt`, `caption` or
    `text`, or the text of the file `x.txt` beside `x.png`.

    Args:
        folder: A folder that `judged_splits` found.
        label: Name of the data in messages.

    Returns:
        Rows with `file_name` from `folder` on, `liked` or `stars`, and `prompt` if any image has one; those of one
        prompt are neighbours.

    Raises:
        PreferenceDataError: A table or a text cannot be read, or there is no image.
    """
    judged = _judgements(folder)
    left_out = [one.name for one in _folders(folder) if one not in judged]
    if left_out:
        logger.warning("%s: not read: %s, which %s", label, ", ".join(map(short, left_out)), "judge no image")
    rows = []
    for part, (column, value) in judged.items():
        for name, prompt in _images(part).items():
            rows.append({"file_name": f"{part.name}/{name}", column: value, "prompt": prompt})
    if not rows:
        raise PreferenceDataError(f"{label}: no images in {', '.join(one.name for one in judged)}")
    rows.sort(key=lambda row: (row["prompt"] or "", row["file_name"]))
    if not any(row["prompt"] for row in rows):
        rows = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
    return Dataset(pa.Table.from_pylist(rows))


def with_judgements_of_folders(table: Dataset) -> Dataset:
    """Add `liked` or `stars` to a table of images without a judgement, where the folder of each tells it.

    Example:
        >>> rows = Dataset.from_dict({"file_name": ["liked/a.png", "disliked/b.png"], "text": ["a cat", "a cat"]})
        >>> with_judgements_of_folders(rows)["liked"][:]
        [True, False]
    """
    names = table.column_names
    if "file_name" not in names or find_layout([*names, "prompt"], lambda name, kind: False) is not None:
        return table
    found = [_judgement(PurePosixPath(str(name)).parent.name) for name in table["file_name"]]
    columns = {one[0] for one in found if one}
    if len(columns) != 1 or None in found:
        return table
    (column,) = columns
    kind = Value("bool" if column == "liked" else "int64")
    return table.add_column(column, [one and one[1] for one in found], feature=kind)


def with_judgements_of_labels(dataset: AnyDataset) -> AnyDataset:
    """Add `liked` or `stars` to images with a `label` whose names are those of judged folders, as `imagefolder` has.

    Example:
        >>> label = ClassLabel(names=["disliked", "liked"])
        >>> features = Features({"image": Value("string"), "label": label})
        >>> rows = Dataset.from_dict({"image": ["a.png", "b.png"], "label": [1, 0]}, features=features)
        >>> with_judgements_of_labels(rows)["liked"][:]
        [True, False]
    """
    features: Features = dataset.features or Features()
    label = features.get("label")
    if not isinstance(label, ClassLabel) or find_layout([*features, "prompt"], lambda name, kind: False) is not None:
        return dataset
    judged = [_judgement(name) for name in label.names]
    columns = {one[0] for one in judged if one}
    if len(columns) != 1 or None in judged:
        return dataset
    (column,) = columns
    kind = Value("bool" if column == "liked" else "int64")
    values = [one[1] for one in judged if one]
    if isinstance(dataset, Dataset):
        judged_rows = [_of_label(one, column, values)[column] for one in dataset["label"]]
        return dataset.add_column(column, judged_rows, feature=kind)
    return dataset.map(
        _of_label,
        input_columns="label",
        fn_kwargs={"column": column, "values": values},
        features=Features({**features, column: kind}),
    )


def _of_label(label: int | None, column: str, values: list[bool | int]) -> dict[str, bool | int | None]:
    return {column: values[label] if label is not None and 0 <= label < len(values) else None}


def _judgement(name: str) -> tuple[str, bool | int] | None:
    word = name.strip().lower()
    if word in _LIKED:
        return "liked", _LIKED[word]
    stars = _STARS.fullmatch(word)
    return ("stars", int(stars[1])) if stars else None


def _folders(folder: Path) -> Iterator[Path]:
    return (one for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith((".", "__")))


def _judgements(folder: Path) -> Mapping[Path, tuple[str, bool | int]]:
    """Return the folders that judge images, with what they say: likes, or stars if there is no other folder."""
    folders = list(_folders(folder))
    found = {one: judged for one in folders if (judged := _judgement(one.name))}
    likes = {one: judged for one, judged in found.items() if judged[0] == "liked"}
    stars = found if not likes and len(found) == len(folders) > 1 else {}
    return likes or stars


def _images(folder: Path) -> dict[str, str | None]:
    """Return the images below a folder, by their paths in it, with their prompts."""
    images: dict[str, str | None] = {}
    for table in (file for file in sorted(folder.glob("metadata.*")) if file.suffix.lower() in TABLES):
        images |= _captions(table)
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = Path(place, file)
            if file.startswith(".") or path.suffix.lower() not in PILImage.registered_extensions():
                continue
            name = path.relative_to(folder).as_posix()
            images[name] = images.get(name) or _caption(path.with_suffix(".txt"))
    return images


def _captions(table: Path) -> dict[str, str | None]:
    name = f"{table.parent.name}/{table.name}"
    try:
        rows = read_table(table, roles)
    except ValueError as error:
        raise PreferenceDataError(f"{name}: cannot be read ({one_line(error)})") from error
    prompt = next((column for column in PROMPTS if column in rows.column_names), None)
    if prompt is None or "file_name" not in rows.column_names:
        raise PreferenceDataError(
            f"{name}: expected the columns file_name and prompt, found {', '.join(rows.column_names)}"
        )
    pairs = zip(rows["file_name"], rows[prompt], strict=True)
    return {str(file): text if isinstance(text, str) else None for file, text in pairs}


def _caption(file: Path) -> str | None:
    if not file.is_file() or file.is_symlink():
        return None
    try:
        return file.read_text(encoding="utf-8-sig").strip() or None
    except UnicodeDecodeError as error:
        raise PreferenceDataError(f"{file.parent.name}/{file.name}: is not text in UTF-8") from error
