"""One way to turn whatever a row holds into an upright RGB image.

The checks of `bt_hf.data.pairs` and the collators call the same `to_rgb`, so what was checked is what is trained on.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Any, name: str = "") -> Image.Image:
    """Return an image upright, in mode RGB, with transparency laid over white.

    Greyscale, 1-bit, palette, CMYK and other modes are converted; EXIF orientation is applied; of an animation the
    first frame is taken; colour profiles are ignored. 16-bit greyscale is scaled to 8 bits (65535 becomes 255).
    Float images must hold either [0, 1] or [0, 255].

    Args:
        image: A `PIL.Image.Image`, encoded `bytes`, a path (`str` or `os.PathLike`, or an `fsspec` address such as
            `hf://...`), a mapping with `bytes` or `path` (an undecoded `datasets.Image`), or a `uint8` array of
            shape (H, W), (H, W, 1), (H, W, 2), (H, W, 3) or (H, W, 4).
        name: What to call the image in errors, such as "`chosen` of row 7".

    Returns:
        A loaded `PIL.Image.Image` of mode RGB and the same size (width and height swap where EXIF says so).

    Raises:
        ValueError: There is no image, its file does not exist, it cannot be read, or it has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`. The message is one line, `reason: detail`, after the name if there is one.

    Example:
        >>> to_rgb(np.zeros((4, 6, 4), dtype=np.uint8)).getpixel((0, 0))  # fully transparent: the white shows
        (255, 255, 255)
    """
    try:
        return _to_rgb(image)
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"{name}: {error}") from error


def _to_rgb(image: Any) -> Image.Image:
    if image is None:
        raise ValueError("image missing: the value is empty")
    if isinstance(image, Image.Image):
        return _convert(image, "the image")
    if isinstance(image, np.ndarray):
        return _convert(_from_array(image), "the array")
    path = None
    if isinstance(image, Mapping):
        path, image = image.get("path"), image.get("bytes")
        if image is None and not path:
            raise ValueError("image missing: the value has neither bytes nor a path")
    elif isinstance(image, str | os.PathLike):
        path, image = os.fspath(image), None
    if image is None:
        return _decode(_open(str(path)), f"'{path}'")
    if not isinstance(image, bytes | bytearray | memoryview):
        raise ValueError(
            "unreadable image: expected a PIL image, bytes, a path, {'bytes', 'path'} or a uint8 array, "
            f"found {type(image).__name__}"
        )
    return _decode(io.BytesIO(image), f"'{path}'" if path else f"{len(image)} bytes")


def _open(path: str) -> Any:
    try:
        if "://" in path:  # `datasets` hands out such addresses when it streams image files
            import fsspec

            with fsspec.open(path, "rb") as remote:
                return io.BytesIO(remote.read())
        return open(path, "rb")
    except FileNotFoundError as error:
        raise ValueError(f"image file missing: '{path}'") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"unreadable image: '{path}' ({_one_line(error)})") from error


def _decode(file: Any, name: str) -> Image.Image:
    try:
        # PIL only warns between one and two times its limit on pixels; here both are refused, and only here.
        with file, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                return _convert(image, name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"image too large: {name} has more than PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS} pixels; "
            "make it smaller, or raise that limit if you trust the file"
        ) from error
    except Exception as error:  # PIL's decoders raise almost anything on broken files: SyntaxError, KeyError, ...
        if isinstance(error, ValueError) and str(error).startswith("unreadable image: "):
            raise
        raise ValueError(f"unreadable image: {name} ({_one_line(error)})") from error


def _convert(image: Image.Image, name: str) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            image = _to_8_bit(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"unreadable image: {name} of mode {image.mode} ({_one_line(error)})") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    # `Image.convert("L")` would clip: everything above 255 becomes white.
    values = np.asarray(image).astype(np.float64)  # (H, W)
    low, high = values.min(), values.max()
    limit = {"F": 255, "I": 2**31 - 1}.get(image.mode, 65535)
    if not (low >= 0 and high <= limit):  # written so that NaN is refused too
        raise ValueError(f"values from {low} to {high}, expected 0 to {limit}")
    low_limit = {"F": 1, "I": 65535}.get(image.mode, limit)  # shares of 1; PIL opens some 16-bit files as 32-bit "I"
    limit = low_limit if high <= low_limit else limit
    return Image.fromarray(np.rint(values * (255 / limit)).astype(np.uint8))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (2, 3, 4))):
        raise ValueError(
            "unreadable image: expected a uint8 array of shape (H, W) or (H, W, 1 to 4), "
            f"found {array.dtype} of shape {array.shape}"
        )
    return Image.fromarray(array)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
