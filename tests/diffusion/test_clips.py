"""Pairs of short clips: read, trained on, and drawn by unmodified diffusers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from bt_hf import load_preference_pairs
from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.images import to_frames
from bt_hf.diffusion.collator import DiffusionCollator
from code_examples import fenced_blocks
from tiny_models import red_pairs
from tiny_pipelines import SIZE, build, draw, save
from tiny_trainers import logged, make

FORMATS = {"WEBP": {"lossless": True}, "PNG": {}, "GIF": {}}


def clip(colour: tuple[int, int, int], frames: int = 5, format: str = "WEBP") -> bytes:
    """A clip in which a colour becomes brighter from frame to frame."""
    shown = [
        PILImage.new("RGB", SIZE, tuple(value * (index + 1) // frames for value in colour)) for index in range(frames)
    ]
    buffer = io.BytesIO()
    shown[0].save(buffer, format, save_all=True, append_images=shown[1:], duration=62, **FORMATS[format])
    return buffer.getvalue()


def clips(count: int = 4, frames: int = 5, format: str = "WEBP") -> Dataset:
    """Pairs of which the red clip is preferred to the blue one."""
    rows: dict[str, list[Any]] = {"prompt": [f"a thing {index}" for index in range(count)]}
    for name, colour in (("chosen", (230, 30, 30)), ("rejected", (30, 30, 230))):
        rows[name] = [
            {"bytes": clip((colour[0], colour[1] + 5 * index, colour[2]), frames, format), "path": None}
            for index in range(count)
        ]
    return Dataset.from_dict(rows).cast_column("chosen", Image()).cast_column("rejected", Image())


@pytest.mark.parametrize("format", FORMATS)
def test_collator_reads_the_first_frames(format: str) -> None:
    rows = [
        dict(row)
        for row in clips(2, 6, format).cast_column("chosen", Image(False)).cast_column("rejected", Image(False))
    ]
    pixels = DiffusionCollator(SIZE, frames=5)(rows)["pixels"]
    assert pixels.shape == (4, 5, *SIZE, 3)
    for index, frame in enumerate(pixels[0]):
        expected = [value * (index + 1) // 6 for value in (230, 30, 30)]
        assert (frame.float().mean((0, 1)) - torch.tensor(expected)).abs().max() < 3
    still = DiffusionCollator(SIZE)(rows)["pixels"]
    assert torch.equal(still, pixels[:, 0])


@pytest.mark.parametrize("cached", [True, False])
def test_lora_of_clips_learns_and_unmodified_diffusers_draws_with_it(cached: bool, tmp_path: Path) -> None:
    options = {"max_steps": 30, "learning_rate": 3e-3, "num_noise_samples": 1} if cached else {"learning_rate": 3e-2}
    trainer = make(tmp_path, "wan", clips(), num_frames=5, cache_latents=cached, **options)
    trainer.train()
    trainer.save_model()
    if cached:
        losses = logged(trainer, "loss")
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    loaded, own = build("wan"), build("wan")
    before = draw(loaded, num_frames=5)
    loaded.load_lora_weights(tmp_path / "out")
    on = draw(loaded, num_frames=5)
    assert on.shape == (5, 3, *SIZE)
    assert (on - before).abs().max() > 0.02
    own.transformer = trainer.pipeline.transformer
    torch.testing.assert_close(draw(own, num_frames=5), on, atol=1e-5, rtol=0)


def test_frames_matter(tmp_path: Path) -> None:
    """Clips that begin alike are told apart; as images they would be the same."""
    first = {"bytes": clip((200, 30, 30), 5), "path": None}
    colours = [(40, 6, 6), *((6, 6, 40 * index) for index in range(2, 6))]
    frames = [PILImage.new("RGB", SIZE, colour) for colour in colours]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=62, lossless=True)
    second = {"bytes": buffer.getvalue(), "path": None}
    rows = {"prompt": ["a thing"] * 2, "chosen": [first, first], "rejected": [second, second]}
    pairs = Dataset.from_dict(rows).cast_column("chosen", Image()).cast_column("rejected", Image())
    pairs = load_preference_pairs(pairs)
    trainer = make(tmp_path, "wan", pairs, num_frames=5, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["latents"].shape == (4, 8, 8, 8)
    latents = batch["latents"].unflatten(1, (4, 2))
    torch.testing.assert_close(latents[0, :, 0], latents[2, :, 0])  # the VAE is causal
    assert not torch.allclose(latents[0, :, 1], latents[2, :, 1], atol=0.05)
    same = Dataset.from_dict({**rows, "rejected": [first, first]})
    same = same.cast_column("chosen", Image()).cast_column("rejected", Image())
    with pytest.raises(PreferenceDataError, match="identical images"):
        load_preference_pairs(same)


def test_a_folder_of_clips(tmp_path: Path) -> None:
    lines = ["prompt,chosen,rejected"]
    for index in range(2):
        (tmp_path / f"{index}a.webp").write_bytes(clip((200 + index, 0, 0)))
        (tmp_path / f"{index}b.webp").write_bytes(clip((0, 0, 200 + index)))
        lines.append(f"a thing {index},{index}a.webp,{index}b.webp")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    pairs = load_preference_pairs(tmp_path)
    make(tmp_path / "run", "wan", pairs, num_frames=5, max_steps=1).train()


@pytest.mark.parametrize("frames", [1, 5])
def test_validation_and_card(frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(tmp_path / "base", "wan")
    options = {"validation_prompts": ["a red apple"], "validation_images": 2, "validation_inference_steps": 1}
    trainer = make(tmp_path, base, clips(2), num_frames=frames, max_steps=1, learning_rate=3e-2, **options)
    trainer.train()
    trainer.save_model()
    assert [image.size for image in trainer.validation.after[0]] == [SIZE[::-1]] * 2
    assert trainer.validation.before[0][0].tobytes() != trainer.validation.after[0][0].tobytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    assert f"- frames of a clip: {frames}\n" in card
    monkeypatch.chdir(tmp_path)
    blocks = list(fenced_blocks(card, "python"))
    assert len(blocks) == 2
    for block in blocks:
        code = block.code.replace("path/to/base", base)
        code = code.replace('pipe("a red apple", ', 'pipe("a red apple", height=32, width=32, num_inference_steps=1, ')
        exec(code, {})
    end = "png" if frames == 1 else "webp"
    drawn = [to_frames(tmp_path / f"{name}.{end}") for name in ("with", "half", "without")]
    assert [len(one) for one in drawn] == [frames] * 3
    assert not np.array_equal(np.asarray(drawn[0][0]), np.asarray(drawn[2][0]))


@pytest.mark.parametrize("cached", [True, False])
def test_clips_that_are_too_short_are_named(cached: bool, tmp_path: Path) -> None:
    for pairs, frames in ((clips(2, 4), 4), (red_pairs(2), 1)):
        with pytest.raises(ValueError, match=rf"`chosen` of row \d: clip too short: {frames} frames?, and 5 are"):
            make(tmp_path, "wan", pairs, num_frames=5, cache_latents=cached).train()


def test_other_pipelines_and_lengths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_frames=5` is for a pipeline that draws videos"):
        make(tmp_path, "sd", clips(2), num_frames=5)
    with pytest.raises(ValueError, match="got 6: take 5"):
        make(tmp_path, "wan", clips(2), num_frames=6)
    with pytest.raises(ValueError, match="`num_frames` should be a positive number"):
        make(tmp_path, "wan", clips(2), num_frames=0)


def test_images_and_clips_share_no_file_of_the_cache(tmp_path: Path) -> None:
    one = make(tmp_path, "wan", clips(2), num_frames=1, max_steps=1)
    five = make(tmp_path, "wan", clips(2), num_frames=5, max_steps=1)
    shapes = [next(iter(trainer.get_train_dataloader()))["latents"].shape for trainer in (one, five)]
    assert shapes == [(4, 4, 8, 8), (4, 8, 8, 8)]
