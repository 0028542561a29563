"""Learning while clicking: against the fit itself, across restarts, and at a size that people have."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bt_hf.data.clicks import Asked, Click
from bt_hf.reward.posterior import fit_taste
from bt_hf.reward.scorer import PreferenceScorer
from bt_hf.studio.desk import Desk
from bt_hf.studio.learner import FIRST_AT_RANDOM, Learner
from bt_hf.studio.pool import Pool
from bt_hf.studio.session import Session
from bt_hf.studio.sources import Listed
from bt_hf.studio.telling import NOTHING, tell
from studio_page import close, make_desk, write_images
from tiny_models import build, picture


class Many:
    """A source of small pictures that are never on the disk."""

    title = "many"

    def __init__(self, images: int, prompts: int) -> None:
        self.images, self.prompts = images, prompts

    def listed(self) -> Any:
        return (Listed(f"{number}.png", "", f"prompt {number % self.prompts}") for number in range(self.images))

    def read(self, name: str) -> Any:
        number = int(name.split(".")[0])
        return picture((number % 250, number // 250, 90), seed=number)


def wait(desk: Desk, name: str, value: int) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while desk.learner.told()[name] < value and time.monotonic() < deadline:
        time.sleep(0.01)
    told = desk.learner.told()
    assert told[name] >= value, told
    return told


def test_the_ranking_is_that_of_the_fit(tmp_path: Path) -> None:
    desk = make_desk(write_images(tmp_path / "images"), tmp_path / "session")
    wait(desk, "embedded", 16)
    for number in range(10):
        desk.click(f"c{number}", desk.state()["queue"][0]["id"], "left" if number % 3 else "right", None)
    ranking = wait(desk, "clicks", 10)["ranking"]
    scorer = PreferenceScorer(*build("clip"))
    images = [desk.pool.read(number) for number in range(16)]
    vectors, pairs = scorer.embed_images(images), desk.session.log.pairs()
    text = scorer.embed_texts([pair.prompt for pair in pairs])
    chosen, rejected = vectors[[pair.chosen for pair in pairs]], vectors[[pair.rejected for pair in pairs]]
    ones = torch.ones(len(pairs))
    taste = fit_taste(text, chosen, rejected, ones, ones, float(scorer.scale))
    own = scorer.embed_texts([one.prompt for one in desk.pool.pictures]).double()
    value = ((taste.direction + own @ taste.by_prompt.T) * vectors.double()).sum(1)
    order = [entry["image"] for entry in ranking]
    assert (np.diff(value[order].numpy()) < 1e-4).all()
    shown = torch.tensor([entry["taste"] for entry in ranking]).double()
    torch.testing.assert_close(shown, value[order] - value.mean(), atol=2e-3, rtol=1e-3)
    close(desk)


def test_predictions_are_those_of_the_taste_before(tmp_path: Path) -> None:
    desk = make_desk(write_images(tmp_path / "images"), tmp_path / "session")
    wait(desk, "embedded", 16)
    desk.click("a", desk.state()["queue"][0]["id"], "left", None)
    wait(desk, "clicks", 1)
    pair = desk.session.log.asked[desk.state()["queue"][0]["id"]]
    scorer = PreferenceScorer(*build("clip"))
    first, second = scorer.score(pair.prompt, [desk.pool.read(pair.left), desk.pool.read(pair.right)])
    model, base = desk.learner.predict(pair)
    assert base == pytest.approx(float(first - second), abs=1e-4)
    flipped = Asked("x", pair.prompt, pair.right, pair.left)
    assert model is not None
    assert desk.learner.predict(flipped)[0] == pytest.approx(-model)
    close(desk)


def test_embeddings_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images")
    desk = make_desk(images, tmp_path / "session")
    wait(desk, "embedded", 16)
    close(desk)
    monkeypatch.setattr(PreferenceScorer, "embed_images", lambda self, images: pytest.fail("embedded again"))
    desk = make_desk(images, tmp_path / "session")
    assert wait(desk, "embedded", 16)["embedded"] == 16
    close(desk)


def test_embeddings_of_another_base_are_not_taken(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 1, 3)
    desk = make_desk(images, tmp_path / "session")
    wait(desk, "embedded", 3)
    close(desk)
    session = Session(tmp_path / "session", "images")
    learner = Learner(session, Pool(session, None), PreferenceScorer(*build("clip", seed=1)))
    learner.embeddings._load()
    assert learner.told()["embedded"] == 0
    session.close()


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, b'{"a": 1}'])
def test_a_damaged_cache_is_computed_anew(tmp_path: Path, damage: bytes) -> None:
    images = write_images(tmp_path / "images", 1, 3)
    close(make_desk(images, tmp_path / "session", start=False))
    (tmp_path / "session" / "embeddings.safetensors").write_bytes(damage)
    desk = make_desk(images, tmp_path / "session")
    wait(desk, "embedded", 3)
    close(desk)


def test_undoing_everything_forgets_everything(tmp_path: Path) -> None:
    desk = make_desk(write_images(tmp_path / "images"), tmp_path / "session")
    wait(desk, "embedded", 16)
    desk.click("a", desk.state()["queue"][0]["id"], "left", None)
    assert wait(desk, "clicks", 1)["ranking"]
    desk.undo("u", None)
    deadline = time.monotonic() + 20
    while desk.learner.told()["ranking"] and time.monotonic() < deadline:
        time.sleep(0.01)
    told = desk.learner.told()
    assert (told["clicks"], told["ranking"], told["fitted_ms"]) == (0, [], None)
    close(desk)


def test_ten_thousand_images(tmp_path: Path) -> None:
    """The first pairs are random, then about each second one, and now and then one comes back."""
    session = Session(tmp_path / "session", "many")
    pool = Pool(session, Many(10_000, 500))
    learner = Learner(session, pool, PreferenceScorer(*build("clip")))
    vectors = torch.nn.functional.normalize(torch.randn(10_000, 256), dim=1)
    learner.embeddings._vectors, learner.embeddings._known = vectors, np.ones(10_000, dtype=bool)
    learner.embeddings._texts = {f"prompt {number}": vectors[-number] for number in range(500)}
    desk = Desk(session, pool, learner, "many", "unused")
    queue = desk.state()["queue"]
    for number in range(40):
        reply = desk.click(f"c{number}", queue[0]["id"], "left" if number % 2 else "right", None)
        queue = reply["queue"]
    kinds = [pair.kind for pair in session.log.asked.values()]
    assert kinds.count("repeat") >= 1
    assert "asked" not in kinds[:FIRST_AT_RANDOM]
    later = [kind for kind in kinds[FIRST_AT_RANDOM:] if kind != "repeat"]
    assert 0.35 < later.count("random") / len(later) < 0.65
    session.close()


def test_a_click_while_the_pool_grows(tmp_path: Path) -> None:
    """Drawings and uploads come in while somebody clicks; nothing is mixed up."""
    desk = make_desk(write_images(tmp_path / "images", 2, 4), tmp_path / "session", uploads=True)
    stop = threading.Event()

    def grow() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            desk.pool.add(picture((number % 255, 9, 9), seed=number), f"drawing {number}", "ddd", "drawn")

    thread = threading.Thread(target=grow)
    thread.start()
    for number in range(12):
        desk.click(f"c{number}", desk.state()["queue"][0]["id"], "left", None)
    stop.set()
    thread.join()
    for pair in desk.session.log.asked.values():
        assert desk.pool.pictures[pair.left].prompt == desk.pool.pictures[pair.right].prompt == pair.prompt
    numbers = [json.loads(line)["number"] for line in (tmp_path / "session" / "pool.jsonl").read_text().splitlines()]
    assert numbers == list(range(len(numbers)))
    close(desk)


def click(number: int, choice: str, kind: str = "random", model: float | None = 1.0, of: int | None = None) -> Click:
    place = number if of is None else of
    sides = (2 * place, 2 * place + 1) if of is None else (2 * place + 1, 2 * place)
    return Click(f"c{number}", Asked(f"p{number}", "a", *sides, kind), choice, None, model, -1.0)


def test_what_is_told_of_predictions() -> None:
    """Left is predicted each time, the base says right; asked, repeated and blind pairs do not count."""
    clicks = [click(number, "left" if number < 15 else "right") for number in range(20)]
    others = [click(30, "right", "asked"), click(31, "right", "blind"), click(32, "skip"), click(33, "tie")]
    again = [click(40, "right", "repeat", of=0), click(41, "left", "repeat", of=1)]
    told = tell([*clicks, *others, *again])
    accuracy = told["accuracy"]
    assert (accuracy["n"], accuracy["model"], accuracy["base"]) == (20, 0.75, 0.25)
    assert accuracy["low"] < 0.75 < accuracy["high"]
    assert [point["n"] for point in accuracy["curve"]] == list(range(1, 21))
    assert told["self"] == {"n": 2, "share": 0.5}
    assert told["verdict"].startswith("Better than the base: 75 % against 25 %")


def test_nothing_is_told_of_nothing() -> None:
    assert tell([]) == {"accuracy": None, "self": None, "verdict": NOTHING, "worth": None}


def test_a_long_curve_is_thinned() -> None:
    curve = tell([click(number, "left") for number in range(1000)])["accuracy"]["curve"]
    assert len(curve) <= 300
    assert curve[-1]["n"] == 1000


def test_a_ranking_of_many_prompts_holds_no_click_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are embedded a few at a time: between them the model is free to predict a click."""
    desk = make_desk(write_images(tmp_path / "images"), tmp_path / "session")
    learner = desk.learner
    prompts = [f"thing {number}" for number in range(100)]
    plain = learner.scorer.embed_texts(prompts)
    sizes = []

    def embed(texts: list[str]) -> torch.Tensor:
        sizes.append(len(texts))
        assert learner.embeddings._model.locked()
        return PreferenceScorer.embed_texts(learner.scorer, texts)

    monkeypatch.setattr(learner.scorer, "embed_texts", embed)
    assert torch.allclose(learner.embeddings.prompts(prompts), plain, atol=1e-6)
    assert max(sizes) <= 32
    assert sum(sizes) == 100
    close(desk)
