"""Smoke test of the oldest versions that `pyproject.toml` allows, which `make floor` runs in an environment of them.

Docstrings say which older versions fail a test, and why. `make test` includes these tests too.
"""

import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

import bt_hf
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer, load_preference_pairs, plots
from bt_hf.cli import COMMANDS, main
from bt_hf.cli.lora import unpair
from bt_hf.data.formats import PreferenceDataError
from hub_server import Hub
from tiny_models import red_pairs, save
from tiny_pipelines import build as build_pipeline
from tiny_pipelines import draw
from tiny_trainers import adapter, make

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
MODULES = Path(bt_hf.__file__).parent / "evaluate_modules"
pytest_plugins = ["hub_fixtures"]


def reward_trainer(folder: Path, model: str, callbacks: Any = None, **options: Any) -> BradleyTerryTrainer:
    """A trainer of the tiny CLIP: 12 pairs, three steps an epoch."""
    steps = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    args = BradleyTerryConfig(str(folder), **{**QUIET, **steps, **options})
    return BradleyTerryTrainer(model, args, red_pairs(12), red_pairs(8, seed=1), callbacks=callbacks)


def trained(trainer: BradleyTerryTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("base") / "tiny-clip")


class Crash(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_every_public_name_imports() -> None:
    assert all(getattr(bt_hf, name) is not None for name in bt_hf.__all__)


def test_reward_is_trained_saved_loaded_and_scores(clip: str, tmp_path: Path) -> None:
    """Load it with transformers too: with peft 0.19 that gives a random adapter, and only a report says so."""
    trainer = reward_trainer(tmp_path, clip)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    held_out = red_pairs(8, seed=1)
    scorer = PreferenceScorer.from_pretrained(tmp_path)
    margins = [scorer.compare(row["prompt"], row["chosen"], row["rejected"]) for row in held_out]
    assert np.mean(np.array(margins) > 0.5) == pytest.approx(metrics["eval_accuracy"])
    assert metrics["eval_loss"] < 0.9 * metrics["eval_base_log_loss"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    names = {name: name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in saved}
    assert all(torch.equal(loaded[names[name]], value) for name, value in saved.items())
    assert "8 held-out pairs" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_accumulated_batches_train_as_one(tmp_path: Path) -> None:
    """`Trainer.loss_is_scaled_for_ga`: transformers 5.18 divides the loss of a UNet twice, and says nothing."""
    options = {"optim": "sgd", "loss_type": "sft", "max_steps": 1, "max_grad_norm": 0.0}
    sizes = {"whole": (4, 1), "halves": (2, 2)}
    for name, (size, accumulated) in sizes.items():
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = make(tmp_path / name, **options, **batches)
        trainer.train()
        trainer.save_model()
    whole, halves = (adapter(tmp_path / name / "out") for name in sizes)
    moved = [value for name, value in whole.items() if "lora_B" in name]
    assert max(value.abs().max() for value in moved) > 1e-5
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, atol=1e-7, rtol=1e-3)


def test_reward_resumes_to_the_bit(clip: str, tmp_path: Path) -> None:
    """Resume in the second epoch: accelerate 1.6 gives it the rows of the first."""
    whole = trained(reward_trainer(tmp_path / "whole", clip))
    options = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        reward_trainer(tmp_path / "killed", clip, [Crash()], **options).train()
    resumed = reward_trainer(tmp_path / "killed", clip, overwrite_output_dir=True, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    found = dict(resumed.model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_lora_is_trained_resumed_and_drawn_with(tmp_path: Path) -> None:
    """`load_lora_weights` of a folder: diffusers 0.39 refuses in offline mode."""
    options = {"save_strategy": "steps", "save_steps": 1, "validation_prompts": ["a red apple"]}
    trainer = make(tmp_path / "whole", **options)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "whole" / "out"
    assert (folder / "before_after.png").is_file()
    resumed = make(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    resumed.save_model()
    expected, found = adapter(folder), adapter(tmp_path / "resumed" / "out")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    pipeline = build_pipeline("sd")
    before = draw(pipeline)
    pipeline.load_lora_weights(folder)
    assert (draw(pipeline) - before).abs().max() > 1e-3


def test_stream_is_unpaired() -> None:
    """`unpair_preference_dataset` on a stream with more columns: trl 1.6 leaves those at half the length."""
    pairs = red_pairs(3, preference=[1.0, 0.0, 0.25])
    rows = list(unpair(pairs.to_iterable_dataset()))
    assert [row["preference"] for row in rows] == [1.0, 0.0, 0.25] * 2
    assert [row["label"] for row in rows] == [True] * 3 + [False] * 3


def test_pairs_are_read_and_bad_files_named(tmp_path: Path) -> None:
    """A `Path` to save to: fsspec 2024.3 takes text alone."""
    pairs: Dataset = red_pairs(4)
    pairs.save_to_disk(tmp_path / "pairs")
    assert load_preference_pairs(tmp_path / "pairs")["prompt"][:] == pairs["prompt"][:]
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(PreferenceDataError, match="broken.jsonl: cannot be read"):
        load_preference_pairs(tmp_path / "broken.jsonl")


def test_adapter_is_published_and_fetched(clip: str, hub: Hub, online: Path, tmp_path: Path) -> None:
    """Validation of the card: huggingface_hub 2.1 asks huggingface.co, whichever Hub it publishes to."""
    hub.put("me/tiny-clip", Path(clip))
    trainer = reward_trainer(tmp_path / "my-taste", clip)
    trainer.train()
    trainer.save_model()
    bt_hf.push_adapter(tmp_path / "my-taste", "me/my-taste", base_model="me/tiny-clip")
    pulled = PreferenceScorer.from_pretrained(bt_hf.pull_adapter("me/my-taste"))
    row = red_pairs(1)[0]
    expected = PreferenceScorer.from_pretrained(tmp_path / "my-taste").score(row["prompt"], [row["chosen"]])
    np.testing.assert_allclose(pulled.score(row["prompt"], [row["chosen"]]), expected, atol=1e-5)


def test_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own font, where Matplotlib is not installed: Pillow 10.0 has it in one size."""
    plots.plot_training_curve([{"loss": 0.7, "step": 1}, {"loss": 0.5, "step": 2}], tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.width > 100
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    assert plots.contact_sheet([images], [images[::-1]], prompts=["a colour"]).width > 100


def test_evaluate_modules_compute(tmp_path: Path) -> None:
    for folder in (path for path in MODULES.iterdir() if any(path.glob("*.py"))):
        metric = evaluate.load(str(folder), cache_dir=str(tmp_path))
        assert metric.compute(predictions=[1.0, -2.0, 0.5], references=[1.0, 0.0, 1.0])


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_command_helps(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"bt-hf {command} " in capsys.readouterr().out
