"""Tables of the documents: each is as in the JSON of the benchmark that measured it."""

import argparse
import json
import platform
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return the script, with a folder of its own that holds `speed.json`."""
    import tables

    import results

    monkeypatch.setattr(tables, "RESULTS", tmp_path / "docs" / "results")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.load.cache_clear()
    with results.Report("speed", "python speed.py", tmp_path / "docs" / "results") as report:
        report.table("steps", "Steps", ["seconds", "note"], [("bare", 0.12345, "a|b"), ("**ours**", None, "")], ".2f")
    yield tables
    tables.load.cache_clear()


DOCUMENT = """# Speed

A step takes little:

<!-- table: speed.steps -->
<!-- end -->
"""
TABLE = """`python speed.py` ([rows and source](results/speed.json)):

| | seconds | note |
| --- | ---: | --- |
| bare | 0.12 | a\\|b |
| **ours** | | |
"""


def problems(tables: ModuleType, text: str) -> list[str]:
    return list(tables.differences(text, tables.ROOT / "docs" / "speed.md"))


def test_documents_agree_with_their_json() -> None:
    import tables

    found = [
        f"{path.name}:{problem}"
        for path in tables.documents()
        for problem in tables.differences(path.read_text(encoding="utf-8"), path)
    ]
    assert not found
    assert not tables.unused()


def test_json_names_its_source_and_no_machine() -> None:
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        assert content["command"].startswith("python examples/benchmarks/")
        assert len(content["commit"]) == 12  # measured with committed code: changed code adds "-dirty"
        assert content["versions"]["torch"]
        assert content["machine"]["cores"] >= 1
        assert str(ROOT) not in text
        assert len(platform.node()) < 4 or platform.node() not in text


def test_tables_are_filled_in_and_then_agree(tables: ModuleType) -> None:
    document = tables.ROOT / "docs" / "speed.md"
    filled = tables.filled(DOCUMENT, document)
    assert filled == DOCUMENT.replace("<!-- end -->", TABLE + "<!-- end -->")
    assert problems(tables, filled) == []
    assert tables.filled(filled, document) == filled
    # Beside another file, the link is another one.
    assert "(docs/results/speed.json)" in tables.filled(DOCUMENT, tables.ROOT / "README.md")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0.12", "0.11", "5: speed.steps is not as in the JSON"),
        ("python speed.py", "python fast.py", "5: speed.steps is not as in the JSON"),
        ("speed.steps", "speed.leaps", "no 'leaps'"),
        ("table: speed.steps", "table: space.steps", "no docs/results/space.json"),
        ("<!-- end -->", "", "5: a marker without its other half"),
        ("little", "0.12 s", "3: '0.12' without its source"),
        ("little", "half as long, 47 % less", "3: '7 %' without its source"),
        ("little", "3.5 GB", "3: '3.5 GB' without its source"),
        ("little:\n", "little:\n\n| bare | 12 |\n", "a table without its source"),
    ],
)
def test_differences_are_found(tables: ModuleType, old: str, new: str, says: str) -> None:
    filled = tables.filled(DOCUMENT, tables.ROOT / "docs" / "speed.md")
    found = problems(tables, filled.replace(old, new))
    assert found
    assert says in "\n".join(found)


@pytest.mark.parametrize(
    "prose", ["`set_scale(0.5)`", "N = 64", "[paper](https://arxiv.org/abs/2308.07929)", "16 pairs"]
)
def test_prose_may_name_settings(tables: ModuleType, prose: str) -> None:
    filled = tables.filled(DOCUMENT, tables.ROOT / "docs" / "speed.md")
    assert problems(tables, filled.replace("little", prose)) == []


def test_unfinished_runs_are_refused(tables: ModuleType) -> None:
    file = tables.RESULTS / "speed.json"
    file.write_text(file.read_text().replace('"complete": true', '"complete": false'))
    assert "unfinished" in problems(tables, DOCUMENT)[0]


def test_json_that_no_document_shows_is_found(tables: ModuleType) -> None:
    (tables.ROOT / "README.md").write_text("")
    document = tables.ROOT / "docs" / "speed.md"
    document.write_text("")
    assert tables.unused() == ["speed.json"]
    document.write_text(DOCUMENT)
    assert tables.unused() == []


def test_runs_that_were_made_are_not_made_again(tmp_path: Path) -> None:
    from results import Report

    made = []

    def measure() -> list[int]:
        made.append(1)
        return [len(made)]

    def cut() -> None:
        with Report("speed", "python speed.py", tmp_path) as report:
            assert report.run("bare", measure) == [1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut()
    assert json.loads((tmp_path / "speed.json").read_text())["complete"] is False
    with Report("speed", "python speed.py", tmp_path) as report:
        assert report.run("bare", measure) == [1]
        assert report.run("ours", measure) == [2]
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content["complete"] is True
    assert content["runs"] == {"bare": [1], "ours": [2]}
    # Another command is another measurement; `fresh` begins anew; reports of one process share what is known.
    assert Report("speed", "python speed.py --fast", tmp_path).run("bare", measure) == [3]
    assert Report("speed", "python speed.py --fast", tmp_path, fresh=True).run("bare", measure) == [4]
    known = {"bare": [7]}
    assert Report("space", "python space.py", tmp_path, known=known).run("bare", measure) == [7]


def test_commands_leave_out_defaults_and_folders(tmp_path: Path) -> None:
    from results import command_line, make_parser

    parser: argparse.ArgumentParser = make_parser("Measure.")
    parser.add_argument("--parts", nargs="+", default=["all"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    script = str(BENCHMARKS / "few_pairs.py")
    args = parser.parse_args(["--output_dir", str(tmp_path), "--fresh", "--bf16", "--seeds", "3", "--parts", "a", "b"])
    assert command_line(parser, args, script) == "python examples/benchmarks/few_pairs.py --parts a b --bf16"
    assert command_line(parser, args, script, parts=["b"]).endswith("--parts b --bf16")


def test_values_are_rounded_to_plain_json() -> None:
    import numpy as np
    import torch

    from results import rounded

    value = {"a": np.float32(1 / 3), "b": torch.tensor([0.1, 2.0]), "c": np.int64(3), "d": True, "e": (None, "x")}
    assert json.loads(json.dumps(rounded(value))) == {
        "a": 0.333333,
        "b": [0.1, 2.0],
        "c": 3,
        "d": True,
        "e": [None, "x"],
    }
