"""On-disk cache of encoder outputs, one entry per distinct image or prompt."""

import copy
import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets
from datasets import config as datasets_config
from filelock import FileLock, Timeout

from bt_hf.data.fingerprint import digest, number_of
from bt_hf.data.verified import is_whole, move_into_place

logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: "float32", torch.float16: "float16"}
FORMAT = 3  # raised with every change to what the files hold, so that no other version reads them
_BATCH = 100  # rows whose images are read at a time, for their digests
SHARD = 1024  # images or prompts in a file, all that a killed build loses
Encoded = dict[str, torch.Tensor]
_Encode = Callable[[dict[str, list[Any]]], Encoded]
_Read = Callable[[list[str]], list[bytes]]


class CachedPairs(torch.utils.data.Dataset, ABC):
    """Pairs whose images and prompts have been encoded: a row holds keys, which `collate` looks up.

    Args:
        rows: Rows of the contract with keys instead of images.
    """

    def __init__(self, rows: Dataset | list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if isinstance(self.rows, list):
            return [self.rows[index] for index in indices]
        columns = self.rows[indices]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @abstractmethod
    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Turn rows into a batch."""

    def select(self, indices: list[int]) -> Self:
        """Return some of the pairs, on the same cache."""
        chosen = copy.copy(self)
        rows = self.rows
        chosen.rows = [rows[index] for index in indices] if isinstance(rows, list) else rows.select(indices)
        return chosen


def without_format(pairs: Any) -> Any:
    """Return a dataset as it is stored: `with_format` changes how values look. A `with_transform` stays."""
    if isinstance(pairs, IterableDataset) or (isinstance(pairs, Dataset) and not _has_transform(pairs)):
        return pairs.with_format(None)
    return pairs


def can_be_cached(pairs: Any) -> bool:
    """True for a dataset whose rows stay the same; warns of a `with_transform`, which may draw others each time."""
    if not isinstance(pairs, Dataset):
        return False
    if _has_transform(pairs):
        logger.warning(
            "The dataset has a transform (`with_transform`), which may change its rows at every epoch: they are "
            "encoded at every step, without a cache. Use `map` instead for what stays the same."
        )
        return False
    return True


def _has_transform(pairs: Dataset) -> bool:
    return pairs.format["type"] == "custom"


def encode_once(
    pairs: Dataset,
    columns: Sequence[str],
    encode_images: Callable[[list[Any], list[str]], Encoded],
    encode_prompts: Callable[[list[str]], Encoded],
    model: str,
    cache_dir: str | None,
    description: str,
    tokens_of: _Read | None = None,
) -> tuple[Dataset, Dataset, Dataset]:
    """Encode the distinct images and prompts of `pairs`, or find what an earlier run has encoded.

    The files are named by what they were computed from: the bytes of the images, the prompts, and `model`. Each holds
    `SHARD` images or prompts. It is written elsewhere, synced and moved into place, so that a build that was killed or
    failed leaves whole files alone, from which the next one goes on. A file that is not what was written, by its
    digest, is encoded anew. Processes that see the same disk share the work. Memory does not grow with the data but
    for some 200 bytes a row.

    Args:
        pairs: Rows with `prompt` and images.
        columns: The columns that hold images; none for prompts alone.
        encode_images: Images and what to call them in errors -> tensors (N, ...), of the same shapes for all images.
        encode_prompts: Prompts -> tensors (N, ...), of the same shapes for all prompts.
        model: A digest of all that the results depend on besides images and prompts.
        cache_dir: Folder of the files; default: `bt_hf` in the cache of `datasets`.
        description: What the progress bars say.
        tokens_of: Prompts -> what the model reads of each; prompts of the same tokens are encoded once. Default: the
            prompts themselves.

    Returns:
        Rows with numbers instead of images, and `condition`, the number of the prompt; what the numbers of the images
        mean; what `condition` means. `read_tensors` reads the latter two.

    Raises:
        OSError: The disk is full, or not writable.
        ValueError: `pairs` has a transform.
    """
    if _has_transform(pairs):
        raise ValueError("Rows of a dataset with a transform can't be cached: see `can_be_cached`.")
    pairs = without_format(pairs)
    root = Path(cache_dir) if cache_dir else Path(datasets_config.HF_DATASETS_CACHE) / "bt_hf"
    root.mkdir(parents=True, exist_ok=True)
    with _room_on_disk(root, len(pairs)):
        digests = _digests(pairs, columns, root, description)
    cells = [digests[name] for name in columns]
    contents = np.stack(cells, axis=1).ravel() if cells else np.empty(0, dtype=np.int64)
    first_image, image_numbers = _distinct(contents)
    first_text, text_numbers = _distinct(digests["prompt"])
    texts = digests["prompt"][first_text]
    tokens = texts if tokens_of is None else _read_tokens(pairs, first_text, tokens_of)
    first_tokens, token_numbers = _distinct(tokens)
    first_prompt, prompt_numbers = first_text[first_tokens], token_numbers[text_numbers]
    single = {name: pairs.select_columns([name]) for name in (*columns, "prompt")}  # one is read without the others
    single |= {name: single[name].cast_column(name, Image(decode=False)) for name in columns}  # `to_rgb` opens them

    def images_of(batch: dict[str, list[Any]]) -> Encoded:
        places = [(columns[number % len(columns)], number // len(columns)) for number in batch["first"]]
        return encode_images(
            [single[name][row][name] for name, row in places], [f"`{name}` of row {row}" for name, row in places]
        )

    def prompts_of(batch: dict[str, list[Any]]) -> Encoded:
        return encode_prompts([single["prompt"][row]["prompt"] for row in batch["first"]])

    images = _encoded(root, "images", model, contents[first_image], first_image, images_of, description)
    prompts = _encoded(root, "prompts", model, tokens[first_tokens], first_prompt, prompts_of, description)
    rows = pairs.select_columns(
        ["prompt", *(name for name in ("preference", "weight", "label") if name in pairs.column_names)]
    )
    for side, name in enumerate(columns):
        rows = rows.add_column(name, image_numbers[side :: len(columns)])
    return rows.add_column("condition", prompt_numbers), images, prompts


def read_tensors(dataset: Dataset, indices: list[int]) -> dict[str, torch.Tensor]:
    """Read rows of an `encode_once` dataset as tensors, floating ones as float32: one copy out of the mapped file."""
    table = dataset[indices]
    values = {}
    for name, feature in dataset.features.items():
        column, shape = table[name].combine_chunks(), [len(indices)]
        while isinstance(feature, List):
            shape.append(feature.length)
            column, feature = column.flatten(), feature.feature
        value = torch.from_numpy(column.to_numpy(zero_copy_only=False).reshape(shape).copy())
        values[name] = value.float() if value.is_floating_point() else value
    return values


def _digests(pairs: Dataset, columns: Sequence[str], root: Path, description: str) -> dict[str, np.ndarray]:
    """Return a number (N,) int64 for the content of each cell; `datasets` keeps them for data on the disk."""
    raw = pairs.select_columns([*columns, "prompt"])
    for name in columns:
        raw = raw.cast_column(name, Image(decode=False))
    # Files that rows only point to may be other ones by now, which the fingerprint of the rows doesn't tell.
    whole = all(
        chunk.field("bytes").null_count == 0 for name in columns for chunk in raw.data.column(name).iterchunks()
    )
    keeps = whole and bool(raw.cache_files)
    if not keeps:
        batches = [_digest_batch(batch) for batch in raw.iter(_BATCH)]
        return {name: np.concatenate([batch[name].numpy() for batch in batches]) for name in raw.column_names}
    path = root / digest(str(FORMAT), raw._fingerprint, *raw.column_names) / "digests.arrow"
    _build(path, raw, _digest_batch, f"{description}: digests", wait=True, batch_size=_BATCH)
    table = Dataset.from_file(str(path)).with_format("arrow")[:]
    return {name: table[name].to_numpy() for name in raw.column_names}


def _digest_batch(batch: dict[str, list[Any]]) -> Encoded:
    return {
        name: torch.tensor([number_of(value.encode() if name == "prompt" else _content(value)) for value in values])
        for name, values in batch.items()
    }


def _read_tokens(pairs: Dataset, rows: np.ndarray, tokens_of: _Read) -> np.ndarray:
    """Return a number (K,) int64 for the tokens of the prompt in each of some rows, 1,000 prompts at a time."""
    prompts = pairs.select_columns(["prompt"])
    numbers = []
    for start in range(0, len(rows), 1000):
        numbers += [number_of(tokens) for tokens in tokens_of(prompts[rows[start : start + 1000]]["prompt"])]
    return np.array(numbers, dtype=np.int64)


def _content(image: Mapping[str, Any] | None) -> bytes:
    content = (image or {}).get("bytes")
    if content is None and (path := (image or {}).get("path")) and Path(path).is_file():
        content = Path(path).read_bytes()
    # Without content `to_rgb` tells what is wrong, when the image is encoded.
    return content if content is not None else repr(image).encode()


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first place of each distinct value (K,), in that order, and the number of each value (N,) in it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = first.argsort()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def _encoded(
    root: Path, kind: str, model: str, contents: np.ndarray, first: np.ndarray, encode: _Encode, description: str
) -> Dataset:
    """Encode the rows `first`, or open the files named by their `contents`; memory-mapped, in the same order."""
    if not len(first):
        return Dataset.from_dict({})
    shards = []
    for start in range(0, len(first), SHARD):
        part = slice(start, start + SHARD)
        path = root / digest(str(FORMAT), model, contents[part].tobytes()) / f"{kind}.arrow"
        count = f" {start // SHARD + 1} of {-(-len(first) // SHARD)}" if len(first) > SHARD else ""
        shards.append((path, Dataset.from_dict({"first": first[part]}), encode, f"{description}: {kind}{count}"))
    missing = shards
    for wait in (False, True):  # at first only for what no other process is at
        with _room_on_disk(root, len(first)):
            missing = [shard for shard in missing if not _build(*shard, wait=wait)]
    return concatenate_datasets([Dataset.from_file(str(path)) for path, *_ in shards]).with_format("arrow")


def _build(path: Path, items: Dataset, encode: _Encode, description: str, wait: bool, batch_size: int = 8) -> bool:
    """Encode `items` into the file `path`, unless it is whole. False if another process is at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with FileLock(path.with_suffix(".lock"), timeout=-1 if wait else 0):
            if is_whole(path):
                return True
            try:
                first = _flat(encode(items[:1]))
                items.map(
                    lambda batch: _flat(encode(batch)),
                    batched=True,
                    batch_size=batch_size,
                    remove_columns=items.column_names,
                    features=Features({name: _feature(value) for name, value in first.items()}),
                    cache_file_name=str(part),
                    load_from_cache_file=False,
                    new_fingerprint=path.parent.name,
                    writer_batch_size=64,
                    desc=description,
                )
                move_into_place(part, path)
            finally:
                # A failed or killed build leaves half a file. The lock stays, and so does its folder: another process
                # may be waiting for it.
                for left_over in (*path.parent.glob("tmp*"), *path.parent.glob("*.part")):
                    left_over.unlink()
            return True
    except Timeout:
        return False


@contextmanager
def _room_on_disk(folder: Path, rows: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"no space left to cache {rows} rows: free some, and the next run goes on from the files that are "
                "complete; or name another `cache_dir`, or turn the cache off",
                str(folder),
            ) from error
        raise


def _flat(values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    # Arrow has no bfloat16; latents and embeddings of such models are kept in float32.
    return {
        name: (value if value.dtype in _DTYPES or not value.is_floating_point() else value.float()).cpu().numpy()
        for name, value in values.items()
    }


def _feature(array: Any) -> Any:
    """Describe one row as nested lists of fixed lengths, from which `read_tensors` takes the shape."""
    feature: Any = Value(str(array.dtype))
    for length in reversed(array.shape[1:]):
        feature = List(feature, length=length)
    return feature
