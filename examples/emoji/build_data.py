"""Rebuild the drawings of the emoji domain from the npm packages they came from.

    python examples/emoji/build_data.py --check   # compares a fresh build with the shipped emoji64.parquet
    python examples/emoji/build_data.py           # writes examples/emoji/emoji64.parquet anew

Needs `npm` on the path and `pip install -e '.[emoji]'` (resvg-py). The packages are fetched into a temporary folder,
at fixed versions and without running their install scripts.

A concept is an emoji that all five sets draw under the same name, and whose name is the slug of its CLDR short name.
`split.json` is fixed: the seed of its random split was not recorded, so this script only verifies that it covers the
concepts.
"""

import argparse
import io
import json
import re
import subprocess
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tqdm.auto import tqdm

from emoji import FOLDER, STYLES

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent_3d": "@iconify-json/fluent-emoji@1.2.7",
    "mono": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
CAPTIONS = "emojibase-data@17.0.0"
SIZE = 64
PARQUET = FOLDER / "emoji64.parquet"
FEATURES = Features(
    {
        "concept": Value("string"),
        "caption": Value("string"),
        "tags": List(Value("string")),
        "group": Value("int32"),
        "style": Value("string"),
        "image": Image(),
    }
)
# The order of the shipped rows: three sets were drawn concept by concept, and two were added later, set by set.
ROW_BLOCKS = (("noto", "twemoji", "fluent"), ("fluent_3d",), ("mono",))


def fetch_packages(folder: Path) -> Path:
    """Install the npm packages into a folder and return its `node_modules`."""
    command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run([*command, *PACKAGES.values(), CAPTIONS], check=True)
    return folder / "node_modules"


def read_package(modules: Path, package: str, file: str) -> Any:
    """Read a JSON file of an installed package, named with its version as in `PACKAGES`."""
    return json.loads((modules / package.rpartition("@")[0] / file).read_text(encoding="utf-8"))


def slug(label: str) -> str:
    """Return the name that the icon sets give to a CLDR short name: "piñata" -> "pinata"."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label).strip("-")


def draw(icons: dict[str, Any], name: str) -> bytes:
    """Rasterise one icon of an Iconify set on white, as the bytes of a lossless WebP of `SIZE` x `SIZE` RGB pixels."""
    icon = icons["icons"][name]
    # A few icons have a size of their own; in a square canvas they are centred, and keep their proportions.
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    buffer = io.BytesIO()
    PILImage.open(io.BytesIO(bytes(png))).convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def build_rows(modules: Path) -> Iterator[dict[str, Any]]:
    """Draw every concept in every style, in the order of the shipped file."""
    icons = {style: read_package(modules, package, "icons.json") for style, package in PACKAGES.items()}
    labels = {slug(entry["label"]): entry for entry in read_package(modules, CAPTIONS, "en/data.json")}
    concepts = sorted(set(labels).intersection(*(icons[style]["icons"] for style in STYLES)))
    with tqdm(total=len(concepts) * len(STYLES), unit="drawing") as progress:
        for block in ROW_BLOCKS:
            for concept in concepts:
                for style in block:
                    yield {
                        "concept": concept,
                        "caption": labels[concept]["label"],
                        "tags": labels[concept].get("tags", []),
                        "group": labels[concept]["group"],
                        "style": style,
                        "image": {"bytes": draw(icons[style], concept), "path": None},
                    }
                    progress.update()


def build() -> Dataset:
    """Build the whole dataset from freshly fetched packages, and verify that `split.json` covers its concepts."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(build_rows(fetch_packages(Path(folder))))
    split = json.loads((FOLDER / "split.json").read_text(encoding="utf-8"))
    if sorted(split["train"] + split["held_out"]) != sorted({row["concept"] for row in rows}):
        raise ValueError(
            "`split.json` should hold each concept exactly once, but the concepts drawn are others. Either restore "
            "the versions in PACKAGES, or write a new split (and pretrain the base models again: they must not have "
            "seen held-out concepts)."
        )
    return Dataset.from_list(rows, features=FEATURES)


def compare(fresh: Dataset, shipped: Dataset) -> dict[str, float]:
    """Return the shares of the shipped rows that the fresh build reproduces.

    Args:
        fresh: What `build` returned.
        shipped: The dataset of `emoji64.parquet`.

    Returns:
        `same_place`: same concept and style in the same row. `same_caption`, `same_tags`, `same_group`: equal columns.
        `same_pixels`: identical images. `near_pixels`: no channel of any pixel differs by more than 2 of 255.
    """
    fresh_rows = {(row["concept"], row["style"]): (index, row) for index, row in enumerate(fresh)}
    checks: dict[str, list[bool]] = {
        name: [] for name in ("same_place", "same_caption", "same_tags", "same_group", "same_pixels", "near_pixels")
    }
    for index, old in enumerate(shipped):
        position, new = fresh_rows.get((old["concept"], old["style"]), (None, None))
        checks["same_place"].append(position == index)
        for column in ("caption", "tags", "group"):
            checks[f"same_{column}"].append(new is not None and new[column] == old[column])
        # int16, so that differences of bytes don't wrap around
        pixels = [np.asarray(row["image"].convert("RGB"), dtype=np.int16) for row in (old, new) if row is not None]
        distance = abs(pixels[0] - pixels[-1]).max() if new is not None else 255
        checks["same_pixels"].append(distance == 0)
        checks["near_pixels"].append(distance <= 2)
    return {name: float(np.mean(values)) for name, values in checks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shipped file, write nothing")
    args = parser.parse_args()
    fresh = build()
    if args.check:
        shipped = Dataset.from_parquet(str(PARQUET))
        shares = compare(fresh, shipped)
        print(f"{len(fresh):,} rows built, {len(shipped):,} shipped; shares of the shipped rows:")
        for name, share in shares.items():
            print(f"  {name:13s} {share:.4f}")
        raise SystemExit(min(shares.values()) < 1)
    # Written beside and moved, so that an interrupted build leaves the shipped file whole.
    temporary = PARQUET.with_suffix(".tmp")
    fresh.to_parquet(str(temporary))
    temporary.replace(PARQUET)
    print(f"Wrote {len(fresh):,} rows to {PARQUET}.")


if __name__ == "__main__":
    main()
