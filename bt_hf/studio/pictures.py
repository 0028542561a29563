"""Pictures as the page gets them: pixels alone, of a bounded size."""

import io

from PIL import Image

from bt_hf.hub.privacy import encode_picture

# Longest side of a stored picture: more than pipelines train on, and small enough for a phone.
LONGEST_SIDE = 2048
# Up to this side a picture is stored without loss.
LOSSLESS_SIDE = 512
_QUALITY = 95


def encode_shown(picture: Image.Image) -> tuple[bytes, str]:
    """Encode a picture to be shown and trained on, as (bytes, suffix): PNG where it is small, else JPEG.

    Example:
        >>> encode_shown(Image.new("RGB", (8, 8)))[1], encode_shown(Image.new("RGB", (800, 600)))[1]
        ('.png', '.jpg')
    """
    picture = shrunk(picture, LONGEST_SIDE)
    if max(picture.size) <= LOSSLESS_SIDE:
        return encode_picture(picture), ".png"
    return _jpeg(picture, _QUALITY), ".jpg"


def encode_thumbnail(picture: Image.Image, side: int) -> tuple[bytes, str]:
    """Encode a small picture for a list, as (bytes, suffix)."""
    picture = shrunk(picture, side)
    if max(picture.size) <= 64:
        return encode_picture(picture), ".png"
    return _jpeg(picture, 85), ".jpg"


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture whose longest side is at most `side`."""
    if max(picture.size) <= side:
        return picture
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    # From the pixels, so that nothing else of the picture comes along.
    plain, buffer = Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes()), io.BytesIO()
    plain.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
