"""Fetching: the unmodified client of huggingface_hub against the Hub of `hub_server`."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from bt_hf import pull_adapter
from bt_hf.hub.contract import CONTRACT_FILES
from hub_published import BASE, LORA, PIPELINE, TASTE, push, spoil
from hub_server import READ_TOKEN, STRANGER, Hub
from tiny_models import build

pytest_plugins = ["hub_fixtures"]


def test_pull_gives_what_was_pushed(hub: Hub, online: Path, bases: None, made: Path) -> None:
    commit = push(made, tag="v1")
    folder = pull_adapter(TASTE)
    assert folder.name == commit.oid
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == hub.files(TASTE)
    assert pull_adapter(TASTE, revision="v1") == pull_adapter(TASTE, revision=commit.oid) == folder
    pull_adapter(TASTE, kind="reward", base_model=BASE)
    pull_adapter(TASTE, base_model=made / "tiny-clip")
    pull_adapter(TASTE, base_model=build("clip")[0])
    assert snapshot_download(TASTE) == str(folder)  # the client finds it too


def test_pull_offline_from_the_cache(hub: Hub, online: Path, bases: None, made: Path, monkeypatch) -> None:
    push(made)
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        pull_adapter(TASTE, local_files_only=True)
    folder = pull_adapter(TASTE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert pull_adapter(TASTE) == folder
    assert not hub.requests
    with pytest.raises(ConnectionError, match="offline mode is on"):
        push(made)


def test_private_repo_needs_its_owners_token(hub: Hub, online: Path, bases: None, made: Path) -> None:
    push(made)
    for token in (STRANGER, False):
        with pytest.raises(FileNotFoundError, match="no such repo, or it is private"):
            pull_adapter(TASTE, token=token)
    with pytest.raises(PermissionError, match="does not know this token"):
        pull_adapter(TASTE, token="hf_nobodys")
    assert pull_adapter(TASTE, token=READ_TOKEN).is_dir()
    with pytest.raises(FileNotFoundError, match="no such revision"):
        pull_adapter(TASTE, revision="v9")
    with pytest.raises(ValueError, match="`revision` should be"):
        pull_adapter(TASTE, revision="../v9")


def test_pull_refuses_what_is_no_adapter(hub: Hub, online: Path, bases: None, made: Path, copied: Path) -> None:
    def refused(repo_id: str, says: str, **options: object) -> None:
        with pytest.raises(ValueError, match=says) as caught:
            pull_adapter(repo_id, **options)
        assert "\n" not in str(caught.value)

    push(made)
    push(made, LORA)
    refused(LORA, "is a preference LoRA, not a reward adapter: `load_lora_weights`", kind="reward")
    refused(TASTE, "is a reward adapter, not a preference LoRA: `PreferenceScorer", kind="lora")
    refused(TASTE, "`kind` should be", kind="model")
    refused(TASTE, "was trained on 'me/tiny-clip', not on 'me/tiny-sd'", base_model=PIPELINE)
    refused(TASTE, "none of the layers", base_model=made / "tiny-sd")
    refused(BASE, "is a whole model, not an adapter: `AutoModel")
    refused(PIPELINE, "holds no adapter")
    for index, (how, says) in enumerate(
        {
            "cut": "not a safetensors file",
            "pickle": "may run code",
            "language model": "task type CAUSAL_LM",
            "other layers": "not those of a dual encoder",
            "code": "asks for code of 'os.path'",
        }.items()
    ):
        spoiled = Path(shutil.copytree(copied, copied.parent / f"spoiled-{index}"))
        spoil(spoiled, how)
        hub.put(f"you/spoiled-{index}", spoiled)
        refused(f"you/spoiled-{index}", says)


def test_pull_fetches_no_other_files(hub: Hub, online: Path, bases: None, made: Path) -> None:
    push(made)
    hub.put(TASTE, {"optimizer.pt": b"pickle", "run.py": b"raise SystemExit", "deep/adapter_model.bin": b"pickle"})
    folder = pull_adapter(TASTE)
    assert {file.name for file in folder.rglob("*")} <= CONTRACT_FILES
    assert not [path for _, path, _ in hub.requests if path.endswith((".pt", ".py", ".bin"))]
