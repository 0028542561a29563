"""Trainings that hardly leave the base say so, and curves begin at the base."""

import logging
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.losses import bradley_terry_loss
from tiny_models import build, red_pairs
from tiny_trainers import logged, make

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
LAYERS = ["text_projection", "visual_projection"]
SLOW = {
    "dora": LoraConfig(r=2, target_modules=LAYERS, use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=LAYERS),
    "ia3": IA3Config(target_modules=LAYERS, feedforward_modules=[]),
    "without a warm start": None,
}


def train(folder: Path, peft_config: PeftConfig | None = None, **options: Any) -> BradleyTerryTrainer:
    model, processor = build(seed=3)
    args = BradleyTerryConfig(str(folder), **{**QUIET, **options})
    pairs = red_pairs(16)
    trainer = BradleyTerryTrainer(
        model, args, train_dataset=pairs, processing_class=processor, peft_config=peft_config
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", SLOW)
def test_rewards_that_hardly_move(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"warm_start": False} if SLOW[name] is None else {}
    train(tmp_path, SLOW[name], max_steps=2, learning_rate=1e-6, **options)
    said = [record.message for record in caplog.records if "Hardly anything was learnt in 2 steps" in record.message]
    assert len(said) == 1
    assert "`learning_rate` (it is 1e-06;" in said[0]


def test_rewards_that_move_are_not_told_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, max_steps=2)
    assert not [record for record in caplog.records if "Hardly anything" in record.message]


def test_loras_that_hardly_move(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, learning_rate=1e-6, max_steps=2).train()
    assert [record for record in caplog.records if "Hardly anything was learnt in 2 steps" in record.message]
    caplog.clear()
    make(tmp_path / "more", learning_rate=1e-1, max_steps=5).train()
    assert not [record for record in caplog.records if "Hardly anything" in record.message]


@pytest.mark.parametrize("options", [{}, {"warm_start": False}, {"full_finetuning": True}], ids=str)
def test_the_log_begins_with_the_base(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=2, **options)
    first = trainer.state.log_history[0]
    assert first["step"] == 0
    margins = trainer.predict(red_pairs(16)).predictions[1]
    expected = bradley_terry_loss(*(trainer.model.logit_scale.new_tensor(values) for values in (margins, [1.0] * 16)))
    assert first["base_loss"] == pytest.approx(expected.mean().item(), abs=1e-3)
    assert first["base_accuracy"] == pytest.approx((margins > 0).mean())


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "hinge"])
def test_the_log_of_a_lora_begins_with_the_base(loss_type: str, tmp_path: Path) -> None:
    """A fresh LoRA is the base: the first step has the base's loss."""
    trainer = make(tmp_path, loss_type=loss_type, max_steps=1)
    trainer.train()
    assert logged(trainer, "base_loss") == [pytest.approx(logged(trainer, "loss")[0], rel=1e-4)]


def test_resumed_trainings_keep_one_beginning(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, max_steps=1, **saving)
    model, processor = build(seed=3)
    args = BradleyTerryConfig(str(tmp_path), **{**QUIET, **saving, "max_steps": 2, "resume_from_checkpoint": "true"})
    trainer = BradleyTerryTrainer(model, args, train_dataset=red_pairs(16), processing_class=processor)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "base_loss" in entry] == [0]


def test_nothing_is_said_at_info_level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(tmp_path, max_steps=3)
    assert not caplog.records
