"""The base's errors: at the same noise samples and in the same precision, whatever was computed before."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trl import unpair_preference_dataset

from bt_hf.diffusion.collator import batch_labels
from tiny_models import red_pairs
from tiny_trainers import adapter, logged, make


@pytest.mark.parametrize("num_noise_samples", [None, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_lora_that_does_nothing_has_no_margin(bf16: bool, num_noise_samples: int | None, tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        evaluation=red_pairs(4, seed=1),
        bf16=bf16,
        num_noise_samples=num_noise_samples,
        beta=2000,
        learning_rate=0,
        max_steps=12,
        per_device_train_batch_size=4,
    )
    assert trainer.evaluate()["eval_margin"] == 0
    trainer.train()
    assert set(logged(trainer, "margin")) == {0.0}
    assert set(logged(trainer, "accuracy")) == {0.5}  # it guesses
    assert trainer.evaluate()["eval_margin"] == 0


@pytest.mark.parametrize("num_noise_samples", [None, 2])
def test_evaluating_the_training_pairs_changes_no_training(num_noise_samples: int | None, tmp_path: Path) -> None:
    def train(folder: Path, evaluate: bool) -> dict[str, torch.Tensor]:
        trainer = make(
            folder,
            max_steps=12,
            num_noise_samples=num_noise_samples,
            per_device_train_batch_size=4,
            num_eval_noise_samples=3,
        )
        before = trainer.evaluate(trainer.train_dataset) if evaluate else {}
        trainer.train()
        if evaluate:
            assert before["eval_margin"] == 0
            assert trainer.evaluate(trainer.train_dataset)["eval_margin"] != 0
        trainer.save_model()
        return adapter(folder / "out")

    plain, evaluated = (train(tmp_path / str(evaluate), evaluate) for evaluate in (False, True))
    for name, value in plain.items():
        assert torch.equal(evaluated[name], value), name


def test_pairs_of_one_trainer_serve_another_with_other_noise(tmp_path: Path) -> None:
    first = make(tmp_path, num_noise_samples=2, max_steps=6)
    first.train()
    second = make(
        tmp_path / "second", pairs=first.train_dataset, num_noise_samples=2, max_steps=6, seed=7, learning_rate=0
    )
    second.train()
    assert set(logged(second, "margin")) == {0.0}


@pytest.mark.parametrize(
    ("rows", "options", "computed"),
    [
        (8, {"max_steps": 20}, (8, 2, 2)),  # 10 epochs with 2 noise samples
        (8, {"max_steps": -1, "num_train_epochs": 3}, (8, 2, 2)),
        (8, {"max_steps": 4}, None),  # in 2 epochs no sample comes again
        (9, {"max_steps": 4, "gradient_accumulation_steps": 2}, None),
        (9, {"max_steps": 5, "gradient_accumulation_steps": 2}, (9, 2, 2)),  # 2 steps an epoch
    ],
)
def test_errors_are_computed_once_where_noise_samples_come_again(
    rows: int, options: dict, computed: tuple | None, tmp_path: Path
) -> None:
    trainer = make(tmp_path, pairs=red_pairs(rows), num_noise_samples=2, per_device_train_batch_size=4, **options)
    trainer.train()
    found = trainer.get_train_dataloader().dataset.reference
    assert (None if found is None else tuple(found.shape)) == computed


def test_each_of_several_evaluation_sets_is_computed_once(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, evaluation={"near": red_pairs(4, seed=1), "far": red_pairs(3, seed=2)}, num_eval_noise_samples=3
    )
    metrics = trainer.evaluate()
    assert metrics["eval_near_margin"] == metrics["eval_far_margin"] == 0
    for name, rows in (("near", 4), ("far", 3)):
        assert trainer.get_eval_dataloader(name).dataset.reference.shape == (rows, 3, 2)


def test_predictions_are_those_of_the_evaluation(tmp_path: Path) -> None:
    trainer = make(tmp_path, evaluation=red_pairs(4, seed=1))
    predicted = trainer.predict(trainer.eval_dataset)  # before anything else
    assert (predicted.predictions[0] == 0).all()
    trainer.train()
    margins = trainer.predict(trainer.eval_dataset).predictions[0]
    assert margins.mean() == pytest.approx(trainer.evaluate()["eval_margin"], rel=1e-5)


def test_pairs_that_are_not_encoded_are_refused_once_the_encoders_are_gone(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    for use in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="text encoders.*`eval_dataset`.*cache_latents=False"):
            use(red_pairs(2, seed=3))
    streaming = make(tmp_path / "streaming", cache_latents=False)
    assert streaming.evaluate(red_pairs(2, seed=3))["eval_margin"] == 0


def test_ties_have_no_winner(tmp_path: Path) -> None:
    # Where all are ties, there is nobody's error to tell; else that of the others.
    def evaluate(folder: Path, preference: list[float]) -> dict[str, float]:
        trainer = make(folder, evaluation=red_pairs(3, seed=1, preference=preference))
        trainer.train()
        return trainer.evaluate()

    ties = evaluate(tmp_path / "ties", [0.5, 0.5, 0.5])
    assert not any("winner" in name or "loser" in name for name in ties)
    one = evaluate(tmp_path / "one", [0.5, 0.5, 1.0])
    trainer = make(tmp_path / "alone", evaluation=red_pairs(3, seed=1).select([2]))
    trainer.train()
    alone = trainer.evaluate()
    for name in ("eval_winner_error_base", "eval_winner_error_change", "eval_loser_error_change"):
        assert one[name] == pytest.approx(alone[name], abs=1e-6)


def test_unpaired_rows_of_trl_keep_their_preference() -> None:
    rows = list(unpair_preference_dataset(red_pairs(3, preference=[1.0, 0.0, 0.25])))
    np.testing.assert_allclose(batch_labels(rows)["label"], [1.0, 0.0, 0.25, 0.0, 1.0, 0.75])
    assert batch_labels([{"label": False}, {"label": True}])["label"].tolist() == [0.0, 1.0]
