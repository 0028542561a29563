"""Draw the pictures of the studio for the documents: a person who likes colour, after their clicks.

    python docs/draw_studio.py

Writes `docs/images/studio.webp` (choosing, with what is learnt beside it) and `studio-taste.webp` (the taste). It
needs chromium and the development tools; `tests/support/browsing.py` opens the page.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from browsing import Served, Visitor, open_browser, serve

IMAGES = Path(__file__).parent / "images"
SIZE = {"width": 1240, "height": 800}


def click(served: Served, person: Visitor, count: int) -> None:
    """Choose the more colourful picture of each pair, at the pace of a person: each click is learnt from."""
    for number in range(1, count + 1):
        left, right = person.pair()
        person.pause()
        person.page.keyboard.press(
            "ArrowLeft" if served.colourfulness(left) > served.colourfulness(right) else "ArrowRight"
        )
        while served.studio.desk.learner.told()["clicks"] < number:
            time.sleep(0.05)
    person.saved(count)


def shoot(person: Visitor, path: Path) -> None:
    """Write what the window shows, as a small WebP."""
    person.page.wait_for_timeout(1000)  # thumbnails, and the fading in of pictures
    Image.open(io.BytesIO(person.page.screenshot())).convert("RGB").save(path, quality=54, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=40)
    parser.add_argument("--output_dir", type=Path, default=IMAGES)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(None, Path(folder) / "session") as served,
        open_browser() as browser,
    ):
        learner = served.studio.desk.learner
        while learner.told()["embedded"] < len(served.studio.desk.pool):
            time.sleep(0.5)
        person = Visitor(browser, served.address, viewport=SIZE, color_scheme="light")
        click(served, person, args.clicks)
        shoot(person, args.output_dir / "studio.webp")
        person.page.get_by_role("link", name="Taste").click()
        person.page.set_viewport_size({"width": 900, "height": 1180})
        shoot(person, args.output_dir / "studio-taste.webp")
        person.close()


if __name__ == "__main__":
    main()
