"""Draw the map of the architecture from the code's own imports.

    python docs/draw_architecture.py            # renews docs/architecture.md and docs/images/architecture.svg
    python docs/draw_architecture.py --check    # says if the map in docs/architecture.md is out of date

A wing stands on the lowest floor from which it imports lower wings only; an arrow is an import.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bt_hf"
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "images" / "architecture.svg"
MAP = re.compile(r"(?<=<!-- map -->\n).*?(?=<!-- end map -->)", re.DOTALL)


def wings() -> dict[str, list[Path]]:
    """Files by wing: the folders and lone files of the package."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        if place.parts[0] != "__init__.py":
            found.setdefault(place.parts[0].removesuffix(".py"), []).append(file)
    return found


def imports(files: list[Path], known: set[str]) -> set[str]:
    """Wings that any of the files imports, wherever the import stands."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "bt_hf":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
                found |= {name.split(".")[1] for name in names if name.startswith("bt_hf.")}
    return found & known


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Wings by floor, from the ground up."""
    house: list[list[str]] = []
    left = dict(arrows)
    while left:
        floor = sorted(wing for wing, below in left.items() if not below & left.keys())
        if not floor:
            sys.exit(f"These wings import each other in a circle: {', '.join(sorted(left))}.")
        house.append(floor)
        left = {wing: below for wing, below in left.items() if wing not in floor}
    return house


def rooms(wing: str, files: list[Path]) -> list[str]:
    """List the files of a wing, or the folders that it has inside."""
    names = {file.relative_to(PACKAGE / wing).parts[0] for file in files if (PACKAGE / wing).is_dir()}
    return sorted(name.removesuffix(".py") + ("" if name.endswith(".py") else "/") for name in names - {"__init__.py"})


def table(house: list[list[str]], files: dict[str, list[Path]], arrows: dict[str, set[str]]) -> str:
    """The map as a Markdown table, from the top floor down."""
    rows = ["| floor | wing | rooms | imports |", "|---:|---|---|---|"]
    for floor, names in reversed(list(enumerate(house))):
        for wing in names:
            cells = [", ".join(f"`{name}`" for name in rooms(wing, files[wing])), ", ".join(sorted(arrows[wing]))]
            rows.append(f"| {floor} | **{wing}** | {cells[0]} | {cells[1]} |")
    return "\n".join(rows) + "\n"


def draw(house: list[list[str]], files: dict[str, list[Path]], arrows: dict[str, set[str]]) -> None:
    """Draw the house into `PICTURE`."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    rcParams["svg.hashsalt"] = "bt_hf"  # the same file for the same house
    figure = Figure(figsize=(11, 1.75 * len(house)), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 12)
    axes.set_ylim(-0.1, 2 * len(house) - 0.4)
    axes.axis("off")
    middles: dict[str, tuple[float, float]] = {}
    for floor, names in enumerate(house):
        width = 12 / len(names)
        for place, wing in enumerate(names):
            left, bottom = place * width + 0.15, 2.0 * floor
            box = FancyBboxPatch((left, bottom), width - 0.3, 1.2, "round,pad=0.05", zorder=2)
            box.set(facecolor="#f2f5f9", edgecolor="#0072B2")
            axes.add_patch(box)
            axes.text(left + 0.1, bottom + 1.0, wing, weight="bold", va="center", zorder=4)
            text, line = [], ""
            for name in rooms(wing, files[wing]):
                if len(line) + len(name) > 9.2 * width:
                    text, line = [*text, line], ""
                line += name + "  "
            listed = "\n".join([*text, line])
            axes.text(left + 0.1, bottom + 0.8, listed, fontsize=7.5, va="top", color="#444444", zorder=4)
            middles[wing] = (left + width / 2 - 0.15, bottom)
    for wing, below in arrows.items():
        for other in sorted(below):  # the same file for the same house
            (x, y), (to_x, to_y) = middles[wing], middles[other]
            style = {"arrowstyle": "->", "color": "#767676", "lw": 0.8}
            # Behind the boxes: an arrow that passes a floor hides nothing.
            axes.annotate("", (to_x, to_y + 1.27), (x, y - 0.06), arrowprops=style, zorder=1)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if docs/architecture.md is out of date")
    args = parser.parse_args()
    files = wings()
    arrows = {wing: imports(found, set(files)) - {wing} for wing, found in files.items()}
    house = floors(arrows)
    page = PAGE.read_text(encoding="utf-8")
    renewed = MAP.sub(lambda match: table(house, files, arrows), page)
    if args.check:
        sys.exit(0 if page == renewed else f"{PAGE.name} is out of date: run `python docs/draw_architecture.py`.")
    PAGE.write_text(renewed, encoding="utf-8")
    draw(house, files, arrows)


if __name__ == "__main__":
    main()
