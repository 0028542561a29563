"""Simulated people: they click what they prefer, on other concepts than they are judged by."""

import hashlib
import io
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def people(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("emoji", "icons", "benchmarks"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    import people

    return people


def bytes_of(pairs: Dataset, column: str) -> list[bytes]:
    return [image["bytes"] for image in pairs.cast_column(column, ImageFeature(decode=False))[column]]


def looks_of(people: ModuleType, person: object, pairs: Dataset, column: str) -> list[str]:
    """Looks of the drawings, found by their bytes."""
    pool = people.load_pool(person.pool, "held_out")
    drawn = {hashlib.md5(image["bytes"]).digest(): look for image, look in zip(pool.images, pool.looks, strict=True)}
    return [drawn[hashlib.md5(image).digest()] for image in bytes_of(pairs, column)]


def test_everyone_clicks_on_other_concepts_than_they_are_judged_by(people: ModuleType) -> None:
    assert {person.kind for person in people.PEOPLE.values()} == set(people.KINDS)
    assert all(len(people.people_of(kind)) >= 2 for kind in people.KINDS)
    for kind in people.KINDS:
        person = people.people_of(kind)[-1]
        clicks, test = person.pairs("held_out", 128, seed=1), person.test("held_out", seed=1)
        assert len(clicks) == 128
        assert len(test) >= 100, person.name
        assert not set(clicks["concept"]) & set(test["concept"])
        assert clicks.column_names == ["prompt", "chosen", "rejected", "concept"]


def test_a_house_a_weight_and_a_family_are_chosen_each_time(people: ModuleType) -> None:
    for name in ("twemoji", "noto_v1", "emojione", "duotone"):
        person = people.PEOPLE[name]
        pairs = person.test("held_out", seed=0)
        assert set(looks_of(people, person, pairs, "chosen")) == {name}
        assert name not in looks_of(people, person, pairs, "rejected")


def test_a_taste_for_warm_colours_is_warm(people: ModuleType) -> None:
    pairs = people.PEOPLE["warm"].pairs("held_out", 20, seed=0)

    def warmth(image: bytes) -> float:
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), dtype=float)
        drawn = pixels[pixels.min(axis=2) < 250]
        return float((drawn[:, 0] - drawn[:, 2]).mean())

    both = zip(bytes_of(pairs, "chosen"), bytes_of(pairs, "rejected"), strict=True)
    assert all(warmth(chosen) > warmth(rejected) + 20 for chosen, rejected in both)


def test_taste_depends_on_the_prompt(people: ModuleType) -> None:
    from emoji import load_emoji

    person = people.PEOPLE["flat animals, shaded food"]
    emoji = load_emoji("held_out")
    groups = dict(zip(emoji["concept"], emoji["group"], strict=True))
    pairs = person.pairs("held_out", 30, seed=0)
    for concept, look in zip(pairs["concept"], looks_of(people, person, pairs, "chosen"), strict=True):
        assert look in (people.FLAT if groups[concept] in (0, 1, 3) else people.SHADED)


def test_wrong_clicks_and_ties(people: ModuleType) -> None:
    person = people.PEOPLE["mono"]
    clicks = person.pairs("held_out", 400, seed=0, wrong=0.3)
    wrong = [look != "mono" for look in looks_of(people, person, clicks, "chosen")]
    assert 0.22 < np.mean(wrong) < 0.38
    ties = person.pairs("held_out", 40, seed=0, ties=0.25)
    assert Counter(ties["preference"]) == {1.0: 30, 0.5: 10}
    equal = ties.filter(lambda row: row["preference"] == 0.5)
    assert "mono" not in looks_of(people, person, equal, "chosen") + looks_of(people, person, equal, "rejected")


def test_seeds_are_other_people_and_repeat(people: ModuleType) -> None:
    person = people.PEOPLE["embedding 2"]
    one, again, other = (person.pairs("held_out", 16, seed=seed) for seed in (0, 0, 1))
    assert bytes_of(one, "chosen") == bytes_of(again, "chosen") != bytes_of(other, "chosen")


def test_what_pretraining_left_out_is_not_tuned_on(people: ModuleType) -> None:
    assert people.PEOPLE["warm"].splits == ("train", "held_out")
    for name in ("noto_v1", "thin", "serif typefaces"):
        assert people.PEOPLE[name].splits == ("held_out",)
        with pytest.raises(ValueError, match="for measuring alone: pass split='held_out'"):
            people.PEOPLE[name].pairs("train", 4, seed=0)
    with pytest.raises(ValueError, match=r"should be one of train, held_out, but got 'test'"):
        people.PEOPLE["warm"].pairs("test", 4, seed=0)
    with pytest.raises(ValueError, match=r"'noto' has \d+ pairs of this sort in 'held_out', but `n` asks for 9999"):
        people.PEOPLE["noto"].pairs("held_out", 9999, seed=0)


def test_drawings_to_ask_about_are_of_the_half_that_is_clicked_on(people: ModuleType) -> None:
    for name in ("warm", "three houses"):  # one has an opinion of everything, one of some groups
        person = people.PEOPLE[name]
        pool = people.load_pool(person.pool, "held_out")
        rows, utility = person.drawings("held_out", seed=1)
        concepts = {pool.concepts[row] for row in rows}
        assert set(person.pairs("held_out", 40, seed=1)["concept"]) <= concepts
        assert not concepts & {pool.concepts[row] for pair in person.test_rows("held_out", seed=1) for row in pair}
        assert len(rows) == len(utility)
        assert not np.isnan(utility).any()
        test = person.test("held_out", seed=1)
        assert test["concept"] == [pool.concepts[better] for better, _ in person.test_rows("held_out", seed=1)]


def test_clicks_that_asking_saves(people: ModuleType) -> None:
    import asking

    assert asking.CHECKED == (10, 20, 30, 45, 60)
    assert asking.saved_clicks(np.array([0.6, 0.7, 0.8, 0.85, 0.9]), 0.75) == "35"  # reached after 25
    assert asking.saved_clicks(np.array([0.6, 0.7, 0.8, 0.85, 0.9]), 0.9) == "0"
    assert asking.saved_clicks(np.array([0.6, 0.7, 0.8, 0.85, 0.9]), 0.55) == "50 or more"
    assert asking.saved_clicks(np.array([0.6, 0.7, 0.8, 0.85, 0.9]), 0.95) == "none"
