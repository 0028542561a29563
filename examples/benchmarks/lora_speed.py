"""Measure what makes the training of a preference LoRA faster, each thing in a row of its own, in one run.

    python examples/benchmarks/lora_speed.py                      # what each thing gives
    python examples/benchmarks/lora_speed.py --parts arguments batch size rank

The pipeline is random and of the layout of Stable Diffusion: a UNet of 71 M parameters, images of 256 px, 4 pairs a
step, a LoRA of rank 8. The first row stands for a training script such as diffusers' own for Diffusion-DPO: the
formula of the paper in float32, with images and prompts encoded at every step (`straight_loop` of `lora_step.py`).
Every row below keeps what the rows above it have brought, that of bf16 only where the device multiplies in it
natively; the other parts are in bf16 only there. Rows take turns of a few steps, and medians are compared. What is
spent once, before the first step or in it, is printed by itself, with how long it takes to earn it back. Each part
writes `docs/results/lora_speed_PART.json`.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DDIMScheduler, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import lora_step
import timing
from lora_step import bare, straight_loop, train
from results import Report, make_parser
from taste import preference_pairs

PAIRS, SIZE, ROUNDS, DRAWS = 4, 256, 3, 8
STRAIGHT, ENCODED = "straight loop, fp32", "trainer: images and prompts encoded once"
KNOWN, COMPILED = "+ errors of the base computed once", "+ torch_compile"
# Each on top of those above it; "+ bf16" is the trainer's default where the device has it.
ROWS: dict[str, dict[str, Any]] = {
    ENCODED: {"channels_last": False},
    "+ channels-last": {"channels_last": True},
    "+ bf16": {"bf16": True},
    KNOWN: {"num_noise_samples": 1},  # in the few steps of a turn no pair meets more; a step costs the same with more
    COMPILED: {"torch_compile": True},
}


def save_pipeline(folder: Path) -> None:
    """Save a random pipeline whose UNet has 71 M parameters."""
    torch.manual_seed(0)
    lora_step.save_random(
        folder,
        text={"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
        vae={"block_out_channels": [32, 64, 128, 128], "layers_per_block": 1, "sample_size": SIZE},
        unet=UNet2DConditionModel(
            sample_size=SIZE // 8,
            block_out_channels=[128, 256, 512],
            layers_per_block=2,
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            cross_attention_dim=256,
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
    )


def options(pairs: int = PAIRS, **others: Any) -> dict[str, Any]:
    return {"per_device_train_batch_size": pairs, "resolution": SIZE} | others


def things(
    report: Report, model: Path, scratch: Path, args: argparse.Namespace, rows: dict[str, dict[str, Any]] = ROWS
) -> None:
    """Add one thing after another."""
    pairs = preference_pairs("fluent", 2 * PAIRS)  # two steps a pass: each pair comes again within a turn
    builds: dict[str, timing.Build] = {
        STRAIGHT: partial(straight_loop, model, pairs, False, PAIRS, SIZE, channels_last=False),
        "bare: two forwards, a backward, fp32": partial(bare, model, False, False, PAIRS, channels_last=False),
    }
    chosen: dict[str, Any] = {}
    for name, more in rows.items():
        left_out = args.no_compile and "torch_compile" in more or more.get("bf16") and not timing.BF16
        if not left_out:
            chosen = chosen | more
            builds[name] = partial(train, model, pairs, scratch, **options(**chosen))
    turns, building = timing.build(builds)
    seconds = timing.compare(turns, args.rounds)
    title = f"What makes steps faster, {PAIRS} pairs a step"
    timing.tabulate(report, "rates", title, seconds, PAIRS, STRAIGHT, timing.peaks(builds))
    once(report, turns, building, seconds, pairs)


def once(
    report: Report, turns: dict[str, Any], building: dict[str, float], seconds: dict[str, float], pairs: Dataset
) -> None:
    """Print the seconds that are spent once, and after how long faster steps have earned them back."""
    names = list(seconds)
    above = dict(zip(names[1:], names, strict=False))
    # The next trainer loads the same pipeline, but finds what this one has encoded.
    encoding = building[ENCODED] - building[names[names.index(ENCODED) + 1]]
    errors = (turns[KNOWN].before - turns[above[KNOWN]].before) * DRAWS
    costs = [
        ("encoding, against the straight loop", encoding, ENCODED, STRAIGHT),
        (f"errors of the base for {DRAWS} noise samples, against new noise", errors, KNOWN, above[KNOWN]),
        ("both, and the other rows up to there, against the straight loop", encoding + errors, KNOWN, STRAIGHT),
    ]
    if COMPILED in turns:
        costs.append(("compiling", turns[COMPILED].first - seconds[COMPILED], COMPILED, above[COMPILED]))
    rows: list[list[str | float]] = []
    for name, cost, fast, slow in costs:
        saved = seconds[slow] - seconds[fast]  # in each step
        if saved <= 0:
            rows.append([name, cost, "never", "never"])
            continue
        steps = cost / saved
        passes = "" if fast == COMPILED else f"{steps * PAIRS / len(pairs):.1f}"
        rows.append([name, cost, f"{steps:.0f}", passes])
    columns = ["seconds", "earned back after steps", "after passes over the pairs"]
    report.table("once", f"Spent once, for {len(pairs)} pairs", columns, rows, ".1f")


def sweep(
    report: Report,
    model: Path,
    scratch: Path,
    args: argparse.Namespace,
    title: str,
    rows: dict[str, dict[str, Any]],
    pairs: int | dict[str, int] = PAIRS,
    reference: str | None = None,
) -> None:
    """Compare steps of trainers with other options, by default with those of the first row."""
    data = preference_pairs("fluent", 32)
    turns = {name: train(model, data, scratch, **options(**chosen)) for name, chosen in rows.items()}
    seconds = timing.compare(turns, args.rounds)
    timing.tabulate(report, "rates", title, seconds, pairs, reference or next(iter(rows)))


def batch(report: Report, model: Path, scratch: Path, args: argparse.Namespace) -> None:
    """Compare pairs a step."""
    counts = {f"{count} pairs a step": count for count in (1, 4, 16)}
    rows = {name: {"pairs": count, "bf16": timing.BF16} for name, count in counts.items()}
    sweep(report, model, scratch, args, f"Pairs a step, {timing.PRECISION}", rows, counts)


def size(report: Report, model: Path, scratch: Path, args: argparse.Namespace) -> None:
    """Compare resolutions."""
    rows = {f"{side} px": {"pairs": 2, "bf16": timing.BF16, "resolution": side} for side in (128, 256, 384)}
    sweep(report, model, scratch, args, f"Resolution, 2 pairs a step, {timing.PRECISION}", rows, 2, "256 px")


def rank(report: Report, model: Path, scratch: Path, args: argparse.Namespace) -> None:
    """Compare ranks of the LoRA."""
    rows = {f"rank {value}": {"bf16": timing.BF16, "lora_r": value} for value in (4, 8, 32, 128)}
    sweep(report, model, scratch, args, f"Rank, {PAIRS} pairs a step, {timing.PRECISION}", rows, reference="rank 8")


def arguments(report: Report, model: Path, scratch: Path, args: argparse.Namespace) -> None:
    """Compare options of TrainingArguments, each alone: most of them save memory, not time."""
    rows: dict[str, dict[str, Any]] = {
        "the trainer's defaults, fp32": {},
        **({"bf16": {"bf16": True}} if timing.BF16 else {}),
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "optim adamw_torch (not fused)": {"optim": "adamw_torch"},
        "optim adafactor": {"optim": "adafactor"},
    }
    sweep(report, model, scratch, args, f"Options, each alone, {PAIRS} pairs a step", rows)


PARTS = {"things": things, "arguments": arguments, "batch": batch, "size": size, "rank": rank}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["things"])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each")
    parser.add_argument("--steps", type=int, default=3, help="in a turn, of which the first is not counted")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch_compile, which takes minutes")
    args = parser.parse_args()
    timing.quiet()
    lora_step.STEPS = args.steps
    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as scratch:
        save_pipeline(Path(model))
        for part in args.parts:
            with Report.of_script(__file__, parser, args, part) as report:
                PARTS[part](report, Path(model), Path(scratch), args)


if __name__ == "__main__":
    main()
