"""Memory while training on a stream: does it stay flat over many rows?

    python examples/benchmarks/streaming.py                       # rewards
    python examples/benchmarks/streaming.py --trainer lora --rows 4000

Random pairs are written to Parquet files in a temporary folder, and trained on with the models of `examples/emoji/`.
Every tenth of the rows it prints the process's resident memory, and in the end the largest against that after the
first tenth, when everything has been loaded.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from datasets import Dataset, disable_progress_bars
from PIL import Image
from transformers import TrainerCallback

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, load_preference_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from emoji import DIFFUSION_FOLDER
from pretrain_clip import CLIP_FOLDER

BATCH = 20


class Memory(TrainerCallback):
    """Resident memory (MB) after so many rows."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: dict[int, float] = {}
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = state.global_step * BATCH
        if rows % self.every == 0:
            self.seen[rows] = psutil.Process().memory_info().rss / 1e6
            print(
                f"{rows:6d} rows  {self.seen[rows]:7.1f} MB  {rows / (time.perf_counter() - self.start):6.1f} rows/s"
            )


def write_pairs(folder: Path, rows: int, shards: int, side: int) -> float:
    """Parquet files of random pictures. Returns their size (MB)."""
    generator = np.random.default_rng(0)

    def picture() -> bytes:
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG")
        return file.getvalue()

    def pairs(count: int) -> Iterator[dict[str, Any]]:
        for _ in range(count):
            yield {"prompt": "red apple", "chosen": picture(), "rejected": picture()}

    for shard in range(shards):
        data = Dataset.from_list(list(pairs(rows // shards)))
        data.to_parquet(folder / f"part-{shard:03d}.parquet", batch_size=100)
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=["reward", "lora"], default="reward")
    parser.add_argument("--rows", type=int, default=10_000, help="a multiple of 1000")
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--workers", type=int, default=0, help="of the data loader; their memory is not counted")
    options = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "pairs"
        data.mkdir()
        size = write_pairs(data, options.rows, options.shards, options.side)
        print(f"{options.rows} pairs, {size:.0f} MB in {options.shards} files")
        arguments: dict[str, Any] = {
            "output_dir": f"{scratch}/out",
            "max_steps": options.rows // BATCH,
            "per_device_train_batch_size": BATCH,
            "dataloader_num_workers": options.workers,
            "logging_steps": 1_000_000,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        pairs = load_preference_pairs(data, streaming=True).shuffle(seed=0, buffer_size=100)
        memory = Memory(options.rows // 10)
        if options.trainer == "reward":
            reward_args = BradleyTerryConfig(**arguments)
            BradleyTerryTrainer(CLIP_FOLDER, reward_args, train_dataset=pairs, callbacks=[memory]).train()
        else:
            from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer

            lora_args = PreferenceLoRAConfig(**arguments)
            PreferenceLoRATrainer(DIFFUSION_FOLDER, lora_args, train_dataset=pairs, callbacks=[memory]).train()
    first, *_ = memory.seen.values()
    print(f"largest after the first tenth: {max(memory.seen.values()) / first:.3f} of what it was then")


if __name__ == "__main__":
    main()
