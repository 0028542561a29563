"""`bt-hf score` in this process: it prints what the scorer says, and errors of one line."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image, features

from bt_hf.cli import main
from bt_hf.cli.score import find_images
from bt_hf.data.images import FORMATS, to_rgb
from bt_hf.reward.scorer import PreferenceScorer
from command_line import BLUE, PROMPT, RED, Workplace, lines_of_error
from tiny_models import picture


def test_score_prints_what_the_scorer_says(workplace: Workplace, capsys) -> None:
    argv = ["score", str(workplace.reward), "--prompt", PROMPT, str(workplace.images)]
    assert main([*argv, "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths, _ = find_images([str(workplace.images)])
    ranking = PreferenceScorer.from_pretrained(workplace.reward).rank(PROMPT, paths)
    assert [row["image"] for row in rows] == [str(paths[index]) for index, _ in ranking]
    assert [row["reward"] for row in rows] == pytest.approx([reward for _, reward in ranking])
    assert {row["prompt"] for row in rows} == {PROMPT}

    assert main([*argv, "--top_k", "1", "--batch_size", "1"]) == 0
    header, best = capsys.readouterr().out.splitlines()
    assert header.split() == ["rank", "reward", "image"]
    assert best.split(maxsplit=2)[::2] == ["1", rows[0]["image"]]


def test_score_compares_two_images(workplace: Workplace, capsys) -> None:
    first, second = workplace.images / "red.png", workplace.images / "deeper" / "BLUE.JPG"
    argv = ["score", workplace.reward, first, "--prompt", PROMPT, second, "--compare"]
    assert main([str(argument) for argument in argv]) == 0
    expected = PreferenceScorer.from_pretrained(workplace.reward).compare(PROMPT, first, second)
    printed = capsys.readouterr().out
    assert float(printed.split()[0]) == pytest.approx(expected, abs=1e-3)
    assert f"{first} is preferred to {second}" in printed
    assert main([*map(str, argv), "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["probability"] == pytest.approx(expected)


def test_score_takes_another_base_and_plain_models(workplace: Workplace, capsys) -> None:
    argv = ["--prompt", PROMPT, str(workplace.images / "red.png")]
    assert main(["score", str(workplace.reward), *argv, "--base_model", workplace.model]) == 0
    assert main(["score", workplace.model, *argv]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_find_images(workplace: Workplace, tmp_path) -> None:
    red, blue = workplace.images / "red.png", workplace.images / "deeper" / "BLUE.JPG"
    assert find_images([str(red), str(workplace.images)]) == ([red, blue], {"not images": 1})
    with pytest.raises(FileNotFoundError, match="no images in the folder"):
        find_images([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no such image file or folder"):
        find_images([str(tmp_path / "nowhere.png")])


def test_score_bad_inputs(workplace: Workplace, tmp_path, capsys) -> None:
    def error(*argv: object) -> str:
        lines = lines_of_error(capsys, "score", *argv)
        assert len(lines) == 1, lines
        assert lines[0].startswith("bt-hf score: error: ")
        return lines[0]

    red = workplace.images / "red.png"
    assert "--prompt" in error(workplace.reward, red)
    assert "nowhere.png" in error(workplace.reward, "nowhere.png", "--prompt", PROMPT)
    assert "exactly two images, but got 1" in error(workplace.reward, red, "--prompt", PROMPT, "--compare")
    assert "at least 1" in error(workplace.reward, red, "--prompt", PROMPT, "--top_k", "0")
    assert "exclude each other" in error(workplace.reward, red, red, "--prompt", PROMPT, "--compare", "--top_k", "1")
    assert "notes.txt" in error(workplace.model, workplace.images / "notes.txt", "--prompt", PROMPT)
    assert "nowhere" in error(tmp_path / "nowhere", red, "--prompt", PROMPT)


@pytest.mark.parametrize("suffix", sorted(s for s, f in Image.registered_extensions().items() if f in FORMATS))
def test_every_ending_that_pillow_reads(suffix: str, tmp_path: Path) -> None:
    """As far as Pillow can write it here."""
    kind = Image.registered_extensions()[suffix]
    if kind not in Image.SAVE or (kind == "AVIF" and not features.check("avif")):
        pytest.skip(f"Pillow does not write {kind}")
    for name in (f"a{suffix}", f"B{suffix.upper()}"):
        picture(RED).convert("L" if suffix in (".pgm", ".pbm") else "RGB").save(tmp_path / name, kind)
    paths, left_out = find_images([str(tmp_path)])
    assert [path.name for path in paths] == [f"B{suffix.upper()}", f"a{suffix}"]
    assert not left_out
    assert [to_rgb(path).mode for path in paths] == ["RGB", "RGB"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images among what folders of a photographer hold."""
    root = tmp_path / "photos"
    for name in ("deeper/a.png", ".thumbnails/a.png", "deeper/.hidden/x/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(RED).save(root / name)
    picture(BLUE).save(root / "b.jpg")
    picture(BLUE).save(root / "._b.jpg", "JPEG")  # as macOS leaves them beside a file
    for name in ("Thumbs.db", "notes.txt", "a.psd", "b.eps", "c.pdf", "d.svg", "e.py", "noending"):
        (root / name).write_bytes(b"%!PS-Adobe")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "broken-link.png").symlink_to("nowhere.png")
    return root


def test_hidden_and_foreign_files_are_counted(workplace: Workplace, folder: Path, capsys) -> None:
    paths, left_out = find_images([str(folder)])
    assert paths == [folder / "b.jpg", folder / "deeper" / "a.png"]
    assert left_out == {"hidden": 3, "not images": 10}
    assert main(["score", workplace.model, "--prompt", PROMPT, str(folder)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert printed.err == "bt-hf score: left out 13 other files in folders: 3 hidden, 10 not images\n"
    # A file or folder that is named is meant.
    assert find_images([str(folder / ".thumbnails")]) == ([folder / ".thumbnails" / "a.png"], {})
    assert find_images([str(folder / "._b.jpg")]) == ([folder / "._b.jpg"], {})


BROKEN = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"<html>404</html>",
    "eps": lambda content: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_image_is_left_out_with_a_note(damage: str, workplace: Workplace, tmp_path: Path, capsys) -> None:
    for number in range(5):
        picture(RED, number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(BROKEN[damage]((tmp_path / "2.png").read_bytes()))
    argv = ["score", workplace.model, "--prompt", PROMPT, str(tmp_path), "--format", "jsonl"]
    for size in ("1", "3"):
        assert main([*argv, "--batch_size", size]) == 0
        printed = capsys.readouterr()
        rows = [json.loads(line) for line in printed.out.splitlines()]
        assert sorted(Path(row["image"]).name for row in rows) == ["0.png", "1.png", "3.png", "4.png"]
        assert rows == sorted(rows, key=lambda row: -row["reward"])
        (note,) = printed.err.splitlines()
        assert note.startswith("bt-hf score: left out: ")
        assert "2.png" in note
    for number in (0, 1, 3, 4):
        (tmp_path / f"{number}.png").write_bytes(b"no")
    (error,) = lines_of_error(capsys, *argv)
    assert "no image can be read: " in error
    assert "(and 4 more)" in error


NAMES = [b"caf\xe9.png", b"two\nlines.png", b"\x1b[31mred.png", "\u00e4\u732b\U0001f600.png".encode(), b"a b'\"\\.png"]
NAMES += ["line\u2028separator.png".encode(), b"tab\t.png", b"-n.png", b"%s{}.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("kind", ["table", "jsonl"])
def test_any_file_name_is_printed(
    kind: str, encoding: str, workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    picture(RED).save(content, "PNG")
    for name in NAMES:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(content.getvalue())
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, newline=""))
    assert main(["score", workplace.model, "--prompt", PROMPT, str(tmp_path), "--format", kind]) == 0
    sys.stdout.flush()
    lines = written.getvalue().decode(encoding).splitlines()
    assert len(lines) == len(NAMES) + (kind == "table")
    assert all(line.isprintable() for line in lines)
    if kind == "jsonl":
        found = [os.fsencode(json.loads(line)["image"]).rpartition(b"/")[2] for line in lines]
        assert sorted(found) == sorted(NAMES)
    else:
        assert any("two\\nlines.png" in line for line in lines)


def test_a_reward_that_is_not_finite_names_the_file(workplace: Workplace, capsys) -> None:
    model = PreferenceScorer.from_pretrained(workplace.model)
    broken = workplace.images.parent / "nan"
    model.model.vision_model.embeddings.class_embedding.data[0] = float("nan")
    model.model.save_pretrained(broken)
    model.processor.save_pretrained(broken)
    capsys.readouterr()
    (error,) = lines_of_error(capsys, "score", broken, "--prompt", PROMPT, workplace.images / "red.png")
    assert "red.png' is not finite, computed in torch.float32" in error


def test_a_prompt_of_undecodable_bytes_is_refused(workplace: Workplace, capsys) -> None:
    (error,) = lines_of_error(
        capsys, "score", workplace.model, "--prompt", os.fsdecode(b"caf\xe9"), workplace.images / "red.png"
    )
    assert "should be valid Unicode" in error
