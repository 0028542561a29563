"""Options in a file: unknown names with a near match, wrong values by their name, and each in one line."""

from pathlib import Path

import pytest

from bt_hf.cli import main
from bt_hf.cli.config_file import read_config
from command_line import lines_of_error

BOTH = "model: m\ndataset: d\n"


def write(folder: Path, text: str, name: str = "taste.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("command", ["reward", "lora"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rat: 1e-4", ["unknown option learning_rat, did you mean learning_rate?"]),
        ("lr: 1e-4", ["unknown option lr, did you mean learning_rate?"]),
        ("evaluation_strategy: steps", ["did you mean eval_strategy?"]),
        ("modle: x", ["unknown option modle, did you mean model?"]),
        ("zzzzzz: 1", ["unknown option zzzzzz"]),
        ("7: 1", ["unknown option 7"]),
        ("env: {HF_TOKEN: x}", ["unknown option env"]),
        ("learning_rate: [1]", ["`learning_rate` should be a number, but got [1] (list)"]),
        ("learning_rate: much", ["--learning_rate", "much"]),
        ("learning_rate: .nan", ["`learning_rate`", "nan"]),
        ("lora_r: 2.5", ["`lora_r` should be a whole number or None, but got 2.5"]),
        ("lora_r: {a: 1}", ["`lora_r` should be a whole number"]),
        ("seed: true", ["`seed` should be a whole number, but got True"]),
        ("bf16: maybe", ["--bf16", "maybe"]),
        ("bf16: 3", ["`bf16` should be True or False", "but got 3"]),
        ("streaming: 3", ["`streaming` should be True or False"]),
        ("on_bad_rows: drp", ["on_bad_rows", "drp", "did you mean drop?"]),
        ("split: [a]", ["`split` should be text or None"]),
        ("plots: [a]", ["`plots` should be True or False"]),
        ("lora_target_modules: 3", ["`lora_target_modules` should be a list or None"]),
        ("optim: adam", ["`optim` should be one of", "did you mean adamw_torch?"]),
        ("learning_rate: 1e-4\nlearning_rate: 1e-5", ["line 4", "'learning_rate' stands there twice"]),
        ("learning_rate: 1e-4\nlearning-rate: 1e-5", ["'learning_rate' stands there twice"]),
        ("a: [", ["line 4", "not valid YAML"]),
        ("a: !!python/object/apply:os.system [x]", ["not valid YAML"]),
    ],
)
def test_mistakes_are_named(command: str, line: str, said: list[str], tmp_path: Path, capsys) -> None:
    errors = lines_of_error(capsys, command, "--config", write(tmp_path, BOTH + line + "\n"))
    assert len(errors) == 1
    assert not [words for words in said if words not in errors[0]], errors[0]


def test_a_mistake_is_named_before_what_is_missing(tmp_path: Path, capsys) -> None:
    errors = lines_of_error(capsys, "reward", "--config", write(tmp_path, "modle: x\ndataset: d\n"))
    assert "did you mean model?" in errors[0]
    assert "did you mean --model?" in lines_of_error(capsys, "reward", "--modle", "x", "--dataset", "d")[0]
    assert "did you mean --scorer?" in lines_of_error(capsys, "pairs", "m", "--scorr", "x")[0]


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "3\n"])
def test_other_files(text: str, tmp_path: Path, capsys) -> None:
    errors = lines_of_error(capsys, "reward", f"--config={write(tmp_path, text)}")
    assert "should hold options" in errors[0]


def test_bytes_that_are_no_text(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "not text in UTF-8" in lines_of_error(capsys, "reward", "--config", tmp_path / "x.yaml")[0]


def test_two_files(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, BOTH)
    assert "--config stands there twice" in lines_of_error(capsys, "reward", "--config", path, f"--config={path}")[0]


def test_json_and_hyphens(tmp_path: Path) -> None:
    path = write(tmp_path, '{"learning-rate": 0.1, "seed": 3}', "taste.json")
    assert read_config(path, ["learning_rate", "seed"]) == {"learning_rate": 0.1, "seed": 3}


def test_misspelt_words_of_an_option(capsys) -> None:
    error = lines_of_error(capsys, "lora", "--model", "m", "--dataset", "d", "--loss_type", "dop")[0]
    assert "--loss_type" in error
    assert "did you mean dpo?" in error
    assert main(["lora", "--model", "m", "--dataset", "d", "--lora_r", "many"]) == 2
    assert "--lora_r" in capsys.readouterr().err
