"""Measure the studio's page in a real browser: from a click to the next picture, with 10,000 images.

    python examples/benchmarks/studio.py

A folder of 10,000 images (64 px emoji of `examples/emoji`, each with a border of its own; 5 a prompt) is opened with
the base of the repository. When all of them are embedded, a browser clicks a hundred times at a person's pace. The
time runs from the click to the first frame after both pictures of the next pair are decoded, in the browser's own
clock. The server's part is the time from the request of a click to its reply: it writes the click to disk and chooses
the next pair, behind the picture that is shown already. It needs chromium and the development tools.
"""

import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageOps

from results import ROOT, Report, make_parser

sys.path.insert(0, str(ROOT / "tests" / "support"))
from browsing import Served, Visitor, open_browser, serve

BASE = ROOT / "examples" / "icons" / "base"
EMOJI = ROOT / "examples" / "emoji" / "emoji64.parquet"
PACE = 0.4  # seconds between a new picture and the click on it: faster than a person who looks at both
# Resolves to milliseconds from the click to the first frame with the next pair.
CLICKED = """side => new Promise(resolve => {
  const before = document.querySelector('h1').textContent + document.querySelector('.stage img').src;
  const button = document.querySelectorAll('.stage .choice')[side];
  button.addEventListener('click', event => {
    const look = async () => {
      const images = [...document.querySelectorAll('.stage .picture-frame img')];
      const now = document.querySelector('h1')?.textContent + images[0]?.src;
      if (images.length < 2 || now === before) return requestAnimationFrame(look);
      await Promise.all(images.map(image => image.decode()));
      requestAnimationFrame(painted => resolve(painted - event.timeStamp));
    };
    look();
  }, { once: true });
  button.click();
})"""


def write_images(folder: Path, count: int) -> None:
    """Write images in fives of a prompt; borders of many colours make each differ from the others."""
    columns = pq.read_table(EMOJI, columns=["image"]).column("image")
    for number in range(count):
        drawn = Image.open(io.BytesIO(columns[number % len(columns)].as_py()["bytes"])).convert("RGB")
        border = (number * 37 % 256, number * 91 % 256, number * 151 % 256)
        ImageOps.expand(drawn, 4, border).save(folder / f"thing {_letters(number // 5)} {number % 5}.png")


def _letters(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:05d}")


def measure(count: int, clicks: int) -> dict[str, Any]:
    """Return milliseconds from each click to the next picture, and of each reply of the server."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        write_images(folder, count)
        with serve(str(folder), Path(place) / "session", str(BASE)) as served, open_browser() as browser:
            wait_for_embeddings(served, count)
            person = Visitor(browser, served.address, viewport={"width": 1280, "height": 800})
            replies: list[float] = []
            person.page.on(
                "requestfinished",
                lambda request: (
                    replies.append(request.timing["responseEnd"]) if request.url.endswith("/api/clicks") else None
                ),
            )
            shown = []
            for number in range(clicks):
                person.pair()
                time.sleep(PACE)
                shown.append(person.page.evaluate(CLICKED, number % 2))
            person.saved(clicks)
            person.close()
    return {"next picture": shown, "reply": replies}


def wait_for_embeddings(served: Served, count: int) -> None:
    """Return when all images are embedded: from then on every pair is chosen among all of them."""
    while (done := served.studio.desk.learner.told()["embedded"]) < count:
        print(f"\r{done} of {count} images embedded", end="", flush=True)
        time.sleep(1)
    print()


def summary(values: list[float]) -> list[float]:
    """Return median, 95th percentile and maximum."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[max(0, round(0.95 * len(ordered)) - 1)], ordered[-1]]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--clicks", type=int, default=100)
    args = parser.parse_args()
    with Report.of_script(__file__, parser, args) as report:
        found = report.run(f"{args.images} images", lambda: measure(args.images, args.clicks))
        rows = [
            ("from the click to the next picture", *summary(found["next picture"])),
            ("reply of the server, behind it", *summary(found["reply"])),
        ]
        title = f"{args.clicks} clicks among {args.images:,} images, milliseconds"
        report.table("click", title, ["median", "95th percentile", "maximum"], rows, ".0f")


if __name__ == "__main__":
    main()
