"""Compare pairs a second in one process and in two, each with one thread.

    python examples/benchmarks/scaling.py

Runs the two example scripts under `accelerate launch` on the emoji models, 16 pairs a step in each process. With two
processes a step sees twice as many pairs; twice as many a second would be perfect. The table is written to
`docs/results/scaling.json`.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER
from results import Report, make_parser
from taste import preference_pairs

EXAMPLES = Path(__file__).parents[1]
RUNS = {
    "train_preference_lora.py": ["--model", str(DIFFUSION_FOLDER), "--learning_rate", "1e-6", "--beta", "2000"],
    "train_reward.py": ["--model", str(CLIP_FOLDER), "--cross_validate", "0", "--cache_features", "false"],
}


def rate(script: str, options: list[str], processes: int, folder: Path, steps: int) -> float:
    """Return pairs a second, as the Trainer counts them."""
    launch = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *(launch if processes > 1 else ["--cpu"])]
    command += [str(EXAMPLES / script), *options, "--dataset", str(folder / "pairs.parquet")]
    command += ["--output_dir", str(folder / f"out-{processes}-{script}"), "--max_steps", str(steps)]
    command += ["--per_device_train_batch_size", "16", "--save_strategy", "no", "--eval_strategy", "no"]
    command += ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    found = re.search(r"train_samples_per_second'?: '?([0-9.e+]+)", done.stdout)
    if f"Processes: {processes} on cpu" not in done.stdout or found is None:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return float(found.group(1))


def main() -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    columns, rows = ["1 process, pairs a second", "2 processes", "times"], []
    with Report.of_script(__file__, parser, args) as report, tempfile.TemporaryDirectory() as folder:
        preference_pairs("fluent", 128).to_parquet(Path(folder) / "pairs.parquet")
        for script, options in RUNS.items():
            one, two = (rate(script, options, count, Path(folder), 24) for count in (1, 2))
            rows.append([script, one, two, two / one])
            report.table("rates", "One process and two", columns, rows, [".1f", ".1f", ".2f"])


if __name__ == "__main__":
    main()
