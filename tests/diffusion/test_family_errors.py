"""Refusal of pipelines and adapters that can't be trained, with messages that say why."""

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, get_peft_model

from bt_hf.diffusion.families.base import check_adapter, family_class, find_family
from tiny_pipelines import SIZE, build, make_flux, make_flux2, unet


def test_pipeline_of_another_kind_is_named() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    pipeline = DDPMPipeline(UNet2DModel(block_out_channels=(32, 32, 32, 32)), DDPMScheduler())
    with pytest.raises(TypeError, match="DDPMPipeline is not supported: .*StableDiffusionPipeline.*FluxPipeline"):
        find_family(pipeline)


def test_a_class_is_known_by_its_name_alone() -> None:
    found = family_class("StableDiffusionXLPipeline")
    assert found is not None
    assert (found.name, found.denoiser, found.beta) == ("stable-diffusion-xl", "unet", 5000.0)
    assert "conv1" in found.target_modules
    assert family_class("DDPMPipeline") is None


def test_subclass_of_a_supported_pipeline() -> None:
    pipeline = build("sd")
    pipeline.__class__ = type("MyPipeline", (type(pipeline),), {})
    assert find_family(pipeline).name == "stable-diffusion"


@pytest.mark.parametrize(("name", "left_out"), [("sd", "unet, vae"), ("sd3", "transformer"), ("sdxl", "text_encoder")])
def test_components_that_were_left_out_are_named(name: str, left_out: str) -> None:
    pipeline = build(name)
    pipeline.register_modules(**dict.fromkeys(left_out.split(", ")))
    with pytest.raises(ValueError, match=f"{type(pipeline).__name__} was loaded without {left_out}, .* whole"):
        find_family(pipeline)


def test_what_a_pipeline_draws_without_may_be_left_out() -> None:
    pipeline = build("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert find_family(pipeline).name == "stable-diffusion-3"


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [("sd", 9, "should take 4 channels"), ("flux", 96, "should take 16 channels")],
)
def test_inpainting_models_are_refused(name: str, channels: int, expected: str) -> None:
    pipeline = build(name)
    denoiser = pipeline.unet if name == "sd" else pipeline.transformer
    denoiser.register_to_config(in_channels=channels)
    with pytest.raises(ValueError, match=f"{expected}.*takes {channels}. Models for inpainting"):
        find_family(pipeline)


def test_models_distilled_with_their_guidance_are_refused() -> None:
    pipeline = build("sd")
    pipeline.unet.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(ValueError, match=r"distilled .* Train on the model that it was distilled from"):
        find_family(pipeline)


def test_models_distilled_to_few_steps_are_refused() -> None:
    pipeline = build(lambda: make_flux2(is_distilled=True))
    with pytest.raises(ValueError, match=r"few steps.* Train on .* FLUX\.2-klein-base-4B"):
        find_family(pipeline)
    schnell = build(lambda: make_flux(guidance_embeds=False))
    schnell.scheduler.register_to_config(use_dynamic_shifting=False, shift=1.0)
    with pytest.raises(ValueError, match=r"few steps.* Train on FLUX\.1-dev"):
        find_family(schnell)
    guided = build("qwen")
    guided.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"few steps.* Train on Qwen-Image"):
        find_family(guided)


@pytest.mark.parametrize("name", ["Tongyi-MAI/Z-Image-Turbo", "models/z_image_turbo"])
def test_z_image_turbo_is_known_by_its_name(name: str) -> None:
    turbo = build("z_image")
    turbo.register_to_config(_name_or_path=name)
    with pytest.raises(ValueError, match=r"few steps.* Train on Tongyi-MAI/Z-Image: the LoRA loads into both"):
        find_family(turbo)
    turbo.register_to_config(_name_or_path="Tongyi-MAI/Z-Image")
    assert find_family(turbo).name == "z-image"


@pytest.mark.parametrize("part", ["boundary_ratio", "transformer_2"])
def test_wan_with_two_transformers_is_refused(part: str) -> None:
    pipeline = build("wan")
    if part == "boundary_ratio":
        pipeline.register_to_config(boundary_ratio=0.875)
    else:
        pipeline.register_modules(transformer_2=build("wan").transformer)
    with pytest.raises(ValueError, match=r"A14B hands over .* train on Wan 2\.2 TI2V-5B or Wan 2\.1"):
        find_family(pipeline)


@pytest.mark.parametrize("name", ["FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "me/Wan2.1-T2V-14B-StepDistill"])
def test_distilled_wan_is_known_by_its_name(name: str) -> None:
    pipeline = build("wan")
    pipeline.register_to_config(_name_or_path=name)
    with pytest.raises(ValueError, match=r"few steps.* Train on the Wan that it comes from"):
        find_family(pipeline)


def test_unknown_prediction_type_is_named() -> None:
    pipeline = build("sd")
    pipeline.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="'flow_prediction'"):
        find_family(pipeline).schedule(SIZE)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (IA3Config(target_modules=["to_k"], feedforward_modules=[]), "expected a `LoraConfig`, but got IA3Config"),
        (LoraConfig(target_modules=["to_k"], modules_to_save=["conv_in"]), "`modules_to_save` asks for"),
        (LoraConfig(target_modules=["to_k"], bias="lora_only"), "`bias='lora_only'` trains biases"),
    ],
    ids=["ia3", "modules_to_save", "bias"],
)
def test_adapters_that_pipelines_cannot_load(config: Any, expected: str, tmp_path: Path) -> None:
    pipeline = build("sd")
    model = get_peft_model(unet(), config)
    with pytest.raises(ValueError, match=expected):
        find_family(pipeline).save_lora(model, tmp_path)
    with pytest.raises(ValueError, match=expected):
        check_adapter(config)
