"""The sentence at the end of a training, for histories whose answer is plain."""

from typing import Any

import pytest

from bt_hf.diffusion.summary import summarise
from tiny_trainers import make


def held_out(step: int, accuracy: float, low: float, drift: float) -> dict[str, Any]:
    errors = {"eval_winner_error_base": 0.5, "eval_winner_error_change": 0.5 * drift}
    return {"step": step, "eval_accuracy": accuracy, "eval_accuracy_low": low, **errors}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (held_out(100, 0.81, 0.7, -0.02), "Held-out preference 0.81, +0.02 in the last fifth, preferred images "
         "denoised 2.0 % better than by the base: more steps would help."),
        (held_out(100, 0.79, 0.7, 0.0), "denoised 0.0 % better than by the base: more steps would change little."),
        (held_out(100, 0.75, 0.6, 0.01), "denoised 1.0 % worse than by the base: fewer steps would do better."),
        (held_out(100, 0.56, 0.4, 0.0), ": it has not learnt this taste; more pairs or steps may help."),
        (held_out(100, 0.95, 0.9, 0.12), "denoised 12.0 % worse than by the base: more steps would cost captions; "
         "fewer, or half of the LoRA (`set_adapters`), keep more of them."),
    ],
)  # fmt: skip
def test_sentences(last: dict[str, Any], expected: str) -> None:
    training = [{"step": step, "accuracy": 1.0} for step in range(10, 101, 10)]  # held-out pairs say more
    said = summarise([*training, held_out(80, 0.79, 0.7, 0.0), last], 100)
    assert said is not None
    assert said.endswith(expected)


def test_without_held_out_pairs_the_means_of_training_count() -> None:
    log = [{"step": step, "accuracy": accuracy} for step, accuracy in ((70, 0.6), (80, 0.7), (90, 0.8), (100, 0.9))]
    assert summarise(log, 100) == "Training preference 0.85, +0.20 in the last fifth: more steps would help."
    assert summarise([{"step": 1, "loss": 0.7}], 1) is None


def test_at_the_end_of_a_training(tmp_path: Any) -> None:
    trainer = make(tmp_path, max_steps=3)
    trainer.train()
    assert trainer.summary.said is not None
    assert trainer.summary.said.startswith("Training preference ")
