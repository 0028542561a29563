"""Publication by the trainers, while they train and at the end."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.hub.contract import CONTRACT_FILES
from hub_published import BASE, QUIET, TASTE
from hub_server import TOKEN, Hub
from tiny_models import red_pairs

pytest_plugins = ["hub_fixtures"]


def trainer_for(made: Path, folder: Path, **options: object) -> BradleyTerryTrainer:
    arguments = {**QUIET, "push_to_hub": True, "hub_token": TOKEN, "save_steps": 1, "max_steps": 2, **options}
    trainer = BradleyTerryTrainer(str(made / "tiny-clip"), BradleyTerryConfig(str(folder), **arguments), red_pairs(8))
    trainer.hub_base_model = BASE
    return trainer


def test_trainer_publishes_the_contract(hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path) -> None:
    trainer = trainer_for(made, tmp_path / "taste", push_to_hub=False, save_strategy="no")
    trainer.train()
    commit = trainer.push_to_hub(license="mit", tags=["mine"], tag="v1", model_name="ignored")
    assert hub.titles("me/taste") == ["End of training"]
    assert hub.repos["me/taste"].private
    assert hub.repos["me/taste"].tags == {"v1": commit.oid}
    files = hub.files("me/taste")
    assert set(files) <= CONTRACT_FILES
    data = ModelCard(files["README.md"].decode()).data
    assert (data.license, data.tags[0], data.tags[-1]) == ("mit", "bt_hf", "mine")
    assert "training_args.bin" not in {file.name for file in (tmp_path / "taste").iterdir()}


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_trainer_with_every_strategy(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path, strategy: str
) -> None:
    trainer = trainer_for(
        made,
        tmp_path / "taste",
        hub_strategy=strategy,
        hub_private_repo=False,
        hub_model_id=TASTE,
        hub_revision="run-1",
        hub_always_push=True,
    )
    assert hub.state(TASTE) is None  # nothing before there is something
    trainer.train()
    trainer.save_model()
    checkpoints = [] if strategy == "end" else ["Training in progress, step 2", "Training in progress, step 1"]
    assert hub.titles(TASTE, "run-1") == ["Model save", *checkpoints]
    assert not hub.repos[TASTE].private
    assert not hub.titles(TASTE, "main")
    folders = {name.split("/")[0] for name in hub.files(TASTE, "run-1") if "/" in name}
    assert folders == ({"checkpoint-1", "checkpoint-2"} if strategy == "all_checkpoints" else set())
    assert {name.split("/")[-1] for name in hub.files(TASTE, "run-1")} <= CONTRACT_FILES
    assert str(made).encode() not in hub.everything()


def test_training_survives_a_hub_that_refuses(
    hub: Hub, online: Path, bases: None, made: Path, tmp_path: Path, caplog
) -> None:
    trainer = trainer_for(made, tmp_path / "taste", hub_always_push=True)
    hub.accounts.clear()
    trainer.train()
    assert "The checkpoint of step 1 was not published: Could not publish" in caplog.text
    with pytest.raises(PermissionError, match="does not know this token"):
        trainer.save_model()
    assert (tmp_path / "taste" / "adapter_model.safetensors").is_file()
    with pytest.raises(PermissionError, match="does not know this token"):
        trainer_for(made, tmp_path / "other")
