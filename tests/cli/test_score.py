"""`bt-hf score` in this process: it prints what the scorer says, and errors of one line."""

import json

import pytest

from bt_hf.cli import main
from bt_hf.cli.score import find_images
from bt_hf.reward.scorer import PreferenceScorer
from command_line import PROMPT, Workplace, lines_of_error


def test_score_prints_what_the_scorer_says(workplace: Workplace, capsys) -> None:
    argv = ["score", str(workplace.reward), "--prompt", PROMPT, str(workplace.images)]
    assert main([*argv, "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths = find_images([str(workplace.images)])
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
    assert find_images([str(red), str(workplace.images)]) == [red, blue]
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
