"""A person's whole way on the embedded default: clicks, verdict, words, ranking, LoRA, blind test, export."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browsing import Served, Visitor, serve
from bt_hf import load_preference_pairs

CLICKS = 30


@pytest.fixture
def opened(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Visitor]]:
    """The default, with a training of a few steps and few drawings."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "TokenOfTheTests" * 2)  # so that publishing is offered
    with serve(None, tmp_path / "session") as served:
        served.studio.desk.learner._random.seed(0)
        served.studio.desk.questions._random.seed(0)
        workshop = served.studio.desk.workshop
        quick = {"max_steps": 3, "validation_inference_steps": 2, "per_device_train_batch_size": 4}
        drawing = replace(
            workshop.drawing,
            shown=workshop.drawing.shown[:2],
            unseen=workshop.drawing.unseen[:3],
            options={**workshop.drawing.options, **quick},
        )
        object.__setattr__(workshop, "drawing", drawing)
        person = Visitor(browser, served.address)
        person.context.set_default_timeout(60_000)
        yield served, person
        person.close()


def click_colourful(served: Served, person: Visitor, count: int) -> None:
    """Choose the more colourful picture of each pair."""
    for _ in range(count):
        left, right = person.pair()
        person.pause()
        person.page.keyboard.press(
            "ArrowLeft" if served.colourfulness(left) > served.colourfulness(right) else "ArrowRight"
        )
    person.saved(count)


def ranked(person: Visitor) -> list[int]:
    """Numbers of the images in the ranking."""
    urls = person.page.eval_on_selector_all(".ranking img", "all => all.map(one => one.src)")
    return [int(url.split("/api/images/")[1].split("?")[0]) for url in urls]


def test_from_the_first_click_to_the_export(opened: tuple[Served, Visitor], tmp_path: Path) -> None:
    served, person = opened
    page = person.page

    page.get_by_role("link", name="Taste").click()
    page.get_by_role("heading", name="Nothing is learnt yet").wait_for()
    page.get_by_role("link", name="Choose", exact=True).first.click()
    click_colourful(served, person, CLICKS)

    # Verdict, words and a ranking that leans to what was clicked.
    page.get_by_role("link", name="Taste").click()
    page.get_by_text(f"After {CLICKS} clicks").wait_for()
    assert len(page.locator("h1").inner_text()) > 20
    words = page.locator(".words > div").last.inner_text()
    assert words.startswith("Away from")
    assert re.search("black|grey|white|outline", words)
    order = ranked(person)
    assert len(order) >= 20
    colourfulness = np.mean([served.colourfulness(number) for number in range(0, len(served.studio.desk.pool), 7)])
    assert np.mean([served.colourfulness(number) for number in order[:20]]) > colourfulness
    # One click more, and the ranking follows without a reload.
    page.get_by_role("link", name="Choose", exact=True).click()
    left, right = person.pair()
    person.pause()
    page.keyboard.press("ArrowLeft" if served.colourfulness(left) < served.colourfulness(right) else "ArrowRight")
    person.saved(CLICKS + 1)
    page.get_by_role("link", name="Taste").click()
    page.get_by_text(f"After {CLICKS + 1} clicks").wait_for()
    assert ranked(person) != order

    # A LoRA, with the drawings before and after at the same seeds.
    page.get_by_role("link", name="Model").click()
    page.get_by_role("button", name="Train the drawing LoRA").click()
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("table", name="Drawings of the same prompts").wait_for(timeout=300_000)
    images = page.locator(".drawings img")
    assert images.count() == 4
    images.last.scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.querySelectorAll('.drawings img')].every(one => one.naturalWidth > 0)")

    # The blind test: by keys, with the sides hidden, to the sentence.
    page.get_by_role("button", name="Begin the blind test").click()
    for place, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown"), start=1):
        page.get_by_text(f"{place} of 3", exact=True).wait_for()
        urls = page.eval_on_selector_all(".blind img", "all => all.map(one => one.src)")
        assert all(re.search(r"/api/drawings/\d+\?s=\w+$", url) for url in urls)  # a number, and no name that tells
        person.pause()
        page.keyboard.press(key)
    page.locator(".sentence", has_text="sides hidden").wait_for()
    tally = [int(text) for text in page.locator(".tally dd").all_inner_texts()]
    assert sum(tally) == 3
    assert tally[1] == 1

    # The card is read before it is published: private, and without pictures, unless the person says so.
    page.get_by_role("button", name="Publish on the Hub").click()
    card = page.locator("pre.card")
    page.wait_for_function("() => document.querySelector('pre.card').textContent.includes('library_name')")
    assert page.get_by_label("Private: only you can see it").is_checked()
    assert not page.get_by_label("Show my pictures in the card").is_checked()
    before = card.inner_text()
    page.get_by_label("Show my pictures in the card").check()
    page.wait_for_function("before => document.querySelector('pre.card').textContent !== before", arg=before)
    page.get_by_role("button", name="Cancel").click()

    # All clicks that prefer a picture, and the votes, in the row contract.
    for name, kind in (("Parquet", "pairs.parquet"), ("JSON Lines (zip)", "pairs.zip")):
        with page.expect_download() as started:
            page.get_by_role("link", name=name).click()
        assert started.value.suggested_filename == kind
        started.value.save_as(tmp_path / kind)
    pairs = load_preference_pairs(str(tmp_path / "pairs.parquet"))
    assert len(pairs) == CLICKS + 1 + 3
    assert sorted(pairs["preference"])[0] == 0.5  # the tie
    assert served.studio.session.log.pairs()[0].prompt == pairs[0]["prompt"]
