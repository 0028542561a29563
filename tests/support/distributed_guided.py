"""Script of each process of `diffusion/test_guided_distributed.py`: train a tiny guided LoRA, and write a report."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bt_hf import RewardLoRAConfig, RewardLoRATrainer
from tiny_pipelines import SIZE, build

# Two processes fill the last batches up to 8 rows, with rows that must not count twice.
PROMPTS = [f"a red {thing}" for thing in ("apple", "boat", "house", "bird", "dog", "car", "hat")]


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def train(folder: Path, batch: int) -> dict:
    """Train and save; returns what should not depend on the number of processes."""
    args = RewardLoRAConfig(
        str(folder),
        per_device_train_batch_size=batch,
        max_steps=5,
        # Adam and clipping would hide a gradient of another scale, and make much of rounding errors.
        optim="sgd",
        bf16=False,
        max_grad_norm=0.0,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        num_inference_steps=4,
        reward_samples=6,
        max_anchor=10.0,
        resolution=SIZE[0],
        cache_dir=str(folder / "cache"),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    trainer = RewardLoRATrainer(build("sd"), args, redness, PROMPTS)
    trainer.train()
    trainer.save_model()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "world_size": trainer.accelerator.num_processes,
        "scale": asdict(trainer.scale),
        "steps": [{name: entry[name] for name in ("loss", "reward", "anchor")} for entry in logs],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    facts = train(output, batch=int(sys.argv[2]))
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
