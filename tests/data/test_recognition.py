"""Data as it is in the world: types, further columns, and advice that looks at the values."""

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, Value

from bt_hf.data.checks import check_columns
from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.images import to_rgb
from bt_hf.data.pairs import load_preference_pairs
from tiny_images import png

RED, BLUE = png("red"), png("blue")
PAIR: dict[str, list[Any]] = {"prompt": ["x"], "chosen": [RED], "rejected": [BLUE]}
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
IMAGES = [
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    pa.struct({"bytes": pa.binary_view(), "path": pa.string_view()}),
    pa.struct({"bytes": pa.large_binary()}),
    *TEXTS,
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("text", "image"), [(TEXTS[0], image) for image in IMAGES] + [(text, IMAGES[0]) for text in TEXTS]
)
def test_types_of_arrow_and_polars(text: pa.DataType, image: pa.DataType, streaming: bool) -> None:
    def values(kind: pa.DataType, value: Any) -> pa.Array:
        if pa.types.is_struct(kind):
            return pa.array([{"bytes": value}], kind)
        plain = pa.array([value])
        return plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)

    texts = image in TEXTS
    red, blue = ((base64.b64encode(one).decode() if texts else one) for one in (RED, BLUE))
    table = pa.table(
        {
            "prompt": values(text, "007"),
            "chosen": values(image, red),
            "rejected": values(image, blue),
            "note": values(text, "n"),
        }
    )
    data = Dataset(table)
    check_columns(data)
    (row,) = load_preference_pairs(data, streaming=streaming)
    assert (row["prompt"], row["note"]) == ("007", "n")
    assert [to_rgb(row[name]).getpixel((0, 0)) for name in ("chosen", "rejected")] == [(255, 0, 0), (0, 0, 255)]


FURTHER = [
    "label",
    "completion",
    "score",
    "rank",
    "ranking",
    "image",
    "images",
    "caption",
    "human_preference",
    "label_0",
    "has_label",
    "winner",
    "prompt_id",
    "img_better",
    "chosen_file_name",
    "file_name",
    "_row",
    "_problem",
    "_shard",
    "text",
    "__key__",
    "messages",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", ["text", 3, None, 0.5, [1, 2], {"a": 1}])
def test_further_columns_are_never_mistaken(value: Any, streaming: bool) -> None:
    for layout in (PAIR, {"prompt": ["x"], "img_better": [RED], "img_worse": [BLUE]}):
        names = [name for name in FURTHER if name not in layout]
        data = Dataset.from_dict(layout | {name: [value] for name in names})
        check_columns(Dataset.from_dict(PAIR | {name: [value] for name in names}))
        (row,) = load_preference_pairs(data, streaming=streaming)
        assert row["prompt"] == "x"
        assert (row["preference"], row["weight"]) == (1.0, 1.0)
        if not streaming:
            assert {name: row[name] for name in names} == dict.fromkeys(names, value)


def test_a_further_column_gives_way_to_the_contract() -> None:
    (row,) = load_preference_pairs(
        Dataset.from_dict({"prompt": ["x"], "img_better": [RED], "img_worse": [BLUE], "chosen": ["A"]})
    )
    assert to_rgb(row["chosen"]).getpixel((0, 0)) == (255, 0, 0)


def test_further_images_are_not_opened() -> None:
    broken = {"bytes": b"broken", "path": None}
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "mask": Image()})
    data = Dataset.from_dict(PAIR | {"mask": [broken]}, features=features)
    for streaming in (False, True):
        (row,) = load_preference_pairs(data, streaming=streaming).remove_columns([] if streaming else ["mask"])
        assert row["prompt"] == "x"


@pytest.mark.parametrize(
    ("columns", "expected", "unwanted"),
    [
        (
            {"prompt": ["x"], "image_a": ["a.png"], "image_b": ["b.png"], "winner": [1]},
            "of 'image_a' and 'image_b', as 'winner'",
            "rename",
        ),
        (
            {"prompt": ["x"], "left": ["a.png"], "right": ["b.png"], "winner": ["left"]},
            "of 'left' and 'right', as 'winner'",
            "rename",
        ),
        ({"prompt": ["x"], "best": [0.9], "worst": [0.1]}, "missing: chosen, rejected", "rename 'best'"),
        ({"text": [3], "chosen": ["a.png"], "rejected": ["b.png"]}, "default_prompt", "rename 'text'"),
        ({"image_path": ["a.png"], "chosen": ["a.png"], "rejected": ["b.png"]}, "default_prompt", "rename"),
        (
            {"text": ["a cat"], "chosen": ["a.png"], "rejected": ["b.png"]},
            "rename 'text' to 'prompt'",
            "default_prompt",
        ),
        (
            {"prompt": ["x"], "winner": ["a.png"], "loser": ["b.png"]},
            "rename 'winner' to 'chosen', rename 'loser'",
            "make",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["dataset", "csv", "jsonl"])
def test_advice_looks_at_the_values(
    tmp_path: Path, kind: str, columns: dict[str, list], expected: str, unwanted: str
) -> None:
    source: Any = Dataset.from_dict(columns)
    if kind == "csv":
        source = tmp_path / "p.csv"
        source.write_text("\n".join(",".join(map(str, line)) for line in (columns, [v[0] for v in columns.values()])))
    elif kind == "jsonl":
        source = tmp_path / "p.jsonl"
        source.write_text(json.dumps({name: value[0] for name, value in columns.items()}))
    with pytest.raises(PreferenceDataError) as caught:
        load_preference_pairs(source)
    message = str(caught.value)
    assert expected in message or (kind == "csv" and "text" in columns)  # a CSV has texts alone
    assert unwanted not in message or (kind == "csv" and "text" in columns)
    assert "dataset." not in message or kind == "dataset"
    assert "\n" not in message


@pytest.mark.parametrize("streaming", [False, True])
def test_a_default_prompt(streaming: bool) -> None:
    columns = {"chosen": [RED, BLUE], "rejected": [BLUE, RED]}
    for data in (columns, columns | {"prompt": [None, " "]}, columns | {"prompt": ["", "y"]}):
        rows = list(load_preference_pairs(Dataset.from_dict(data), streaming=streaming, default_prompt="a photo"))
        assert [row["prompt"] for row in rows] == ["a photo", "y" if "y" in data.get("prompt", []) else "a photo"]
    with pytest.raises(PreferenceDataError, match="default_prompt="):
        load_preference_pairs(Dataset.from_dict(columns), streaming=streaming)
    with pytest.raises(PreferenceDataError, match="default_prompt must be a text, found 3"):
        load_preference_pairs(Dataset.from_dict(columns), default_prompt=3)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("where", ["", "train"])
def test_metadata_of_image_folders(tmp_path: Path, suffix: str, where: str) -> None:
    folder = tmp_path / "data" / where
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(RED)
    (folder / "b.png").write_bytes(BLUE)
    for columns in (
        {"prompt": ["007"], "chosen_file_name": ["a.png"], "rejected_file_name": ["b.png"]},
        {"prompt": ["007"] * 2, "file_name": ["b.png", "a.png"], "rank": [2, 1]},
    ):
        if suffix == "csv":
            lines = [list(columns), *zip(*columns.values(), strict=True)]
            (folder / "metadata.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
        elif suffix == "jsonl":
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            Dataset.from_dict(columns).to_parquet(folder / "metadata.parquet")
        (row,) = load_preference_pairs(tmp_path / "data")
        assert row["prompt"] == "007"
        assert to_rgb(row["chosen"]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["numpy", "torch", "arrow", "pandas"])
def test_formats_of_datasets_change_nothing(format: str) -> None:
    data = Dataset.from_dict(PAIR)
    (row,) = load_preference_pairs(data.with_format(format))
    assert to_rgb(row["chosen"]).getpixel((0, 0)) == (255, 0, 0)
    check_columns(data.with_format(format))
    with pytest.raises(PreferenceDataError, match=r"has a transform.*dataset\.map"):
        load_preference_pairs(data.with_transform(lambda rows: rows))
