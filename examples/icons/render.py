"""Render named icons, with their look and colour, from the icon sets of Iconify.

    python examples/icons/render.py FOLDER    # about 5 minutes: FOLDER/icons.npy and FOLDER/icons.json

Needs `npm` on the path and `pip install -e '.[emoji]'` (resvg-py). Packages are fetched at fixed versions; each set's
own `info.json` says its licence, and a set under any other than those of `LICENCES` is refused. `README.md` lists the
sets with their authors. `LEFT_OUT` names the sets that pretraining never sees: tastes for them are measured.
"""

import argparse
import io
import json
import random
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from tqdm.auto import tqdm

from looks import COLOURS

SIZE = 64
PER_SET = 5000
LICENCES = ("MIT", "ISC", "Apache-2.0", "CC-BY-3.0", "CC-BY-4.0")
LEFT_OUT = ("noto-v1", "emojione", "emojione-v1", "emojione-monotone", "openmoji", "fxemoji", "ph", "solar")
SETS: dict[str, tuple[str, ...]] = {  # set at its version: its house, and looks that all its drawings share
    "material-symbols@1.2.98": ("material symbol",),
    "fluent@1.2.60": ("fluent icon",),
    "tabler@1.2.41": ("tabler icon",),
    "mdi@1.2.3": ("material design icon",),
    "lucide@1.2.137": ("lucide icon", "line", "outline"),
    "flat-color-icons@1.2.3": ("flat colour icon", "flat", "colour"),
    "mingcute@1.2.8": ("mingcute icon",),
    "iconoir@1.2.11": ("iconoir icon",),
    "carbon@1.2.29": ("carbon icon",),
    "bi@1.2.7": ("bootstrap icon",),
    "ri@1.2.10": ("remix icon",),
    "ion@1.2.7": ("ionic icon",),
    "heroicons@1.2.3": ("hero icon",),
    "uil@1.2.3": ("unicons icon", "line", "outline"),
    "hugeicons@1.2.35": ("huge icon", "line", "outline"),
    "basil@1.2.4": ("basil icon",),
    "pixelarticons@1.2.9": ("pixel art icon", "pixel art"),
    "game-icons@1.2.4": ("game icon", "silhouette"),
    "icon-park@1.2.4": ("icon park icon", "colour"),
    "icon-park-twotone@1.2.4": ("icon park icon", "two tone"),
    "icon-park-solid@1.2.4": ("icon park icon", "filled", "solid"),
    "icon-park-outline@1.2.4": ("icon park icon", "line", "outline"),
    "fluent-color@1.2.21": ("fluent icon", "colour", "shaded"),
    "streamline-ultimate-color@1.2.2": ("streamline ultimate icon", "colour"),
    "streamline-plump-color@1.2.2": ("streamline plump icon", "colour"),
    "streamline-flex-color@1.2.2": ("streamline flex icon", "colour"),
    "streamline-freehand-color@1.2.2": ("streamline freehand icon", "colour", "sketched"),
    "streamline-sharp@1.2.0": ("streamline sharp icon", "sharp"),
    "streamline-plump@1.2.0": ("streamline plump icon",),
}
# Ends of names that tell looks; an empty one tells nothing.
LINE, FILLED = ("line", "outline"), ("filled", "solid")
SUFFIXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("line", "linear", "outline", "outlined"), LINE),
    **dict.fromkeys(("fill", "filled", "solid"), FILLED),
    **{word: (word,) for word in ("bold", "duotone", "light", "rounded", "sharp", "thin")},
    "round": ("rounded",),
    "twotone": ("two tone",),
    **dict.fromkeys(("regular", "16", "20", "24", "28", "32", "48"), ()),
}
# Looks of a set's drawings whose names tell neither lines nor filled areas.
PLAIN = {
    **dict.fromkeys(("material-symbols", "mdi", "ion"), FILLED),
    **dict.fromkeys(("tabler", "bi", "heroicons", "iconoir", "fluent", "basil"), LINE),
}


@dataclass
class Icon:
    """Icon of a set: its name in words, phrases for its look (its house first), and its colour if it has one alone."""

    name: str
    looks: list[str]
    colour: str | None


def fetch_set(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the icons and the description of the set `name@version`.

    Raises:
        ValueError: The set's licence is not one of `LICENCES`.
    """
    command = ["npm", "pack", f"@iconify-json/{name}", "--pack-destination", str(folder), "--json"]
    packed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    with tarfile.open(folder / packed[0]["filename"].replace("@", "").replace("/", "-")) as archive:
        icons, info = (json.load(archive.extractfile(f"package/{part}.json")) for part in ("icons", "info"))
    if info["license"]["spdx"] not in LICENCES:
        raise ValueError(f"{name} is under {info['license']['spdx']}, but only {', '.join(LICENCES)} are used.")
    return icons, info


def describe(set_name: str, icon: str) -> tuple[str, list[str]]:
    """Return the words of an icon's name and phrases for its look, the set's house first.

    Example:
        >>> describe("bi@1.2.7", "red-apple-24-fill")
        ('red apple', ['bootstrap icon', 'filled', 'solid'])
    """
    parts, looks = icon.split("-"), list(SETS[set_name])
    while len(parts) > 1 and parts[-1] in SUFFIXES:
        looks += SUFFIXES[parts.pop()]
    if not {"line", "filled", "duotone", "light", "thin", "bold"} & set(looks):
        looks += PLAIN.get(set_name.split("@")[0], ())
    return " ".join(parts), list(dict.fromkeys(looks))


def draw(icons: dict[str, Any], name: str, colour: str | None = None) -> np.ndarray | None:
    """Draw an icon on white, (SIZE, SIZE, 3) uint8; `None` if nothing can be seen.

    Args:
        icons: Content of `icons.json`.
        name: Name in the set.
        colour: One of `COLOURS`, for an icon of a single colour.
    """
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    body = icon["body"] if colour is None else icon["body"].replace("currentColor", COLOURS[colour])
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
        )
    except Exception:  # resvg-py raises bare exceptions for what it can't parse
        return None
    with Image.open(io.BytesIO(bytes(png))) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels if pixels.shape == (SIZE, SIZE, 3) and pixels.min() < 250 else None


def render_set(name: str, folder: Path, rng: random.Random) -> Iterator[tuple[np.ndarray, Icon]]:
    """Yield drawings of up to `PER_SET` icons; a third of those of a single colour are drawn in two colours.

    Raises:
        ValueError: The set is for measuring.
    """
    if name.split("@")[0] in LEFT_OUT:
        raise ValueError(f"{name} is for measuring, not for pretraining.")
    icons, info = fetch_set(name, folder)
    names = [icon for icon in icons["icons"] if not re.search(r"skin-tone|-(8|10|12|16|28|32|48)(-|$)", icon)]
    rng.shuffle(names)
    for icon in names[:PER_SET]:
        words, looks = describe(name, icon)
        colours: list[str | None] = [None]
        if not info.get("palette"):
            colours = list(rng.sample(list(COLOURS), 2)) if rng.random() < 1 / 3 else ["black"]
        for colour in colours:
            pixels = draw(icons, icon, colour)
            if pixels is not None:
                yield pixels, Icon(words, looks, colour)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, pixels, found = random.Random(0), [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name in tqdm(SETS, desc="Rendering sets"):
            for drawing, icon in render_set(name, Path(scratch), rng):
                pixels.append(drawing)
                found.append(asdict(icon))
    np.save(folder / "icons.npy", np.stack(pixels))
    (folder / "icons.json").write_text(json.dumps(found))
    print(f"{len(found):,} drawings of {len({icon['name'] for icon in found}):,} names in {folder}")


if __name__ == "__main__":
    main()
