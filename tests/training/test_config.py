"""Options of both trainers that would be ignored, or fail late, are refused at once; an explicit one wins."""

from pathlib import Path

import pytest

from bt_hf import BradleyTerryConfig, PreferenceLoRAConfig


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [
        ({}, 200, 3.0),
        ({"num_train_epochs": 5}, -1, 5),
        ({"max_steps": 7}, 7, 3.0),
        ({"max_steps": 7, "num_train_epochs": 5}, 7, 5),
        ({"max_steps": -1}, -1, 3.0),
    ],
)
def test_epochs_that_are_given_win_over_the_default_steps(
    tmp_path: Path, given: dict[str, float], steps: int, epochs: float
) -> None:
    config = PreferenceLoRAConfig(str(tmp_path), report_to="none", **given)
    assert (config.max_steps, config.num_train_epochs) == (steps, epochs)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "loss_type": "kto"},
        {"desirable_weight": 2.0},
        {"undesirable_weight": 2.0, "loss_type": "ipo"},
        {"safeguard_mu": 0.5},
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}=.*has no effect without") as error:
        PreferenceLoRAConfig(str(tmp_path), report_to="none", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [BradleyTerryConfig, PreferenceLoRAConfig])
def test_columns_are_not_removed(tmp_path: Path, config: type) -> None:
    with pytest.raises(ValueError, match="`remove_unused_columns` should stay off"):
        config(str(tmp_path), report_to="none", remove_unused_columns=True)
