"""`PreferenceLoRATrainer` on a tiny pipeline, as many tests need it."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file

from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer
from tiny_models import red_pairs
from tiny_pipelines import PIPELINES, SIZE, build

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "resolution": SIZE[0]}


def make(
    tmp_path: Path,
    pipeline: Any = "sd",
    pairs: Dataset | None = None,
    evaluation: Dataset | None = None,
    peft: Any = None,
    **options: Any,
) -> PreferenceLoRATrainer:
    """A trainer on a fresh tiny pipeline, with a learning rate at which a few steps show."""
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
    if options.get("cache_latents", True):
        defaults["cache_dir"] = str(tmp_path / "latents")
    args = PreferenceLoRAConfig(str(tmp_path / "out"), **{**QUIET, **defaults, **options})
    model = build(pipeline) if isinstance(pipeline, str) and pipeline in PIPELINES else pipeline
    pairs = red_pairs(8) if pairs is None else pairs
    return PreferenceLoRATrainer(model, args, train_dataset=pairs, eval_dataset=evaluation, peft_config=peft)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logged(trainer: PreferenceLoRATrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
