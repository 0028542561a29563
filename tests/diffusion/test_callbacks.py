"""Guards of several held-out sets: each by itself, found by exact names."""

from pathlib import Path

import torch
from transformers import TrainerControl, TrainerState

from bt_hf.diffusion.callbacks import Guard, OverfittingGuard, WinnerErrorGuard, make_guards
from tiny_models import red_pairs
from tiny_trainers import make


def told(guards: list[Guard], step: int, model: torch.nn.Module | None = None, **metrics: float) -> bool:
    """Tell all guards the metrics of one set, as the Trainer would; returns whether one stops."""
    state, control = TrainerState(), TrainerControl()
    state.global_step = step
    for guard in guards:
        guard.on_log(None, state, control, logs={"accuracy": 1.0})
        guard.on_evaluate(None, state, control, metrics=metrics, model=model)
    return control.should_training_stop


def test_a_falling_set_beside_a_rising_one_is_seen_and_named(tmp_path: Path) -> None:
    sets = {"easy": red_pairs(3, seed=1), "hard": red_pairs(3, seed=2)}
    trainer = make(tmp_path, evaluation=sets, eval_strategy="steps")
    guards = [guard for guard in trainer.guards if isinstance(guard, OverfittingGuard)]
    assert [guard.prefix for guard in guards] == ["eval_easy", "eval_hard"]
    stops = []
    for step, (easy, hard) in enumerate([(0.6, 0.9), (0.7, 0.8), (0.8, 0.8), (0.9, 0.8)], start=1):
        told(guards, step, trainer.model, eval_easy_accuracy=easy)
        stops.append(told(guards, step, trainer.model, eval_hard_accuracy=hard))
    assert stops == [False, False, True, False]
    assert [len(guard.said) for guard in guards] == [0, 1]
    assert "held-out accuracy 'hard' fell from 0.900 to 0.800" in guards[1].said[0]


def test_sets_that_alternate_are_no_overfitting(tmp_path: Path) -> None:
    """One set is always at 0.9 and the other at 0.5: taken together, every second value would be a fall."""
    trainer = make(tmp_path, evaluation={"a": red_pairs(3), "b": red_pairs(3)}, eval_strategy="steps")
    for step in range(1, 6):
        assert not told(trainer.guards, step, trainer.model, eval_a_accuracy=0.9)
        assert not told(trainer.guards, step, trainer.model, eval_b_accuracy=0.5)


def test_names_are_exact(tmp_path: Path) -> None:
    """Metrics of the user, of other evaluations and of the base end alike, and mean something else."""
    guard = OverfittingGuard("eval")
    model = make(tmp_path).model
    assert not told([guard], 1, model, eval_accuracy=0.5)
    for step in range(2, 6):
        assert not told([guard], step, model, eval_my_accuracy=0.1, test_accuracy=0.1, eval_base_accuracy=0.1)
    winner = WinnerErrorGuard("eval_a")
    told([winner], 1, eval_b_winner_error_change=1.0, eval_b_winner_error_base=1.0)
    assert winner.said == []
    told([winner], 1, eval_a_winner_error_change=1.0, eval_a_winner_error_base=1.0)
    assert "preferred held-out 'a' images" in winner.said[0]


def test_each_set_keeps_its_best_in_a_checkpoint(tmp_path: Path) -> None:
    sets = {"a": red_pairs(3, seed=1), "b/c": red_pairs(3, seed=2)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make(tmp_path, evaluation=sets, **options)
    trainer.train()
    files = {file.name for file in (tmp_path / "out" / "checkpoint-2").glob("best_adapter*")}
    assert files == {"best_adapter-eval_a.safetensors", "best_adapter-eval_b%2Fc.safetensors"}
    again = make(tmp_path / "again", evaluation=sets, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for old, new in zip(trainer.guards, again.guards, strict=True):
        if isinstance(old, OverfittingGuard):
            assert (old._best, old._best_step) == (new._best, new._best_step)


def test_without_evaluation_the_training_pairs_are_watched(tmp_path: Path) -> None:
    args = make(tmp_path).args
    for evaluation in (None, {"a": 1, "b": 2}):
        assert [type(guard).__name__ for guard in make_guards(args, evaluation)] == [
            "WinnerErrorGuard",
            "CollapseGuard",
        ]
