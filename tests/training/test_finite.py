"""Numbers that are not finite: refused as options, stopped at in training, never saved, never ranked."""

from pathlib import Path

import pytest
import torch

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceLoRAConfig, PreferenceScorer
from bt_hf.data.checks import check_columns
from bt_hf.data.formats import PreferenceDataError
from tiny_models import build, picture, red_pairs
from tiny_trainers import make

NAN, INFINITE = float("nan"), float("inf")


def reward(folder: Path, **options: object) -> BradleyTerryTrainer:
    model, processor = build("clip")
    defaults = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 6}
    args = BradleyTerryConfig(str(folder), **{**defaults, **options})
    return BradleyTerryTrainer(model, args, train_dataset=red_pairs(8), processing_class=processor)


@pytest.mark.parametrize("value", [NAN, INFINITE, -1.0])
@pytest.mark.parametrize("name", ["prior_weight", "kl_weight", "learning_rate", "label_smoothing", "lora_dropout"])
def test_options_are_finite(tmp_path: Path, name: str, value: float) -> None:
    for config in (BradleyTerryConfig, PreferenceLoRAConfig):
        if name in config.__dataclass_fields__:
            with pytest.raises(ValueError, match=f"`{name}` should be"):
                config(str(tmp_path), report_to="none", **{name: value})


def test_a_weight_holds_in_the_precision_of_losses() -> None:
    with pytest.raises(PreferenceDataError, match="weight out of range"):
        check_columns(red_pairs(4, weight=[1.0, 1.0, 1e39, 1.0]))


@pytest.mark.parametrize("kind", ["reward", "lora"])
def test_training_stops_and_nothing_is_saved(tmp_path: Path, kind: str) -> None:
    trainer = (reward if kind == "reward" else make)(tmp_path / "out", learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="the loss became (nan|inf|-inf) at step .* with the prompt '.+'"):
        trainer.train()
    with torch.no_grad():
        next(value for value in trainer.model.parameters() if value.requires_grad).fill_(NAN)
    with pytest.raises(FloatingPointError, match="not saved: .*lora_.* is not finite"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("*.safetensors"))


def test_a_reward_that_is_not_finite_is_not_ranked() -> None:
    model, processor = build("clip")
    with torch.no_grad():
        model.visual_projection.weight.fill_(NAN)
    scorer = PreferenceScorer(model, processor)
    with pytest.raises(ValueError, match="the embedding of image 0 is not finite, computed in torch.float32"):
        scorer.rank("a red apple", [picture([200, 0, 0]), picture([0, 0, 200])])
