"""Two bases and adapters trained on them, made once."""

import shutil
from pathlib import Path

import pytest
from peft import LoraConfig
from PIL import Image

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.diffusion.families.base import find_family
from hub_published import BASE, PIPELINE, QUIET
from hub_server import Hub
from tiny_models import red_pairs, save
from tiny_pipelines import build as build_pipeline
from tiny_pipelines import save as save_pipeline
from tiny_trainers import make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases and adapters trained on them: `tiny-clip`, `my-taste`, `tiny-sd`, `my-taste-lora`."""
    folder = tmp_path_factory.mktemp("made")
    args = BradleyTerryConfig(str(folder / "my-taste"), **QUIET)
    trainer = BradleyTerryTrainer(save(folder / "tiny-clip"), args, red_pairs(8), red_pairs(4, seed=1))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    Image.new("RGB", (8, 8)).save(folder / "my-taste" / "reliability.png")
    (folder / "my-taste" / ".cache").mkdir()
    (folder / "my-taste" / ".cache" / "secret.json").write_text("{}")
    (folder / "my-taste" / "notes.txt").write_text("not of the contract")

    save_pipeline(folder / "tiny-sd", "sd")
    layers = find_family(build_pipeline("sd")).target_modules
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=layers)
    lora = make(folder / "lora", str(folder / "tiny-sd"), peft=config)
    (folder / "my-taste-lora").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "my-taste-lora" / "before_after.png")
    lora.save_model(str(folder / "my-taste-lora"))
    return folder


@pytest.fixture
def bases(hub: Hub, made: Path) -> None:
    """The bases, published by somebody else's tools."""
    hub.put(BASE, made / "tiny-clip")
    hub.put(PIPELINE, made / "tiny-sd")


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of the reward that a test may spoil."""
    return Path(shutil.copytree(made / "my-taste", tmp_path / "my-taste"))
