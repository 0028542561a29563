"""Sets of files are replaced all or nothing, and a folder from elsewhere can't use that to reach out of itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bt_hf.data.atomic import SCRATCH, locked, recover, replaced, write_file

GATES = ("config",)


def save(folder: Path, **files: str) -> None:
    with replaced(folder, GATES, lambda name: name.startswith("weights")) as scratch:
        for name, text in files.items():
            (scratch / name).parent.mkdir(exist_ok=True, parents=True)
            (scratch / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def pending(folder: Path, remove: list[str], move: list[str], **files: str) -> None:
    """Leave the scratch of a save that was cut after its list."""
    new = folder / SCRATCH / "new"
    new.mkdir(parents=True)
    for name, text in files.items():
        (new / name).write_text(text)
    (folder / SCRATCH / "journal.json").write_text(json.dumps({"remove": remove, "move": move}))


def test_a_set_replaces_a_set_and_leaves_the_rest(tmp_path: Path) -> None:
    save(tmp_path, config="old", weights="old", weights_2="old", words="old")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "state").write_text("1")
    save(tmp_path, config="new", weights="new")
    kept = {"words": "old", "checkpoint-1/state": "1"}
    assert contents(tmp_path) == {"config": "new", "weights": "new", **kept}


def test_an_error_leaves_the_old_files(tmp_path: Path) -> None:
    save(tmp_path, config="old", weights="old")

    def fail() -> None:
        with replaced(tmp_path, GATES) as scratch:
            (scratch / "config").write_text("new")
            raise RuntimeError("no weights")

    with pytest.raises(RuntimeError, match="no weights"):
        fail()
    assert contents(tmp_path) == {"config": "old", "weights": "old"}


def test_a_single_file_that_changes_is_never_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that stays the same is not taken away while one file of weights is replaced."""
    save(tmp_path, config="same", weights="old")
    seen, replace = [], os.replace

    def look(source: Path, target: Path) -> None:
        seen.append((tmp_path / "config").exists() and (tmp_path / "weights").exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    save(tmp_path, config="same", weights="new")
    assert seen
    assert all(seen)


def test_a_cut_save_is_finished_from_wherever_it_was(tmp_path: Path) -> None:
    save(tmp_path, config="old", weights="old")
    pending(tmp_path, ["config"], ["weights", "config"], config="new", weights="new")
    (tmp_path / "config").unlink()
    os.replace(tmp_path / SCRATCH / "new" / "weights", tmp_path / "weights")
    recover(tmp_path)
    recover(tmp_path)
    assert contents(tmp_path) == {"config": "new", "weights": "new"}


def test_finishing_twice_does_not_take_the_new_files_away(tmp_path: Path) -> None:
    save(tmp_path, config="new", weights="new")
    pending(tmp_path, ["config"], ["weights", "config"])  # all was moved, and the scratch not yet removed
    recover(tmp_path)
    assert contents(tmp_path) == {"config": "new", "weights": "new"}


@pytest.mark.parametrize("where", ["remove", "move"])
@pytest.mark.parametrize("name", ["../outside", "{}/outside", "a/../../outside", "link/outside", "..\\outside", 7, ""])
def test_a_list_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path, where: str, name: object) -> None:
    folder, outside = tmp_path / "pulled", tmp_path / "outside"
    outside.write_text("private")
    save(folder, config="theirs")
    (folder / "link").symlink_to(tmp_path)
    if isinstance(name, str):
        name = name.format(tmp_path)
    pending(folder, [name] if where == "remove" else [], [name] if where == "move" else [], outside="evil")
    recover(folder)
    assert outside.read_text() == "private"
    assert (folder / "config").read_text() == "theirs"
    assert not (folder / SCRATCH).exists()


def test_scratch_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    folder, other = tmp_path / "pulled", tmp_path / "other"
    other.mkdir()
    (other / "private").write_text("private")
    folder.mkdir()
    (folder / SCRATCH).symlink_to(other)
    recover(folder)
    assert (other / "private").read_text() == "private"


def test_two_processes_do_not_save_at_once(tmp_path: Path) -> None:
    code = (
        f"import pathlib; from bt_hf.data.atomic import locked; locked(pathlib.Path({str(tmp_path)!r}), 0).__enter__()"
    )
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TimeoutError: another process is saving into" in other.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_that_is_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "folder" / "file", b"text", scratch=tmp_path)
    assert contents(tmp_path) == {"folder/file": "text"}
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_file(tmp_path / "taken", b"text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken"]
