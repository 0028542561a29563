"""Script of each process of `training/test_distributed.py`: train a tiny CLIP, and write down how it went."""

import json
import os
import sys
from pathlib import Path

import torch

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from launching import write_threads_at_exit
from tiny_models import build, red_pairs

# Two processes fill the last batches up to 16 rows, with rows that must not count twice.
ROWS = 13
CASES = {
    "cached": {"save_strategy": "steps", "save_steps": 3},
    "uncached": {"cache_features": False},
    "accumulated": {"gradient_accumulation_steps": 2},
}


def train(folder: Path, batch: int, case: str, resume: Path | None = None) -> dict:
    """Train with `batch` rows a step and process, evaluate and save.

    Returns:
        What should not depend on the number of processes.
    """
    options = {"save_strategy": "no", **CASES[case]}
    model, processor = build()
    args = BradleyTerryConfig(
        str(folder),
        per_device_train_batch_size=batch // options.get("gradient_accumulation_steps", 1),
        per_device_eval_batch_size=3,
        num_train_epochs=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **options,
    )
    pairs = red_pairs(
        ROWS, preference=[(0.0, 1.0, 0.5, 0.8)[i % 4] for i in range(ROWS)], weight=[0.2 + i % 5 for i in range(ROWS)]
    )
    # As many as don't divide here either.
    held_out = red_pairs(7, seed=1, preference=[0.0, 1.0, 0.0, 1.0, 1.0, 0.3, 1.0])
    trainer = BradleyTerryTrainer(model, args, train_dataset=pairs, eval_dataset=held_out, processing_class=processor)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    metrics = trainer.evaluate()
    trainer.save_model()
    names = ("loss", "accuracy", "margin", "kl")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "world_size": trainer.accelerator.num_processes,
        "cached": trainer.cache is not None,
        # A last batch may be a tie, of which there is no accuracy.
        "steps": [{name: entry[name] for name in names if name in entry} for entry in logs],
        "metrics": {name: metrics[name] for name in ("eval_accuracy", "eval_log_loss", "eval_base_log_loss")},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    write_threads_at_exit(output)
    for name in CASES:
        facts = train(output / name, batch=int(sys.argv[2]), case=name)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (output / f"{name}-{rank}.json").write_text(json.dumps(facts))
    train(output / "resumed", batch=int(sys.argv[2]), case="cached", resume=output / "cached" / "checkpoint-3")
