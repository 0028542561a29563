"""LoRA options: the same names for both trainers, and a refusal where one would have no effect."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bt_hf import BradleyTerryConfig, PreferenceLoRAConfig
from bt_hf.training.config import PreferenceConfig
from bt_hf.training.lora_options import LoraOptions, check_adapter_options

GIVEN = {"lora_r": 4, "lora_alpha": 6, "lora_dropout": 0.5, "lora_target_modules": ["to_q", "to_k"]}
both_configs = pytest.mark.parametrize("cls", [BradleyTerryConfig, PreferenceLoRAConfig])


@both_configs
def test_survive_saving(cls: type[PreferenceConfig], tmp_path: Path) -> None:
    args = cls(str(tmp_path), report_to="none", **GIVEN)
    assert GIVEN.items() <= args.to_dict().items()
    assert GIVEN.items() <= json.loads(args.to_json_string()).items()
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert {name: getattr(loaded, name) for name in GIVEN} == GIVEN
    assert (args.output_dir, cls(report_to="none").given_lora_options()) == (str(tmp_path), [])


def test_defaults_and_alpha_as_rank() -> None:
    config = LoraOptions().lora_config(["to_q", "to_k"])
    assert config == LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=["to_q", "to_k"])
    assert LoraOptions(lora_r=2).lora_config("all-linear") == LoraConfig(
        r=2, lora_alpha=2, target_modules="all-linear"
    )


@pytest.mark.parametrize(
    ("modules", "adapted"),
    [
        (["to_q"], {"first.to_q", "second.to_q"}),
        ([r"first\..*"], {"first.to_q", "first.to_k"}),
        (["all-linear"], {"first.to_q", "first.to_k", "second.to_q"}),
        ("all-linear", {"first.to_q", "first.to_k", "second.to_q"}),
        (["to_k", "second.to_q"], {"first.to_k", "second.to_q"}),
    ],
)
def test_target_modules(modules: list[str], adapted: set[str]) -> None:
    layers = {"first": ("to_q", "to_k"), "second": ("to_q",)}
    model = nn.ModuleDict({name: nn.ModuleDict({q: nn.Linear(2, 2) for q in to}) for name, to in layers.items()})
    options = LoraOptions(lora_target_modules=modules)
    peft_model = get_peft_model(model, options.lora_config(options.lora_target_modules))
    names = [name for name, _ in peft_model.get_base_model().named_modules() if name.endswith(".lora_A")]
    assert {name.removesuffix(".lora_A") for name in names} == adapted


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lora_r": 0}, "`lora_r` should be a whole number of at least 1, but got 0"),
        ({"lora_alpha": -1}, "`lora_alpha` should be a whole number of at least 1, but got -1"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` should be in \[0, 1\), but got 1.0"),
        ({"lora_target_modules": []}, "`lora_target_modules` should name at least one module"),
    ],
)
@both_configs
def test_bad_values(cls: type[PreferenceConfig], wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls("out", report_to="none", **wrong)


@pytest.mark.parametrize("name", GIVEN)
def test_options_without_effect(name: str) -> None:
    options = LoraOptions(**{name: GIVEN[name]})
    model = nn.Sequential(nn.Linear(2, 2))
    config = LoraConfig(target_modules=["0"])
    check_adapter_options(model, options, None)
    check_adapter_options(model, LoraOptions(), config)
    with pytest.raises(ValueError, match=f"`peft_config` excludes `{name}`: leave out one or the other"):
        check_adapter_options(model, options, config)
    with pytest.raises(ValueError, match=f"`full_finetuning` excludes `{name}`: leave out one or the other"):
        check_adapter_options(model, options, None, full_finetuning=True)
    adapted = get_peft_model(model, config)
    check_adapter_options(adapted, LoraOptions(), None)
    with pytest.raises(ValueError, match=f"training goes on from it: leave out `{name}`, or merge the adapter first"):
        check_adapter_options(adapted, options, None)
