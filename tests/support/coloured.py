"""Images of one colour each, which tests recognise in pairs."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from bt_hf.data.images import to_rgb

COLOURS = ["red", "lime", "blue", "white", "black", "yellow"]


def png(colour: str | tuple[int, int, int]) -> bytes:
    """Return an image of 4 x 4 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def colour(image: Any) -> str:
    """Return the name of the first pixel's colour."""
    pixel = to_rgb(image).getpixel((0, 0))
    return next(name for name in COLOURS if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == pixel)


def summary(pairs: Iterable[dict[str, Any]]) -> list[tuple]:
    """Return (prompt, colour of chosen, colour of rejected, preference, weight) of each pair."""
    return [
        (row["prompt"], colour(row["chosen"]), colour(row["rejected"]), row["preference"], round(row["weight"], 6))
        for row in pairs
    ]


def images(folder: Path, names: Iterable[str] = tuple(COLOURS)) -> None:
    """Write an image of each colour, such as `red.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_bytes(png(name))
