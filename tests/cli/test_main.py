"""The command line: train, then score, in this process; errors are one line and exit code 2."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from bt_hf.cli import COMMANDS, main
from bt_hf.cli.reward import parse
from bt_hf.cli.score import find_images
from bt_hf.reward.scorer import PreferenceScorer
from tiny_models import picture, red_pairs, save

RED, BLUE = (220, 40, 40), (40, 40, 220)
PROMPT = "a red house"


class Workplace(NamedTuple):
    """A base model, pairs, pictures, and a reward that `bt-hf reward` trained with them."""

    model: str
    pairs: str
    images: Path
    reward: Path
    printed: str


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("cli")
    model = save(folder / "base")
    red_pairs(12).save_to_disk(folder / "pairs")
    red_pairs(8, seed=1).save_to_disk(folder / "held-out")
    images = folder / "images"
    (images / "deeper").mkdir(parents=True)
    picture(RED).save(images / "red.png")
    picture(BLUE).save(images / "deeper" / "BLUE.JPG")
    (images / "notes.txt").write_text("no image")
    config = folder / "taste.yaml"
    config.write_text(
        f"model: {model}\ndataset: {folder / 'pairs'}\neval_dataset: {folder / 'held-out'}\noutput_dir: nowhere\n"
        "num_train_epochs: 2\nlearning_rate: 1e-3\nlogging_steps: 1\ncross_validate: 2\n"
        "disable_tqdm: true\nuse_cpu: true\n"
    )
    out = folder / "reward"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *values, **options: printed.append(" ".join(map(str, values))))
        assert main(["reward", f"--config={config}", "--output_dir", str(out), "--lora_r", "2"]) == 0
    return Workplace(model, str(folder / "pairs"), images, out, "\n".join(printed))


def lines_of_error(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    assert main([str(argument) for argument in argv]) == 2
    return capsys.readouterr().err.splitlines()


# --- reward ---


def test_reward_says_what_it_found_and_where_it_is(workplace: Workplace) -> None:
    assert "2-fold cross-validation of 12 pairs" in workplace.printed
    assert "8 held-out pairs:" in workplace.printed
    assert f"Saved to {workplace.reward}" in workplace.printed
    files = {file.name for file in workplace.reward.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files
    assert {"training_curve.png", "reliability.png"} <= files


def test_reward_takes_options_from_yaml_and_from_the_command_line(workplace: Workplace) -> None:
    adapter = json.loads((workplace.reward / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["task_type"]) == (2, 2, None)
    card = (workplace.reward / "README.md").read_text()
    assert "epochs: 2" in card
    assert "peak learning rate: 0.001" in card
    assert "8 held-out pairs" in card
    assert "Cross-validated" in card


def test_reward_goes_on_from_an_adapter_without_cross_validating(workplace: Workplace, tmp_path, capsys) -> None:
    argv = ["reward", "--model", str(workplace.reward), "--dataset", workplace.pairs, "--output_dir", str(tmp_path)]
    assert main([*argv, "--max_steps", "1", "--no_plots", "--disable_tqdm", "True", "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert "No cross-validation: the model has an adapter already" in printed
    assert not list(tmp_path.glob("*.png"))


def test_reward_lora_options(workplace: Workplace) -> None:
    argv = ["--model", "m", "--dataset", "d"]
    model = PreferenceScorer.from_pretrained(workplace.model).model
    _, extra, config = parse(argv)
    assert extra.peft_config(model) is None
    assert config.output_dir == "reward-adapter"
    _, extra, _ = parse([*argv, "--lora_alpha", "3", "--lora_target_modules", "q_proj", "v_proj"])
    lora = extra.peft_config(model)
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (8, 3, {"q_proj", "v_proj"})


def test_reward_bad_inputs(workplace: Workplace, tmp_path, capsys) -> None:
    def error(*argv: object) -> str:
        lines = lines_of_error(capsys, "reward", *argv)
        assert len(lines) == 1, lines
        assert lines[0].startswith("bt-hf reward: error: ")
        return lines[0]

    (tmp_path / "bad.yaml").write_text("modell: typo\n")
    both = ["--model", workplace.model, "--dataset", workplace.pairs]
    assert "required: --model, --dataset" in error()
    assert "--modell" in error("--config", tmp_path / "bad.yaml", *both)
    assert "nowhere.yaml" in error("--config", tmp_path / "nowhere.yaml")
    assert "expected one argument" in error(*both, "--config")
    assert "label_smoothing" in error(*both, "--label_smoothing", "3")
    assert "at least 2 folds" in error(*both, "--cross_validate", "1")
    assert "nowhere" in error("--model", workplace.model, "--dataset", tmp_path / "nowhere")
    assert "overwrite_output_dir" in error(*both, "--output_dir", workplace.reward)


# --- score ---


def test_score_prints_what_the_scorer_says(workplace: Workplace, capsys) -> None:
    argv = ["score", str(workplace.reward), "--prompt", PROMPT, str(workplace.images)]
    assert main([*argv, "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths = find_images([str(workplace.images)])
    ranking = PreferenceScorer.from_pretrained(workplace.reward).rank(PROMPT, paths)
    assert [row["image"] for row in rows] == [str(paths[index]) for index, _ in ranking]
    assert [row["reward"] for row in rows] == pytest.approx([reward for _, reward in ranking])
    assert {row["prompt"] for row in rows} == {PROMPT}

    assert main([*argv, "--top_k", "1", "--batch_size", "1"]) == 0
    header, best = capsys.readouterr().out.splitlines()
    assert header.split() == ["rank", "reward", "image"]
    assert best.split(maxsplit=2)[::2] == ["1", rows[0]["image"]]


def test_score_compares_two_images(workplace: Workplace, capsys) -> None:
    first, second = workplace.images / "red.png", workplace.images / "deeper" / "BLUE.JPG"
    argv = ["score", workplace.reward, first, "--prompt", PROMPT, second, "--compare"]
    assert main([str(argument) for argument in argv]) == 0
    expected = PreferenceScorer.from_pretrained(workplace.reward).compare(PROMPT, first, second)
    printed = capsys.readouterr().out
    assert float(printed.split()[0]) == pytest.approx(expected, abs=1e-3)
    assert f"{first} is preferred to {second}" in printed
    assert main([*map(str, argv), "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["probability"] == pytest.approx(expected)


def test_score_takes_another_base_and_plain_models(workplace: Workplace, capsys) -> None:
    argv = ["--prompt", PROMPT, str(workplace.images / "red.png")]
    assert main(["score", str(workplace.reward), *argv, "--base_model", workplace.model]) == 0
    assert main(["score", workplace.model, *argv]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_find_images(workplace: Workplace, tmp_path) -> None:
    red, blue = workplace.images / "red.png", workplace.images / "deeper" / "BLUE.JPG"
    assert find_images([str(red), str(workplace.images)]) == [red, blue]
    with pytest.raises(FileNotFoundError, match="no images in the folder"):
        find_images([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="no such image file or folder"):
        find_images([str(tmp_path / "nowhere.png")])


def test_score_bad_inputs(workplace: Workplace, tmp_path, capsys) -> None:
    def error(*argv: object) -> str:
        lines = lines_of_error(capsys, "score", *argv)
        assert len(lines) == 1, lines
        assert lines[0].startswith("bt-hf score: error: ")
        return lines[0]

    red = workplace.images / "red.png"
    assert "--prompt" in error(workplace.reward, red)
    assert "nowhere.png" in error(workplace.reward, "nowhere.png", "--prompt", PROMPT)
    assert "exactly two images, but got 1" in error(workplace.reward, red, "--prompt", PROMPT, "--compare")
    assert "at least 1" in error(workplace.reward, red, "--prompt", PROMPT, "--top_k", "0")
    assert "exclude each other" in error(workplace.reward, red, red, "--prompt", PROMPT, "--compare", "--top_k", "1")
    assert "notes.txt" in error(workplace.model, workplace.images / "notes.txt", "--prompt", PROMPT)
    assert "nowhere" in error(tmp_path / "nowhere", red, "--prompt", PROMPT)


# --- both ---


def test_debug_shows_the_traceback(workplace: Workplace, capsys) -> None:
    lines = lines_of_error(capsys, "score", workplace.model, "nowhere.png", "--prompt", PROMPT, "--debug")
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "bt-hf score: error: no such image file or folder: 'nowhere.png'"


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (KeyError("lost"), "unexpected KeyError: 'lost' (run with --debug for the traceback)"),
        (TypeError("two\n  lines"), "unexpected TypeError: two lines (run with --debug for the traceback)"),
        (ValueError("bad value"), "bad value"),
    ],
)
def test_bugs_are_one_line_too(monkeypatch, capsys, raised: Exception, line: str) -> None:
    def fail(options: object) -> None:
        raise raised

    monkeypatch.setattr("bt_hf.cli.score.run", fail)
    assert lines_of_error(capsys, "score", "m", "i.png", "--prompt", "p") == [f"bt-hf score: error: {line}"]


def test_interrupts_end_quietly(monkeypatch, capsys) -> None:
    def stop(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bt_hf.cli.score.run", stop)
    assert main(["score", "m", "i.png", "--prompt", "p"]) == 130
    assert capsys.readouterr().err == "bt-hf score: interrupted\n"


def test_help_teaches(capsys) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"\n  bt-hf {name} " in capsys.readouterr().out
    assert main(["reward", "--help_all"]) == 0
    assert "--dataloader_num_workers" in capsys.readouterr().out
    assert main(["reward", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--dataloader_num_workers" not in text
    assert all(option in text for option in ("--model", "--cross_validate", "--lora_r", "--prior_weight", "--config"))


def test_version_and_unknown_commands(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bt-hf 0.")
    assert "invalid choice: 'tarin'" in lines_of_error(capsys, "tarin")[0]
    assert "COMMAND" in lines_of_error(capsys)[0]
