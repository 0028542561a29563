"""Fixtures for `pytest_plugins`: a working directory and a Hub in which code of documents runs as it is written.

The Hub of `hub_server` has tiny models under the names that the code uses.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

import tiny_models
import tiny_pipelines
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceLoRAConfig, PreferenceLoRATrainer
from bt_hf.data.clicks import CLICKS, FORMAT, IMAGES, SESSION
from bt_hf.training.config import PreferenceConfig
from hub_server import Hub

CLIP, DIFFUSION = "openai/clip-vit-base-patch32", "stable-diffusion-v1-5/stable-diffusion-v1-5"
STEPS = 4
PHOTOS = ("a", "b", "c", "first", "second")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models in the place of published ones."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save(folder / CLIP)
    tiny_pipelines.save(folder / DIFFUSION)
    return folder


@pytest.fixture
def workplace(
    models: Path, hub: Hub, online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Prepare a working directory for a text: the models on the Hub, and on the disk what the text does not write."""
    for name in (CLIP, DIFFUSION):
        hub.put(name, models / name)
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(PreferenceConfig, "__post_init__", with_few_steps(PreferenceConfig.__post_init__))

    def prepare(text: str) -> Path:
        write_data(folder)
        if needs("my-taste", text):
            train_reward("my-taste")
        if needs("my-taste-lora", text):
            train_lora("my-taste-lora")
        if "pull_adapter(" in text and "push_adapter(" not in text:
            train_reward("published")
            hub.put("me/my-taste", folder / "published")
        return folder

    return prepare


def with_few_steps(post_init: Callable[[PreferenceConfig], None]) -> Callable[[PreferenceConfig], None]:
    """Limit trainings to the steps that a test has time for."""

    def limited(self: PreferenceConfig) -> None:
        self.max_steps = min(self.max_steps, STEPS)
        post_init(self)

    return limited


def needs(adapter: str, text: str) -> bool:
    """True if a text uses an adapter that it does not train."""
    return f'"{adapter}"' in text and not re.search(rf'Config\(\s*"{adapter}"', text)


def write_data(folder: Path) -> None:
    """Write pairs as a folder with `metadata.csv` and as Parquet files, pictures, and prompts."""
    for name, seed in (("my-clicks", 0), ("more-clicks", 1)):
        write_pairs(folder / name, pairs(12, seed))
    shards = folder / "my-shards"
    shards.mkdir()
    for seed in range(2):
        pairs(8, seed).to_parquet(shards / f"part-{seed}.parquet")
    (folder / "photos").mkdir()
    for seed, name in enumerate(PHOTOS):
        picture = tiny_models.picture((40 * seed, 200 - 30 * seed, 90), seed, tiny_pipelines.SIZE)
        picture.save(folder / f"{name}.png")
        picture.save(folder / "photos" / f"{name}.png")
    (folder / "prompts.txt").write_text("a red apple\nan old house\n")
    write_session(folder / "my-photos-clicks")


def pairs(count: int, seed: int) -> Dataset:
    """Pairs as large as the tiny pipeline draws."""

    def enlarge(row: dict) -> dict:
        return {side: row[side].resize(tiny_pipelines.SIZE) for side in ("chosen", "rejected")}

    return tiny_models.red_pairs(count, seed).map(enlarge)


def write_pairs(folder: Path, rows: Dataset) -> None:
    """Write rows as people have them: `metadata.csv`, and the images that it names."""
    folder.mkdir()
    lines = ["prompt,chosen,rejected"]
    for number, row in enumerate(rows):
        names = [f"{number:04}_{side}.png" for side in ("chosen", "rejected")]
        for name, side in zip(names, ("chosen", "rejected"), strict=True):
            row[side].save(folder / name)
        lines.append(",".join([row["prompt"], *names]))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def write_session(folder: Path) -> None:
    """Write a session of the studio with one click."""
    (folder / IMAGES).mkdir(parents=True)
    for number in (0, 1):
        tiny_models.picture((90 * number, 90, 90), number, tiny_pipelines.SIZE).save(folder / IMAGES / f"{number}.png")
    (folder / SESSION).write_text(json.dumps({"format": FORMAT, "source": "photos"}))
    asked = {"asked": "p", "prompt": "a red apple", "left": 0, "right": 1, "kind": "random"}
    lines = [asked, {"click": "c", "pair": "p", "choice": "left"}]
    (folder / CLICKS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_reward(folder: str) -> None:
    """Train a reward for a few steps."""
    args = BradleyTerryConfig(folder, max_steps=STEPS, report_to="none")
    trainer = BradleyTerryTrainer(CLIP, args, train_dataset=pairs(8, 0))
    trainer.train()
    trainer.save_model()


def train_lora(folder: str) -> None:
    """Train a preference LoRA for a few steps."""
    args = PreferenceLoRAConfig(folder, report_to="none")
    trainer = PreferenceLoRATrainer(DIFFUSION, args, train_dataset=pairs(8, 0))
    trainer.train()
    trainer.save_model()
