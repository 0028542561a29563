"""Options of both trainers that would be ignored, or fail late, are refused at once; an explicit one wins."""

import dataclasses
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import pytest
from transformers import TrainingArguments

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
        {"beta": 500.0, "loss_type": "sft"},
        {"cache_dir": "somewhere", "cache_latents": False},
        {"validation_batch_size": 2},
        {"validation_images": 2},
        {"validation_inference_steps": 2},
        {"validation_guidance_scale": 2.0},
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}=.*has no effect without") as error:
        PreferenceLoRAConfig(str(tmp_path), report_to="none", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"prior_weight": 0.1, "warm_start": False},
        {"prior_weight": 0.1, "full_finetuning": True},
        {"kl_bank_size": 8, "kl_weight": 0.0},
        {"cache_dir": "somewhere", "cache_features": False},
        {"cache_max_gb": 1.0, "cache_features": False},
        {"cache_max_gb": 1.0, "cache_dir": "somewhere"},
    ],
)
def test_an_option_of_rewards_without_effect_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}=.*has no effect without"):
        BradleyTerryConfig(str(tmp_path), report_to="none", **options)


WRONG = {
    float: ["much", [1.0], True, None, float("nan"), float("inf"), -1.0],
    int: ["2", 2.5, [1], True, 0, -3],
    bool: ["maybe", 2, None],
    str: [7, ["a"]],
    list: [7, [7], True],
}
OWN = [
    (config, field.name)
    for config in (BradleyTerryConfig, PreferenceLoRAConfig)
    for field in dataclasses.fields(config)
    if field.name not in TrainingArguments.__dataclass_fields__
]


@pytest.mark.parametrize(("config", "name"), OWN, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_types_and_values_are_refused_by_name(config: type, name: str, tmp_path: Path) -> None:
    """Try each option of ours; a `None` or 0 with a meaning is for other tests."""
    hint = get_type_hints(config)[name]
    parts = get_args(hint) or (hint,)
    kinds = [kind for kind in WRONG if kind in parts] or [list if list[str] in parts else str]
    fine = {"lora_dropout": [0.0], "prior_weight": [0.0], "beta": []}.get(name, [])
    for value in WRONG[kinds[0]]:
        allowed = value in fine or (value is None and NoneType in get_args(hint))
        if allowed or (name == "beta" and value is None):
            continue
        with pytest.raises(ValueError, match=f"`{name}`? ?") as error:
            config(str(tmp_path), report_to="none", **{name: value})
        assert "\n" not in str(error.value)


def test_one_prompt_is_not_its_letters(tmp_path: Path) -> None:
    args = PreferenceLoRAConfig(str(tmp_path), report_to="none", validation_prompts="a cat")
    assert args.validation_prompts == ["a cat"]


@pytest.mark.parametrize("config", [BradleyTerryConfig, PreferenceLoRAConfig])
def test_columns_are_not_removed(tmp_path: Path, config: type) -> None:
    with pytest.raises(ValueError, match="`remove_unused_columns=True` is refused: it should stay off"):
        config(str(tmp_path), report_to="none", remove_unused_columns=True)
