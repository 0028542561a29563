"""The embedded default: what its data promise, what its base can see, and that the demo runs."""

import ast
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def emoji_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "emoji"))


def test_rows_are_ordered_by_concept_then_style() -> None:
    # Pretraining reshapes the rows to (concepts, styles): another order would pair captions with other drawings.
    from emoji import STYLES, load_emoji

    for split, concepts in (("train", 1326), ("held_out", 234), (None, 1560)):
        emoji = load_emoji(split)
        assert list(emoji["style"]) == list(STYLES) * concepts
        names = list(emoji["concept"])
        assert names[:: len(STYLES)] == sorted(set(names))
        assert all(names[row] == names[row - row % len(STYLES)] for row in range(len(names)))


def test_splits_do_not_overlap() -> None:
    split = json.loads((EXAMPLES / "emoji" / "split.json").read_text())
    assert not set(split["train"]) & set(split["held_out"])


def test_a_simulated_person_has_the_taste() -> None:
    from emoji import load_emoji
    from taste import preference_pairs

    drawings = load_emoji("held_out")
    style_of = {
        np.asarray(image).tobytes(): style for image, style in zip(drawings["image"], drawings["style"], strict=True)
    }
    pairs = preference_pairs("mono", 20, split="held_out", seed=1)
    assert [style_of[np.asarray(image).tobytes()] for image in pairs["chosen"]] == ["mono"] * 20
    assert "mono" not in [style_of[np.asarray(image).tobytes()] for image in pairs["rejected"]]
    flipped = preference_pairs("mono", 100, split="held_out", flipped=0.2)
    wrong = sum(style_of[np.asarray(image).tobytes()] != "mono" for image in flipped["chosen"])
    assert 8 <= wrong <= 34  # Binomial(100, 0.2), 3 standard deviations and a half
    for row in preference_pairs("warm", 20, split="held_out"):
        warm, cold = (np.asarray(row[side], dtype=float) for side in ("chosen", "rejected"))
        heat = [(p[..., 0] - p[..., 2])[p.min(2) < 250].mean() for p in (warm, cold)]
        assert heat[0] - heat[1] > 20


def test_base_is_neutral_about_style_on_new_concepts_yet_sees_it() -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    from pretrain_clip import CLIP_FOLDER, EmojiCorpus, evaluate

    model = CLIPModel.from_pretrained(CLIP_FOLDER, dtype=torch.float32)
    figures = evaluate(model, CLIPProcessor.from_pretrained(CLIP_FOLDER), EmojiCorpus("held_out"))
    assert ((figures["bare"] > 0.4) & (figures["bare"] < 0.6)).all()
    assert (figures["named"] > 0.8).all()
    assert figures["recall@5"].mean() > 0.25


def test_assets_stay_small_and_hold_no_pickles() -> None:
    files = [path for path in (EXAMPLES / "emoji").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 45.1e6  # 45 MB of assets, and the scripts beside them
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pkl", ".pt", ".pth")]


def test_pipeline_of_the_emoji_domain_draws_in_the_style_that_is_named() -> None:
    import torch
    from diffusers import DiffusionPipeline

    from emoji import DIFFUSION_FOLDER
    from judge import JUDGE_FOLDER, Judge

    pipeline = DiffusionPipeline.from_pretrained(DIFFUSION_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f"{name}, mono" for name in ("red apple", "zebra", "house", "bell", "heart", "whale", "key", "star")]
    options = {"num_inference_steps": 12, "guidance_scale": 3.0, "height": 64, "width": 64}
    images = pipeline(prompts, generator=torch.Generator().manual_seed(0), **options).images
    styles = Judge.from_pretrained(JUDGE_FOLDER).eval().style_probabilities(images).argmax(1)
    assert (styles == 4).float().mean() > 0.7  # bare captions: about a fifth


@pytest.mark.parametrize("native", [True, False])
def test_drawing_is_in_bfloat16_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    import torch

    import emoji

    monkeypatch.setattr(emoji, "multiplies_bfloat16", lambda use_cpu: native)
    with emoji.fast_precision():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if native else torch.float32)


def test_no_example_computes_in_bfloat16_whatever_the_cpu() -> None:
    """Each context of mixed precision is told when it is on."""
    for script in EXAMPLES.rglob("*.py"):
        for call in ast.walk(ast.parse(script.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "autocast":
                assert "enabled" in {word.arg for word in call.keywords}, f"{script}, line {call.lineno}"


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    options = ["--taste", "mono", "--pairs", "8", "--prompts", "6", "--steps", "3", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *options])
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "cross-validation of 8 pairs" in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "accuracy_by_pairs.png",
        "before_after.png",
        "reliability.png",
        "training_curve.png",
    }
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert "pairs of the pipeline's own drawings" in printed
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "lora" / "before_after.png").is_file()
