"""Lists of prompts and images from whatever a caller passes; a lone value is named instead of taken apart."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from bt_hf.data.images import to_rgb

_CHANNELS = (1, 2, 3, 4)


def list_texts(texts: Any, argument: str) -> list[str]:
    """Return the texts of `argument` as a list.

    Raises:
        TypeError: It is a lone value, or one of its items isn't a text.
        ValueError: A text has half a surrogate pair, as undecodable bytes of a command line give.
    """
    if isinstance(texts, str | bytes | bytearray | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"`{argument}` should be a list of texts, but got {_brief(texts)}: put it into a list.")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`{argument}` should hold texts, but item {index} is {_brief(text)}.")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"`{argument}` should be valid Unicode, but item {index} is {text[:40]!r}.")
    return texts


def check_text(text: Any, argument: str) -> None:
    """Raise a `TypeError` unless `argument` is one text."""
    if not isinstance(text, str):
        raise TypeError(f"`{argument}` should be one text, but got {_brief(text)}.")


def check_count(value: Any, argument: str, least: int) -> None:
    """Raise a `ValueError` unless `argument` is a whole number of at least `least`."""
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{argument}` should be a whole number of at least {least}, but got {value!r}.")


def list_images(images: Any) -> list[Any]:
    """Return images as a list; an array or tensor of four dimensions is a batch.

    Raises:
        TypeError: `images` is not a list of anything.
        ValueError: It is a single image.
    """
    single = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Mapping)
    if single or getattr(images, "ndim", None) in (2, 3):
        raise ValueError(
            f"`images` should be a list of images, but got a single one ({_brief(images)}): put it into a list. "
            "An array of four dimensions is a batch."
        )
    if not isinstance(images, Iterable):
        raise TypeError(f"`images` should be a list of images, but got {_brief(images)}.")
    return list(images)


def to_image(image: Any, name: str) -> Image.Image:
    """Return any image as RGB: what `to_rgb` takes, and arrays or tensors with the channels last or first.

    Args:
        image: Of `uint8`, or floats in [0, 1]. Where both ends could be channels, NumPy has them last, torch first.
        name: What to call it in errors.

    Raises:
        ValueError: It can't be read as an image; the message begins with `name`.
    """
    first = isinstance(image, torch.Tensor)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    elif hasattr(image, "__array__") and not isinstance(image, np.ndarray | Image.Image):
        image = np.asarray(image)  # JAX and others
    if not isinstance(image, np.ndarray):
        return to_rgb(image, name)
    found = f"{image.dtype} of shape {image.shape}"
    if image.ndim == 3:
        ends = [image.shape[0] in _CHANNELS, image.shape[2] in _CHANNELS]
        image = np.moveaxis(image, 0, 2) if ends[0] and (first or not ends[1]) else image
    if image.size and np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):  # written so that NaN is refused too
            raise ValueError(f"{name}: unreadable image: floats should lie in [0, 1], found {found} beyond it")
        image = np.rint(image * 255).astype(np.uint8)
    if not image.size or image.ndim not in (2, 3) or image.dtype != np.uint8 or (image.shape[2:] or (1,))[0] > 4:
        raise ValueError(
            f"{name}: unreadable image: expected an array of uint8, or of floats in [0, 1], of shape (H, W), "
            f"(H, W, C) or (C, H, W) with 1 to 4 channels, found {found}"
        )
    return to_rgb(np.ascontiguousarray(image), name)


def describe_image(image: Any, index: int) -> str:
    """Name an image by its path if it has one, else by its place."""
    path = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None) or image
    return f"image '{os.fspath(path)}'" if isinstance(path, str | os.PathLike) else f"image {index}"


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    return f"the text {value[:40]!r}" if isinstance(value, str) else type(value).__name__
