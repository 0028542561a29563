"""`load_preference_pairs` on real files of every known layout, and each way in which data can be bad."""

import csv
import io
import json
import logging

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from datasets.utils.logging import disable_progress_bar
from PIL import Image

from bt_hf.data.checks import check_columns, check_unpaired, overlapping_rows
from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.pairs import load_preference_pairs
from coloured import COLOURS, colour, images, png, summary

disable_progress_bar()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(**columns):
    """Two good pairs, with columns replaced."""
    good = {"prompt": ["a", "b"], "chosen": [png("red"), png("blue")], "rejected": [png("lime"), png("white")]}
    return good | columns


TWO = [("a", "red", "lime", 1.0, 1.0), ("b", "blue", "white", 1.0, 1.0)]
PICK_A_PIC = {
    "caption": ["a", "b", "c", "d"],
    "jpg_0": [png("red")] * 4,
    "jpg_1": [png("blue")] * 4,
    "label_0": [1.0, 0.0, 0.5, 0.0],
    "label_1": [0.0, 1.0, 0.5, 0.0],
    "has_label": [True, True, True, False],
    "user_id": [7, 8, 9, 10],
}
PICKED = [("a", "red", "blue", 1.0, 1.0), ("b", "blue", "red", 1.0, 1.0), ("c", "red", "blue", 0.5, 1.0)]
THREE = [[png("red"), png("lime"), png("blue")], [png("white"), png("black"), png("yellow")]]
RANKED = [  # ranks 2, 1, 3 and 1, 1, 2
    ("a", "red", "blue", 1.0, 1.0),
    ("a", "lime", "red", 1.0, 0.5),
    ("a", "lime", "blue", 1.0, 0.5),
    ("b", "white", "yellow", 1.0, 1.0),
    ("b", "black", "yellow", 1.0, 1.0),
]
LAYOUTS = {
    "contract": (rows(), TWO),
    "soft": (rows(preference=[0.5, 1], weight=[2, 0]), [("a", "red", "lime", 0.5, 2.0), ("b", "blue", "white", 1, 0)]),
    "better and worse": (
        {"prompt": ["a", "b"], "img_better": rows()["chosen"], "img_worse": rows()["rejected"]},
        TWO,
    ),
    "Pick-a-Pic": (PICK_A_PIC, PICKED),
    "HPDv2": (
        {"prompt": ["a", "b"], "image_path": THREE, "human_preference": [[0, 1, 0], [1, 1, 0]]},
        [
            ("a", "lime", "red", 1.0, 0.5),
            ("a", "lime", "blue", 1.0, 0.5),
            ("b", "white", "yellow", 1.0, 1.0),
            ("b", "black", "yellow", 1.0, 1.0),
        ],
    ),
    "ranking": ({"prompt": ["a", "b"], "image": THREE, "rank": [[2, 1, 3], [1, 1, 2]]}, RANKED),
    "ranking by row": (
        {"prompt": list("aaabbb"), "image": sum(THREE, []), "rank": [2, 1, 3, 1, 1, 2]},
        RANKED,
    ),
    "ranking by row and id": (
        {
            "prompt_id": list("xxxyyy"),
            "prompt": list("aaabbb"),
            "images": sum(THREE, []),
            "ranking": [2, 1, 3, 1, 1, 2],
        },
        RANKED,
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, streaming):
    columns, expected = LAYOUTS[name]
    pairs = load_preference_pairs(Dataset.from_dict(columns), streaming=streaming)
    assert isinstance(pairs, IterableDataset if streaming else Dataset)
    assert sorted(summary(pairs)) == sorted(expected)
    features = pairs.features
    assert features["chosen"] == features["rejected"] == ImageFeature()
    assert features["prompt"] == Value("string")
    assert features["preference"] == features["weight"] == Value("float64")
    assert not any(column.startswith("_") for column in features)
    assert summary(pairs) == summary(load_preference_pairs(Dataset.from_dict(columns)))  # the order too


@pytest.mark.parametrize("streaming", [False, True])
def test_image_features_and_lists_of_them(streaming):
    features = Features({"prompt": Value("string"), "image": List(ImageFeature()), "rank": List(Value("int8"))})
    data = Dataset.from_dict(LAYOUTS["ranking"][0], features=features)
    assert sorted(summary(load_preference_pairs(data, streaming=streaming))) == sorted(RANKED)
    data = Dataset.from_dict(
        {name: [Image.new("RGB", (4, 4), c)] for name, c in [("chosen", "red"), ("rejected", "blue")]}
    )
    data = data.add_column("prompt", ["a"])
    assert summary(load_preference_pairs(data, streaming=streaming)) == [("a", "red", "blue", 1.0, 1.0)]


def test_rankings_need_not_be_neighbours_unless_streamed():
    columns = {"prompt": list("aba"), "image": [png("red"), png("lime"), png("blue")], "rank": [2, 1, 1]}
    data = Dataset.from_dict(columns)
    assert summary(load_preference_pairs(data)) == [("a", "blue", "red", 1.0, 1.0)]
    with pytest.raises(PreferenceDataError, match="row 2: prompt 'a' comes again.*streaming=False"):
        list(load_preference_pairs(data, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_prompt_ids_do_not_mix_prompts(streaming):
    columns = {"prompt_id": [None] * 4 + ["x"], "prompt": list("aabbb"), "rank": [1, 2, 2, 1, 3]}
    columns["image"] = [png(name) for name in COLOURS[:5]]
    pairs = load_preference_pairs(Dataset.from_dict(columns), streaming=streaming)
    assert [row[:3] for row in summary(pairs)] == [("a", "red", "lime"), ("b", "white", "blue")]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_rank_spoils_its_prompt_alone(streaming):
    columns = {"prompt": list("aabb"), "rank": [1, 2, None, 1], "image": [png(name) for name in COLOURS[:4]]}
    data = Dataset.from_dict(columns)
    with pytest.raises(PreferenceDataError, match="row 2 of the dataset: not a number: 'rank' is None"):
        list(load_preference_pairs(data, streaming=streaming))
    pairs = load_preference_pairs(data, streaming=streaming, on_bad_rows="drop")
    assert summary(pairs) == [("a", "red", "lime", 1.0, 1.0)]


def test_streams_reach_data_loader_workers():
    loader = pytest.importorskip("torch").utils.data.DataLoader
    for name in ("Pick-a-Pic", "ranking by row"):
        columns, expected = LAYOUTS[name]
        pairs = load_preference_pairs(Dataset.from_dict(columns), streaming=True)
        assert sorted(summary(loader(pairs, batch_size=None, num_workers=1))) == sorted(expected)


def test_more_pairs_than_a_writer_keeps():
    """`datasets` writes 1,000 rows at a time, each time with the same columns."""
    n = 1100
    pictures = [[png((index % 256, index // 256, blue)) for index in range(n)] for blue in (7, 9)]
    pairs = Dataset.from_dict({"prompt": ["a"] * n, "chosen": pictures[0], "rejected": pictures[1]})
    assert len(load_preference_pairs(pairs)) == n


def test_extra_columns():
    pairs = load_preference_pairs(Dataset.from_dict(rows(note=["x", "y"], tags=[["t"], []])))
    assert (pairs["note"][:], pairs["tags"][:]) == (["x", "y"], [["t"], []])
    for streaming in (False, True):
        pairs = load_preference_pairs(Dataset.from_dict(PICK_A_PIC), streaming=streaming)
        assert [row["user_id"] for row in pairs] == [7, 8, 9]
        pairs = load_preference_pairs(Dataset.from_dict(LAYOUTS["ranking by row and id"][0]), streaming=streaming)
        assert [row["prompt_id"] for row in pairs] == list("xxxyy")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "folder", "folder_file_name"])
def test_files_with_relative_paths(tmp_path, suffix, streaming):
    images(tmp_path / "data" / "pictures")
    table = [
        {"prompt": "null", "chosen": "pictures/red.png", "rejected": "pictures/lime.png", "preference": 0.75},
        {
            "prompt": "b",
            "chosen": str(tmp_path / "data/pictures/blue.png"),
            "rejected": "pictures/white.png",
            "preference": 1,
        },
    ]
    if suffix == "folder_file_name":
        rename = {"chosen": "chosen_file_name", "rejected": "rejected_file_name"}
        table = [{rename.get(key, key): value for key, value in row.items()} for row in table]
    folder = suffix.startswith("folder")
    path = tmp_path / "data" / ("metadata.jsonl" if folder else f"pairs.{suffix}")
    if suffix in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(table)
    elif suffix == "json":
        path.write_text(json.dumps(table))
    elif suffix == "parquet":
        Dataset.from_list(table).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    pairs = load_preference_pairs(path.parent if folder else path, streaming=streaming)
    assert summary(pairs) == [("null", "red", "lime", 0.75, 1.0), ("b", "blue", "white", 1.0, 1.0)]


@pytest.mark.parametrize("streaming", [False, True])
def test_hpdv2_and_ranking_files(tmp_path, streaming):
    images(tmp_path)
    paths = [["red.png", "lime.png"], ["blue.png", "white.png"]]
    table = [{"prompt": p, "file_path": f, "human_preference": [1, 0]} for p, f in zip("ab", paths, strict=True)]
    (tmp_path / "train.json").write_text(json.dumps(table))
    assert summary(load_preference_pairs(tmp_path / "train.json", streaming=streaming)) == TWO
    table = [{"prompt": p, "image_path": f[k], "rank": k} for p, f in zip("ab", paths, strict=True) for k in (0, 1)]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    assert summary(load_preference_pairs(tmp_path / "rows.json", streaming=streaming)) == TWO


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_and_splits(tmp_path, streaming):
    data = Dataset.from_dict(rows())
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    before = sorted(tmp_path.rglob("*"))
    assert summary(load_preference_pairs(tmp_path / "one", streaming=streaming)) == TWO
    assert summary(load_preference_pairs(tmp_path / "two", streaming=streaming)) == TWO
    assert summary(load_preference_pairs(tmp_path / "two", split="test", streaming=streaming)) == TWO[1:]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written beside the user's data
    data.to_parquet(tmp_path / "shards" / "train.parquet")
    assert summary(load_preference_pairs(tmp_path / "shards", split="train", streaming=streaming)) == TWO
    with pytest.raises(PreferenceDataError, match="unknown split 'dev'.*train, test"):
        load_preference_pairs(tmp_path / "two", split="dev", streaming=streaming)
    with pytest.raises(PreferenceDataError, match="(?i)split.*dev.*train"):
        load_preference_pairs(tmp_path / "shards" / "train.parquet", split="dev", streaming=streaming)
    with pytest.raises(PreferenceDataError, match="several splits.*a, b"):
        load_preference_pairs(DatasetDict({"a": data, "b": data}), streaming=streaming)


def half(data):
    return data[: len(data) // 2]


NOISE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(NOISE, "PNG")
BAD_ROWS = {
    "empty prompt": rows(prompt=["a", ""]),
    "empty prompt: found '  '": rows(prompt=["a", "  "]),
    "prompt is not text": rows(prompt=["a", None]),
    "unreadable image: chosen": rows(chosen=[png("red"), half(NOISE.getvalue())]),
    "unreadable image: rejected": rows(rejected=[png("lime"), b"text"]),
    "image missing: rejected": rows(rejected=[png("lime"), None]),
    "image file missing: chosen 'nowhere.png'": rows(
        chosen=[{"bytes": png("red"), "path": None}, {"bytes": None, "path": "nowhere.png"}]
    ),
    "identical images": rows(rejected=[png("lime"), png("blue")]),
    "preference out of range.*found 1.5": rows(preference=[1.0, 1.5]),
    "preference out of range.*found -0.1": rows(preference=[1.0, -0.1]),
    "preference out of range.*found nan": rows(preference=[1.0, float("nan")]),
    "weight out of range.*found -1": rows(weight=[1.0, -1.0]),
    "weight out of range.*found nan": rows(weight=[1.0, float("nan")]),
    "weight out of range.*found inf": rows(weight=[1.0, float("inf")]),
    "labels out of range": {**{k: v[:2] for k, v in PICK_A_PIC.items()}, "label_1": [0.0, 0.3]},
    "not a number: 'label_0'": {**{k: v[:2] for k, v in PICK_A_PIC.items()}, "label_0": [1.0, None]},
    "not a number: 'rank'": {
        "prompt": ["a", "b"],
        "image": [t[:2] for t in THREE],
        "rank": [[1.0, 2.0], [1.0, float("nan")]],
    },
    "images without ranks": {"prompt": ["a", "b"], "image": [t[:2] for t in THREE], "rank": [[1, 2], [1]]},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows(message, streaming, caplog):
    data = Dataset.from_dict(BAD_ROWS[message])
    with pytest.raises(PreferenceDataError, match=f"row 1 of the dataset: {message}.*on_bad_rows='drop'") as caught:
        list(load_preference_pairs(data, streaming=streaming))
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="bt_hf.data.checks"):
        pairs = load_preference_pairs(data, streaming=streaming, on_bad_rows="drop")
        kept = summary(pairs)
    assert len(kept) == 1
    assert kept[0][0] == "a"
    (record,) = caplog.records
    assert message.partition(":")[0].partition(" out")[0] in record.getMessage()
    with pytest.raises(PreferenceDataError, match="no pair is usable"):
        load_preference_pairs(data.select([1]), streaming=streaming, on_bad_rows="drop")


def test_a_stream_is_lazy():
    read = []

    def generate():
        for index, name in enumerate(["red", "blue", "lime", "black"]):
            read.append(index)
            yield {"prompt": "a" if index < 2 else "", "chosen": png(name), "rejected": png("white")}

    pairs = load_preference_pairs(IterableDataset.from_generator(generate))
    assert set(read) == {0}
    rows = iter(pairs)
    read.clear()
    assert colour(next(rows)["chosen"]) == "red"
    assert max(read) <= 1
    next(rows)
    with pytest.raises(PreferenceDataError, match="row 2 of the dataset: empty prompt"):
        next(rows)


def test_a_stream_of_python_objects():
    def generate():
        yield {"prompt": "a", "chosen": Image.new("RGB", (4, 4), "red"), "rejected": Image.new("RGB", (4, 4), "blue")}
        yield {"prompt": "b", "chosen": Image.new("RGB", (4, 4), "lime"), "rejected": Image.new("RGB", (4, 4), "blue")}

    pairs = load_preference_pairs(IterableDataset.from_generator(generate).map(lambda row: row))
    assert [row[:3] for row in summary(pairs)] == [("a", "red", "blue"), ("b", "lime", "blue")]


def test_drop_warns_once_with_counts(caplog):
    data = Dataset.from_dict(
        {
            "prompt": ["a", "", " ", "d"],
            "chosen": [png("red")] * 4,
            "rejected": [png("blue"), png("blue"), png("blue"), png("red")],
        }
    )
    with caplog.at_level(logging.WARNING, logger="bt_hf.data.checks"):
        assert len(load_preference_pairs(data, on_bad_rows="drop")) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the dataset: dropped 3 of 4 pairs (2 empty prompt, 1 identical images)"
    ]


def test_row_numbers_are_those_of_the_source(tmp_path):
    images(tmp_path, ["red", "blue"])
    columns = {**PICK_A_PIC, "has_label": [False, True, False, True], "label_0": [1, 1, 1, 1], "label_1": [0] * 4}
    columns["jpg_0"] = [png("red")] * 3 + [b"broken"]
    with pytest.raises(PreferenceDataError, match="row 3 of the dataset: unreadable image: chosen 6 bytes"):
        load_preference_pairs(Dataset.from_dict(columns))
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\na,red.png,blue.png\nb,red.png,gone.png\n")
    with pytest.raises(PreferenceDataError, match=r"row 1 of p.csv: image file missing: rejected '.*gone.png'"):
        load_preference_pairs(tmp_path / "p.csv", num_proc=2)


def test_bombs_are_refused(monkeypatch):
    data = Dataset.from_dict(rows())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # the images have 16: PIL alone would only warn
    with pytest.raises(PreferenceDataError, match="row 0 of the dataset: image too large: chosen"):
        load_preference_pairs(data)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": ["a"], "winner": ["x.png"], "loser": ["y.png"]},
            "rename 'winner' to 'chosen', rename 'loser' to 'rejected'",
        ),
        ({"caption": ["a"], "chosen": ["x"], "rejected": ["y"]}, "found caption, .*rename 'caption' to 'prompt'"),
        (
            {"prompt": ["a"], "chosen": ["x.png"], "rejcted": ["y.png"]},
            "missing: rejected; rename 'rejcted' to 'rejected'",
        ),
        ({"foo": ["a"]}, "missing: prompt, chosen, rejected; rename your columns"),
        (rows(prompt=[1, 2]), "column 'prompt' should hold text .*found Value..int64"),
        (rows(chosen=[1, 2]), "column 'chosen' should hold images"),
        (rows(preference=["x", "y"]), "column 'preference' should hold numbers"),
        ({"prompt": ["a"], "image": [["x", "y"]], "rank": [1]}, "column 'rank' should hold lists of numbers"),
    ],
)
def test_bad_columns(columns, message, streaming):
    data = Dataset.from_dict(columns)
    with pytest.raises(PreferenceDataError, match=message) as caught:
        load_preference_pairs(data, streaming=streaming)
    assert "\n" not in str(caught.value)
    if "rank" not in columns:
        with pytest.raises(PreferenceDataError, match=message):
            check_columns(data)


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_to_train_on(tmp_path, streaming):
    with pytest.raises(PreferenceDataError, match="no rows"):
        load_preference_pairs(Dataset.from_dict(rows()).select([]), streaming=streaming)
    with pytest.raises(PreferenceDataError, match="no labelled rows"):
        load_preference_pairs(Dataset.from_dict(PICK_A_PIC | {"has_label": [False] * 4}), streaming=streaming)
    for name in ("ranking", "ranking by row"):
        ties = LAYOUTS[name][0]
        ties = ties | {"rank": [[1] * len(r) if isinstance(r, list) else 1 for r in ties["rank"]]}
        with pytest.raises(PreferenceDataError, match="no row prefers one image"):
            load_preference_pairs(Dataset.from_dict(ties), streaming=streaming)
    (tmp_path / "none.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(PreferenceDataError, match="none.csv: has no rows"):
        load_preference_pairs(tmp_path / "none.csv", streaming=streaming)


def test_bad_sources(tmp_path):
    for source in (tmp_path / "gone.csv", tmp_path / "gone", "./gone"):
        with pytest.raises(PreferenceDataError, match="no such local file"):
            load_preference_pairs(source)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(PreferenceDataError, match="expected one of .csv"):
        load_preference_pairs(tmp_path / "a.txt")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(PreferenceDataError, match="broken.jsonl: cannot be read"):
        load_preference_pairs(tmp_path / "broken.jsonl")
    with pytest.raises(PreferenceDataError, match="found int"):
        load_preference_pairs(3)
    for source in (
        "",
        " ",
        "https://a.example/pairs.csv",
        "https://a.example/pairs",
        "hf://datasets/me/x",
        "zip://a::b",
    ):
        with pytest.raises(PreferenceDataError, match="expected a Hub id, or a local file or folder"):
            load_preference_pairs(source)
    for source in ("a\0b", "x" * 5000):
        with pytest.raises(PreferenceDataError) as caught:
            load_preference_pairs(source)
        assert len(str(caught.value)) < 400
    with pytest.raises(PreferenceDataError, match="'raise' or 'drop'"):
        load_preference_pairs(Dataset.from_dict(rows()), on_bad_rows="ignore")


def test_check_columns():
    data = Dataset.from_dict(rows())
    assert check_columns(data) is data
    stream = data.to_iterable_dataset()
    assert check_columns(stream) is stream
    with pytest.raises(PreferenceDataError, match="those of Pick-a-Pic.*load_preference_pairs"):
        check_columns(Dataset.from_dict(PICK_A_PIC))
    with pytest.raises(PreferenceDataError, match="pick a split: train, test"):
        check_columns(DatasetDict({"train": data, "test": data}))
    with pytest.raises(PreferenceDataError, match="found list"):
        check_columns([1])


BAD_VALUES = [
    ("prompt", "  ", "empty prompt: found '  '"),
    ("prompt", None, "prompt is not text: found None"),
    ("weight", -1.0, "weight out of range: expected a number >= 0, found -1.0"),
    ("weight", float("inf"), "weight out of range: .* found inf"),
    ("weight", None, "weight out of range: .* found None"),
]


def many(column: str, value: object, columns: dict[str, list]) -> Dataset:
    """20,003 rows, of which one has a bad value: row 2 after some have been left out."""
    columns = {name: values * 20_003 for name, values in columns.items()}
    columns[column] = [*columns[column][:15_002], value, *columns[column][15_003:]]
    return Dataset.from_dict(columns).select(range(15_000, 20_003))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        *BAD_VALUES,
        ("preference", 1.7, "preference out of range: expected a number from 0 to 1, found 1.7"),
        ("preference", float("nan"), "preference out of range: .* found nan"),
    ],
)
def test_check_columns_reads_labels(column, value, message):
    good = {"prompt": ["a"], "chosen": ["x"], "rejected": ["y"], "preference": [1.0], "weight": [1.0]}
    with pytest.raises(PreferenceDataError, match=f"row 2 of the dataset: {message}.*load_preference_pairs"):
        check_columns(many(column, value, good))
    check_columns(many(column, value, good).select([0, 1, 3]))
    check_columns(Dataset.from_dict(rows(preference=[0, 1], weight=[0, 7], label=[5, 5])))  # the last is not a label


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        *BAD_VALUES,
        ("label", 2.0, "label out of range: expected a number from 0 to 1, found 2.0"),
        ("label", None, "label out of range: .* found None"),
    ],
)
def test_check_unpaired(column, value, message):
    good = {"prompt": ["a"], "completion": ["x"], "label": [0.5], "weight": [1.0]}
    with pytest.raises(PreferenceDataError, match=f"row 2 of the dataset: {message}.*dataset.filter"):
        check_unpaired(many(column, value, good))
    check_unpaired(many(column, value, good).select([0, 1, 3]))


def test_check_unpaired_columns():
    good = {"prompt": ["a"], "completion": ["x"], "label": [True]}
    check_unpaired(Dataset.from_dict(good))
    check_unpaired(Dataset.from_dict(good).to_iterable_dataset())
    with pytest.raises(PreferenceDataError, match="no rows"):
        check_unpaired(Dataset.from_dict(good).select([]))
    with pytest.raises(PreferenceDataError, match="missing: label; rename"):
        check_unpaired(Dataset.from_dict(good).remove_columns("label"))
    with pytest.raises(PreferenceDataError, match="'label' should hold numbers"):
        check_unpaired(Dataset.from_dict(good | {"label": ["good"]}))


def test_overlapping_rows():
    jpeg = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(jpeg, "WEBP", lossless=True)  # the same pixels in another format
    train = load_preference_pairs(Dataset.from_dict(rows()))
    held_out = Dataset.from_dict(
        {
            "prompt": ["a", "b", "a", "c"],
            "chosen": [png("lime"), png("blue"), png("red"), png("red")],
            "rejected": [png("red"), jpeg.getvalue(), png("blue"), png("lime")],
        }
    )
    assert overlapping_rows(train, held_out) == 2  # swapped, and in another format; not: other image, other prompt
    assert overlapping_rows(train.to_iterable_dataset(), load_preference_pairs(held_out, streaming=True)) == 2
    assert overlapping_rows(train.select([0]), train.select([1])) == 0
