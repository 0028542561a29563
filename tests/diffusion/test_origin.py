"""Where a pipeline comes from: each thing that is not a pipeline folder has one line with the way out."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from bt_hf.diffusion.families.base import find_family
from bt_hf.diffusion.loading import load_family
from bt_hf.diffusion.origin import from_pretrained, known_name
from tiny_pipelines import build, clip_text, draw, save


def adapter_folder(folder: Path, base: str, name: str = "sd") -> str:
    """A published preference LoRA of a tiny pipeline, which says that its base is at `base`."""
    family = find_family(build(name))
    model = get_peft_model(family.module, LoraConfig(r=2, target_modules=["to_q"]))
    model.active_peft_config.base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    family.save_lora(model, folder)
    return str(folder)


def refused(name: str) -> str:
    with pytest.raises((OSError, ValueError)) as error:
        load_family(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nothing_there(tmp_path: Path) -> None:
    assert "No pipeline can be loaded from" in refused(str(tmp_path / "nowhere"))
    assert "No pipeline can be loaded from" in refused("nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "No pipeline can be loaded from" in refused(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "https://huggingface.co/a/b/blob/main/model.safetensors", "m.ckpt"]
)
def test_a_single_file(name: str) -> None:
    assert "single file: load it with diffusers (`StableDiffusionPipeline.from_single_file(...)`" in refused(name)


def test_lora_weights_alone(tmp_path: Path) -> None:
    adapter_folder(tmp_path, "somewhere")
    for file in tmp_path.glob("adapter*"):
        file.unlink()
    message = refused(str(tmp_path))
    assert "holds LoRA weights without a pipeline" in message
    assert "fuse_lora()" in message


def test_a_part_of_a_pipeline(tmp_path: Path) -> None:
    save(tmp_path)
    assert "holds weights without a pipeline" in refused(str(tmp_path / "unet"))


def test_a_base_that_has_moved(tmp_path: Path) -> None:
    message = refused(adapter_folder(tmp_path, str(tmp_path / "old place")))
    assert "The base" in message
    assert "if it has moved, load its pipeline from where it is" in message
    assert "is_trainable=True" in message


def test_a_lora_of_another_family(tmp_path: Path) -> None:
    message = refused(adapter_folder(tmp_path / "lora", save(tmp_path / "base", "sd"), "sd3"))
    assert "does not fit the unet" in message
    assert "another kind or size of model" in message


def test_a_lora_that_lacks_weights(tmp_path: Path) -> None:
    folder = Path(adapter_folder(tmp_path / "lora", save(tmp_path / "base", "sd")))
    save_file({}, folder / "adapter_model.safetensors")
    assert "is incomplete" in refused(str(folder))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_of_half_precision_alone(variant: str, tmp_path: Path) -> None:
    pipeline = build().to(torch.float16 if variant == "fp16" else torch.bfloat16)
    pipeline.save_pretrained(tmp_path, variant=variant)
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    loaded = from_pretrained(str(tmp_path))
    assert loaded.unet.dtype == loaded.text_encoder.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight.float())


# --- A loaded pipeline, and what it says of itself ---


def load(folder: Path, **kwargs: Any) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(str(folder), **{"dtype": torch.float32, **kwargs})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_untouched_pipeline_keeps_its_name(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = save(tmp_path)
    pipeline = load(tmp_path, dtype=dtype)
    assert known_name(pipeline) == name
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)  # draws otherwise, from the same weights
    assert known_name(pipeline.to(torch.float32)) == name
    pipeline.unet = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"]))
    assert known_name(pipeline) == name
    assert known_name(build()) is None  # made in code
    assert "any more" not in caplog.text


def fuse(pipeline: DiffusionPipeline, folder: Path) -> None:
    family = find_family(build())
    model = get_peft_model(family.module, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    family.save_lora(model, folder)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def exchange(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.unet = build(seed=1).unet


def exchange_vae(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.vae = build(seed=1).vae


def exchange_text_encoder(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.text_encoder = clip_text()


def edit(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.unet.conv_in.bias.data[0] += 1e-2


def add_token(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.load_textual_inversion({"<mine>": torch.ones(1, 16)})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (fuse, "unet"),
        (exchange, "unet"),
        (edit, "unet"),
        (exchange_vae, "vae"),
        (exchange_text_encoder, "text_encoder"),
        (add_token, "text_encoder"),
    ],
)
def test_a_changed_pipeline_is_not_named_as_its_base(
    change: Any, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = save(tmp_path / "base")
    pipeline = load(tmp_path / "base")
    change(pipeline, tmp_path / "lora")
    with caplog.at_level(logging.WARNING):
        family, base = load_family(pipeline)
    assert base is None
    assert f"The pipeline's {part} is not that of {name!r} any more" in caplog.text
    assert draw(family.pipeline).isfinite().all()
