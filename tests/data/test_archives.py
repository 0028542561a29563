"""WebDataset archives with any extensions, loaded and streamed."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.images import to_rgb
from bt_hf.data.pairs import load_preference_pairs
from tiny_images import png


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, members: dict[str, bytes], name: str = "a.tar") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as archive:
        for path, content in members.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


RED, BLUE, JPEG, WEBP = png("red"), png("blue"), png("red", format="JPEG"), png("blue", format="WEBP")
MIXED = {
    "1.chosen.png": RED,
    "1.rejected.webp": WEBP,
    "1.prompt.txt": b"007",
    "2.chosen.jpg": JPEG,
    "2.rejected.PNG": BLUE,
    "2.txt": b"true",
    "x/3.chosen.jpeg": JPEG,
    "x/3.rejected.webp": WEBP,
    "x/3.json": json.dumps({"prompt": "2024-01-01", "note": 5}).encode(),
}


def load(source: Path, streaming: bool, **options: Any) -> list[dict[str, Any]]:
    return list(load_preference_pairs(source, streaming=streaming, **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_several_extensions_and_texts(tmp_path: Path, streaming: bool) -> None:
    folder = write(tmp_path / "data", MIXED)
    for source in (folder, folder / "a.tar"):
        rows = load(source, streaming)
        assert [row["prompt"] for row in rows] == ["007", "true", "2024-01-01"]
        assert all(to_rgb(row["chosen"]).getpixel((0, 0))[0] > 200 for row in rows)
        assert all(to_rgb(row["rejected"]).getpixel((0, 0))[2] > 200 for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_one_image(tmp_path: Path, streaming: bool) -> None:
    members = {
        f"{n}.{k}": v
        for n in (1, 2)
        for k, v in (("png", RED if n == 1 else BLUE), ("json", b'{"prompt": "x", "rank": %d}' % n))
    }
    (row,) = load(write(tmp_path / "data", members), streaming)
    assert to_rgb(row["chosen"]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"9.chosen.png": RED, "9.chosen.jpg": JPEG, "9.rejected.png": BLUE, "9.txt": b"x"},
            "two members for one column",
        ),
        ({"9.chosen.png": RED, "9.rejected.png": BLUE, "9.json": b"{"}, "not valid JSON"),
        ({"9.chosen.png": RED, "9.rejected.png": BLUE, "9.txt": b"\xff\xff"}, "not text in UTF-8"),
        ({"9.chosen.png": RED, "9.txt": b"x"}, "image missing: rejected"),
        ({"9.chosen.png": RED[:30], "9.rejected.png": BLUE, "9.txt": b"x"}, "unreadable image: chosen"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, members: dict[str, bytes], message: str, streaming: bool) -> None:
    folder = write(tmp_path / "data", MIXED | members)
    with pytest.raises(PreferenceDataError, match=f"row 3 of .*{message}"):
        load(folder, streaming)
    assert len(load(folder, streaming, on_bad_rows="drop")) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_links_in_archives_and_paths_in_their_json_lead_nowhere(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "private.png").write_bytes(png("lime"))
    path = str(tmp_path / "private.png")
    folder = write(
        tmp_path / "data",
        MIXED | {"9.rejected.png": BLUE, "9.json": json.dumps({"prompt": "x", "chosen": path}).encode()},
    )
    with tarfile.open(folder / "a.tar", "a") as archive:
        link = tarfile.TarInfo("8.chosen.png")
        link.type, link.linkname = tarfile.SYMTYPE, path
        archive.addfile(link)
    with pytest.raises(PreferenceDataError):
        load(folder, streaming)
    assert len(load(folder, streaming, on_bad_rows="drop")) == 3


def test_a_changed_archive_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", MIXED)
    assert len(load(folder, False)) == 3
    write(folder, {name: content for name, content in MIXED.items() if not name.startswith("x")})
    assert len(load(folder, False)) == 2


def test_splits(tmp_path: Path) -> None:
    folder = write(
        write(tmp_path / "data", MIXED, "train.tar"), {k: v for k, v in MIXED.items() if k[0] == "1"}, "test.tar"
    )
    assert [len(load(folder, streaming, split="test")) for streaming in (False, True)] == [1, 1]
    assert len(load(folder, False, split="train[:2]")) == 2
    for streaming in (False, True):
        with pytest.raises(PreferenceDataError, match=r"(?i)split.*train"):
            load(folder, streaming, split="dev")
