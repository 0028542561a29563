"""Conditions of every test: no network, few threads, the same random numbers."""

import os

# Before transformers and datasets are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# The models are tiny: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute alike on every machine: as on one without bfloat16, where a test does not ask for it."""
    monkeypatch.setattr("bt_hf.diffusion.pipeline_config.multiplies_bfloat16", lambda use_cpu: False)
