"""Weights that are divided among two processes give what one process gives, and a whole adapter."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bt_hf import PreferenceLoRATrainer, cross_validate
from distributed_fsdp import CASES
from launching import CONFIGS, launch
from tiny_models import build as build_clip
from tiny_models import red_pairs
from tiny_pipelines import build as build_pipeline
from tiny_trainers import make


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes wrote."""
    folder = tmp_path_factory.mktemp("divided")
    launch("distributed_fsdp.py", folder, config=CONFIGS / "fsdp2.yaml")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_divided_weights_give_what_whole_ones_give(case: str, divided: Path, tmp_path: Path) -> None:
    ranks = [json.loads((divided / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    assert [facts["world_size"] for facts in ranks] == [2, 2]
    one = CASES[case](tmp_path / "one", batch=4)
    tolerance = 1e-4 if "beta" not in one else 5e-7 * one["beta"]
    assert len(ranks[0]["steps"]) == len(one["steps"]) > 4
    for step, other in zip(one["steps"], ranks[0]["steps"], strict=True):
        assert other == pytest.approx(step, abs=tolerance)
    for facts in ranks:
        assert facts["metrics"] == pytest.approx(one["metrics"], abs=tolerance)

    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    found = load_file(divided / case / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)


def test_a_divided_run_leaves_a_folder_for_peft_and_diffusers(divided: Path) -> None:
    model = PeftModel.from_pretrained(build_clip()[0], divided / "reward")
    assert any(value.abs().max() > 0 for name, value in model.named_parameters() if "lora_B" in name)
    pipeline = build_pipeline("sd")
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(divided / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.unet.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_validation_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreferenceLoRATrainer, "sharded", True)
    with pytest.raises(ValueError, match="validation_prompts.*saved folder"):
        make(tmp_path, validation_prompts=["a red apple"])


def test_cross_validation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="divided its weights: pass `--cross_validate 0`"):
        cross_validate(build_clip()[0], red_pairs(4))
