"""The look at the first step that counts, in trainings that run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from tiny_models import build, red_pairs

PLAIN = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "warm_start": False}


def trained(tmp_path: Path, **kwargs: Any) -> BradleyTerryTrainer:
    options = {"max_steps": 2, "learning_rate": 1e-2, "kl_weight": 0.0, **PLAIN, **kwargs.pop("options", {})}
    model, processor = build()
    trainer = BradleyTerryTrainer(
        model,
        BradleyTerryConfig(str(tmp_path), **options),
        train_dataset=kwargs.pop("pairs", None) or red_pairs(),
        processing_class=processor,
        **kwargs,
    )
    trainer.train()
    return trainer


def test_a_training_that_learns_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path)
    trained(tmp_path, options={"warmup_steps": 1})  # a first step with a learning rate of 0
    trained(tmp_path, options={"full_finetuning": True, "learning_rate": 1e-4})
    assert "first step" not in caplog.text


def test_an_optimizer_of_other_weights_moves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=1e-2)
    trained(tmp_path, optimizers=(other, None))
    assert caplog.text.count("Nothing moved in the first step") == 1


def test_layers_that_the_model_does_not_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An adapted layer whose output is detached."""
    model, processor = build()
    config = LoraConfig(r=2, target_modules=["visual_projection", "text_model.encoder.layers.0.self_attn.q_proj"])
    trainer = BradleyTerryTrainer(
        model,
        BradleyTerryConfig(str(tmp_path), max_steps=2, cache_features=False, **PLAIN),
        train_dataset=red_pairs(),
        processing_class=processor,
        peft_config=config,
    )
    layer = trainer.model.get_base_model().text_model.encoder.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: output.detach())
    trainer.train()
    assert "Layers without a gradient in the first step" in caplog.text
    assert "text_model.encoder.layers.0.self_attn.q_proj. Leave" in caplog.text
    assert "visual_projection" not in caplog.text
