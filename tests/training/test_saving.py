"""Folder of a trainer: the weights are safe whatever happens to pictures and card."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny_trainers import make

WEIGHTS = {
    *("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
    "out_comfyui.safetensors",  # named after the run
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_of_another_name_replaces_the_file_for_interfaces(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "saved" / "mine.safetensors").write_bytes(b"mine")
    trainer.args.output_dir = str(tmp_path / "Second try (2)")
    trainer.save_model(str(tmp_path / "saved"))
    kept = WEIGHTS - {"out_comfyui.safetensors"} | {"README.md", "mine.safetensors"}
    assert names(tmp_path / "saved") == kept | {"Second-try-2_comfyui.safetensors"}
    assert "(Second-try-2_comfyui.safetensors)" in (tmp_path / "saved" / "README.md").read_text()


def test_without_matplotlib_adapter_sheet_and_card_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    trainer = make(tmp_path, validation_prompts=["a red apple"], validation_images=1, validation_inference_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert names(tmp_path / "saved") >= WEIGHTS | {"README.md", "before_after.png"}
    with Image.open(tmp_path / "saved" / "before_after.png") as sheet:
        assert sheet.width > 64
    assert "before_after.png" in (tmp_path / "saved" / "README.md").read_text()


def test_pictures_that_fail_cost_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "before_after.png").write_bytes(b"half a picture")
        raise RuntimeError("no room for pictures")

    monkeypatch.setattr(trainer, "draw_pictures", fail)
    with caplog.at_level(logging.WARNING, logger="bt_hf.training.saving"):
        trainer.save_model(str(tmp_path / "saved"))
    assert names(tmp_path / "saved") == WEIGHTS | {"README.md"}
    assert "pictures of the card were not drawn: no room for pictures" in caplog.text


def test_a_card_that_fails_comes_after_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path)

    def fail(folder: Path) -> None:
        raise RuntimeError("a fact is missing")

    monkeypatch.setattr(trainer, "write_card", fail)
    with pytest.raises(RuntimeError, match="a fact is missing"):
        trainer.save_model(str(tmp_path / "saved"))
    assert names(tmp_path / "saved") == WEIGHTS
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_validation_that_fails_after_training_costs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, validation_prompts=["a red apple"], validation_images=1, validation_inference_steps=1)
    monkeypatch.setattr(trainer.validation, "draw_after", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING, logger="bt_hf.diffusion.trainer"):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert names(tmp_path / "saved") >= WEIGHTS
    assert "not drawn after training: division by zero" in caplog.text
