"""Cards as promises: each block of code runs, with bases stored in any floating type, and says what it was made of."""

import io
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer, push_adapter
from bt_hf.hub.card_sections import address_card, in_code
from bt_hf.hub.facts import digest_rows
from code_examples import fenced_blocks
from hub_published import BASE, LORA, PIPELINE, QUIET, TASTE, push
from hub_server import Hub
from tiny_models import picture, red_pairs, save

pytest_plugins = ["hub_fixtures"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COLOURS = {"first.png": (220, 40, 40), "second.png": (40, 40, 220)}


def stored_in(folder: Path, made: Path, dtype: torch.dtype) -> dict[str, Path]:
    """Both bases, stored in a floating type."""
    shutil.copytree(made / "tiny-clip", folder / "clip")
    AutoModel.from_pretrained(folder / "clip", dtype=dtype).save_pretrained(folder / "clip")
    DiffusionPipeline.from_pretrained(made / "tiny-sd", dtype=dtype).save_pretrained(folder / "sd")
    return {BASE: folder / "clip", PIPELINE: folder / "sd"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_of_every_card_runs(
    hub: Hub, online: Path, made: Path, tmp_path: Path, monkeypatch, capsys, dtype: torch.dtype
) -> None:
    for repo_id, folder in stored_in(tmp_path / "bases", made, dtype).items():
        hub.put(repo_id, folder)
    push(made)
    push(made, LORA)
    monkeypatch.chdir(tmp_path)
    for name, colour in COLOURS.items():
        picture(colour).save(name)
    printed = []
    for repo_id, blocks in ((TASTE, 2), (LORA, 2)):
        found = list(fenced_blocks(hub.files(repo_id)["README.md"].decode(), "python"))
        assert len(found) == blocks
        for block in found:
            capsys.readouterr()
            # The tiny pipeline is made for small images.
            small = 'pipe("a red apple", height=32, width=32, num_inference_steps=2, '
            exec(block.code.replace('pipe("a red apple", ', small), {})
            printed.append(capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(float(printed[0].splitlines()[0]), abs=1e-6)
    expected = PreferenceScorer.from_pretrained(TASTE).compare("a red apple", *COLOURS)
    assert float(printed[1]) == pytest.approx(expected, abs=1e-6)
    assert all(max(high for _, high in Image.open(name).getextrema()) > 0 for name in ("with.png", "without.png"))


@pytest.mark.parametrize(
    "name", ['my "taste"', "my\ntaste", "my'taste", "my\\taste", "{{ 7 * 7 }}", "my`taste`", "geschmäcke 味"]
)
def test_names_of_folders_do_not_break_code(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    base = save(tmp_path / f"base {name}")
    options = {**QUIET, "max_steps": 1, "save_strategy": "no"}
    trainer = BradleyTerryTrainer(base, BradleyTerryConfig(str(tmp_path / name), **options), red_pairs(4))
    trainer.save_model()
    monkeypatch.chdir(tmp_path)
    for picture_name, colour in COLOURS.items():
        picture(colour).save(picture_name)
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    ModelCard(card)
    assert len([line for line in card.splitlines() if line.startswith("# ")]) == 1
    blocks = list(fenced_blocks(card, "python"))
    assert len(blocks) == 2
    for block in blocks:
        exec(block.code.replace("path/to/", ""), {})
    # After a push, there is a name that needs no care.
    published = address_card(card, "me/nice", "me/base")
    assert "# nice\n" in published
    for block in fenced_blocks(published, "python"):
        compile(block.code, "card", "exec")
        assert '"me/nice"' in block.code
        assert '"base' not in block.code


def test_strings_in_code_are_read_back() -> None:
    for text in ('"', "'", "\\", "\n", "\r\n", "\u2028", "味", "\U0001f34e", "{x}", "\x00", '"""', "\\N{DASH}"):
        assert eval(in_code(text)) == text


def test_card_names_base_data_and_its_repo(hub: Hub, online: Path, made: Path, copied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "tiny-clip", tmp_path / "clip"))
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n# A base\n")
    commit = hub.put(BASE, folder)
    # Trained from the Hub: known by the run. From a folder: known when it is published.
    args = BradleyTerryConfig(str(tmp_path / "taste"), **QUIET)
    trainer = BradleyTerryTrainer(BASE, args, red_pairs(8))
    trainer.save_model()
    text = (tmp_path / "taste" / "README.md").read_text()
    sha = commit if isinstance(commit, str) else hub.repos[BASE].branches["main"]
    assert f"- revision of the base: {sha}" in text
    assert f"- digest of the pairs: {digest_rows(red_pairs(8))}" in text
    Image.new("RGB", (8, 8)).save(copied / "training_curve.png")
    for _ in range(2):
        push_adapter(copied, "me/other-name", base_model=BASE)
        card = hub.files("me/other-name")["README.md"].decode()
        assert card.count(f"`{BASE}` at revision `{sha}`, licence openrail") == 1
        assert "\n# other-name\n" in card
        assert card.count("](training_curve.png)") == 1
        assert card.count("](reliability.png)") == 1
        Image.open(io.BytesIO(hub.files("me/other-name")["training_curve.png"]))
    assert re.search(r"digest of the pairs: [0-9a-f]{16}\n", card)


def test_digest_tells_data_apart() -> None:
    pairs = red_pairs(4)
    assert digest_rows(pairs) == digest_rows(red_pairs(4))
    others = [
        red_pairs(4, seed=1),
        red_pairs(5),
        pairs.select([1, 0, 2, 3]),
        red_pairs(4, weight=[1.0, 1.0, 1.0, 2.0]),
    ]
    assert len({digest_rows(rows) for rows in [pairs, *others]}) == 5
    assert digest_rows(pairs.add_column("note", ["x"] * 4)) == digest_rows(pairs)
    assert digest_rows(pairs.with_format("torch")) == digest_rows(pairs)
    assert digest_rows(pairs.to_iterable_dataset()) is None
    assert digest_rows(None) is None
    assert isinstance(pairs, Dataset)
