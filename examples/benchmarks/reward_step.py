"""Measure what a training step of a reward costs beyond its network, and what makes it faster.

    python examples/benchmarks/reward_step.py                            # seconds a step, with and without cache
    python examples/benchmarks/reward_step.py --parts batch arguments    # pairs a step, and TrainingArguments

Compared are:

- bare: forwards without and with the LoRA, one backward, and the optimizer's step, on one batch that lies in memory;
- uncached: `BradleyTerryTrainer.train` from the end of one step to the end of the next, images read and fitted for it;
- cached: the same, with what lies below the first trained layer computed once for each image and prompt.

They take turns of a few steps, and medians are compared. Each part writes `docs/results/reward_step_PART.json`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import timing
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, bradley_terry_loss
from emoji import CLIP_FOLDER
from results import Report, make_parser
from taste import preference_pairs

BATCH, STEPS, ROUNDS = 16, 4, 3
VISION = r"vision_model\.encoder\.layers\.{}\..*(q_proj|v_proj)"
Load = Callable[[], tuple[CLIPModel, CLIPProcessor]]


def vit_b_32() -> tuple[CLIPModel, CLIPProcessor]:
    """Return a random model of the shape of openai/clip-vit-base-patch32, with the emoji tokenizer."""
    tokenizer = CLIPProcessor.from_pretrained(CLIP_FOLDER).tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=special, vision_config={}, projection_dim=512)
    return CLIPModel(config), CLIPProcessor(CLIPImageProcessor(), tokenizer)


def emoji_clip() -> tuple[CLIPModel, CLIPProcessor]:
    return (
        CLIPModel.from_pretrained(CLIP_FOLDER, dtype=torch.float32),
        CLIPProcessor.from_pretrained(CLIP_FOLDER),
    )


MODELS: dict[str, Load] = {"emoji CLIP": emoji_clip, "ViT-B/32 shape": vit_b_32}


def make(load: Load, targets: str | None, pairs: Dataset, scratch: str, **options: Any) -> BradleyTerryTrainer:
    torch.manual_seed(0)
    model, processor = load()
    defaults = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": timing.DEVICE.type == "cpu",  # the Trainer allows bf16 on a CPU only when told so
    }
    args = BradleyTerryConfig(scratch, **defaults | options)
    peft_config = LoraConfig(r=8, target_modules=targets) if targets else None
    return BradleyTerryTrainer(model, args, pairs, processing_class=processor, peft_config=peft_config)


def train(*what: Any, **options: Any) -> timing.Training:
    """Return a turn of a trainer, with the arguments of `make`."""
    return timing.Training(make(*what, **options))


def bare(load: Load, targets: str | None, pairs: Dataset, scratch: str) -> timing.Turn:
    """Return a turn of the network of a trainer without the trainer."""
    trainer = make(load, targets, pairs, scratch, cache_features=False)
    model = trainer.model.to(timing.DEVICE).train()
    inputs = trainer.data_collator([pairs[index] for index in range(BATCH)])
    inputs = {name: value.to(timing.DEVICE) for name, value in inputs.items() if name not in ("preference", "weight")}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)

    def margins() -> torch.Tensor:
        output = model(**inputs)
        chosen, rejected = output.image_embeds.chunk(2)
        return model.logit_scale.exp() * (output.text_embeds * (chosen - rejected)).sum(-1)

    def step() -> None:
        with torch.no_grad(), model.disable_adapter():
            margins()
        bradley_terry_loss(margins(), 1.0).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return timing.repeat(step, STEPS)


def cache(report: Report, args: argparse.Namespace) -> None:
    """Compare steps of 16 pairs with and without the cache."""
    rows: dict[str, tuple[Load, str | None]] = {
        f"{name}, LoRA on both projections": (load, None) for name, load in args.models.items()
    }
    if vit_b_32 in args.models.values():
        rows["ViT-B/32 shape, LoRA on the top 2 of 12 vision layers"] = vit_b_32, VISION.format(r"(10|11)")
        rows["ViT-B/32 shape, LoRA on all vision layers"] = vit_b_32, VISION.format(r"\d+")
    columns = ["bare", "uncached", "cached", "uncached to bare", "uncached to cached", "filling the cache, s"]
    if timing.tells_memory():
        columns += [f"{name}: peak memory, GB" for name in columns[:3]]
    formats = [".4f", ".4f", ".4f", ".2f", ".2f", ".1f", ".2f", ".2f", ".2f"][: len(columns)]
    pairs = preference_pairs("fluent", STEPS * BATCH)
    table: list[list[Any]] = []
    for name, what in rows.items():
        with tempfile.TemporaryDirectory() as scratch:
            builds = {
                "bare": partial(bare, *what, pairs, scratch),
                "uncached": partial(train, *what, pairs, scratch, cache_features=False),
                "cached": partial(train, *what, pairs, scratch),
            }
            turns, building = timing.build(builds)
            seconds = timing.compare(turns, args.rounds)
            memory = timing.peaks(builds).values()
        times = [seconds["uncached"] / seconds[other] for other in ("bare", "cached")]
        table.append([name, *seconds.values(), *times, building["cached"] - building["uncached"], *memory])
        report.table("seconds", f"Seconds of a step of {BATCH} pairs", columns, table, formats)


def batch(report: Report, args: argparse.Namespace) -> None:
    """Compare pairs a step, with the default LoRA on both projections."""
    pairs = preference_pairs("fluent", STEPS * BATCH)
    counts = {
        f"{name}, {kind}, {count} pairs a step": (load, kind == "cached", count)
        for name, load in args.models.items()
        for kind in ("uncached", "cached")
        for count in (1, 4, 16)
    }
    with tempfile.TemporaryDirectory() as scratch:
        turns = {
            name: train(load, None, pairs, scratch, cache_features=cached, per_device_train_batch_size=count)
            for name, (load, cached, count) in counts.items()
        }
        seconds = timing.compare(turns, args.rounds)
    sizes = {name: count for name, (*_, count) in counts.items()}
    timing.tabulate(report, "rates", "Pairs a step", seconds, sizes, next(iter(counts)))


def arguments(report: Report, args: argparse.Namespace) -> None:
    """Compare options of TrainingArguments, each alone, with a LoRA on all vision layers and no cache."""
    name, load = list(args.models.items())[-1]
    pairs = preference_pairs("fluent", STEPS * BATCH)
    alone: dict[str, dict[str, Any]] = {
        f"{name}, the trainer's defaults, fp32": {},
        **({"bf16": {"bf16": True}} if timing.BF16 else {}),
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "torch_compile": {"torch_compile": True},
        "optim adamw_torch (not fused)": {"optim": "adamw_torch"},
    }
    if args.no_compile:
        del alone["torch_compile"]
    with tempfile.TemporaryDirectory() as scratch:
        builds: dict[str, timing.Build] = {
            name: partial(train, load, VISION.format(r"\d+"), pairs, scratch, cache_features=False, **chosen)
            for name, chosen in alone.items()
        }
        seconds = timing.compare(timing.build(builds)[0], args.rounds)
        title = "Options, with a LoRA on all vision layers and no cache"
        timing.tabulate(report, "rates", title, seconds, BATCH, next(iter(alone)), timing.peaks(builds))


PARTS = {"cache": cache, "batch": batch, "arguments": arguments}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["cache"])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each")
    parser.add_argument("--emoji_only", action="store_true", help="leave out the models of ViT-B/32's shape")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch_compile, which takes minutes")
    args = parser.parse_args()
    args.models = {"emoji CLIP": emoji_clip} if args.emoji_only else MODELS
    timing.quiet()
    for part in args.parts:
        with Report.of_script(__file__, parser, args, part) as report:
            PARTS[part](report, args)


if __name__ == "__main__":
    main()
