"""What the caches in files cost as data grow: time, disk and memory, and what a million rows take.

    python examples/benchmarks/latent_cache.py                    # latents and embeddings of a pipeline
    python examples/benchmarks/latent_cache.py --of reward        # frozen features of a CLIP
    python examples/benchmarks/latent_cache.py --rows 100 1000 10000 100000

Rows are synthetic: two images of noise of 64 px, and a prompt that no other row has, which lie in a file as a dataset
from the Hub does. Each number of rows has a process of its own, since a peak of memory never falls. The encoders are
those of the emoji domain; for others, seconds and bytes are other ones, but grow in the same way. Measured is making a
trainer with `cache_dir`, with all that it does to the rows: checks, counting prompts that are too long, encoding. The
loading of the model is in it too, the same for any number of rows. Memory is what the process holds of its own: pages
of mapped files, which the system takes back when it needs them, don't count.
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
from lora_step import Watch

import timing
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceLoRAConfig, PreferenceLoRATrainer
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER

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
    """Print what `count` rows took, as JSON."""
    columns = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    pairs = Dataset.from_generator(rows, columns, cache_dir=str(folder), gen_kwargs={"count": count})
    trainer, config, model = TRAINERS[of]
    cache = folder / "cache"

    def store(pairs: Dataset, cache: Path) -> Any:
        """What the trainer reads its batches from."""
        args = config(str(folder / "out"), cache_dir=str(cache), use_cpu=True, disable_tqdm=True, report_to="none")
        return trainer(str(model), args, train_dataset=pairs).train_dataset

    store(pairs.select(range(8)), folder / "first")  # what a first batch allocates
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000], help="at least two, the largest last")
    parser.add_argument(
        "--of", choices=TRAINERS, default="lora", help="whose cache: that of a LoRA's or a reward's trainer"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(args.rows) < 2:
        parser.error("--rows needs at least two numbers, for the line through the last two")
    timing.quiet()
    if args.child:
        measure(args.of, int(args.child[0]), Path(args.child[1]))
        return
    print("| rows | building, s | finding again, s | files, MB | memory grown by, MB | a batch of 16, ms |")
    print("|---:" * 6 + "|", flush=True)
    found = []
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--of", args.of, "--child", str(count), folder]
            found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
        print(line(f"{count:,}", found[-1]), flush=True)
    few, many = found[-2:]
    further = args.rows[-1] - args.rows[-2]
    rate = (MILLION - args.rows[-1]) / further
    straight = {name: many[name] + rate * (many[name] - few[name]) for name in few}
    print(line(f"{MILLION:,}, by a straight line through the last two", {**straight, "read": float("nan")}))
    each = {name: (many[name] - few[name]) / further for name in few}
    print(
        f"\nEach further row: {1000 * each['build']:.2f} ms to build and {1000 * each['find']:.3f} ms to find again, "
        f"{each['bytes']:,.0f} bytes on disk, {each['memory']:,.0f} bytes of memory"
    )


def line(name: str, found: dict[str, float]) -> str:
    read = "" if np.isnan(found["read"]) else f"{1000 * found['read']:.1f}"
    size, grown = found["bytes"] / 1e6, found["memory"] / 1e6
    return f"| {name} | {found['build']:,.1f} | {found['find']:,.2f} | {size:,.0f} | {grown:,.0f} | {read} |"


if __name__ == "__main__":
    main()
