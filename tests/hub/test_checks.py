"""Checks before publishing: a bad folder fails in one line, and nothing is created."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bt_hf import push_adapter
from hub_published import BASE, LORA, PIPELINE, TASTE, push, spoil
from hub_server import Hub
from tiny_models import save

pytest_plugins = ["hub_fixtures"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "is not a safetensors file .*: save the adapter again"),
        ("nan", "not finite in .*: it was cut or diverged"),
        ("shape", "_projection is 12 x 16 there, but the adapter was made for inputs of 5"),
        ("rank", "has tensors of rank 8, but its adapter_config.json says r = 3"),
        ("type", "has no `peft_type` that PEFT knows"),
        ("pickle", "as a pickle .*, which may run code"),
        ("language model", "another kind of model .task type CAUSAL_LM"),
        ("other layers", "not those of a dual encoder"),
        ("code", "asks for code of 'os.path'"),
        ("no card", "has no README.md"),
        ("draft", r'README.md says "\[More Information Needed\]"'),
        ("metadata", "metadata that can't be read"),
        ("rejected metadata", "does not take the metadata of README.md"),
        ("token", "README.md contains what looks like a token"),
        ("own token", "tokenizer_config.json contains what looks like a token"),
        ("path", "README.md names a path of this machine ./data/me/clicks"),
        ("path in json", "processor_config.json names a path of this machine"),
    ],
    ids=lambda value: value if len(value) < 18 else "",
)
def test_failed_check_is_one_line_and_creates_nothing(
    hub: Hub, online: Path, bases: None, copied: Path, how: str, says: str
) -> None:
    spoil(copied, how)
    with pytest.raises(ValueError, match=says) as caught:
        push_adapter(copied, TASTE, base_model=BASE)
    assert "\n" not in str(caught.value)
    assert hub.state(TASTE) is None
    changing = [path for method, path, _ in hub.requests if method != "GET" and "validate-yaml" not in path]
    assert not changing


def test_two_halves_of_a_lora_are_of_one_training(hub: Hub, online: Path, bases: None, made: Path) -> None:
    folder = Path(shutil.copytree(made / "my-taste-lora", online.parent / "mixed-lora"))
    weights = folder / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="are not of the same training"):
        push_adapter(folder, LORA, base_model=PIPELINE)
    assert hub.state(LORA) is None


def test_a_local_base_has_to_be_named(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names the local path .*tiny-clip' as its base.*pass `base_model`"):
        push(made, base_model=None)
    with pytest.raises(ValueError, match="`base_model` should be the Hub id"):
        push(made, base_model=str(made / "tiny-clip"))
    with pytest.raises(ValueError, match="has no model 'me/nothing'"):
        push(made, base_model="me/nothing")
    hub.put("me/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    push(made, "me/unsure", base_model="me/old")  # its shapes are unknown
    hub.put("me/other", Path(save(tmp_path / "other", "siglip")))
    with pytest.raises(ValueError, match="does not fit its base 'me/other'"):
        push(made, base_model="me/other")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        push_adapter(tmp_path / "nowhere", TASTE)
    with pytest.raises(ValueError, match="holds no adapter"):
        push_adapter(tmp_path, TASTE)
    with pytest.raises(ValueError, match="`repo_id` should be"):
        push(made, "me/my taste")
    assert hub.state(TASTE) is None
