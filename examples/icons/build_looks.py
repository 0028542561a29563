"""Rebuild `looks64.parquet`, the drawings that pretraining never saw, from the npm packages they came from.

    python examples/icons/build_looks.py

Needs `npm` on the path and `pip install -e '.[emoji]'` (resvg-py). Words are drawn with Pillow.
"""

import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))

from emoji import STYLES, load_emoji
from looks import PARQUET, PHOSPHOR_WEIGHTS
from render import SIZE, draw, fetch_set

HOUSES = {"noto_v1": "noto-v1@1.2.5", "emojione": "emojione@1.2.3"}
PHOSPHOR, PHOSPHOR_NAMES = "ph@1.2.2", 200
FAMILIES = {  # packages @fontsource/FAMILY, by kind
    "serif": ("lora", "merriweather", "playfair-display", "eb-garamond", "crimson-text", "libre-baskerville"),
    "sans": ("inter", "open-sans", "lato", "montserrat", "work-sans", "nunito"),
    "mono": ("jetbrains-mono", "fira-code", "ibm-plex-mono", "source-code-pro", "space-mono", "inconsolata"),
    "hand": ("caveat", "dancing-script", "pacifico", "kalam", "patrick-hand", "shadows-into-light"),
    "display": ("bebas-neue", "lobster", "righteous", "bungee", "abril-fatface", "alfa-slab-one"),
}
WORDS = (
    "apple boat bread brick bridge cake chair cloud clock coat corn crown dance desk dream "
    "eagle earth farm field fire fish flute frost game glass gold grape green hand heart "
    "honey horse house ice island jazz juice king lake lamp leaf lemon light lunch magic "
    "maple milk moon music night ocean olive paper pearl piano plum queen rain river rose"
)
FEATURES = Features(
    {name: Value("string") for name in ("set", "concept", "caption", "look", "kind")}
    | {"image": ImageFeature(mode="RGB")}
)


def row(of: str, concept: str, caption: str, look: str, kind: str, pixels: np.ndarray | Image.Image) -> dict[str, Any]:
    """Return a row of the table, its image as PNG."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    # Black on white needs no colours, which saves half of the file.
    image.convert("RGB" if kind == "emoji" else "L").save(buffer, "PNG", optimize=True)
    drawn = {"bytes": buffer.getvalue(), "path": None}
    return {"set": of, "concept": concept, "caption": caption, "look": look, "kind": kind, "image": drawn}


def emoji_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Draw the held-out emoji concepts in the two unseen houses, where they have them."""
    rows = load_emoji("held_out").select_columns(["concept", "caption"])[:: len(STYLES)]
    for house, package in HOUSES.items():
        icons, _ = fetch_set(package, folder)
        for concept, caption in zip(rows["concept"], rows["caption"], strict=True):
            if concept in icons["icons"] and (pixels := draw(icons, concept)) is not None:
                yield row(house, concept, caption, house, "emoji", pixels)


def phosphor_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Draw icons of one word in all six weights."""
    icons, _ = fetch_set(PHOSPHOR, folder)
    suffixes = {weight: "" if weight == "regular" else f"-{weight}" for weight in PHOSPHOR_WEIGHTS}
    names = [name for name in sorted(icons["icons"]) if "-" not in name]
    names = [name for name in names if all(name + suffix in icons["icons"] for suffix in suffixes.values())]
    for name in sorted(random.Random(0).sample(names, PHOSPHOR_NAMES)):
        for weight, suffix in suffixes.items():
            yield row("phosphor", name, name, weight, "icon", draw(icons, name + suffix, "black"))


def write_word(word: str, font_file: io.BytesIO) -> Image.Image:
    """Draw a word in black on white, as large as fits."""
    size, box = 64, (0, 0, SIZE, SIZE)
    while size > 8:
        font_file.seek(0)
        font = ImageFont.truetype(font_file, size)
        box = font.getbbox(word)
        if box[2] - box[0] <= SIZE - 4 and box[3] - box[1] <= SIZE - 4:
            break
        size -= 1
    image = Image.new("RGB", (SIZE, SIZE), "white")
    place = ((SIZE - box[2] - box[0]) / 2, (SIZE - box[3] - box[1]) / 2)
    ImageDraw.Draw(image).text(place, word, fill="black", font=font)
    return image


def typeface_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Draw words in 30 families, all under the SIL Open Font License.

    Raises:
        ValueError: A package names another licence.
    """
    fonts: dict[tuple[str, str], io.BytesIO] = {}
    for kind, families in FAMILIES.items():
        for family in families:
            command = ["npm", "pack", f"@fontsource/{family}@~5.3.0", "--pack-destination", str(folder), "--json"]
            packed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[-1]
            with tarfile.open(folder / packed["filename"].replace("@", "").replace("/", "-")) as archive:
                licence = json.load(archive.extractfile("package/package.json"))["license"]
                if licence != "OFL-1.1":
                    raise ValueError(f"{family} should be under OFL-1.1, but its package says {licence}.")
                file = f"package/files/{family}-latin-400-normal.woff"
                fonts[family, kind] = io.BytesIO(archive.extractfile(file).read())
    for word in WORDS.split():
        for (family, kind), font in fonts.items():
            yield row("typefaces", word, word, family, kind, write_word(word, font))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [*emoji_rows(folder), *phosphor_rows(folder), *typeface_rows(folder)]
    temporary = PARQUET.with_suffix(".tmp")
    Dataset.from_list(rows, features=FEATURES).to_parquet(str(temporary))
    temporary.replace(PARQUET)
    print(f"Wrote {len(rows):,} rows to {PARQUET}.")


if __name__ == "__main__":
    main()
