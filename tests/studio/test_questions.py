"""The pairs that are put: sides, repeats, and where a session goes on."""

from pathlib import Path

import numpy as np

from bt_hf.studio.desk import Desk
from studio_page import close, make_desk, write_images
from tiny_models import picture


def answer(desk: Desk, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        desk.click(f"c{number}", desk.state()["queue"][0]["id"], "left", None)


def test_no_pair_comes_twice_by_chance_and_sides_are_shuffled(tmp_path: Path) -> None:
    desk = make_desk(write_images(tmp_path / "images", 2, 6), tmp_path / "session", start=False)
    answer(desk, 25)
    asked = [pair for pair in desk.session.log.asked.values() if pair.kind != "repeat"]
    assert len({frozenset((pair.left, pair.right)) for pair in asked}) == len(asked)
    assert 0.2 < np.mean([pair.left < pair.right for pair in asked]) < 0.8
    close(desk)


def test_repeats_are_swapped_and_rare_and_not_at_once(tmp_path: Path) -> None:
    desk = make_desk(write_images(tmp_path / "images", 6, 6), tmp_path / "session", start=False)
    answer(desk, 60)
    asked = list(desk.session.log.asked.values())
    repeats = [(place, pair) for place, pair in enumerate(asked) if pair.kind == "repeat"]
    assert 3 <= len(repeats) <= 6  # one in twelve
    for place, pair in repeats:
        first = next(number for number, other in enumerate(asked) if other.id == pair.of)
        assert (pair.left, pair.right) == (asked[first].right, asked[first].left)
        assert place - first > 5
    assert len({pair.of for _, pair in repeats}) == len(repeats)
    close(desk)


def test_what_was_taken_back_comes_first_after_a_restart(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    desk = make_desk(images, tmp_path / "session", start=False)
    answer(desk, 3)
    desk.undo("u1", None)
    queue = desk.undo("u2", None)["queue"]
    close(desk)
    desk = make_desk(images, tmp_path / "session", start=False)
    assert desk.state()["queue"] == queue
    answer(desk, 2, start=10)
    assert [pair["id"] for pair in desk.state()["queue"]][:2] == [pair["id"] for pair in queue][2:4]
    close(desk)


def test_equal_pictures_are_not_put(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "abcd":
        picture((9, 9, 9), seed=name == "d").save(tmp_path / "images" / f"{name}.png")
    desk = make_desk(tmp_path / "images", tmp_path / "session", start=False)
    state = desk.state()
    assert 1 <= len(state["queue"]) <= 3
    assert all(3 in (pair["left"], pair["right"]) for pair in state["queue"])
    close(desk)
