"""Script of each process of `diffusion/test_distributed.py`: train tiny preference LoRAs, and write a report."""

import json
import os
import sys
from pathlib import Path

import torch
from trl import unpair_preference_dataset

from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer
from tiny_models import red_pairs
from tiny_pipelines import SIZE, build

# Two processes fill the last batches up to 8 rows, with rows that must not count twice.
ROWS = 7
CASES = {
    "cached": {},
    "samples": {"num_noise_samples": 2},
    "uncached": {"cache_latents": False},
    "kto": {"loss_type": "kto", "beta": 500},
}


def train(folder: Path, batch: int, case: str) -> dict:
    """Train, evaluate and save; returns what should not depend on the number of processes."""
    args = PreferenceLoRAConfig(
        str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=3,
        max_steps=5,
        # Adam and clipping would hide a gradient of another scale, and make much of rounding errors.
        optim="sgd",
        bf16=False,
        max_grad_norm=0.0,
        learning_rate=3e-4,
        warmup_steps=0,
        logging_steps=1,
        num_eval_noise_samples=2,
        resolution=SIZE[0],
        cache_dir=None if case == "uncached" else str(folder / "cache"),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **CASES[case],
    )
    pairs = red_pairs(
        ROWS, preference=[(0.0, 1.0, 0.5, 0.8)[i % 4] for i in range(ROWS)], weight=[0.2 + i % 5 for i in range(ROWS)]
    )
    if case == "kto":
        pairs = unpair_preference_dataset(pairs)
    # 7 rows don't divide: the last process is given rows twice, which must not be counted twice.
    held_out = red_pairs(7, seed=1, preference=[0.0, 1.0, 0.0, 1.0, 1.0, 0.3, 1.0])
    trainer = PreferenceLoRATrainer(build("sd"), args, train_dataset=pairs, eval_dataset=held_out)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    names = ("loss", "accuracy", "margin", "winner_error_change", "loser_error_change")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    measured = ("accuracy", "log_loss", "margin", "winner_error_base", "winner_error_change", "loser_error_change")
    return {
        "world_size": trainer.accelerator.num_processes,
        "beta": trainer.beta,
        # The first pair may be a tie, of which there is no accuracy.
        "steps": [{name: entry[name] for name in names if name in entry} for entry in logs],
        "metrics": {name: metrics[f"eval_{name}"] for name in measured},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    for name in CASES:
        facts = train(output / name, batch=int(sys.argv[2]), case=name)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (output / f"{name}-{rank}.json").write_text(json.dumps(facts))
