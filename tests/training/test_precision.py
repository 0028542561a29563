"""bfloat16 by itself where a device has it, and never against what was asked for."""

from functools import partial
from pathlib import Path

import pytest
import torch

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceLoRAConfig, PreferenceLoRATrainer
from bt_hf.training.precision import multiplies_bfloat16
from tiny_models import build as build_clip
from tiny_models import red_pairs
from tiny_pipelines import SIZE
from tiny_pipelines import build as build_pipeline
from tiny_trainers import adapter, make


def has(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    monkeypatch.setattr("bt_hf.diffusion.pipeline_config.multiplies_bfloat16", lambda use_cpu: bfloat16)


def test_a_cpu_is_asked_for_what_the_kernel_lists() -> None:
    listed = Path("/proc/cpuinfo")
    if not listed.is_file() or not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("the system lists no flags of its CPU, or PyTorch tells none")
    flags = set(listed.read_text().split())
    assert multiplies_bfloat16(use_cpu=True) == bool(flags & {"amx_bf16", "avx512_bf16"})


@pytest.mark.parametrize(
    ("bfloat16", "given", "environment", "expected"),
    [
        (True, {}, {}, True),
        (False, {}, {}, False),
        (True, {"bf16": False}, {}, False),
        (False, {"bf16": True}, {}, True),
        (True, {}, {"ACCELERATE_MIXED_PRECISION": "no"}, True),
        (True, {}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, False),
    ],
)
def test_precision_is_chosen_only_where_none_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bfloat16: bool,
    given: dict[str, bool],
    environment: dict[str, str],
    expected: bool,
) -> None:
    has(monkeypatch, bfloat16)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert PreferenceLoRAConfig(str(tmp_path), report_to="none", **given).bf16 is expected


def test_a_lora_trained_in_bfloat16_by_itself_is_one_of_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    has(monkeypatch, True)
    caplog.set_level("INFO", logger="bt_hf")
    weights = {}
    for name, given in {"chosen": {}, "asked": {"bf16": True}, "float32": {"bf16": False}}.items():
        trainer = make(tmp_path / name, max_steps=2, **given)
        trainer.train()
        trainer.save_model()
        weights[name] = adapter(tmp_path / name / "out")
        card = (tmp_path / name / "out" / "README.md").read_text()
        assert ("mixed precision" in card and "bfloat16" in card) == (name != "float32")
    assert "Computing in bfloat16" in caplog.text
    assert all(value.dtype == torch.float32 for value in weights["chosen"].values())
    for name, value in weights["chosen"].items():
        assert torch.equal(value, weights["asked"][name])
    assert any(not torch.equal(value, weights["float32"][name]) for name, value in weights["chosen"].items())


@pytest.mark.parametrize("configs", ["reward first", "drawing first"])
@pytest.mark.parametrize("trainings", ["reward first", "drawing first"])
def test_trainings_of_two_precisions_follow_one_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configs: str, trainings: str
) -> None:
    """Both configs are made before either trainer, as a script with its options at the top does."""
    has(monkeypatch, True)
    options = {"report_to": "none", "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    kinds = {"reward": BradleyTerryConfig, "drawing": partial(PreferenceLoRAConfig, resolution=SIZE[0])}
    names = list(kinds) if configs == "reward first" else list(kinds)[::-1]
    args = {name: kinds[name](str(tmp_path / name), **options) for name in names}
    for name in list(kinds) if trainings == "reward first" else list(kinds)[::-1]:
        if name == "reward":
            model, processor = build_clip()
            trainer = BradleyTerryTrainer(model, args[name], red_pairs(4), processing_class=processor)
        else:
            trainer = PreferenceLoRATrainer(build_pipeline("sd"), args[name], train_dataset=red_pairs(4))
        assert trainer.accelerator.mixed_precision == ("no" if name == "reward" else "bf16")
        trainer.train()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("asked", ["the config", "the launcher", "nobody"])
def test_bfloat16_that_the_cpu_emulates_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, native: bool, asked: str
) -> None:
    monkeypatch.setattr("bt_hf.training.precision.multiplies_bfloat16", lambda use_cpu: native)
    if asked == "the launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model, processor = build_clip()
    args = BradleyTerryConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=asked == "the config")
    BradleyTerryTrainer(model, args, red_pairs(4), processing_class=processor)
    assert ("emulates bfloat16" in caplog.text) == (asked != "nobody" and not native)
