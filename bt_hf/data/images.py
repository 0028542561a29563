"""One way to turn whatever a row holds into an upright RGB image, without network and of known formats alone.

The checks of `bt_hf.data.pairs` and the collators call the same `to_rgb`, so what was checked is what is trained on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import sys
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Decoders that run inside Pillow or its libraries. Others start programs (EPS: Ghostscript) or are hardly tested.
FORMATS = (  # HEIF: where pillow-heif has registered it
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "HEIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
)
# Processors enlarge the shorter edge to hundreds of pixels, and the longer edge with it.
MAX_ASPECT_RATIO = 32
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\1\0", b"\0\0\0\x0cjP")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{40}")
_LONG_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{256}")  # longer than names of files, and without a dot
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(:|//)|[\\/]{2}")  # `http://`, `simplecache::`, and shares of Windows


def to_rgb(image: Any, name: str = "") -> Image.Image:
    """Return an image upright, in mode RGB, with transparency laid over white.

    Greyscale, 1-bit, palette, CMYK and other modes are converted; EXIF orientation is applied; of an animation the
    first frame is taken; colour profiles are ignored. 16-bit greyscale is scaled to 8 bits (65535 becomes 255).
    Float images must hold either [0, 1] or [0, 255].

    Args:
        image: A `PIL.Image.Image`, encoded `bytes`, a path (`str` or `os.PathLike`) of a regular file, a data URI or
            Base64 text, a mapping with `bytes` or `path` (an undecoded `datasets.Image`), or a `uint8` array of shape
            (H, W), (H, W, 1), (H, W, 2), (H, W, 3) or (H, W, 4). Never an address: `load_preference_pairs` fetches
            those, with `allow_urls=True`.
        name: What to call the image in errors, such as "`chosen` of row 7".

    Returns:
        A loaded `PIL.Image.Image` of mode RGB and the same size (width and height swap where EXIF says so).

    Raises:
        ValueError: There is no image, its file does not exist or is not a regular one, its format is not in `FORMATS`,
            it cannot be read, one side is more than `MAX_ASPECT_RATIO` times the other, or it has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`. The message is one line, `reason: detail`, after the name if there is one.

    Example:
        >>> to_rgb(np.zeros((4, 6, 4), dtype=np.uint8)).getpixel((0, 0))  # fully transparent: the white shows
        (255, 255, 255)
    """
    return to_frames(image, 1, name)[0]


def to_frames(image: Any, count: int | None = None, name: str = "") -> list[Image.Image]:
    """Return the first frames of a clip, an animated GIF, WebP, AVIF or PNG, each as `to_rgb` returns an image.

    Args:
        image: As in `to_rgb`. A still image is a clip of one frame.
        count: Frames to return. Default: all.
        name: As in `to_rgb`.

    Raises:
        ValueError: As in `to_rgb`, or the clip has fewer frames.

    Example:
        >>> len(to_frames(np.zeros((4, 6, 3), dtype=np.uint8)))
        1
    """
    try:
        frames = _to_frames(image, count)
        if count is not None and len(frames) < count:
            raise ValueError(
                f"clip too short: {len(frames)} frame{'' if len(frames) == 1 else 's'}, and {count} are asked for; "
                "leave the row out, bring a longer one (an animated GIF, WebP, AVIF or PNG), or ask for fewer"
            )
        return frames
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"{name}: {error}") from error


def is_address(text: str) -> bool:
    """True if a text is an address, such as a URL or one of `fsspec` (`zip://a.png::b.zip`), not a local path."""
    return _ADDRESS.match(text) is not None


def is_embedded(text: str) -> bool:
    """True if a text is a data URI, or Base64 of an image, not a path."""
    if text[:5].lower() == "data:" or _LONG_BASE64.match(text):
        return True
    return _BASE64.match(text) is not None and _is_image(_from_base64(text[:40]))


def embedded_bytes(text: str) -> bytes | None:
    """Return the image that a data URI or Base64 text holds, or `None` if it is neither.

    Raises:
        ValueError: A data URI that is damaged.
    """
    if not is_embedded(text):
        return None
    payload = text
    if text[:5].lower() == "data:":
        header, comma, payload = text.partition(",")
        if not comma:
            raise ValueError(f"unreadable image: a data URI without a comma, {short(text)}")
        if not header.lower().endswith(";base64"):
            return unquote_to_bytes(payload)
    try:
        return _from_base64(payload)
    except binascii.Error as error:
        raise ValueError(f"unreadable image: {short(text)} is not whole Base64 text ({error})") from error


def short(value: Any, length: int = 80) -> str:
    """Return the `repr` of a value for a message: on one line, and its middle left out where it is longer.

    Example:
        >>> short("a" * 1000, 20)
        "'aaaaaaa...aaaaaaaa'"
    """
    if isinstance(value, str) and len(value) > 2 * length:
        value = value[:length] + value[-length:]
    try:
        text = " ".join(repr(value).splitlines())
    except ValueError:  # an integer of more digits than Python prints
        text = f"a huge {type(value).__name__}"
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[half + 3 - length :]}"


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, cut after 300 characters."""
    text = " ".join(str(error)[:2000].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def _from_base64(text: str) -> bytes:
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)


def _is_image(start: bytes) -> bool:
    return start.startswith(_SIGNATURES) or start[4:8] == b"ftyp"  # the latter is AVIF and HEIF


def _to_frames(image: Any, count: int | None) -> list[Image.Image]:
    if image is None:
        raise ValueError("image missing: the value is empty")
    if isinstance(image, Image.Image):
        return _decode(image, "the image", count)
    if isinstance(image, np.ndarray):
        return [_convert(_from_array(image), "the array")]
    path = None
    if isinstance(image, Mapping):
        path, image = image.get("path"), image.get("bytes")
        if image is None and not path:
            raise ValueError("image missing: the value has neither bytes nor a path")
    elif isinstance(image, str | os.PathLike):
        path, image = image, None
    if image is None:
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"unreadable image: expected a path, found {type(path).__name__}")
        path = os.fspath(path)
        if not isinstance(path, str):
            path = os.fsdecode(path)
        image = embedded_bytes(path)
        if image is None:
            return _decode(open_regular(path), short(path), count)
    if not isinstance(image, bytes | bytearray | memoryview):
        raise ValueError(
            "unreadable image: expected a PIL image, bytes, a path, {'bytes', 'path'} or a uint8 array, "
            f"found {type(image).__name__}"
        )
    return _decode(io.BytesIO(image), short(path) if path else f"{len(image)} bytes", count)


def open_regular(path: str) -> BinaryIO:
    """Open a regular file, of an image or a table, for reading; never a FIFO, a device, a socket or an address.

    Raises:
        ValueError: There is no such file, it is of another kind, or it may not be read.
    """
    if is_address(path):
        raise ValueError(
            f"image at an address: {short(path)} would be fetched from elsewhere; load the data with "
            "load_preference_pairs(..., allow_urls=True) if it may"
        )
    try:
        if not path:
            raise ValueError("image missing: the path is empty")
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening, which alone can block or act on a device
            raise ValueError(f"unreadable image: {short(path)} is not a regular file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(descriptor, "rb")
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # it may have been replaced in between
            return file
        file.close()
        raise ValueError(f"unreadable image: {short(path)} is not a regular file")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"image file missing: {short(path)}") from error
    except OSError as error:
        raise ValueError(f"unreadable image: {short(path)} ({error.strerror or type(error).__name__})") from error
    except ValueError as error:
        if "null byte" in str(error) or isinstance(error, UnicodeError):
            raise ValueError(f"unreadable image: {short(path)} is not a path") from error
        raise


def _decode(file: BinaryIO | Image.Image, name: str, count: int | None) -> list[Image.Image]:
    """Decode an encoded image, or one that the caller has opened, once its format and size are known to be good."""
    try:
        # PIL only warns between one and two times its limit on pixels; here both are refused, and only here.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(file, Image.Image):
                return _load(file, name, count)
            Image.init()
            with file, Image.open(file, formats=[format for format in FORMATS if format in Image.OPEN]) as image:
                return _load(image, name, count)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"image too large: {name} has more than PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS} pixels; "
            "make it smaller, or raise that limit if you trust the file"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"unreadable image: {name} is damaged, or of a format other than {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # PIL's decoders raise almost anything on broken files: SyntaxError, KeyError, ...
        if isinstance(error, ValueError) and str(error).startswith(("unreadable image: ", "image too ")):
            raise
        raise ValueError(f"unreadable image: {name} ({one_line(error)})") from error


def _load(image: Image.Image, name: str, count: int | None) -> list[Image.Image]:
    if image.format and image.format not in FORMATS:
        raise ValueError(f"unreadable image: {name} is in the format {image.format}, expected {', '.join(FORMATS)}")
    _check_size(image, name)
    image.load()
    if count == 1:
        return [_convert(image, name)]
    length = min(count or sys.maxsize, getattr(image, "n_frames", 1))
    if Image.MAX_IMAGE_PIXELS and length * image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"image too large: {name} has more than PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS} pixels in "
            f"{length} frames; make it smaller or shorter, or raise that limit if you trust the file"
        )
    frames = []
    for index in range(length):
        image.seek(index)
        frames.append(_convert(image, name))
    image.seek(0)
    return frames


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"unreadable image: {name} has no pixels ({width}x{height})")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"image too narrow: {name} has {width}x{height} pixels, and one side may be at most {MAX_ASPECT_RATIO} "
            "times the other; crop it"
        )


def _convert(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            image = _to_8_bit(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"unreadable image: {name} of mode {image.mode} ({one_line(error)})") from error


def digest_pixels(image: Any, name: str = "") -> str:
    """Return a digest of size and pixels of an image, by which equal ones are known whatever their files.

    Args:
        image: As in `to_rgb`, whose errors these are.
        name: What an error calls it.
    """
    image = to_rgb(image, name)
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


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
