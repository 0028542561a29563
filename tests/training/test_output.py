"""The folder of a run: what can't be written is found before training, and errors name what is left."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceLoRAConfig, PreferenceLoRATrainer
from bt_hf.cli import main
from bt_hf.training.lock import LOCK
from bt_hf.training.output import check_writable
from tiny_models import build, red_pairs
from tiny_trainers import make

QUIET = {"report_to": "none", "disable_tqdm": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
Usage = namedtuple("Usage", "total used free")


def reward(folder: Path, **options: Any) -> BradleyTerryTrainer:
    model, processor = build("clip")
    args = BradleyTerryConfig(str(folder), **{**QUIET, **options})
    return BradleyTerryTrainer(model, args, red_pairs(8), processing_class=processor)


def lora(folder: Path, **options: Any) -> Any:
    return make(folder.parent, **options)  # writes to `out` in it


# --- Found before training ---


@pytest.mark.parametrize("kind", ["reward", "lora"])
@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/bt_hf", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model(tmp_path: Path, kind: str, folder: str) -> None:
    (tmp_path / "file").write_text("in the way")
    options = {"output_dir": str(tmp_path / folder), **QUIET}
    config, trainer = {
        "reward": (BradleyTerryConfig, BradleyTerryTrainer),
        "lora": (PreferenceLoRAConfig, PreferenceLoRATrainer),
    }[kind]
    with pytest.raises(OSError, match=r"`output_dir` '.*' can't be written \(.+\): choose another one"):
        trainer("no-such-model", config(**options), red_pairs(8))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("command", ["reward", "lora"])
def test_the_commands_say_so_before_they_read_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    code = main([command, "--model", "none", "--dataset", "none", "--output_dir", str(tmp_path / "file" / "out")])
    assert code == 2
    error = capsys.readouterr().err
    assert "can't be written (Not a directory)" in error
    assert error.count("\n") == 1


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = reward(tmp_path / "out")
    trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left .* Still intact: the checkpoint '.*checkpoint-3'"):
            reward(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 1))
        with pytest.raises(OSError, match="MB are needed, no space left on device"):
            trainer.train()
    assert not (tmp_path / "out" / LOCK).exists()


def test_the_trial_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "c", 1000)
    assert list(tmp_path.iterdir()) == []


# --- Full while training ---


@pytest.mark.parametrize("kind", ["reward", "lora"])
def test_a_full_disk_at_a_checkpoint_names_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer = reward if kind == "reward" else lora
    whole = make_trainer(tmp_path / "whole" / "out", **options)
    whole.train()
    trainer = make_trainer(tmp_path / "cut" / "out", **options)
    save = torch.save

    def fail(value: Any, file: str) -> None:
        if trainer.state.global_step == 2 and "optimizer" in file:
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        save(value, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="checkpoint of step 2 was not written") as error:
            trainer.train()
    assert "Still intact: the checkpoint" in str(error.value)
    assert "checkpoint-1'" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cut" / "out").iterdir()] == ["checkpoint-1"]
    resumed = make_trainer(tmp_path / "cut" / "out", resume_from_checkpoint=True, **options)
    resumed.train()
    for (name, value), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_a_full_disk_at_the_last_save_keeps_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = reward(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with torch.no_grad():
        next(value for value in trainer.model.parameters() if value.requires_grad).add_(1)
    monkeypatch.setattr(trainer.processing_class, "save_pretrained", full)
    with pytest.raises(OSError, match=r"saved' was not written \(No space left on device\)\. Still intact") as error:
        trainer.save_model(str(tmp_path / "saved"))
    assert "what was saved in" in str(error.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
