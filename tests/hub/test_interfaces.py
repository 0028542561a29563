"""The file for ComfyUI, A1111 and Forge on its way to the Hub and back: of the same training, and with its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bt_hf import pull_adapter, push_adapter
from bt_hf.hub.checks import check_weights
from bt_hf.hub.contract import INTERFACE_WEIGHTS, contract_files, in_contract
from bt_hf.hub.interfaces import interface_name
from bt_hf.hub.patterns import check_patterns
from hub_published import LORA, PIPELINE
from hub_server import Hub
from tiny_pipelines import build

pytest_plugins = ["hub_fixtures"]
FILE = "out_comfyui.safetensors"


@pytest.fixture
def lora(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "my-taste-lora", tmp_path / "lora"))


def test_pushed_and_pulled_with_the_base_that_it_is_published_for(
    hub: Hub, online: Path, bases: None, lora: Path
) -> None:
    local = (lora / FILE).read_bytes()
    assert b"ss_sd_model_name" not in local  # it was trained from a folder
    first = push_adapter(lora, LORA, base_model=PIPELINE)
    assert push_adapter(lora, LORA, base_model=PIPELINE).oid == first.oid  # the same bytes, hence no commit
    folder = pull_adapter(LORA, base_model=build("sd").unet)
    with safe_open(folder / FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_sd_model_name"] == PIPELINE
    assert {key: value for key, value in metadata.items() if key != "ss_sd_model_name"}["ss_network_alpha"] == "6"
    tensors = load_file(folder / FILE)
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(lora / FILE).items())
    assert (lora / FILE).read_bytes() == local


def test_pulled_from_the_cache(hub: Hub, online: Path, bases: None, lora: Path) -> None:
    push_adapter(lora, LORA, base_model=PIPELINE)
    pulled = pull_adapter(LORA)
    assert pull_adapter(LORA, local_files_only=True) == pulled
    (pulled / FILE).write_bytes(b"changed on this machine")
    with pytest.raises(ValueError, match=FILE):
        pull_adapter(LORA, local_files_only=True)


@pytest.mark.parametrize("change", ["a value", "alpha", "a key", "another run's file", "DoRA"])
def test_file_that_is_not_of_the_same_training_is_refused(
    change: str, hub: Hub, online: Path, bases: None, lora: Path
) -> None:
    tensors = load_file(lora / FILE)
    first = min(name for name in tensors if name.endswith("lora_up.weight"))
    says = "not of the same training"
    if change == "a value":
        tensors[first] = tensors[first] + 1
    elif change == "alpha":
        tensors[first.replace("lora_up.weight", "alpha")] = torch.tensor(60.0)
    elif change == "a key":
        tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.diff"] = torch.ones(2)
    if change == "another run's file":
        save_file({**tensors, first: -tensors[first]}, lora / "old_comfyui.safetensors", metadata={"format": "pt"})
    else:
        save_file(tensors, lora / FILE, metadata={"format": "pt"})
    if change == "DoRA":  # it would need further tensors, which the interfaces read each in its own way
        says = "use_dora"
        config = json.loads((lora / "adapter_config.json").read_text())
        (lora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    hub.put("you/lora", lora)
    with pytest.raises(ValueError, match=says) as caught:
        pull_adapter("you/lora", base_model=build("sd").unet)
    assert "\n" not in str(caught.value)
    if change != "DoRA":
        with pytest.raises(ValueError, match=says):
            push_adapter(lora, LORA, base_model=PIPELINE)


def test_patterns_of_others_are_tried_with_a_time_limit(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alphas by layer are found by matching names with a pattern, which may take for ever."""
    from bt_hf.hub import checks

    def quick(*args: Any) -> None:
        check_patterns(*args, seconds=0.5)

    monkeypatch.setattr(checks, "check_patterns", quick)
    pattern = {"([a-z_.0-9]+)+!": 3}
    config = json.loads((lora / "adapter_config.json").read_text()) | {"alpha_pattern": pattern}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    weights = lora / "pytorch_lora_weights.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["lora_adapter_metadata"]) | {"unet.alpha_pattern": pattern}
    save_file(load_file(weights), weights, metadata={**metadata, "lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(ValueError, match="takes longer than 0.5 s to match"):
        check_weights(contract_files(lora), "lora", "it")


def test_names() -> None:
    assert interface_name("my-taste") == "my-taste_comfyui.safetensors"
    for run in ("Zoë's Stil", "../../etc/passwd", "a" * 300, "...", "", "ein Lauf", "日本"):
        name = interface_name(run)
        assert INTERFACE_WEIGHTS.fullmatch(name)
        assert in_contract(name)
        assert "/" not in name
    for name in ("x/y_comfyui.safetensors", "_comfyui.safetensors", "..\\a_comfyui.safetensors", "a_comfyui.pt"):
        assert not in_contract(name)
