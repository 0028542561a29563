"""Ratings, likes, best ones and rankings as weighted pairs: expected pairs by hand, and what is refused."""

import json
import logging
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from datasets.utils.logging import disable_progress_bar

from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.judgements import PARTNERS, RATINGS, Judgement, identity, is_place, weighted_pairs
from bt_hf.data.pairs import load_preference_pairs
from coloured import COLOURS, images, png, summary

disable_progress_bar()
FOUR = [png(name) for name in COLOURS[:4]]  # red, lime, blue, white
# lime 5, red 3, white 3, blue 1: lime chose among three others, red and white each beat blue.
RATED = [
    ("a", "lime", "blue", 1.0, round(1 / 3, 6)),
    ("a", "lime", "red", 1.0, round(1 / 3, 6)),
    ("a", "lime", "white", 1.0, round(1 / 3, 6)),
    ("a", "red", "blue", 1.0, 1.0),
    ("a", "white", "blue", 1.0, 1.0),
]
LIKED = [(*pair, 1.0, 0.5) for pair in [("a", "red", "lime"), ("a", "red", "white")]]
LIKED += [(*pair, 1.0, 0.5) for pair in [("a", "blue", "lime"), ("a", "blue", "white")]]
BEST = [("a", "blue", other, 1.0, round(1 / 3, 6)) for other in ("red", "lime", "white")]
ORDER = ["white.png", "red.png", "blue.png", "lime.png"]
ORDERED = [("a", "white", other, 1.0, round(1 / 3, 6)) for other in ("red", "blue", "lime")]
ORDERED += [("a", "red", "blue", 1.0, 0.5), ("a", "red", "lime", 1.0, 0.5), ("a", "blue", "lime", 1.0, 1.0)]
CASES: dict[str, tuple[str, list, list]] = {
    **{name: (name, [3, 5, 1, 3], RATED) for name in RATINGS},
    "half stars": ("stars", [2.5, 4.5, 0.5, 2.5], RATED),
    "negative scores": ("score", [-1.5, 0.25, -7, -1.5], RATED),
    "ranks": ("rank", [2, 1, 4, 2], RATED),
    "mean ranks": ("ranking", [2.5, 1, 4, 2.5], RATED),
    "ranks from 0": ("rank", [1, 0, 2, 1], RATED),
    "booleans": ("liked", [True, False, True, False], LIKED),
    "numbers": ("like", [1, 0, 1, 0], LIKED),
    "thumbs": ("liked", [1, -1, 1, -1], LIKED),
    "floats": ("is_liked", [1.0, 0.0, 1.0, 0.0], LIKED),
    "words": ("liked", ["like", "dislike", "like", "dislike"], LIKED),
    "other words": ("liked", ["Yes", "no", " YES", "N"], LIKED),
    "words of likes": ("likes", ["like", "dislike", "like", "dislike"], LIKED),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(columns: dict[str, list], streaming: bool = False, **options: Any) -> list[tuple]:
    return sorted(summary(load_preference_pairs(Dataset.from_dict(columns), streaming=streaming, **options)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_one_image_a_row_and_lists(name: str, streaming: bool) -> None:
    column, values, expected = CASES[name]
    prompt = ("prompt", "caption", "text")[len(name) % 3]
    assert load({prompt: ["a"] * 4, "image": FOUR, column: values}, streaming) == sorted(expected)
    assert load({prompt: ["a"], "images": [FOUR], column: [values]}, streaming) == sorted(expected)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["half stars", "negative scores", "mean ranks", "booleans", "numbers", "other words"])
def test_files(tmp_path: Path, name: str, suffix: str) -> None:
    images(tmp_path)
    column, values, expected = CASES[name]
    rows = [{"file_name": f"{c}.png", "text": "a", column: v} for c, v in zip(COLOURS, values, strict=False)]
    path = tmp_path / f"metadata.{suffix}"
    if suffix == "csv":
        path.write_text("\n".join(",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]))
    elif suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert sorted(summary(load_preference_pairs(tmp_path))) == sorted(expected)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("best", [2, 2.0, "2", "blue.png", "pictures/blue.png"])
def test_the_best_of_several(tmp_path: Path, best: Any, streaming: bool) -> None:
    images(tmp_path / "pictures")
    row = {"prompt": "a", "images": [f"pictures/{name}.png" for name in COLOURS[:4]], "best": best}
    (tmp_path / "p.json").write_text(json.dumps([row]))
    assert sorted(summary(load_preference_pairs(tmp_path / "p.json", streaming=streaming))) == sorted(BEST)
    features = Features({"prompt": Value("string"), "images": List(ImageFeature()), "best": Value("int64")})
    if best == 2 and isinstance(best, int):
        data = Dataset.from_dict({"prompt": ["a"], "images": [FOUR], "best": [2]}, features=features)
        assert sorted(summary(load_preference_pairs(data, streaming=streaming))) == sorted(BEST)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_best_with_one_image_a_row(streaming: bool) -> None:
    columns = {"prompt": ["a"] * 4, "image": FOUR, "best": [False, False, True, False]}
    assert load(columns, streaming) == sorted(BEST)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["rank", "ranking"])
def test_an_order_of_file_names(tmp_path: Path, column: str, streaming: bool) -> None:
    images(tmp_path)
    row = {"prompt": "a", "images": [f"{name}.png" for name in COLOURS[:4]], column: ORDER}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    assert sorted(summary(load_preference_pairs(tmp_path / "p.jsonl", streaming=streaming))) == sorted(ORDERED)


def random_values(chance: random.Random) -> list[int]:
    return [chance.randrange(1, 6) for _ in range(chance.randrange(1, PARTNERS + 1))]


def test_reversed_ratings_swap_the_pairs_and_each_choice_counts_once() -> None:
    chance = random.Random(0)
    for _ in range(300):
        values = random_values(chance)
        pairs = list(weighted_pairs(values))
        assert {(b, w) for b, w, _ in pairs} == {(w, b) for b, w, _ in weighted_pairs([-v for v in values])}
        assert {(b, w) for b, w, _ in pairs} == {
            (i, j) for i, one in enumerate(values) for j, other in enumerate(values) if one > other
        }
        assert sum(weight for *_, weight in pairs) == pytest.approx(sum(v > min(values) for v in values))


def test_ratings_reversed_are_ranks() -> None:
    values = [3, 1, 4, 2]
    rating = load({"prompt": ["a"] * 4, "image": FOUR, "rating": values})
    ranks = load({"prompt": ["a"] * 4, "image": FOUR, "rank": values})
    assert {row[1:3] for row in rating} == {row[2:0:-1] for row in ranks}


@pytest.mark.parametrize("values", [range(2000), [index % 5 for index in range(2000)]], ids=["places", "stars"])
def test_pairs_grow_with_the_images_alone(values: Any) -> None:
    pairs = list(weighted_pairs(list(values)))
    assert pairs == list(weighted_pairs(list(values)))
    assert len(pairs) <= PARTNERS * 2000
    assert len({(better, worse) for better, worse, _ in pairs}) == len(pairs)
    assert all(values[better] > values[worse] for better, worse, _ in pairs)
    better = sum(value > min(values) for value in values)
    assert sum(weight for *_, weight in pairs) == pytest.approx(better)
    met = Counter(worse for _, worse, _ in pairs)
    assert len(met) >= 0.9 * sum(value < max(values) for value in values)  # nearly all are met, none too often
    assert max(met.values()) <= 8 * PARTNERS


def test_many_images_of_one_prompt(caplog: pytest.LogCaptureFixture) -> None:
    pictures = [png((index % 256, index // 256, 7)) for index in range(300)]
    data = Dataset.from_dict({"prompt": ["a"] * 300, "image": pictures, "score": list(range(300))})
    with caplog.at_level(logging.INFO):
        pairs = load_preference_pairs(data)
    assert len(pairs) == PARTNERS * (300 - PARTNERS) + sum(range(PARTNERS))
    assert sum(pairs["weight"]) == pytest.approx(299)
    assert f"each image is compared with at most {PARTNERS} lower ones of its prompt" in caplog.text


BAD_ROWS = {
    "not a number: 'rating' is None": {"rating": [1, 2, None]},
    "not a number: 'rating' is nan": {"rating": [1.0, 2.0, float("nan")]},
    "rating out of range: 'rating' is inf, expected a number >= 0": {"rating": [1.0, 2.0, float("inf")]},
    "rating out of range: 'rating' is -1, expected a number >= 0": {"rating": [1, 2, -1]},
    "rating out of range: 'stars' is 6, expected a number from 0 to 5": {"stars": [1, 2, 6]},
    "rating out of range: 'stars' is -1": {"stars": [1, 2, -1]},
    "rating out of range: 'score' is -inf, expected a finite number": {"score": [1.0, 2.0, float("-inf")]},
    "rank out of range: 'rank' is -1, expected 1 for the best": {"rank": [1, 2, -1]},
    "rank out of range: 'rank' is 1.7": {"rank": [1, 2, 1.7]},
    "not a like: 'liked' is 2": {"liked": [1, 0, 2]},
    "not a like: 'liked' is 'maybe'": {"liked": ["yes", "no", "maybe"]},
    "not a like: 'liked' is None": {"liked": [True, False, None]},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_bad_judgement_is_named_and_leaves_its_prompt(message: str, streaming: bool) -> None:
    columns = {"prompt": ["a"] * 3, "image": FOUR[:3], **BAD_ROWS[message]}
    with pytest.raises(PreferenceDataError, match=f"row 2 of the dataset: {message}.*on_bad_rows='drop'") as caught:
        load(columns, streaming)
    assert "\n" not in str(caught.value)
    (pair,) = load(columns, streaming, on_bad_rows="drop")
    assert {pair[1], pair[2]} == {"red", "lime"}
    assert pair[4] == 1


BAD_LISTS = {
    "unknown image: 'best' is 4, expected an index from 0 to 3": {"best": [0, 4]},
    "unknown image: 'best' is -1, expected an index from 0 to 3": {"best": [0, -1]},
    "unknown image: 'best' is 0.5, expected an index or a file name": {"best": [0.0, 0.5]},
    "unknown image: 'best' is None": {"best": [0, None]},
    "unknown image: 'best' is 'z.png', expected one of": {"best": ["red.png", "z.png"]},
    "unknown image: 'ranking' is 'z.png'": {"ranking": [ORDER, ["z.png", *ORDER[1:]]]},
    "image twice: 'ranking' names": {"ranking": [ORDER, ["red.png", *ORDER[1:]]]},
    "incomplete ranking: 'ranking' must name each of the 4 images once": {"ranking": [ORDER, ORDER[:3]]},
    "images without ratings: 'images' and 'rating'": {"rating": [[1, 2, 3, 4], [1, 2]]},
    "not a number: 'rating' is None": {"rating": [[1, 2, 3, 4], [1, 2, 3, None]]},
    "not a like: 'liked' is 'x'": {"liked": [["yes", "no", "no", "no"], ["yes", "no", "no", "x"]]},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("message", BAD_LISTS)
def test_a_bad_list_is_named(tmp_path: Path, message: str, streaming: bool) -> None:
    images(tmp_path)
    columns = {"prompt": ["a", "b"], "images": [[f"{name}.png" for name in COLOURS[:4]]] * 2, **BAD_LISTS[message]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(PreferenceDataError, match=f"row 1 of p.parquet: {message}.*on_bad_rows='drop'") as caught:
        list(load_preference_pairs(tmp_path / "p.parquet", streaming=streaming))
    assert "\n" not in str(caught.value)
    pairs = load_preference_pairs(tmp_path / "p.parquet", streaming=streaming, on_bad_rows="drop")
    assert {row["prompt"] for row in pairs} == {"a"}


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_twice_in_a_prompt(streaming: bool) -> None:
    columns = {"prompt": list("aaab"), "image": [FOUR[0], FOUR[1], FOUR[0], FOUR[0]], "rating": [1, 2, 5, 3]}
    with pytest.raises(PreferenceDataError, match="row 2 of the dataset: image twice: row 0 has the same image"):
        load(columns, streaming)
    assert load(columns, streaming, on_bad_rows="drop") == [("a", "lime", "red", 1.0, 1.0)]
    raters = {"prompt_id": list("xxyy"), "prompt": ["a"] * 4, "image": FOUR[:2] * 2, "rating": [1, 2, 5, 3]}
    assert [row[1:3] for row in load(raters, streaming)] == [("lime", "red"), ("red", "lime")]
    lists = {"prompt": ["a"], "images": [[FOUR[0], FOUR[1], FOUR[0]]], "rating": [[1, 2, 3]]}
    with pytest.raises(PreferenceDataError, match="row 0 of the dataset: image twice: 'images' has an image more"):
        load(lists, streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": list("abcd"), "image": FOUR, "rating": [1, 2, 3, 4]},
        {"prompt": ["a"] * 4, "image": FOUR, "stars": [3] * 4},
        {"prompt": ["a"] * 4, "image": FOUR, "liked": [True] * 4},
        {"prompt": ["a"], "images": [FOUR], "score": [[2.0] * 4]},
        {"prompt": ["a"], "images": [FOUR[:1]], "best": [0]},
    ],
)
def test_nothing_is_better(columns: dict[str, list], streaming: bool) -> None:
    with pytest.raises(PreferenceDataError, match=r"no row prefers one image over another: '\w+' is equal") as caught:
        load(columns, streaming)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_prompts(streaming: bool) -> None:
    columns = {"image": FOUR, "rating": [3, 5, 1, 3]}
    with pytest.raises(PreferenceDataError, match=r"ratings without prompts: .*default_prompt="):
        load(columns, streaming)
    assert [row[1:] for row in load(columns, streaming, default_prompt="p")] == [row[1:] for row in sorted(RATED)]
    for prompt in ("prompt", "caption", "text"):
        some = columns | {prompt: ["a", "", "a", None]}
        pairs = load(some, streaming=False, default_prompt="p")
        assert [row[:3] for row in pairs] == [("a", "red", "blue"), ("p", "lime", "white")]
        with pytest.raises(PreferenceDataError, match="row 1 of the dataset"):
            load(columns | {prompt: ["a", "", "a", ""]}, streaming=False)


def test_names_in_capitals_are_a_hint() -> None:
    with pytest.raises(PreferenceDataError, match="rename it to 'rating'"):
        load({"prompt": ["a"] * 4, "image": FOUR, "Rating": [1, 2, 3, 4]})


def test_lists_for_one_image_are_refused() -> None:
    with pytest.raises(PreferenceDataError, match="column 'rating' should hold lists of numbers"):
        load({"prompt": ["a"], "images": [FOUR], "rating": [3]})
    with pytest.raises(PreferenceDataError, match="column 'rating' should hold numbers"):
        load({"prompt": ["a"] * 4, "image": FOUR, "rating": ["5", "4", "3", "2"]})


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([1, 2, 3], True),
        ([0, 1, 2], True),
        ([1, 1, 2], True),
        ([1, 1, 3], True),
        ([1.5, 1.5, 3], True),
        ([2, 2, 3], True),
        ([0.5, 0.5, 2], True),
        ([2, 3], False),
        ([5, 5, 1], False),
        ([5, 4], False),
        ([0, 0, 5], False),
        ([1, 3, 5], False),
    ],
)
def test_places(values: list[float], places: bool) -> None:
    assert all(is_place(value, values) for value in values) == places


def test_identity_is_that_of_bytes_and_paths() -> None:
    assert identity(b"x") == identity({"bytes": b"x", "path": "a.png"}) != identity({"bytes": b"y", "path": "a.png"})
    assert identity("a.png") == identity({"bytes": None, "path": "a.png"}) == identity(Path("a.png"))
    assert identity(None) is identity({"bytes": None, "path": None}) is None


@pytest.mark.parametrize("judged", ["", "x", None, [], {}, 10**400])
@pytest.mark.parametrize("kind", ["rank", "rating", "like"])
def test_what_is_not_a_judgement_is_a_reason_and_a_detail(judged: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"^[a-z ]+: 'x' is "):
        Judgement("x", kind, 0, 5).value(judged)


def warnings_of(columns: dict[str, list], caplog: pytest.LogCaptureFixture, streaming: bool = False) -> list[str]:
    with caplog.at_level(logging.INFO, logger="bt_hf.data.survey"):
        load(columns, streaming)
    return [f"{record.levelname} {record.getMessage()}" for record in caplog.records if "survey" in record.name]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("rating", [3, 5, 1, 3], "INFO the dataset: 'rating' is read as ratings: larger is better"),
        ("rank", [2, 1, 4, 2], "INFO the dataset: 'rank' is read as rankings: 1 is the best"),
        ("liked", [1, 0, 1, 0], "INFO the dataset: 'liked' is read as likes: liked ones against disliked ones"),
        ("stars", [3, 1, 4, 2], "WARNING .*larger is better; .* once each, as ranks have; .*rename it to 'rank'"),
        ("rating", [3, 80, 1, 3], "WARNING .*most are up to 5, but 1 are up to 80: bring them to one scale"),
        ("rating", [0, 5, 1, 3], r"WARNING .*0 is the lowest one \(1 times\); leave out images that were not rated"),
    ],
)
def test_how_it_is_read(
    column: str, values: list, expected: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = warnings_of({"prompt": ["a"] * 4, "image": FOUR, column: values}, caplog, streaming)
    assert re.fullmatch(expected, message) if "INFO" in expected else re.match(expected, message)
    caplog.clear()
    (message,) = warnings_of({"prompt": ["a"], "image": [FOUR], column: [values]}, caplog, streaming)
    assert re.match(expected, message)


def test_prompts_without_a_pair_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"prompt": list("aabccd"), "image": FOUR + FOUR[:2], "rating": [1, 2, 3, 4, 4, 5]}
    (message,) = warnings_of(columns, caplog)
    assert message.endswith("2 of a single image and 1 of equal values of 4 prompts give no pair")
    caplog.clear()
    lists = {"prompt": list("abc"), "images": [FOUR, FOUR[:1], FOUR[:2]], "rating": [[1, 2, 3, 3], [1], [2, 2]]}
    (message,) = warnings_of(lists, caplog)
    assert message.endswith("1 of a single image and 1 of equal values of 3 prompts give no pair")


def test_ratings_called_ranks_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    stars = {"prompt": list("aabb"), "image": FOUR, "rank": [5, 4, 5, 1]}
    for streaming in (False, True):
        with pytest.raises(
            PreferenceDataError, match=r"not places from 1 on; if larger is better, rename .* 'rating'"
        ):
            load(stars, streaming)
    lists = {"prompt": ["a"], "images": [FOUR], "ranking": [[5, 5, 5, 4]]}
    for streaming in (False, True):
        with pytest.raises(PreferenceDataError, match=r"such as \[5, 5, 5, 4\]"):
            load(lists, streaming)
    long = {"prompt": ["a"] * 20, "image": [png((one, 2, 3)) for one in range(20)], "rank": list(range(20, 0, -1))}
    assert len(list(load_preference_pairs(Dataset.from_dict(long), streaming=True))) == 184  # 16 rows are looked at
    one_gap = {"prompt": list("aabb") + ["c"] * 2, "image": FOUR + FOUR[:2], "rank": [1, 2, 2, 1, 1, 5]}
    (message,) = warnings_of(one_gap, caplog)
    assert message.startswith("WARNING")
    assert "those of 1 prompt (such as [1, 5]) are not places" in message


def test_two_judgements_of_an_image(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"prompt": ["a"] * 4, "image": FOUR, "rating": [3, 5, 1, 3], "liked": [True, True, False, True]}
    (message,) = warnings_of(columns, caplog)
    assert message.startswith("WARNING")
    assert "not read: 'liked'" in message


@pytest.mark.parametrize("bad", [False, True])
def test_a_prompt_in_two_files_of_a_stream(tmp_path: Path, bad: bool) -> None:
    for shard, (picture, rating) in enumerate([(FOUR[0], 1), (FOUR[1], -5 if bad else 5)]):
        columns = {"prompt": ["a"], "image": [picture], "rating": [rating]}
        Dataset.from_dict(columns).to_parquet(tmp_path / "d" / f"train-{shard}.parquet")
    if bad:
        with pytest.raises(PreferenceDataError, match=r"row 0 of train-1.parquet: rating out of range"):
            list(load_preference_pairs(tmp_path / "d", streaming=True))
    else:
        assert summary(load_preference_pairs(tmp_path / "d", streaming=True)) == [("a", "lime", "red", 1.0, 1.0)]
