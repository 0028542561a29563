"""The metrics as `evaluate` loads them: from a folder, offline, in one go or in batches."""

from pathlib import Path

import pytest

from bt_hf import metrics
from bt_hf.evaluate_modules import path

evaluate = pytest.importorskip("evaluate")

MODULES = Path(metrics.__file__).parents[1] / "evaluate_modules"
MARGINS = [1.5, -0.25, 0.0, 3.0, -2.0]
PREFERENCES = [1.0, 1.0, 0.0, 0.5, 0.25]
KEYS = {
    "preference_accuracy": {"accuracy", "accuracy_low", "accuracy_high"},
    "preference_calibration": {"calibration_error"},
    "preference_log_loss": {"log_loss", "brier_score"},
}


def load(name, tmp_path):
    return evaluate.load(str(MODULES / name), cache_dir=str(tmp_path))


def test_every_module_is_tested():
    files = {path for path in MODULES.rglob("*.py") if path.parent != MODULES}
    assert files == {MODULES / name / f"{name}.py" for name in KEYS}


@pytest.mark.parametrize("name", sorted(KEYS))
def test_compute_agrees_with_the_library(name, tmp_path):
    result = load(name, tmp_path).compute(predictions=MARGINS, references=PREFERENCES)
    expected = metrics.preference_metrics(MARGINS, PREFERENCES)
    assert result == pytest.approx({key: expected[key] for key in KEYS[name]})


@pytest.mark.parametrize("name", sorted(KEYS))
def test_batches_give_the_same_result(name, tmp_path):
    at_once = load(name, tmp_path).compute(predictions=MARGINS, references=PREFERENCES)
    metric = load(name, tmp_path)
    metric.add_batch(predictions=MARGINS[:2], references=PREFERENCES[:2])
    metric.add_batch(predictions=MARGINS[2:4], references=PREFERENCES[2:4])
    metric.add(prediction=MARGINS[4], reference=PREFERENCES[4])
    assert metric.compute() == pytest.approx(at_once)


@pytest.mark.parametrize("name", sorted(KEYS))
def test_documented_call_works_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = evaluate.load(path(name), cache_dir=str(tmp_path))
    assert set(metric.compute(predictions=MARGINS, references=PREFERENCES)) == KEYS[name]
    with pytest.raises(ValueError, match="no metric 'accuracy': expected one of preference_accuracy, "):
        path("accuracy")


def test_accuracy_by_hand(tmp_path):
    """Right, wrong, half, left out, right: 2.5 of 4."""
    metric = load("preference_accuracy", tmp_path)
    assert metric.compute(predictions=MARGINS, references=PREFERENCES)["accuracy"] == 0.625


def test_weights(tmp_path):
    """The wrong pair weighs three times as much as the right one."""
    metric = load("preference_accuracy", tmp_path)
    result = metric.compute(predictions=[1.0, -1.0], references=[1.0, 1.0], sample_weight=[1.0, 3.0])
    assert result["accuracy"] == 0.25


def test_texts_are_filled_in(tmp_path):
    metric = load("preference_log_loss", tmp_path)
    assert "log-loss" in metric.description
    assert "predictions" in metric.inputs_description
    assert "`log_loss`, `brier_score`: float." in metric.inputs_description
    assert "Bradley" in metric.citation
