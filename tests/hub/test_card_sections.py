"""Generated parts of a card, and the text of its owner."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, push_adapter
from bt_hf.hub.card_sections import keep_owner_text, owner_text
from hub_published import BASE, QUIET, TASTE
from hub_server import Hub
from tiny_models import red_pairs

pytest_plugins = ["hub_fixtures"]
METRICS = ("accuracy", "accuracy_low", "accuracy_high", "log_loss")


def test_own_text_of_a_card_is_kept(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    push_adapter(copied, TASTE, base_model=BASE)
    # On the Hub's page.
    text = hub.files(TASTE)["README.md"].decode()
    edited = text.replace("<!-- begin usage -->", "## My cat\n\nShe likes red.\n\n<!-- begin usage -->")
    edited = edited.replace("library_name:", "license: mit\nlibrary_name:")
    hub.put(TASTE, {"README.md": edited.replace("- seed: 42", "- seed: wrong").encode()})
    push_adapter(copied, TASTE, base_model=BASE)
    text = hub.files(TASTE)["README.md"].decode()
    assert "She likes red." in text
    assert "- seed: 42" in text
    assert ModelCard(text).data.license == "mit"
    assert owner_text(text) == "## My cat\n\nShe likes red."
    # In the folder.
    card = copied / "README.md"
    card.write_text(card.read_text() + "\nA dog too.\n")
    push_adapter(copied, TASTE, base_model=BASE)
    assert "A dog too." in hub.files(TASTE)["README.md"].decode()


def test_renewing_a_card() -> None:
    old = "---\ntags:\n- a\n- x\n---\n<!-- begin summary; tags: a -->\n1\n<!-- end summary -->\nmine\n"
    new = (
        "---\ntags:\n- b\n---\n<!-- begin summary; tags: b -->\n2\n<!-- end summary -->\n"
        "<!-- begin usage -->\n3\n<!-- end usage -->\n"
    )
    kept = keep_owner_text(new, old)
    assert ModelCard(kept).data.tags == ["b", "x"]  # generated tags go, added ones stay
    assert kept.endswith("<!-- begin summary; tags: b -->\n2\n<!-- end summary -->\nmine\n")  # no usage, as before
    assert keep_owner_text(new, new) == new
    assert keep_owner_text(new, "My own card.") == "My own card."
    assert keep_owner_text(new, "# Draft\n[More Information Needed]\n") == new
    assert keep_owner_text(new, "---\nlicense: mit\n---\n").count("license: mit") == 1


@pytest.mark.parametrize("folder", ["my-taste", "my-taste-lora"])
def test_parts_keep_their_names(made: Path, folder: str) -> None:
    """Published cards are renewed by these names."""
    card = (made / folder / "README.md").read_text()
    parts = ["summary", "evaluation", "usage", "training", "limits", "versions"]
    assert [part for part in re.findall(r"<!-- begin (\w+)", card) if part != "base"] == parts
    assert [part for part in re.findall(r"<!-- end (\w+) -->", card) if part != "base"] == parts
    assert owner_text(card) == ""


def test_saving_again_keeps_the_owners_text(made: Path, tmp_path: Path) -> None:
    args = BradleyTerryConfig(str(tmp_path / "taste"), **QUIET, save_strategy="no")
    trainer = BradleyTerryTrainer(str(made / "tiny-clip"), args, red_pairs(8))
    trainer.save_model()
    card = tmp_path / "taste" / "README.md"
    assert "- steps: 2" not in card.read_text()
    card.write_text(card.read_text() + "\nMine.\n")
    trainer.train()
    trainer.save_model()
    assert "- steps: 2" in card.read_text()
    assert "hardware: " in card.read_text()
    assert card.read_text().endswith("\nMine.\n")


def test_card_shows_the_diagram_that_is_there(made: Path, tmp_path: Path) -> None:
    evaluation = {f"eval_{who}{key}": 0.5 for who in ("", "base_") for key in METRICS}
    args = BradleyTerryConfig(str(tmp_path / "taste"), **QUIET)
    trainer = BradleyTerryTrainer(str(made / "tiny-clip"), args)
    trainer.state.log_history = [evaluation]
    trainer.write_card(tmp_path)
    assert "reliability.png" not in (tmp_path / "README.md").read_text()
    (tmp_path / "reliability.png").touch()
    trainer.write_card(tmp_path)
    assert "](reliability.png)" in (tmp_path / "README.md").read_text()
