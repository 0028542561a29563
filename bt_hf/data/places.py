"""Place of a dataset: the folder that its images stay in, and addresses that they may be read from."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import PIL.Image
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, Value, concatenate_datasets, config
from datasets.fingerprint import get_temporary_cache_files_directory
from huggingface_hub import constants

from bt_hf.data.images import embedded_bytes, is_address, short
from bt_hf.data.urls import MAX_BYTES, AllowUrls, fetch

IMAGE = Image(decode=False)  # images travel as {"bytes", "path"} and are decoded one pair at a time
PROBLEM = "_bt_hf_problem"  # column of what is wrong with a row
_HUB_ADDRESS = re.compile(r"(?:zip://[^:]*::)?hf://datasets/([^@/]+/[^@/]+|[^@/]+)(?:@[^/:]+)?/[^:]*")
_LOCAL_ARCHIVE = re.compile(r"zip://([^:]*)::([^:]+)")


@dataclass(frozen=True)
class Place:
    """Where the images of a dataset may come from.

    Attributes:
        base: Folder that relative paths start from; `None` is the working directory.
        roots: Folders that paths have to stay in, with all links resolved; `None` allows every regular file, for rows
            that the caller has made.
        table: The name of the CSV or JSON file that the rows were read from.
        repo: Hub id of the dataset, whose own files a stream names by addresses.
        allow_urls: `True` fetches `http(s)` URLs from public servers, "private" from any.
    """

    base: Path | None = None
    roots: tuple[str, ...] | None = None
    table: str | None = None
    repo: str | None = None
    allow_urls: AllowUrls = False

    @staticmethod
    def folder(path: Path, allow_urls: AllowUrls) -> Place:
        """Return the place of a local folder, and of archives in it that `datasets` has unpacked."""
        real = os.path.realpath(path)
        roots = [real, os.path.realpath(config.EXTRACTED_DATASETS_PATH)]
        if os.path.basename(os.path.dirname(real)) == "snapshots":  # the Hub's cache links them to `blobs`
            roots.append(os.path.join(os.path.dirname(os.path.dirname(real)), "blobs"))
        return Place(path, tuple(roots), allow_urls=allow_urls)

    @staticmethod
    def of_repo(repo: str, allow_urls: AllowUrls) -> Place:
        """Return the place of a dataset of the Hub: its own folder in the cache, and what was unpacked."""
        cached = os.path.join(constants.HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}")
        folders = (cached, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
        return Place(None, tuple(map(os.path.realpath, folders)), None, repo, allow_urls)

    def encode(self, value: Any) -> dict[str, Any] | None:
        """Return any image value as {"bytes", "path"}, fetched if it is a URL; a path is in its place.

        Raises:
            ValueError: `reason: detail` of a path outside the place, an address that may not be read, or one that has
                no image.
            UnreachableError: A server that does not answer.
        """
        path = value
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            if isinstance(content, str):  # JSON has no bytes
                content = embedded_bytes(content) or content.encode()
            if content is not None:
                # Without the path: `datasets` would prefer a file of that name.
                return {"bytes": content, "path": None}
        if path is None:
            return None
        if not isinstance(path, str | os.PathLike):
            if isinstance(value, bytes | np.ndarray | PIL.Image.Image):
                return Image().encode_example(value)
            raise ValueError(f"unreadable image: expected an image, bytes or a path, found {short(path)}")
        path = os.fspath(path)
        if not path:
            return None
        content = embedded_bytes(path)
        if content is None and is_address(path):
            content = self._read_address(path)
        return {"bytes": content, "path": None if content is not None else self._local(path)}

    def _local(self, path: str) -> str:
        joined = os.path.join(self.base, path) if self.base else path
        if self.roots is not None:
            try:
                real = Path(os.path.realpath(joined))
            except ValueError as error:  # a null byte, or what is not Unicode
                raise ValueError(f"unreadable image: {short(path)} is not a path") from error
            if not any(real.is_relative_to(root) for root in self.roots):
                raise ValueError(
                    f"image outside the folder: {short(path)} is not in {short(str(self.base or self.repo))}; move it "
                    "there, or load the rows yourself and pass the dataset"
                )
        return joined

    def _read_address(self, path: str) -> bytes:
        hub, archive = _HUB_ADDRESS.fullmatch(path), _LOCAL_ARCHIVE.fullmatch(path)
        own = hub is not None and hub[1] == self.repo and ".." not in path
        if archive is not None and not own:  # in a stream of a local folder
            path = f"zip://{archive[1]}::{self._local(archive[2])}"
            own = self.roots is not None and not is_address(archive[2]) and os.path.isfile(self._local(archive[2]))
        if own:
            import fsspec

            with fsspec.open(path, "rb") as file:
                content: bytes = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"image too large: {short(path)} has more than {MAX_BYTES // 2**20} MiB")
            return content
        if not path.lower().startswith(("http://", "https://")) or "::" in path:
            way_out = "; pass the Hub id of the dataset itself" if "hf://" in path else ""
            raise ValueError(f"image at an address: {short(path)} is neither a local path nor an http(s) URL{way_out}")
        if not self.allow_urls:
            raise ValueError(
                f"image at an address: {short(path)} would be fetched from elsewhere; pass allow_urls=True if it may"
            )
        return fetch(path, self.allow_urls)


def store_images(dataset: Dataset, names: Sequence[str], place: Place, num_proc: int | None) -> Dataset:
    """Turn columns into `IMAGE`, and add a column of problems; bytes are not copied where all rows hold them."""
    moving = []
    noted = [PROBLEM] if PROBLEM in dataset.column_names else []
    for name in names:
        feature = dataset.features[name]
        if isinstance(feature, Image) or feature == Value("binary") or feature == Value("null"):
            dataset = dataset.cast_column(name, IMAGE)
        if dataset.features[name] != IMAGE or not _whole(dataset, name):
            moving.append(name)
    if not moving:
        return dataset
    found = dataset.select_columns([*moving, *noted]).map(
        _encode_batch,
        batched=True,
        batch_size=16,
        writer_batch_size=64,
        features=Features(dict.fromkeys(moving, IMAGE) | {PROBLEM: Value("string")}),
        fn_kwargs={"names": moving, "place": place},
        cache_file_name=scratch_file(dataset),
        load_from_cache_file=False,  # files, links and servers may have changed since
        num_proc=num_proc,
        desc="Finding images",
    )
    return concatenate_datasets([dataset.remove_columns([*moving, *noted]), found], axis=1)


def scratch_file(dataset: Dataset) -> str | None:
    """Return a file for what is made of a dataset in memory, deleted at exit; of one on disk `datasets` knows one."""
    if dataset.cache_files:
        return None
    return os.path.join(get_temporary_cache_files_directory(), f"pairs-{uuid4().hex}.arrow")


def _whole(dataset: Dataset, name: str) -> bool:
    """True if no row of an `IMAGE` column depends on a path."""
    table = dataset.select_columns([name]).with_format("arrow")
    return all(
        not pc.any(pc.and_(chunk.field("bytes").is_null(), chunk.field("path").is_valid())).as_py()
        for batch in table.iter(10_000)
        for chunk in batch[name].iterchunks()
    )


def _encode_batch(batch: dict[str, list], names: Sequence[str], place: Place) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in (*names, PROBLEM)}
    earlier = batch.get(PROBLEM) or [None] * len(batch[names[0]])
    for problem, *values in zip(earlier, *(batch[name] for name in names), strict=True):
        for name, value in zip(names, values, strict=True):
            encoded, found = encode_or_problem(value, name, place)
            columns[name].append(encoded)
            problem = problem or found
        columns[PROBLEM].append(problem)
    return columns


def encode_or_problem(value: Any, name: str, place: Place) -> tuple[dict[str, Any] | None, str | None]:
    """Return what `Place.encode` does and no problem, or `None` and `reason: column detail`."""
    try:
        return place.encode(value), None
    except ValueError as error:
        reason, _, detail = str(error).partition(": ")
        return None, f"{reason}: {name} {detail}"
