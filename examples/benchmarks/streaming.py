"""Measure memory while training on a stream: does it stay flat over many rows?

    python examples/benchmarks/streaming.py                       # rewards
    python examples/benchmarks/streaming.py --trainer lora --rows 4000

Random pairs are written to Parquet files in a temporary folder, and trained on with the models of `examples/emoji/`.
Every tenth of the rows it prints the process's resident memory, and the same against that after the first tenth, when
everything has been loaded. The table is written to `docs/results/streaming_TRAINER.json`.
"""

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
from results import Report, make_parser

BATCH = 20


class Memory(TrainerCallback):
    """Report the resident memory (MB) every so many rows."""

    def __init__(self, report: Report, title: str, every: int) -> None:
        self.report, self.title, self.every = report, title, every
        self.seen: list[list[Any]] = []
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = state.global_step * BATCH
        if rows % self.every == 0:
            held = psutil.Process().memory_info().rss / 1e6
            first = self.seen[0][1] if self.seen else held
            self.seen.append([f"{rows:,} rows", held, held / first, rows / (time.perf_counter() - self.start)])
            columns = ["resident memory, MB", "times that after the first tenth", "rows a second"]
            self.report.table("memory", self.title, columns, self.seen, [".0f", ".3f", ".1f"])


def write_pairs(folder: Path, rows: int, shards: int, side: int) -> float:
    """Write Parquet files of random pictures; return their size (MB)."""
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
    parser = make_parser(__doc__)
    parser.add_argument("--trainer", choices=["reward", "lora"], default="reward")
    parser.add_argument("--rows", type=int, default=10_000, help="a multiple of 1000")
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--workers", type=int, default=0, help="of the data loader; their memory is not counted")
    options = parser.parse_args()
    disable_progress_bars()
    report = Report.of_script(__file__, parser, options, name=f"streaming_{options.trainer}")
    with report, tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "pairs"
        data.mkdir()
        size = write_pairs(data, options.rows, options.shards, options.side)
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
        title = f"{options.rows:,} pairs, {size:.0f} MB in {options.shards} files"
        memory = Memory(report, title, options.rows // 10)
        if options.trainer == "reward":
            reward_args = BradleyTerryConfig(**arguments)
            BradleyTerryTrainer(CLIP_FOLDER, reward_args, train_dataset=pairs, callbacks=[memory]).train()
        else:
            from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer

            lora_args = PreferenceLoRAConfig(**arguments)
            PreferenceLoRATrainer(DIFFUSION_FOLDER, lora_args, train_dataset=pairs, callbacks=[memory]).train()


if __name__ == "__main__":
    main()
