"""Folders and datasets as they are: captions, hidden, unreadable and huge images, links."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from bt_hf.studio.pool import Pool
from bt_hf.studio.session import Session
from bt_hf.studio.sources import NO_PROMPT, DatasetSource, FolderSource, open_source
from tiny_models import picture, red_pairs


def prompts_of(source: FolderSource) -> dict[str, str | None]:
    return {listed.name: listed.prompt for listed in source.listed() if listed.problem is None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg", "in/c.png"):
        picture((90, 90, 90)).save(tmp_path / name)
    return tmp_path


def test_captions_of_a_table(folder: Path) -> None:
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "in/c.png", "text": " a dog "}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "b.txt").write_text("a bird\n")
    assert prompts_of(FolderSource(folder)) == {"a.png": "a cat", "b.jpg": "a bird", "in/c.png": "a dog"}


def test_one_prompt_for_all(folder: Path) -> None:
    (folder / "b.txt").write_text("a bird\n")
    assert set(prompts_of(FolderSource(folder, "my garden")).values()) == {"my garden"}


def test_file_names_group_images_where_most_have_company(tmp_path: Path) -> None:
    for name in ("red_apple-1.png", "red_apple-2.png", "zebra (1).png", "zebra (2).png", "owl.png"):
        picture((90, 90, 90)).save(tmp_path / name)
    found = prompts_of(FolderSource(tmp_path))
    assert [found[name] for name in sorted(found)] == ["owl", "red apple", "red apple", "zebra", "zebra"]


def test_missing_captions(folder: Path, tmp_path: Path) -> None:
    assert set(prompts_of(FolderSource(folder)).values()) == {None}
    session = Session(tmp_path / "s", "x")
    pool = Pool(session, FolderSource(folder))
    assert set(pool.by_prompt()) == {NO_PROMPT}  # any two can be compared
    session.close()


def test_a_table_that_is_damaged_is_named(folder: Path) -> None:
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"metadata.jsonl: cannot be read"):
        list(FolderSource(folder).listed())


def test_bad_images_are_left_out_and_named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "private.png"
    picture((1, 2, 3)).save(outside)
    (folder / ".hidden.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "text.png").write_text("not an image")
    (folder / "link.png").symlink_to(outside)
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    Image.new("RGB", (500, 4)).save(folder / "narrow.png")
    (folder / ".git").mkdir()
    (folder / ".git" / "d.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    session = Session(tmp_path_factory.mktemp("s") / "s", "x")
    pool = Pool(session, FolderSource(folder))
    for numbers in pool.by_prompt().values():
        for number in numbers:
            try:
                pool.read(number)
            except ValueError:
                continue
    assert len(pool) == 3
    reasons = {name: reason.split(":")[0] for name, reason in pool.skipped.items()}
    assert reasons == {
        ".hidden.png": "hidden file",
        "cut.png": "unreadable image",
        "text.png": "unreadable image",
        "link.png": "image outside the folder",
        "huge.png": "image too large",
        "narrow.png": "image too narrow",
    }
    session.close()


def test_numbers_stay_when_the_folder_changes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("s") / "s"

    def numbers() -> dict[str, int]:
        session = Session(place, "x")
        pool = Pool(session, FolderSource(folder))
        found = {pool.pictures[number].name: number for group in pool.by_prompt().values() for number in group}
        session.close()
        return found

    before = numbers()
    picture((7, 7, 7)).save(folder / "0-first.png")
    (folder / "b.jpg").unlink()
    after = numbers()
    assert after["a.png"] == before["a.png"]
    assert after["in/c.png"] == before["in/c.png"]
    assert after["0-first.png"] == 3
    picture((8, 8, 8), size=(30, 30)).save(folder / "a.png")  # another picture under an old name
    assert numbers()["a.png"] == 4


def test_a_session_in_the_folder_is_not_of_its_images(folder: Path) -> None:
    session = Session(folder / "clicks", "x")
    session.keep_picture(0, picture((1, 1, 1)))
    assert set(prompts_of(FolderSource(folder))) == {"a.png", "b.jpg", "in/c.png"}
    session.close()


def test_a_dataset_of_pairs_gives_both_columns() -> None:
    rows = red_pairs(3)
    source = DatasetSource(rows, "pairs")
    listed = list(source.listed())
    assert [one.name for one in listed][:2] == ["row 0, chosen", "row 0, rejected"]
    assert [one.prompt for one in listed][::2] == rows["prompt"][:]
    assert source.read("row 2, rejected").tobytes() == rows[2]["rejected"].tobytes()


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    red_pairs(2).save_to_disk(str(tmp_path / "data"))
    assert len(list(open_source(str(tmp_path / "data")).listed())) == 4


def test_a_dataset_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no column of images among prompt"):
        DatasetSource(Dataset.from_dict({"prompt": ["a"]}), "texts")


def test_missing_folders_and_an_installation_without_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_source(str(tmp_path / "nowhere"))
    monkeypatch.setattr("bt_hf.studio.sources._EMOJI", tmp_path / "emoji64.parquet")
    with pytest.raises(FileNotFoundError, match=r"name a folder of your own images, as in bt-hf studio my-photos/"):
        open_source(None)


def test_the_default_is_emoji_of_concepts_that_no_base_has_seen() -> None:
    source = open_source(None)
    listed = list(source.listed())
    assert (source.title, len(listed), len({one.prompt for one in listed})) == ("emoji", 1170, 234)
    assert source.read(listed[7].name).size == (64, 64)
