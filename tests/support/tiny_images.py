"""Small encoded images."""

import io

from PIL import Image


def png(colour: str | tuple[int, int, int], size: tuple[int, int] = (4, 4), format: str = "PNG") -> bytes:
    """Encode an image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()
