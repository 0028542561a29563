"""The folder of a session: resuming, other versions, other owners, folders that can't be written."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bt_hf.data.clicks import FORMAT
from bt_hf.studio.errors import NotSavedError
from bt_hf.studio.session import JsonLines, Session
from tiny_models import picture

LINE = {"asked": "p1", "prompt": "a cat", "left": 0, "right": 1, "kind": "random"}


def test_lines_are_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    whole = b'{"a": 1}\n{"a": "\xc3\xa4 \\n"}\n'
    for end in range(len(whole) + 1):
        file.write_bytes(whole[:end])
        lines = JsonLines(file)
        lines.append({"b": 2})
        lines.close()
        kept = whole[: whole[:end].rfind(b"\n") + 1]
        assert file.read_bytes() == kept + b'{"b": 2}\n'


def test_a_long_cut_line_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    JsonLines(file).close()
    assert file.read_bytes() == b'{"a": 1}\n'


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.append({"a": 1})
    write = os.write

    def half(descriptor: int, content: bytes) -> int:
        if len(content) > 5:
            return write(descriptor, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", half)
    with pytest.raises(NotSavedError, match="No space left"):
        lines.append({"b": 12})
    monkeypatch.undo()
    lines.append({"c": 3})
    assert list(lines) == [{"a": 1}, {"c": 3}]
    lines.close()


def test_a_session_goes_on(tmp_path: Path) -> None:
    session = Session(tmp_path / "s", "photos")
    session.append(LINE)
    session.append({"click": "a", "pair": "p1", "choice": "left"})
    session.close()
    again = Session(tmp_path / "s", "photos")
    assert again.id == session.id
    assert list(again.log.answers) == ["a"]
    again.close()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    session = Session(tmp_path / "s", "photos")
    with pytest.raises(ValueError, match="another studio has the session"):
        Session(tmp_path / "s", "photos")
    session.close()
    Session(tmp_path / "s", "photos").close()


def test_other_images_are_refused(tmp_path: Path) -> None:
    Session(tmp_path / "s", "photos").close()
    with pytest.raises(ValueError, match=r"clicks on 'photos', not on 'emoji'.*--session"):
        Session(tmp_path / "s", "emoji")


@pytest.mark.parametrize("content", ['{"format": "bt_hf studio 99"}', "{", "[]", '{"source": "photos"}', ""])
def test_another_version_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    Session(tmp_path / "s", "photos").close()
    (tmp_path / "s" / "session.json").write_text(content)
    with pytest.raises(ValueError, match=r"format 'bt_hf studio 99'|cannot be read") as error:
        Session(tmp_path / "s", "photos")
    assert "\n" not in str(error.value)
    assert (tmp_path / "s" / "session.json").read_text() == content


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and is not a session"):
        Session(tmp_path, "photos")
    with pytest.raises(ValueError, match="is not a folder"):
        Session(tmp_path / "thesis.tex", "photos")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_pictures_are_stored_once(tmp_path: Path) -> None:
    session = Session(tmp_path / "s", "photos")
    session.keep_picture(3, picture((9, 9, 9)))
    session.keep_picture(3, picture((200, 9, 9)))
    session.keep_picture(4, picture((9, 9, 9), size=(600, 20)))
    assert session.picture_file(3) == tmp_path / "s" / "images" / "3.png"
    assert session.picture_file(4) == tmp_path / "s" / "images" / "4.jpg"
    assert session.picture_file(5) is None
    session.close()


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that this process may read and not write; the superuser becomes somebody else for that."""
    folder = Path(tempfile.mkdtemp())
    me = os.geteuid()
    Session(folder / "s", "photos").close()
    for path in (folder, folder / "s", folder / "s" / "images"):
        path.chmod(0o555)
    for path in (folder / "s").glob("*.json*"):
        path.chmod(0o444)
    if me == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(me)
    for path in (folder, folder / "s", folder / "s" / "images"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_can_not_be_written(locked_folder: Path) -> None:
    with pytest.raises(OSError, match=r"cannot be made \(Permission denied\); name a folder in --session"):
        Session(locked_folder / "new", "photos")
    with pytest.raises(OSError, match=r"cannot be written \(Permission denied\); name a folder in --session"):
        Session(locked_folder / "s", "photos")


def test_the_header_tells_format_and_source(tmp_path: Path) -> None:
    Session(tmp_path / "s", "photos").close()
    header = json.loads((tmp_path / "s" / "session.json").read_text())
    assert (header["format"], header["source"], len(header["id"])) == (FORMAT, "photos", 16)
