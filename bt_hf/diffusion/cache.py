"""Encode once: latents of each distinct image and embeddings of each distinct prompt, in memory-mapped files."""

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from datasets import config as datasets_config
from filelock import FileLock

from bt_hf.diffusion.collator import image_columns, labels, row_numbers
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.fingerprint import digest

_DTYPES = {torch.float32: "float32", torch.float16: "float16"}


class CachedPairs(torch.utils.data.Dataset):
    """Rows whose latents and embeddings lie in memory-mapped files; a row has numbers instead of images.

    Attributes:
        reference: (N, draws, 2 or 1) float32 errors of the base at fixed draws, once they are computed: see
            `PreferenceLoRATrainer`.
    """

    def __init__(self, rows: list[dict[str, Any]], images: Dataset, prompts: Dataset) -> None:
        self.rows = rows
        self.images = images
        self.prompts = prompts
        self.reference: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": index}

    def collate(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows to a batch: as `PairEncoder.encode` gives it, and `reference` if there is one."""
        sides = range(len(rows[0]["images"]))
        read = _read(self.images, [row["images"][side] for side in sides for row in rows])
        digests = read.pop("digest").view(len(sides), -1)
        conditions = _read(self.prompts, [row["prompt"] for row in rows])
        batch: dict[str, Any] = {**read, **{f"condition_{name}": value for name, value in conditions.items()}}
        batch["prompt"] = [row["text"] for row in rows]  # for messages
        batch["row"] = row_numbers(batch["prompt"], digests)
        if self.reference is not None:
            batch["reference"] = self.reference[[row["index"] for row in rows]]  # (B, draws, sides)
        return {**batch, **labels(rows)}


def cache_pairs(pairs: Dataset, encoder: PairEncoder, cache_dir: str | None, description: str) -> CachedPairs:
    """Encode the distinct images and prompts of `pairs`, or find what an earlier run has encoded.

    The files are named by what they were computed from: the bytes of the images, the prompts, the weights of the
    encoders and the options of `encoder`. They are written elsewhere and moved into place, so that a build that was
    killed leaves none; a build that failed is taken away.

    Args:
        pairs: Rows of the contract, or unpaired ones.
        encoder: Encodes them.
        cache_dir: Folder of the files; default: `bt_hf` in the cache of `datasets`.
        description: What the progress bars say.

    Raises:
        OSError: The disk is full, or not writable.
        ValueError: An image is unreadable or smaller than what one latent pixel covers.
    """
    columns = image_columns(pairs.column_names)
    raw = pairs.select_columns(list(columns))
    for name in columns:
        raw = raw.cast_column(name, Image(decode=False))
    positions: dict[str, tuple[int, str]] = {}  # by content: where an image is first seen
    digests = [[_digest_of_image(row[name]) for name in columns] for row in raw]
    for index, row in enumerate(digests):
        for name, content in zip(columns, row, strict=True):
            positions.setdefault(content, (index, name))
    texts = list(dict.fromkeys(pairs["prompt"]))
    root = Path(cache_dir) if cache_dir else Path(datasets_config.HF_DATASETS_CACHE) / "bt_hf"
    model = encoder.fingerprint()

    def encode_images(batch: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        return encoder.encode_images(
            [pairs[index][name] for index, name in zip(batch["row"], batch["column"], strict=True)],
            [f"`{name}` of row {index}" for index, name in zip(batch["row"], batch["column"], strict=True)],
        )

    rows, names = zip(*positions.values(), strict=True)
    images = _build(
        root / digest(model, *positions) / "images.arrow",
        Dataset.from_dict({"row": rows, "column": names}),
        encode_images,
        f"{description}: images",
    )
    prompts = _build(
        root / digest(model, *texts) / "prompts.arrow",
        Dataset.from_dict({"prompt": texts}),
        lambda batch: encoder.encode_prompts(batch["prompt"]),
        f"{description}: prompts",
    )
    image_index = {content: index for index, content in enumerate(positions)}
    text_index = {text: index for index, text in enumerate(texts)}
    others = [name for name in ("preference", "weight", "label") if name in pairs.column_names]
    rows_of_labels = pairs.select_columns([*others, "prompt"])
    return CachedPairs(
        [
            {
                "images": tuple(image_index[content] for content in row),
                "prompt": text_index[values["prompt"]],
                "text": values["prompt"],
                **{name: values[name] for name in others},
            }
            for row, values in zip(digests, rows_of_labels, strict=True)
        ],
        images,
        prompts,
    )


def _build(
    path: Path, items: Dataset, encode: Callable[[dict[str, list[Any]]], dict[str, torch.Tensor]], description: str
) -> Dataset:
    """The rows that `encode` makes of `items`, memory-mapped from `path`, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes on one disk, the first builds and the others find.
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            for left_over in path.parent.glob("tmp*"):  # of a build that was killed
                left_over.unlink()
            try:
                first = _flat(encode(items[:1]))
                items.map(
                    lambda batch: _flat(encode(batch)),
                    batched=True,
                    batch_size=8,
                    remove_columns=items.column_names,
                    features=Features({name: _feature(value) for name, value in first.items()}),
                    cache_file_name=str(path),
                    new_fingerprint=path.parent.name,
                    writer_batch_size=64,
                    desc=description,
                )
            except BaseException as error:
                shutil.rmtree(path.parent, ignore_errors=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(
                        error.errno,
                        f"no space left to cache {len(items)} rows: free some, name another `cache_dir`, or pass "
                        "`cache_latents=False` to encode at every step",
                        str(path.parent),
                    ) from error
                raise
        return Dataset.from_file(str(path)).with_format("arrow")


def _flat(values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    # Arrow has no bfloat16; latents and embeddings of such models are kept in float32.
    return {
        name: (value if value.dtype in _DTYPES or not value.is_floating_point() else value.float()).cpu().numpy()
        for name, value in values.items()
    }


def _feature(array: Any) -> Any:
    """The feature of one row: nested lists of fixed lengths, from which `_read` knows the shape."""
    feature: Any = Value(str(array.dtype))
    for length in reversed(array.shape[1:]):
        feature = List(feature, length=length)
    return feature


def _read(dataset: Dataset, indices: list[int]) -> dict[str, torch.Tensor]:
    """Some rows as tensors, floating ones as float32: one copy out of the mapped file."""
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


def _digest_of_image(image: Mapping[str, Any] | None) -> str:
    content = (image or {}).get("bytes")
    if content is None and (path := (image or {}).get("path")) and Path(path).is_file():
        content = Path(path).read_bytes()
    # Without content `to_rgb` tells what is wrong, when the image is encoded.
    return digest(content if content is not None else repr(image))
