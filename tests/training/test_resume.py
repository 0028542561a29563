"""Resuming from a checkpoint that is named in the arguments, as a word, or not at all."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.training.resume import find_checkpoint
from tiny_models import build, red_pairs
from tiny_trainers import make

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "report_to": "none", "disable_tqdm": True}


def reward(folder: Path, **options: object) -> BradleyTerryTrainer:
    model, processor = build("clip")
    evaluation = options.pop("eval_dataset", None)
    args = BradleyTerryConfig(str(folder), **{"per_device_train_batch_size": 4, **STEPS, **options})
    return BradleyTerryTrainer(model, args, red_pairs(16), evaluation, processing_class=processor)


def weights(trainer: BradleyTerryTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer = reward(folder)
    trainer.train()
    trainer.save_model()
    torch.save(weights(trainer), folder / "expected.pt")
    return folder


@pytest.mark.parametrize("word", [True, "true", "True", "checkpoint-2"])
def test_the_arguments_resume_and_end_at_the_same_adapter(whole: Path, tmp_path: Path, word: str | bool) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    trainer = reward(folder, resume_from_checkpoint=str(folder / word) if word == "checkpoint-2" else word)
    seen: list[int] = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (seen.append(trainer.state.global_step), step(*args, **kwargs))[1]
    trainer.train()
    assert seen == [2, 3]
    expected = torch.load(whole / "expected.pt")
    found = weights(trainer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("word", [False, "false", "False", "no"])
def test_a_word_for_no_does_not_lift_the_guard(whole: Path, word: str | bool) -> None:
    with pytest.raises(FileExistsError, match="already holds an adapter"):
        reward(whole, resume_from_checkpoint=word)


@pytest.mark.parametrize("kind", ["reward", "lora"])
def test_a_missing_checkpoint_is_refused_before_the_model_is_loaded(tmp_path: Path, kind: str) -> None:
    run = reward if kind == "reward" else make
    with pytest.raises(FileNotFoundError, match="'nowhere', but there is no such folder"):
        run(tmp_path, resume_from_checkpoint="nowhere")
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        run(tmp_path, resume_from_checkpoint="true")


def test_the_newest_whole_checkpoint_is_taken(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    cut = folder / "checkpoint-3" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, logger="bt_hf.training.resume"):
        assert find_checkpoint(True, folder) == str(folder / "checkpoint-2")
    assert "checkpoint-4 is not a whole checkpoint (it has no trainer_state.json" in caplog.text
    assert "checkpoint-3 is not a whole checkpoint" in caplog.text
    for step in (3, 4):
        with pytest.raises(ValueError, match=f"checkpoint-{step}.*is not a whole checkpoint"):
            find_checkpoint(str(folder / f"checkpoint-{step}"), folder)


def test_a_checkpoint_appears_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = reward(tmp_path)
    seen: list[list[str]] = []
    write = trainer._save_rng_state

    def look(folder: str) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        write(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", look)
    trainer.train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], [f"checkpoint-{n}" for n in (1, 2, 3)]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]


def test_scratch_of_earlier_versions_does_not_stop_resuming(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    for step in (3, 4):  # a kill left it in one, a full disk in the next
        shutil.copytree(folder / "checkpoint-1", folder / f"checkpoint-{step}" / ".saving-abc")
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = reward(folder, resume_from_checkpoint=True)
    trainer.train()
    expected, found = torch.load(whole / "expected.pt"), weights(trainer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(folder.rglob(".saving*"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("length", [0, -100])
def test_a_checkpoint_with_a_cut_file_is_not_whole(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, length: int
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    cut = folder / "checkpoint-4" / name
    cut.write_bytes(cut.read_bytes()[:length])
    with caplog.at_level(logging.WARNING, logger="bt_hf.training.resume"):
        assert find_checkpoint(True, folder) == str(folder / "checkpoint-3")
    assert "checkpoint-4 is not a whole checkpoint" in caplog.text


def test_the_best_checkpoint_keeps_its_name(tmp_path: Path) -> None:
    """Also if it was the one that was just written, and old ones are removed."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "save_total_limit": 1}
    trainer = reward(tmp_path, load_best_model_at_end=True, eval_dataset=red_pairs(4, seed=1), **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.is_dir()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).parent == tmp_path


def test_a_checkpoint_of_another_rank_is_refused_before_a_tensor_is_loaded(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    trainer = reward(tmp_path, resume_from_checkpoint=True, lora_r=4, lora_alpha=4)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"not a checkpoint of this adapter: of .*lora_A.*`lora_r`"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize(
    "extra", ["base_model.model.logit_scale", "base_model.model.text_projection.base_layer.weight"]
)
def test_a_checkpoint_with_tensors_of_the_base_is_refused(whole: Path, tmp_path: Path, extra: str) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{extra}": torch.zeros(())}, file)
    with pytest.raises(ValueError, match="not a checkpoint of this adapter"):
        reward(tmp_path, resume_from_checkpoint=True).train()
