"""Folders named `liked` and `disliked`, or by stars, and the captions of their images."""

import importlib
import json
import logging
from pathlib import Path

import pytest
from datasets import load_dataset
from datasets.utils.logging import disable_progress_bar

from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.pairs import load_preference_pairs
from coloured import png, summary

disable_progress_bar()
LIKES = [("p", "red", "blue", 1.0, 0.5), ("p", "red", "white", 1.0, 0.5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, **folders: list[str]) -> Path:
    for name, colours in folders.items():
        (folder / name).mkdir(parents=True)
        for colour in colours:
            (folder / name / f"{colour}.png").write_bytes(png(colour))
    return folder


def load(folder: Path, streaming: bool = False, prompt: str | None = "p", split: str | None = None) -> list[tuple]:
    return sorted(summary(load_preference_pairs(folder, split, streaming, default_prompt=prompt)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "names",
    [("liked", "disliked"), ("Like", "DISLIKE"), ("good", "bad"), ("Likes", "Dislikes"), ("5", "1"), ("2", "1")],
)
def test_folders(tmp_path: Path, names: tuple[str, str], streaming: bool) -> None:
    folder = write(tmp_path / "d", **{names[0]: ["red"], names[1]: ["blue", "white"]})
    (folder / names[0] / ".DS_Store").write_text("x")
    (folder / names[1] / "Thumbs.db").write_text("x")
    assert load(folder, streaming) == LIKES
    with pytest.raises(PreferenceDataError, match="without prompts.*default_prompt=") as caught:
        load(folder, streaming, prompt=None)
    assert "\n" not in str(caught.value)


def test_stars(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", **{"5 stars": ["red"], "3_star": ["blue", "lime"], "1-stars": ["white"]})
    assert load(folder) == [
        ("p", "blue", "white", 1.0, 1.0),
        ("p", "lime", "white", 1.0, 1.0),
        *(("p", "red", one, 1.0, round(1 / 3, 6)) for one in ("blue", "lime", "white")),
    ]


def test_splits_and_folders_below(tmp_path: Path) -> None:
    for split, colours in {"train": ("red", "blue"), "test": ("lime", "white")}.items():
        write(tmp_path / "d" / split, **{"liked/x": [colours[0]], "disliked/y": [colours[1]]})
    assert load(tmp_path / "d") == [("p", "red", "blue", 1.0, 1.0)]
    assert load(tmp_path / "d", split="test") == [("p", "lime", "white", 1.0, 1.0)]
    with pytest.raises(PreferenceDataError, match="unknown split 'dev'.*test, train"):
        load(tmp_path / "d", split="dev")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", ["metadata in them", "one metadata", "texts"])
@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_captions(tmp_path: Path, column: str, how: str, streaming: bool) -> None:
    folder = write(tmp_path / "d", liked=["red", "lime"], disliked=["blue", "white"])
    prompts = {"liked/red": "a", "liked/lime": "b", "disliked/blue": "a", "disliked/white": "b"}
    for name, prompt in prompts.items():
        if how == "texts":
            (folder / f"{name}.txt").write_text(f"{prompt}\n")
            continue
        part, file = name.split("/") if how == "metadata in them" else (".", name)
        with (folder / part / "metadata.jsonl").open("a") as table:
            table.write(json.dumps({"file_name": f"{file}.png", column: prompt}) + "\n")
    if how == "one metadata" and streaming:
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        (folder / "metadata.jsonl").write_text("\n".join(sorted(lines, key=lambda line: json.loads(line)[column])))
    assert load(folder, streaming, None) == [("a", "red", "blue", 1.0, 1.0), ("b", "lime", "white", 1.0, 1.0)]


def test_a_missing_caption_is_a_bad_row(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", liked=["red", "lime"], disliked=["blue", "white"])
    for name in ("liked/red", "disliked/blue"):
        (folder / f"{name}.txt").write_text("a")
    with pytest.raises(PreferenceDataError, match="row 1 of d: prompt is not text: found None"):
        load(folder, prompt=None)
    assert load(folder) == [("a", "red", "blue", 1.0, 1.0), ("p", "lime", "white", 1.0, 1.0)]


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "d", liked=["red"], disliked=["blue", "white"], unsorted=["lime"])
    with caplog.at_level(logging.WARNING):
        assert load(folder) == LIKES
    assert "not read: 'unsorted', which judge no image" in caplog.text


def test_folders_that_give_nothing(tmp_path: Path) -> None:
    for name, folders, message in (
        ("empty", {"liked": [], "disliked": []}, "no images in disliked, liked"),
        ("one", {"liked": ["red", "blue"]}, "no row prefers one image over another"),
        ("same", {"liked": ["red"], "disliked": []}, "no row prefers one image over another"),
    ):
        with pytest.raises(PreferenceDataError, match=message):
            load(write(tmp_path / name, **folders))
    folder = write(tmp_path / "twice", liked=["red"], disliked=["red", "blue"])
    with pytest.raises(PreferenceDataError, match="identical images|image twice"):
        load(folder)
    (folder / "liked" / "metadata.csv").write_text("name,prompt\nred.png,a\n")
    with pytest.raises(PreferenceDataError, match="liked/metadata.csv: expected the columns file_name and prompt"):
        load(folder)
    (folder / "liked" / "metadata.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PreferenceDataError, match="liked/metadata.csv: cannot be read"):
        load(folder)
    (folder / "liked" / "metadata.csv").unlink()
    (folder / "liked" / "red.txt").write_bytes(b"\xff")
    with pytest.raises(PreferenceDataError, match=r"liked/red.txt: is not text in UTF-8"):
        load(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", [("Liked", "disliked"), ("5", "1")])
def test_labels_that_imagefolder_makes_of_them(tmp_path: Path, names: tuple[str, str], streaming: bool) -> None:
    folder = write(tmp_path / "d", **{names[0]: ["red"], names[1]: ["blue", "white"]})
    data = load_dataset("imagefolder", data_dir=str(folder), split="train", streaming=streaming)
    assert sorted(summary(load_preference_pairs(data, default_prompt="p"))) == LIKES


@pytest.mark.parametrize("command", ["reward", "lora"])
def test_commands_that_train_take_them(tmp_path: Path, command: str) -> None:
    folder = write(tmp_path / "d", liked=["red"], disliked=["blue", "white"])
    parse = importlib.import_module(f"bt_hf.cli.{command}").parse
    arguments = parse(["--model", "x", "--dataset", str(folder), "--default_prompt", "p", "--use_cpu=true"])[0]
    assert sorted(summary(arguments.load_training_pairs())) == LIKES


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", liked=["red"], disliked=["blue"])
    (tmp_path / "secret.png").write_bytes(png("white"))
    (folder / "disliked" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(PreferenceDataError, match="image outside the folder"):
        load(folder)


def test_other_folders_are_as_before(tmp_path: Path) -> None:
    folder = write(tmp_path / "digits", **{str(one): ["red", "blue"] for one in range(10)})
    with pytest.raises(PreferenceDataError, match="expected the columns prompt, chosen and rejected"):
        load(folder)
