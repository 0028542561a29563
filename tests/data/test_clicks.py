"""The log of clicks: what each line means, and what a cut or damaged one loses."""

import json
from pathlib import Path

import pytest

from bt_hf import load_preference_pairs
from bt_hf.data.clicks import CLICKS, FORMAT, IMAGES, SESSION, ClickLog, read_clicks, words_of
from bt_hf.data.formats import PreferenceDataError
from tiny_models import picture

ASKED = {"asked": "p1", "prompt": "a cat", "left": 3, "right": 5, "kind": "random"}


def log_of(*lines: dict) -> ClickLog:
    log = ClickLog()
    for line in lines:
        log.add(line)
    return log


def write_session(folder: Path, *lines: dict, version: str = FORMAT) -> Path:
    (folder / IMAGES).mkdir(parents=True)
    (folder / SESSION).write_text(json.dumps({"format": version, "source": "images"}))
    (folder / CLICKS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in (3, 5, 8):
        picture((20 * number, 90, 90), seed=number).save(folder / IMAGES / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("left", [(3, 5, 1.0)]), ("right", [(5, 3, 1.0)]), ("tie", [(3, 5, 0.5)]), ("skip", [])],
)
def test_choices_are_rows(choice: str, expected: list) -> None:
    pairs = log_of(ASKED, {"click": "a", "pair": "p1", "choice": choice}).pairs()
    assert [(pair.chosen, pair.rejected, pair.preference) for pair in pairs] == expected


def test_a_click_that_comes_twice_counts_once() -> None:
    click = {"click": "a", "pair": "p1", "choice": "left"}
    assert len(log_of(ASKED, click, click).pairs()) == 1


def test_an_undone_click_is_gone_and_its_pair_may_be_answered_again() -> None:
    click, undo = {"click": "a", "pair": "p1", "choice": "left"}, {"undo": "a", "id": "u"}
    log = log_of(ASKED, click, undo)
    assert not log.pairs()
    assert not log.answered
    log.add(click)  # sent again by a page that has not heard of its confirmation
    assert not log.pairs()
    log.add({"click": "b", "pair": "p1", "choice": "right"})
    assert [pair.chosen for pair in log.pairs()] == [5]


def test_stars_become_weighted_pairs() -> None:
    log = log_of({"judged": "j", "prompt": "a cat", "images": [3, 5, 8], "values": [5, 2, 2], "way": "stars"})
    assert [(pair.chosen, pair.rejected, pair.weight) for pair in log.pairs()] == [(3, 5, 0.5), (3, 8, 0.5)]


@pytest.mark.parametrize(
    "line",
    [
        {"click": "a", "pair": "nobody put this", "choice": "left"},
        {"click": "a", "pair": "p1", "choice": "perhaps"},
        {"asked": "p2"},
        {"judged": "j", "prompt": "a", "images": [1, 2], "values": [1]},
        {"something": "else"},
    ],
)
def test_other_lines_are_refused(line: dict) -> None:
    with pytest.raises(ValueError, match=r"unknown|not a line|differ"):
        log_of(ASKED, line)


def test_every_whole_line_counts(tmp_path: Path) -> None:
    clicks = [{"click": name, "pair": "p1", "choice": "left"} for name in "ab"]
    whole = "".join(json.dumps(line) + "\n" for line in (ASKED, *clicks)).encode()
    for end in range(len(whole) + 1):
        (tmp_path / CLICKS).write_bytes(whole[:end])
        log = read_clicks(tmp_path)
        assert len(log.asked) + len(log.answers) == whole[:end].count(b"\n"), end
        assert not log.damaged


def test_a_damaged_line_in_the_middle_costs_that_line(tmp_path: Path) -> None:
    lines = [json.dumps(ASKED), '{"click": "a", "pa\x00', json.dumps({"click": "b", "pair": "p1", "choice": "left"})]
    (tmp_path / CLICKS).write_text("\n".join(lines) + "\n")
    log = read_clicks(tmp_path)
    assert (list(log.answers), log.damaged) == (["b"], [2])


def test_a_session_is_a_dataset_of_pairs(tmp_path: Path) -> None:
    other = {"asked": "p2", "prompt": "a dog", "left": 8, "right": 3, "kind": "asked"}
    clicks = [{"click": "a", "pair": "p1", "choice": "right"}, {"click": "b", "pair": "p2", "choice": "tie"}]
    pairs = load_preference_pairs(write_session(tmp_path / "session", ASKED, other, *clicks))
    assert pairs["prompt"][:] == ["a cat", "a dog"]
    assert pairs["preference"][:] == [1.0, 0.5]
    assert pairs[0]["chosen"].tobytes() == picture((100, 90, 90), seed=5).tobytes()


def test_two_equal_pictures_prefer_nothing(tmp_path: Path) -> None:
    other = {"asked": "p2", "prompt": "a dog", "left": 8, "right": 3, "kind": "asked"}
    clicks = [{"click": "a", "pair": "p1", "choice": "right"}, {"click": "b", "pair": "p2", "choice": "left"}]
    folder = write_session(tmp_path / "session", ASKED, other, *clicks)
    (folder / IMAGES / "5.png").write_bytes((folder / IMAGES / "3.png").read_bytes())
    assert load_preference_pairs(folder)["prompt"][:] == ["a dog"]


def test_a_session_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_session(tmp_path / "session", ASKED, version="bt_hf studio 2")
    with pytest.raises(PreferenceDataError, match=r"format 'bt_hf studio 2', and this version reads") as error:
        load_preference_pairs(folder)
    assert "\n" not in str(error.value)


def test_a_session_without_clicks_says_so(tmp_path: Path) -> None:
    with pytest.raises(PreferenceDataError, match="without a click"):
        load_preference_pairs(write_session(tmp_path / "session", ASKED))


@pytest.mark.parametrize(
    ("name", "words"),
    [("red_apple-02.png", "red apple"), ("a cat (3).jpg", "a cat"), ("IMG_2041.JPG", "IMG"), ("007.png", "")],
)
def test_words_of_a_file_name(name: str, words: str) -> None:
    assert words_of(name) == words
