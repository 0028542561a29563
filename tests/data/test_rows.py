"""Wherever an image is opened, an error names its row and its column, and only `to_rgb` opens it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, Value

import tiny_models
import tiny_trainers
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer, cross_validate
from bt_hf.data.checks import overlapping_rows
from bt_hf.data.rows import as_stored
from tiny_images import png

FEATURES = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
EPS = png("red", (40, 40), "EPS")
BAD = {
    "none": None,
    "broken": {"bytes": b"broken", "path": None},
    "cut": {"bytes": png("red", (40, 40))[:60], "path": None},
    "gone": {"bytes": None, "path": "gone.png"},
    "address": {"bytes": None, "path": "http://127.0.0.1:1/a.png"},
    "chain": {"bytes": None, "path": "zip://a.png::http://127.0.0.1:1/a.zip"},
    "format": {"bytes": EPS, "path": None},
    "narrow": {"bytes": png("red", (1, 4000)), "path": None},
    "device": {"bytes": None, "path": "/dev/zero"},
}
SMALL: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "max_steps": 8,
}


def rows(bad: Any, count: int = 8, first: int = 0) -> Dataset:
    good = [{"bytes": png((10 * (first + n), 0, 200), (40, 40)), "path": None} for n in range(2 * count)]
    columns = {"prompt": tiny_models.prompts(count), "chosen": good[:count], "rejected": good[count:]}
    columns["rejected"][3] = bad
    return Dataset.from_dict(columns, features=FEATURES)


def train_reward(folder: Path, data: Dataset, **options: Any) -> None:
    model, processor = tiny_models.build()
    args = BradleyTerryConfig(str(folder / "out"), per_device_train_batch_size=2, **SMALL, **options)
    BradleyTerryTrainer(model, args, train_dataset=data, processing_class=processor).train()


def evaluate_reward(folder: Path, data: Dataset) -> None:
    model, processor = tiny_models.build()
    args = BradleyTerryConfig(str(folder / "out"), cache_features=False, **SMALL)
    BradleyTerryTrainer(model, args, train_dataset=data.select([0]), processing_class=processor).evaluate(data)


def cross_validated(folder: Path, data: Dataset, **options: Any) -> None:
    model, processor = tiny_models.build()
    args = BradleyTerryConfig(str(folder / "out"), **SMALL, **options)
    cross_validate(model, data, args, folds=2, processing_class=processor, progress=False)


ENTRANCES: dict[str, Callable[[Path, Dataset], Any]] = {
    "reward": lambda folder, data: train_reward(folder, data, cache_features=True),
    "reward, cached in files": lambda folder, data: train_reward(folder, data, cache_dir=str(folder / "cache")),
    "reward, no cache": lambda folder, data: train_reward(folder, data, cache_features=False),
    "evaluation": evaluate_reward,
    "cross-validation": cross_validated,
    "cross-validation, no cache": lambda folder, data: cross_validated(folder, data, cache_features=False),
    "overlap": lambda folder, data: overlapping_rows(data, data),
    "LoRA": lambda folder, data: tiny_trainers.make(folder, pairs=data).train(),
    "LoRA, no cache": lambda folder, data: tiny_trainers.make(folder, pairs=data, cache_latents=False).train(),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_row_and_a_column_are_named(entrance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a connection was tried"))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    # Each bad image at the entrances that open rows one by one; the others share their code.
    for name in BAD if entrance in ("overlap", "reward") else ("none", "chain"):
        with pytest.raises(ValueError, match=r"^`rejected` of row 3: (un|image)") as caught:
            ENTRANCES[entrance](tmp_path, rows(BAD[name]))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_scorers_name_the_image() -> None:
    model, processor = tiny_models.build()
    scorer = PreferenceScorer(model, processor)
    good = png("red", (40, 40))
    with pytest.raises(ValueError, match=r"^image 2: unreadable image"):
        scorer.score("a", [good, good, b"broken"])
    with pytest.raises(ValueError, match=r"^image 1: image at an address"):
        scorer.embed_images([good, "http://127.0.0.1:1/a.png"], batch_size=1)


def test_further_columns_stay_behind() -> None:
    features = FEATURES | {"mask": Image(), "note": Value("string")}
    columns = rows(None).with_format("arrow")[:].select(["prompt", "chosen", "rejected"]).to_pydict()
    data = Dataset.from_dict(columns | {"mask": [BAD["broken"]] * 8, "note": ["x"] * 8}, features=Features(features))
    stored = as_stored(data.with_format("torch"))
    assert len(stored) == 8
    assert stored[2].keys() == stored.__getitems__([2])[0].keys() == {"prompt", "chosen", "rejected", "_bt_hf_row"}
    assert [row["_bt_hf_row"] for row in stored] == list(range(8))


def test_a_transform_of_the_user_is_kept() -> None:
    data = rows({"bytes": png("red"), "path": None}).with_transform(
        lambda batch: {"prompt": [p.upper() for p in batch["prompt"]]}
    )
    assert as_stored(data)[0]["prompt"] == tiny_models.prompts(8)[0].upper()
