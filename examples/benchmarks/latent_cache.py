"""Measure the caches in files as data grow: time, disk and memory, up to a million rows.

    python examples/benchmarks/latent_cache.py                    # latents and embeddings of a pipeline
    python examples/benchmarks/latent_cache.py --of reward        # frozen features of a CLIP
    python examples/benchmarks/latent_cache.py --rows 100 1000 10000 100000

Rows are synthetic: two images of noise of 64 px, and a prompt that no other row has, which lie in a file as a dataset
from the Hub does. Each number of rows has a process of its own, since a peak of memory never falls. The encoders are
those of the emoji domain; for others, seconds and bytes are other ones, but grow in the same way. Measured is making a
trainer with `cache_dir`, with all that it does to the rows: checks, counting prompts that are too long, encoding. The
loading of the model is in it too, the same for any number of rows. Memory is what the process holds of its own: pages
of mapped files, which the system takes back when it needs them, don't count. The table is written to
`docs/results/latent_cache_OF.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import timing
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceLoRAConfig, PreferenceLoRATrainer
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER
from lora_step import Watch
from results import Report, make_parser

SIZE, BATCH, MILLION = 64, 16, 1_000_000


def rows(count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        chosen, rejected = (PILImage.fromarray(one).resize((SIZE, SIZE), 0) for one in pixels)
        yield {"prompt": f"drawing number {index}", "chosen": chosen, "rejected": rejected}


TRAINERS = {
    "lora": (PreferenceLoRATrainer, PreferenceLoRAConfig, DIFFUSION_FOLDER),
    "reward": (BradleyTerryTrainer, BradleyTerryConfig, CLIP_FOLDER),
}


def measure(of: str, count: int, folder: Path) -> None:
    """Print the cost of `count` rows, as JSON."""
    columns = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    pairs = Dataset.from_generator(rows, columns, cache_dir=str(folder), gen_kwargs={"count": count})
    trainer, config, model = TRAINERS[of]
    cache = folder / "cache"

    def store(pairs: Dataset, cache: Path) -> Any:
        """Return the rows that the trainer reads its batches from."""
        args = config(str(folder / "out"), cache_dir=str(cache), use_cpu=True, disable_tqdm=True, report_to="none")
        return trainer(str(model), args, train_dataset=pairs).train_dataset

    store(pairs.select(range(8)), folder / "first")  # a first batch allocates memory of its own
    before = Watch(mapped=False)
    held = before.stop()
    building_memory = Watch(mapped=False)
    began = time.perf_counter()
    cached = store(pairs, cache)
    building = time.perf_counter() - began
    grown = (building_memory.stop() - held) * 1e9
    began = time.perf_counter()
    store(pairs, cache)
    finding = time.perf_counter() - began
    order = np.random.default_rng(0).integers(count, size=(50, BATCH)).tolist()
    began = time.perf_counter()
    for indices in order:
        cached.collate(cached.__getitems__(indices))
    reading = (time.perf_counter() - began) / len(order)
    size = sum(path.stat().st_size for path in cache.rglob("*.arrow"))
    print(json.dumps({"build": building, "find": finding, "read": reading, "bytes": size, "memory": grown}))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000], help="at least two, the largest last")
    parser.add_argument(
        "--of", choices=TRAINERS, default="lora", help="trainer of the cache: of a LoRA or of a reward"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.rows) < 2:
        parser.error("--rows needs at least two numbers, for the line through the last two")
    timing.quiet()
    if args.child:
        measure(args.of, int(args.child[0]), Path(args.child[1]))
        return
    with Report.of_script(__file__, parser, args, name=f"latent_cache_{args.of}") as report:
        tabulate(report, args.of, args.rows)


def tabulate(report: Report, of: str, counts: list[int]) -> None:
    """Measure each number of rows in a process of its own, and draw the straight line through the last two."""
    columns = ["building, s", "finding again, s", "files, MB", "memory grown by, MB", f"a batch of {BATCH}, ms"]
    formats = [",.1f", ",.2f", ",.0f", ",.0f", ".1f"]
    title = f"The cache of a {'preference LoRA' if of == 'lora' else 'reward'}, by rows"
    found: list[dict[str, float]] = []
    rows: list[list[str | float | None]] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--of", of, "--child", str(count), folder]
            found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
        rows.append([f"{count:,}", *cells(found[-1])])
        report.table("rows", title, columns, rows, formats)
    few, many = found[-2:]
    further = counts[-1] - counts[-2]
    each = {name: (many[name] - few[name]) / further for name in few}
    straight = {name: many[name] + (MILLION - counts[-1]) * each[name] for name in few}
    rows.append([f"{MILLION:,}, by a straight line through the last two", *cells(straight)[:-1], None])
    report.table("rows", title, columns, rows, formats)
    row = [1000 * each["build"], 1000 * each["find"], each["bytes"], each["memory"]]
    columns = ["to build, ms", "to find again, ms", "bytes on disk", "bytes of memory"]
    report.table("each", "Each further row", columns, [[of, *row]], [".2f", ".3f", ",.0f", ",.0f"])


def cells(found: dict[str, float]) -> list[float]:
    """Return the cells of a row of the table."""
    size, grown = found["bytes"] / 1e6, found["memory"] / 1e6
    return [found["build"], found["find"], size, grown, 1000 * found["read"]]


if __name__ == "__main__":
    main()
