"""Script of each process of `training/test_streaming.py`: train or evaluate on streams, and write down how it went."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from bt_hf import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PreferenceLoRAConfig,
    PreferenceLoRATrainer,
    load_preference_pairs,
)
from bt_hf.cli.lora import unpair
from launching import write_threads_at_exit
from tiny_models import build as build_clip
from tiny_pipelines import SIZE
from tiny_pipelines import build as build_pipeline

COMMON = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
}


def make(kind: str, folder: Path, data: Path, **options: object) -> BradleyTerryTrainer | PreferenceLoRATrainer:
    """A trainer of a tiny model on a stream of the files in `data`."""
    pairs = load_preference_pairs(data, streaming=True).shuffle(seed=0, buffer_size=4)
    options = {**COMMON, "save_strategy": "no", **options}
    if kind == "reward":
        model, processor = build_clip()
        args = BradleyTerryConfig(str(folder), warm_start=False, **options)
        return BradleyTerryTrainer(model, args, train_dataset=pairs, processing_class=processor)
    if kind == "kto":
        pairs, options = unpair(pairs), {**options, "loss_type": "kto"}
    args = PreferenceLoRAConfig(str(folder), resolution=SIZE[0], beta=500, bf16=False, **options)
    return PreferenceLoRATrainer(build_pipeline("sd"), args, train_dataset=pairs)


def measure(trainer: BradleyTerryTrainer | PreferenceLoRATrainer, data: Path) -> dict:
    """Evaluate on a stream of the files in `data`: the metrics, and the margins behind them."""
    metrics = trainer.evaluate(load_preference_pairs(data, streaming=True))
    return {**metrics, "margins": trainer.last_evaluation["margins"].tolist()}


def follow(trainer: BradleyTerryTrainer | PreferenceLoRATrainer) -> list[list]:
    """Fills with [prompt, weight, pass] of each row that the trainer's loss sees."""
    seen: list[list] = []
    loss, collate = trainer.compute_loss, trainer.data_collator

    def collate_with_prompts(rows: list[dict]) -> dict:
        return {**collate(rows), "prompts": [row["prompt"] for row in rows]}

    def compute_loss(model: torch.nn.Module, inputs: dict, *args: object, **kwargs: object) -> torch.Tensor:
        prompts, weights = inputs.pop("prompts"), inputs["weight"].tolist()
        seen.extend(
            [prompt, weight, trainer.position.epochs_completed]
            for prompt, weight in zip(prompts, weights, strict=True)
        )
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss, trainer.data_collator = compute_loss, collate_with_prompts
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, data = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    write_threads_at_exit(output)
    # Python 3.11 may hang in a worker that is forked while a thread of gloo, which drops its last tensor, is in it.
    os.register_at_fork(before=lambda: time.sleep(0.1))
    for case in json.loads(sys.argv[3]):
        name = case["name"]
        if "evaluate" in case:
            trainer = make(case["kind"], output / name, data / case["evaluate"][0], **case["options"])
            facts = {found: measure(trainer, data / found) for found in case["evaluate"]}
        else:
            trainer = make(case["kind"], output / name, data / case["data"], **case["options"])
            seen = follow(trainer)
            resume = case.get("resume")
            trainer.train(resume_from_checkpoint=resume and str(output / resume))
            trainer.save_model()
            facts = {"world_size": trainer.accelerator.num_processes, "seen": seen, "steps": trainer.state.global_step}
        (output / f"{name}-{rank}.json").write_text(json.dumps(facts))
