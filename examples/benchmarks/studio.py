"""Measure the studio's page in a real browser: from a click to the next picture, with 10,000 images.

    python examples/benchmarks/studio.py

A folder of 10,000 images (500 emoji of `examples/emoji`, 5 different ones a prompt) is opened with the base of the
repository, whose embeddings of the 500 are put into the session's cache, as after an hour of another day. A browser
clicks a thousand times, faster than a person. The time runs from the click until both pictures of the next pair are
decoded and painted, in the browser's own clock. The server's part is the time from the request of a click to its
reply: it writes the click to disk and chooses the next pair, behind the picture that is shown already. A fit follows
it, in another thread: its time is that from its beginning until the taste is there. Memory is measured without a
browser, whose driver would count: a client clicks as fast as it is answered. It needs chromium, the development tools,
and for the memory Linux with glibc. On a machine that is busy with other work, all times are those of that work.
"""

import ctypes
import gc
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from bt_hf import PreferenceScorer
from bt_hf.studio.embeddings import EMBEDDINGS
from results import ROOT, Report, make_parser

sys.path.insert(0, str(ROOT / "tests" / "support"))
from browsing import Served, Visitor, open_browser, serve
from studio_page import Client

BASE = ROOT / "examples" / "icons" / "base"
EMOJI = ROOT / "examples" / "emoji" / "emoji64.parquet"
DISTINCT = 500
LATE = 400  # clicks after which times are told apart
EVERY = 100  # clicks between two looks at the memory
PACE = 0.4  # seconds between a new picture and the click on it: faster than a person who looks at both
# Resolves to milliseconds from the click until the next pair is painted.
CLICKED = """side => new Promise(resolve => {
  const before = document.querySelector('h1').textContent + document.querySelector('.stage img').src;
  const button = document.querySelectorAll('.stage .choice')[side];
  button.addEventListener('click', event => {
    const look = async () => {
      const images = [...document.querySelectorAll('.stage .picture-frame img')];
      const now = document.querySelector('h1')?.textContent + images[0]?.src;
      if (images.length < 2 || now === before) return requestAnimationFrame(look);
      await Promise.all(images.map(image => image.decode()));
      // The second frame begins when the first one, with the pair, is on the screen.
      requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - event.timeStamp)));
    };
    look();
  }, { once: true });
  button.click();
})"""


def draw(count: int) -> list[Image.Image]:
    """Return the first images of the emoji."""
    column = pq.read_table(EMOJI, columns=["image"]).column("image").slice(0, count)
    return [Image.open(io.BytesIO(cell.as_py()["bytes"])).convert("RGB") for cell in column]


def write_images(folder: Path, count: int, drawn: list[Image.Image]) -> None:
    """Write images in fives of a prompt, whose names are in the order of their numbers."""
    files = [io.BytesIO() for _ in drawn]
    for image, file in zip(drawn, files, strict=True):
        image.save(file, "PNG")
    for number in range(count):
        name = f"thing {_letters(number // 5)} {number % 5}.png"
        (folder / name).write_bytes(files[number % len(files)].getvalue())


def fill_cache(session: Path, count: int, drawn: list[Image.Image]) -> None:
    """Embed each of the images once, and write what the studio would have written after embedding all of them."""
    scorer = PreferenceScorer.from_pretrained(str(BASE))
    vectors = scorer.embed_images(drawn)
    numbers = torch.arange(count)
    tensors = {"numbers": numbers, "vectors": vectors[numbers % len(drawn)].contiguous()}
    save_file(tensors, session / EMBEDDINGS, {"model": scorer.digest()})


def _letters(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:05d}")


def measure(count: int, clicks: int) -> dict[str, Any]:
    """Return milliseconds from each click to the next picture, and of what the server does."""
    with tempfile.TemporaryDirectory() as place, served_with(Path(place), count) as served, open_browser() as browser:
        person = Visitor(browser, served.address, viewport={"width": 1280, "height": 800})
        replies: list[float] = []
        person.page.on(
            "requestfinished",
            lambda request: (
                replies.append(request.timing["responseEnd"]) if request.url.endswith("/api/clicks") else None
            ),
        )
        learner = served.studio.desk.learner
        chosen, shown, fits = timed(served.studio.desk.questions, "pick"), [], {}
        for number in range(clicks):
            person.pair()
            time.sleep(PACE)
            shown.append(person.page.evaluate(CLICKED, number % 2))
            told = learner.told()
            fits[told["clicks"]] = told["fitted_ms"] or 0.0
        while len(served.answers) < clicks:
            time.sleep(0.1)
        person.close()
    # A reply chooses no pair where the queue is full, or several.
    return {"next picture": shown, "reply": replies, "choice": chosen, "fit": list(fits.items())}


def measure_memory(count: int, clicks: int) -> list[tuple[int, float, float]]:
    """Return clicks, resident memory in MB, and that after the allocator has given back what is free."""
    found = []
    with tempfile.TemporaryDirectory() as place, served_with(Path(place), count) as served:
        client = Client(served.address)
        queue = client.get("/api/state")["queue"]
        for number in range(clicks + 1):
            if number % EVERY == 0:
                if number:
                    client.learnt(number, timeout=300.0)
                found.append((number, resident(), resident(trimmed=True)))
            if number < clicks:
                for side in ("left", "right"):
                    client.request("GET", f"/api/images/{queue[0][side]}")
                queue = client.click(f"c{number}", queue[0]["id"], "left" if number % 2 else "right").json["queue"]
    return found


def resident(trimmed: bool = False) -> float:
    """Return the resident memory of this process in MB."""
    if trimmed:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 1e6


@contextmanager
def served_with(place: Path, count: int) -> Iterator[Served]:
    """Serve a folder of so many images, which are embedded already."""
    folder, session, drawn = place / "images", place / "session", draw(DISTINCT)
    folder.mkdir()
    write_images(folder, count, drawn)
    with serve(str(folder), session, str(BASE)):
        pass  # the session is made
    fill_cache(session, count, drawn)
    with serve(str(folder), session, str(BASE)) as served:
        wait_for_embeddings(served, count)
        yield served


def timed(owner: Any, name: str) -> list[float]:
    """Let a method note the milliseconds of each call, in the list that is returned."""
    method, taken = getattr(owner, name), []

    def call(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args)
        finally:
            taken.append(1000 * (time.perf_counter() - began))

    setattr(owner, name, call)
    return taken


def wait_for_embeddings(served: Served, count: int) -> None:
    """Return when all images are embedded: from then on every pair is chosen among all of them."""
    while served.studio.desk.learner.told()["embedded"] < count:
        time.sleep(0.1)


def summary(values: list[float]) -> list[float]:
    """Return median, 95th percentile and maximum."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[max(0, round(0.95 * len(ordered)) - 1)], ordered[-1]]


def report_clicks(report: Report, images: int, clicks: int) -> None:
    """Measure in a browser, and keep the table of times."""
    found = report.run(f"{images} images", lambda: measure(images, clicks))
    fits = [(number, taken) for number, taken in found["fit"] if taken]
    values = {
        "from the click to the next picture": found["next picture"],
        "reply of the server, behind it": found["reply"],
        "choice of a pair, within that": found["choice"],
        "fit, behind it": [taken for _, taken in fits],
    }
    late = {name: taken[LATE:] for name, taken in values.items()}
    late["fit, behind it"] = [taken for number, taken in fits if number > LATE]
    rows = [(name, *summary(taken)) for name, taken in values.items()]
    rows += [(f"{name}, after {LATE} clicks", *summary(taken)) for name, taken in late.items() if taken]
    title = f"{clicks} clicks among {images:,} images, milliseconds"
    report.table("click", title, ["median", "95th percentile", "maximum"], rows, ".0f")


def report_memory(report: Report, images: int, clicks: int) -> None:
    """Measure without a browser, and keep the table of memory."""
    found = report.run(f"{images} images", lambda: measure_memory(images, clicks))
    rows = [(f"{number:,} clicks", *sizes) for number, *sizes in found]
    title = f"Resident memory of the server with {images:,} images, MB"
    report.table("memory", title, ["resident", "without what the allocator keeps"], rows, ".0f")


PARTS = {"click": report_clicks, "memory": report_memory}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--clicks", type=int, default=1000)
    args = parser.parse_args()
    for part in args.parts:
        with Report.of_script(__file__, parser, args, part) as report:
            PARTS[part](report, args.images, args.clicks)


if __name__ == "__main__":
    main()
