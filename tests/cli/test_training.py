"""The commands that train keep the adapter, whatever goes wrong after the training."""

import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_models
import tiny_pipelines
from bt_hf.cli import main
from bt_hf.cli.training import draw_plots
from bt_hf.training.trainer import PreferenceTrainer

FAST = {
    "reward": ["--cross_validate", "0", "--max_steps", "1"],
    "lora": ["--resolution", "32", "--max_steps", "1", "--warmup_steps", "0", "--num_eval_noise_samples", "1"],
}
both_commands = pytest.mark.parametrize("command", ["reward", "lora"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"reward": tiny_models.save(folder / "clip"), "lora": tiny_pipelines.save(folder / "pipeline")}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def train(command: str, model: str, folder: Path, *options: object) -> int:
    """Train on 4 pairs, for one step, and log its loss."""
    tiny_models.red_pairs(4).save_to_disk(folder / "pairs")
    argv = ["--model", model, "--dataset", folder / "pairs", "--output_dir", folder / "out", *FAST[command], *options]
    argv += ["--logging_steps", "1", "--disable_tqdm", "True", "--use_cpu", "--report_to", "none"]
    return main([command, *map(str, argv)])


@both_commands
def test_held_out_ties_alone(command: str, models: dict[str, str], tmp_path: Path, capsys) -> None:
    tiny_models.red_pairs(3, seed=1, preference=[0.5] * 3).save_to_disk(tmp_path / "ties")
    assert train(command, models[command], tmp_path, "--eval_dataset", tmp_path / "ties") == 0
    printed = capsys.readouterr().out
    assert "3 held-out pairs" in printed
    assert "all are ties" in printed
    assert "nan" not in printed.partition("Saved to")[2].partition("held-out pairs")[2]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "nan" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@both_commands
def test_without_matplotlib(
    command: str, models: dict[str, str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert train(command, models[command], tmp_path) == 0
    assert "No plots without Matplotlib: pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.png"))


@both_commands
@pytest.mark.parametrize("part", ["evaluate", "create_model_card"])
def test_adapter_survives_later_errors(
    command: str, part: str, models: dict[str, str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, *args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(f"bt_hf.training.trainer.PreferenceTrainer.{part}", fail)
    tiny_models.red_pairs(3, seed=1).save_to_disk(tmp_path / "held-out")
    assert train(command, models[command], tmp_path, "--eval_dataset", tmp_path / "held-out") == 2
    assert "out of memory" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@both_commands
def test_card_shows_the_held_out_pairs(command: str, models: dict[str, str], tmp_path: Path) -> None:
    tiny_models.red_pairs(3, seed=1).save_to_disk(tmp_path / "held-out")
    assert train(command, models[command], tmp_path, "--eval_dataset", tmp_path / "held-out") == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "3 held-out pairs" in card
    assert "training_curve.png" in card


def test_hub_gets_the_card_with_its_figures(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = []

    def push(self: PreferenceTrainer, *args: object, **kwargs: object) -> None:
        cards.append((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))

    monkeypatch.setattr(PreferenceTrainer, "init_hf_repo", lambda self, *args: None)
    monkeypatch.setattr(PreferenceTrainer, "push_to_hub", push)
    tiny_models.red_pairs(3, seed=1).save_to_disk(tmp_path / "held-out")
    options = ["--eval_dataset", tmp_path / "held-out", "--push_to_hub", "--save_strategy", "no"]
    assert train("reward", models["reward"], tmp_path, *options) == 0
    assert len(cards) == 1
    assert "3 held-out pairs" in cards[0]
    assert "training_curve.png" in cards[0]


@pytest.mark.parametrize(("count", "drawn"), [(39, []), (42, ["reliability.png"])])
def test_reliability_needs_pairs(count: int, drawn: list[str], tmp_path: Path, capsys) -> None:
    judged = {"margins": np.linspace(-1, 3, count), "preference": np.ones(count)}
    assert [path.name for path in draw_plots(tmp_path, [], judged)] == drawn
    assert ("39 pairs are too few" in capsys.readouterr().out) == (not drawn)
