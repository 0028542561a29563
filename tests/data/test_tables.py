"""CSV and JSON as people write them: texts stay texts, and whatever is wrong is one line that names its row."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from bt_hf.data.formats import PreferenceDataError, roles
from bt_hf.data.pairs import load_preference_pairs
from bt_hf.data.reading import open_dataset
from bt_hf.data.recognition import recognise
from bt_hf.data.tables import read_table
from tiny_images import png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    return tmp_path


def load(folder: Path, name: str, content: str | bytes, **options: Any) -> Any:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_preference_pairs(folder / name, **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "prompts",
    [
        ["7", "007"],
        ["True", "false"],
        ["1.50", "1e3"],
        ["2024-01-01", "2024-01-02"],
        ["null", "NaN"],
        ["NA", "-"],
        ["1_000", "0x10"],
        ["١", "∞"],
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_prompts_stay_as_they_are_written(folder: Path, kind: str, prompts: list[str], streaming: bool) -> None:
    mark = "\t" if kind == "tsv" else ","
    content = "\n".join(
        [mark.join(["prompt", "chosen", "rejected"]), *(mark.join([p, "a.png", "b.png"]) for p in prompts)]
    )
    rows = [{"prompt": prompt, "chosen": "a.png", "rejected": "b.png"} for prompt in prompts]
    content = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)) if kind == "jsonl" else content
    pairs = load(folder, f"p.{kind}", content, streaming=streaming)
    assert isinstance(pairs, IterableDataset) == streaming
    assert [row["prompt"] for row in pairs] == prompts


def test_images_called_by_digits_stay_paths(folder: Path) -> None:
    (folder / "007").write_bytes(png("lime"))
    assert len(load(folder, "p.csv", "prompt,chosen,rejected\nx,007,a.png\n")) == 1


def test_other_columns_get_types(folder: Path) -> None:
    content = "prompt,chosen,rejected,preference,weight,note,id,ok,n\n"
    content += "x,a.png,b.png,1,2,5,007,true,3\ny,a.png,b.png,0.5,,x,8,False,\n"
    with pytest.raises(PreferenceDataError, match="row 1 of p.csv: weight out of range"):
        load(folder, "p.csv", content)
    pairs = load(folder, "p.csv", content.replace("0.5,,", "0.5,1,"))
    assert pairs.to_pandas()[["preference", "weight", "note", "id", "ok"]].to_numpy().tolist() == [
        [1.0, 2.0, "5", "007", True],
        [0.5, 1.0, "x", "8", False],
    ]
    assert pairs["n"][:] == [3, None]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings(folder: Path, mark: str, suffix: str, encoding: str) -> None:
    content = f'prompt{mark}chosen{mark}rejected\r\n"ä{mark} b\nc"{mark}a.png{mark}b.png\r\n'
    for head in ("", f"sep={mark}\r\n"):
        assert load(folder, f"p.{suffix}", (head + content).encode(encoding))["prompt"][:] == [f"ä{mark} b\nc"]


def test_decimal_commas_of_semicolon_files(folder: Path) -> None:
    content = "prompt;chosen;rejected;preference\nx;a.png;b.png;0,75\n"
    assert load(folder, "p.csv", content)["preference"][:] == [0.75]


GOOD = '{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}\n'
BAD = {
    "p.csv": [
        (
            "prompt,chosen,rejected\nx,a.png,b.png\ny, z,a.png,b.png\n",
            "row 1 of p.csv: wrong number of fields: found 4",
        ),
        (
            "prompt,chosen,rejected\nx,a.png,b.png\ny,a.png\n",
            "row 1 of p.csv: wrong number of fields: found 2, expected 3",
        ),
        ("prompt,chosen,rejected,preference\nx,a.png,b.png,1\ny,a.png,b.png,left\n", "row 1 .*'preference' is 'left'"),
        ("prompt,chosen,rejected\nx,a.png,b.png\n,a.png,b.png\n", "row 1 of p.csv: prompt is not text: found None"),
    ],
    "p.jsonl": [
        (GOOD + '{"prompt"\n', "row 1 of p.jsonl: not a row: not valid"),
        (GOOD + "[1]\n", "row 1 of p.jsonl: not a row: expected a JSON"),
        (
            GOOD + '{"prompt": 7, "chosen": "a.png", "rejected": "b.png"}',
            "row 1 of p.jsonl: not a text: 'prompt' is 7",
        ),
        (
            GOOD + '{"prompt": "y", "chosen": ["a.png"], "rejected": "b.png"}',
            "row 1 of p.jsonl: not a text: 'chosen' is",
        ),
        (
            GOOD + '{"prompt": "\\ud800", "chosen": "a.png", "rejected": "b.png"}',
            "row 1 of p.jsonl: not a row: a text is not valid Unicode",
        ),
        (GOOD + "[" * 100_000, "row 1 of p.jsonl: not a row"),
        (GOOD + '{"prompt": ' + "9" * 5000 + "}", "row 1 of p.jsonl: not a row"),
    ],
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_a_bad_row_spoils_itself_alone(folder: Path, name: str, content: str, message: str, streaming: bool) -> None:
    with pytest.raises(PreferenceDataError, match=message) as caught:
        list(load(folder, name, content, streaming=streaming))
    assert "\n" not in str(caught.value)
    assert len(list(load(folder, name, content, on_bad_rows="drop", streaming=streaming))) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"\xff\xfe\xff", "p.csv: "),
        ("p.csv", "prompt,chosen,rejected\nä".encode("latin-1"), "p.csv: cannot be read .expected text in UTF-8"),
        ("p.csv", "prompt,prompt\n1,2\n", "two columns are called 'prompt'"),
        ("p.csv", "", "p.csv: has no rows"),
        ("p.json", "{", "p.json: cannot be read .not valid JSON"),
        ("p.json", "[[[" * 100_000, "p.json: cannot be read .nested too deeply"),
        ("p.jsonl", "nothing\n", "p.jsonl: cannot be read .row 0: not a row"),
    ],
)
def test_bad_files(folder: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(PreferenceDataError, match=message) as caught:
        load(folder, name, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}],
        {"prompt": ["x"], "chosen": ["a.png"], "rejected": ["b.png"]},
        {"data": [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}]},
        {"prompt": "x", "chosen": "a.png", "rejected": {"path": "b.png"}},
    ],
)
def test_shapes_of_json(folder: Path, value: object) -> None:
    assert len(load(folder, "p.json", json.dumps(value))) == 1


def test_further_columns_may_hold_anything(folder: Path) -> None:
    row = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    further = [
        {"note": 1},
        {"note": "x"},
        {"note": [1, {"a": {}}]},
        {"big": 10**30},
        {"_row": 5, "_problem": "none", "label": 0},
    ]
    pairs = load(folder, "p.jsonl", "\n".join(json.dumps(row | one) for one in further))
    assert pairs["note"][:3] == ["1", "x", '[1, {"a": {}}]']
    assert (pairs[4]["_row"], pairs[4]["_problem"], pairs[4]["label"]) == (5, "none", 0)


def test_splits_and_folders(folder: Path) -> None:
    def write(path: Path, *prompts: str) -> None:
        path.parent.mkdir(exist_ok=True)
        lines = [f"{prompt},a.png,b.png" for prompt in prompts]
        path.write_text("\n".join(["prompt,chosen,rejected", *lines]))

    def prompts(source: Path, split: str | None = None) -> list[str]:
        return load_preference_pairs(source, split)["prompt"][:]

    write(folder / "clicks.csv", "001", "2", "3", "4")
    for source in (folder, folder / "clicks.csv"):
        assert prompts(source) == prompts(source, "train") == ["001", "2", "3", "4"]
        assert prompts(source, "train[:50%]") == ["001", "2"]
        assert prompts(source, "train[1:2]+train[-1:]") == ["2", "4"]
        with pytest.raises(PreferenceDataError, match="unknown split|Unknown split"):
            prompts(source, "test")
    (folder / "clicks.csv").rename(folder / "train.csv")
    write(folder / "test.csv", "5")
    assert (prompts(folder), prompts(folder, "test")) == (["001", "2", "3", "4"], ["5"])
    for name in ("train", "test"):
        write(folder / name / "metadata.csv", f"0{name}")
        for image in ("a.png", "b.png"):
            (folder / name / image).write_bytes((folder / image).read_bytes())
        (folder / f"{name}.csv").unlink()
    assert (prompts(folder), prompts(folder, "test")) == (["0train"], ["0test"])


def test_a_table_of_many_rows_is_read_in_seconds(folder: Path) -> None:
    for name, line in (
        ("p.csv", "x,a.png,b.png,1,note"),
        ("p.jsonl", '{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}'),
    ):
        head = "prompt,chosen,rejected,weight,note\n" if name == "p.csv" else ""
        (folder / name).write_text(head + f"{line}\n" * 50_000)
        started = time.monotonic()
        assert len(read_table(folder / name, roles)) == 50_000
        assert time.monotonic() - started < 5


VALUES: list[Any] = [
    "x",
    "",
    " ",
    "7",
    "a.png",
    "b.png",
    "../a.png",
    "/etc/passwd",
    "http://a.example/x.png",
    "data:image/png;base64,AAAA",
    "data:",
    "\0",
    "a\nb",
    "\ud800",
    "💥",
    "." * 5000,
    "zip://a::b",
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    [],
    {},
    ["a.png", "b.png"],
    [1, 2],
    [None],
    [[1]],
    {"path": "a.png"},
    {"bytes": None, "path": None},
    {"bytes": "x"},
    {"path": 3},
    {"bytes": [1]},
    {"": 1},
]
NAMES = [
    "prompt",
    "chosen",
    "rejected",
    "preference",
    "weight",
    "image",
    "images",
    "rank",
    "ranking",
    "human_preference",
    "rating",
    "stars",
    "liked",
    "best",
    "text",
    "caption",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "has_label",
    "chosen_file_name",
    "rejected_file_name",
    "file_name",
    "prompt_id",
    "label",
    "_bt_hf_problem",
    "_bt_hf_row",
    "_row",
    "",
    "\0",
    "a.b",
    "💥",
]


def fuzzed_row(chance: random.Random) -> Any:
    if chance.random() < 0.05:
        return chance.choice(VALUES)
    row: dict[str, Any] = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    if chance.random() < 0.4:
        row = {"prompt": "x", "image": ["a.png", "b.png"], "rank": [1, 2]} if chance.random() < 0.5 else {}
        row = row or {"prompt": "x", "image": chance.choice(["a.png", "b.png"]), "rank": chance.randrange(3)}
    for _ in range(chance.randrange(3)):
        row[chance.choice(NAMES)] = chance.choice(VALUES)
    if chance.random() < 0.2:
        row.pop(chance.choice(list(row)))
    return row


def fuzzed_file(chance: random.Random) -> bytes:
    content = b"\n".join(json.dumps(fuzzed_row(chance)).encode() for _ in range(chance.randrange(1, 5)))
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        place = chance.randrange(len(content) + 1)
        content = (
            content[:place]
            + chance.choice([b"\xff", b"\0", b'"', b"{", b"}", b"\n", b"[" * 50, b"\\u"])
            + content[place:]
        )
    return content


@pytest.mark.parametrize(("name", "cases"), [("metadata.jsonl", 1000), ("metadata.json", 100), ("metadata.csv", 100)])
def test_fuzz(folder: Path, name: str, cases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a connection was tried"))
    loaded = refused = 0
    messages: list[str] = []
    for seed in range(cases):
        chance = random.Random(seed)
        (folder / name).write_bytes(fuzzed_file(chance))
        policy, streaming = chance.choice(["raise", "drop"]), chance.random() < 0.3
        try:
            if seed % 20:  # files to columns, without the work of `datasets` on rows, which takes most of the time
                rows, place, label = open_dataset(folder, None, False)
                recognise(rows, rows.features, label, place.table)
                pairs = []
            else:
                pairs = list(load_preference_pairs(folder, streaming=streaming, on_bad_rows=policy))
        except PreferenceDataError as error:
            refused += 1
            messages.append(str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        else:
            loaded += 1
            for row in pairs:
                assert isinstance(row["prompt"], str)
                assert row["chosen"].size == row["rejected"].size == (4, 4)
                assert 0 <= row["preference"] <= 1
    assert not [message for message in messages if "\n" in message or not 20 < len(message) < 700]
    assert refused > cases / 20
    assert loaded > cases / 20 or name == "metadata.csv"
