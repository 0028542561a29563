"""Publishing: the unmodified client of huggingface_hub against the Hub of `hub_server`."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors.torch import load_file, save_file

from bt_hf import pull_adapter, push_adapter
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.hub.contract import CONTRACT_FILES
from hub_published import BASE, LORA, PIPELINE, TASTE, push
from hub_server import READ_TOKEN, STRANGER, TOKEN, Hub
from tiny_models import red_pairs

pytest_plugins = ["hub_fixtures"]


def test_push_publishes_the_contract_in_one_commit(hub: Hub, online: Path, bases: None, made: Path) -> None:
    commit = push(made)
    assert commit.commit_url.startswith(hub.endpoint + "/me/my-taste/commit/")
    assert hub.titles(TASTE) == ["Upload a reward adapter"]
    assert hub.repos[TASTE].private
    files = hub.files(TASTE)
    assert set(files) <= CONTRACT_FILES
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "reliability.png"} < set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert (made / "my-taste" / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == (BASE, "adapter")
    local = ModelCard.load(made / "my-taste" / "README.md").data.eval_results
    assert local is not None
    assert card.data.eval_results == local
    for line in (
        f'PreferenceScorer.from_pretrained("{TASTE}"',
        f'base = AutoModel.from_pretrained("{BASE}", dtype=torch.float32)',
        f'PeftModel.from_pretrained(base, "{TASTE}")',
    ):
        assert line in card.text
    assert "local folder" not in card.text
    assert str(made).encode() not in hub.everything()
    # The folder of the trainer is as it was.
    assert str(made) in (made / "my-taste" / "adapter_config.json").read_text()


def test_push_of_a_lora_names_its_base_everywhere(hub: Hub, online: Path, bases: None, made: Path) -> None:
    folder = Path(shutil.copytree(made / "my-taste-lora", online.parent / "leaky-lora"))
    # As diffusers' own scripts write it: the config beside the weights has the path.
    weights = folder / "pytorch_lora_weights.safetensors"
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.base_model_name_or_path": str(made / "tiny-sd")})
    save_file(load_file(weights), weights, metadata={"format": "pt", "lora_adapter_metadata": config})
    push_adapter(folder, LORA, base_model=PIPELINE)
    assert str(made).encode() not in hub.everything()
    files = hub.files(LORA)
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "before_after.png",
        "out_comfyui.safetensors",  # named after the run
        "pytorch_lora_weights.safetensors",
    }
    assert f'pipe.load_lora_weights("{LORA}"' in files["README.md"].decode()
    assert f'DiffusionPipeline.from_pretrained("{PIPELINE}", dtype=torch.float32)' in files["README.md"].decode()
    assert b'"unet.lora_alpha\\": 6' in files["pytorch_lora_weights.safetensors"]


def test_push_again_changes_what_has_changed(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    first = push_adapter(copied, TASTE, base_model=BASE)
    assert push_adapter(copied, TASTE, base_model=BASE).oid == first.oid  # no empty commit
    (copied / "reliability.png").unlink()
    weights = load_file(copied / "adapter_model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, copied / "adapter_model.safetensors")
    second = push_adapter(copied, TASTE, base_model=BASE, commit_message="Twice as much")
    assert hub.titles(TASTE) == ["Twice as much", "Upload a reward adapter"]
    assert "reliability.png" not in hub.files(TASTE)
    assert hub.repos[TASTE].commits[second.oid].parent == first.oid


def test_push_public_branch_tag_and_pull_request(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    def again(**options: object) -> CommitInfo:
        with (copied / "README.md").open("a") as card:
            card.write("\nMore.\n")
        return push_adapter(copied, "my-taste", base_model=BASE, **options)

    first = again(private=False, tag="v1")
    assert not hub.repos[TASTE].private
    assert hub.repos[TASTE].tags == {"v1": first.oid}
    second = again(revision="mild", tag="v2")
    assert hub.repos[TASTE].branches["mild"] == second.oid
    assert hub.repos[TASTE].branches["main"] == first.oid
    proposed = again(create_pr=True)
    assert proposed.pr_url == f"{hub.endpoint}/{TASTE}/discussions/1"
    assert hub.repos[TASTE].pull_requests == {"refs/pr/1": proposed.oid}
    assert hub.repos[TASTE].branches["main"] == first.oid
    with (copied / "README.md").open("a") as card:
        card.write("\nBy you.\n")
    push_adapter(copied, TASTE, base_model=BASE, create_pr=True, token=STRANGER)
    assert set(hub.repos[TASTE].pull_requests) == {"refs/pr/1", "refs/pr/2"}
    with pytest.raises(FileNotFoundError, match="no repo 'me/nothing' that a pull request"):
        push_adapter(copied, "me/nothing", base_model=BASE, create_pr=True)
    assert hub.state("me/nothing") is None
    with pytest.raises(FileExistsError, match="has a tag 'v1' already"):
        again(tag="v1")
    assert hub.repos[TASTE].branches["main"] == first.oid
    with pytest.raises(ValueError, match="leave out `revision` and `tag`"):
        again(create_pr=True, tag="v3")
    with pytest.raises(ValueError, match="exists and is public, but `private=True`"):
        again(private=True)


def test_pairs_go_up_only_when_asked(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    push(made)
    assert "pairs.parquet" not in hub.files(TASTE)
    push(made, pairs=red_pairs(3))
    (tmp_path / "pairs.parquet").write_bytes(hub.files(TASTE)["pairs.parquet"])
    pairs = load_preference_pairs(tmp_path / "pairs.parquet")
    assert pairs["prompt"][:] == red_pairs(3)["prompt"][:]
    assert np.array_equal(np.asarray(pairs[0]["chosen"]), np.asarray(red_pairs(3)[0]["chosen"]))
    assert "pairs.parquet" not in {file.name for file in pull_adapter(TASTE).iterdir()}


@pytest.mark.parametrize(
    ("token", "repo_id", "says"),
    [
        (None, TASTE, "not logged in"),
        ("hf_nobodys", TASTE, "does not know this token"),
        (READ_TOKEN, TASTE, "may not do that. Take one with write access"),
        (STRANGER, TASTE, "may not do that"),
    ],
    ids=["none", "unknown", "may only read", "of somebody else"],
)
def test_push_without_the_right_token(
    hub: Hub, online: Path, bases: None, made: Path, monkeypatch, token: str | None, repo_id: str, says: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=says) as caught:
        push(made, repo_id, token=token)
    assert "\n" not in str(caught.value)
    assert hub.state(TASTE) is None


def test_no_token_is_written_anywhere(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    push(made, tag="v1")
    pull_adapter(TASTE)
    written = [file for file in [*tmp_path.rglob("*"), *made.rglob("*")] if file.is_file()]
    for token in (TOKEN, READ_TOKEN, STRANGER):
        assert token.encode() not in hub.everything()
        assert not [file for file in written if token.encode() in file.read_bytes()]
    assert not [path for _, path, authorized in hub.requests if authorized and path.startswith("/storage/")]
    assert HfApi().whoami()["name"] == "me"
    assert os.environ["HF_TOKEN"] == TOKEN
