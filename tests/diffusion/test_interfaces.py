"""The file for ComfyUI, A1111 and Forge, read by their rules and by unmodified diffusers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from bt_hf.diffusion.families.base import Family, find_family
from bt_hf.diffusion.families.sd import UNET_LAYERS
from bt_hf.diffusion.interfaces import find_interface_name, save_for_interfaces
from interfaces import (
    a1111_module,
    a1111_version,
    comfy_flux,
    comfy_key,
    comfy_load,
    comfy_qwen,
    comfy_sd3,
    comfy_unet,
    comfy_z_image,
)
from tiny_pipelines import build, draw

COMFY = {
    "sd3": comfy_sd3,
    **dict.fromkeys(("flux", "flux2", "flux2_dev"), comfy_flux),
    "qwen": comfy_qwen,
    "z_image": comfy_z_image,
}
UNETS = ["sd", "sd2", "sdxl"]
READ = [*UNETS, *COMFY]
VARIED = {"r": 2, "lora_alpha": 6, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 1, "to_k": 4}}
FILE = "my-taste_comfyui.safetensors"


def adapted(name: str, **options: Any) -> tuple[Any, Family, PeftModel]:
    """A pipeline, its family, and its denoiser with a LoRA of random weights."""
    pipeline = build(name)
    family = find_family(pipeline)
    config = LoraConfig(target_modules=family.target_modules, **{"init_lora_weights": False, **options})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return pipeline, family, get_peft_model(getattr(pipeline, family.denoiser), config)


def save(name: str, folder: Path, **options: Any) -> tuple[Any, Family, PeftModel]:
    pipeline, family, model = adapted(name, **options)
    save_for_interfaces(family, model, folder, "my taste", "me/base")
    return pipeline, family, model


def layers_of(model: PeftModel) -> list[str]:
    names = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names})


def at_scale(pipeline: Any, scale: float) -> torch.Tensor:
    """Draw with the LoRA that diffusers has loaded."""
    pipeline.set_adapters("taste", scale)
    return draw(pipeline)


@pytest.mark.parametrize("name", READ)
def test_drawings_are_the_same(name: str, tmp_path: Path) -> None:
    """At scales 0, 0.5 and 1: as PEFT draws, as diffusers does from the file, and as ComfyUI would by its rules."""
    drawn, family, model = save(name, tmp_path, **VARIED)
    file, layers = load_file(tmp_path / FILE), layers_of(model)
    base, comfy, diffusers = build(name), build(name), build(name)
    plain = draw(base)
    diffusers.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="taste")
    added, unknown = comfy_load(file, layers, family.denoiser)
    assert not unknown
    assert sorted(added) == layers
    for scale in (0.0, 0.5, 1.0):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
        expected = draw(drawn)
        assert torch.allclose(expected, plain, atol=0.02) == (scale == 0)
        torch.testing.assert_close(at_scale(diffusers, scale), expected, atol=2e-5, rtol=0)
        weights = {key: value.clone() for key, value in getattr(base, family.denoiser).state_dict().items()}
        for layer, value in added.items():
            weights[f"{layer}.weight"] += scale * value.reshape(weights[f"{layer}.weight"].shape)
        getattr(comfy, family.denoiser).load_state_dict(weights)
        torch.testing.assert_close(draw(comfy), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", COMFY)
def test_comfyui_has_a_place_for_every_layer_of_a_transformer(name: str) -> None:
    """And layers that share a weight there don't share its rows."""
    _, family, model = adapted(name)
    layers = layers_of(model)
    config = model.get_base_model().config
    hidden = config.dim if name == "z_image" else config.attention_head_dim * config.num_attention_heads
    places = COMFY[name](layers, hidden)
    assert sorted(places) == layers
    assert len(set(places.values())) == len(layers)
    for layer, (_, rows) in places.items():
        if rows is not None:
            assert rows[1] == model.get_base_model().get_submodule(layer).weight.shape[0]


SD1 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
}


@pytest.mark.parametrize(("config", "count"), [(SD1, 250), (SDXL, 767)], ids=["sd1", "sdxl"])
def test_comfyui_and_a1111_find_the_same_weights_of_the_real_unets(config: dict, count: int) -> None:
    # SD 1: 16 transformers of 12 layers, 22 residual blocks of 2, 14 shortcuts. SDXL: 70 blocks of 10 layers in 11
    # transformers with 2 more each, 17 residual blocks, 11 shortcuts.
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config, layers_per_block=2, attention_head_dim=8)
    ends = tuple(f".{name}" for name in UNET_LAYERS)
    layers = [name for name, _ in unet.named_modules() if name.endswith(ends)]
    places = comfy_unet(layers, layers_per_block=2)
    found = [a1111_module(comfy_key(layer, "unet")) for layer in layers]
    assert found == [places[layer][0].replace(".", "_") for layer in layers]
    assert len(set(found)) == len(layers) == count


def test_names_are_those_of_the_converter_of_diffusers_and_alpha_is_the_trained_one(tmp_path: Path) -> None:
    _, family, model = save("sdxl", tmp_path, r=2, lora_alpha=6)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    theirs = convert_state_dict_to_kohya(
        {name.replace("base_model.model.", "unet."): value for name, value in weights.items()}
    )
    ours = load_file(tmp_path / FILE)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], torch.tensor(6.0) if name.endswith(".alpha") else value)


def test_scale_of_a_rank_stabilised_lora(tmp_path: Path) -> None:
    """alpha / sqrt(rank): 6 / sqrt(4) = 3, which is an alpha of 12."""
    _, _, model = save("sd", tmp_path / "unet", r=4, lora_alpha=6, use_rslora=True)
    alphas = {value.item() for name, value in load_file(tmp_path / "unet" / FILE).items() if name.endswith("alpha")}
    assert alphas == {12.0}
    _, _, model = save("sd3", tmp_path / "transformer", r=4, lora_alpha=6, use_rslora=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, value in load_file(tmp_path / "transformer" / FILE).items():
        trained = weights[name.replace("transformer.", "base_model.model.", 1)]
        assert torch.equal(value, trained * (3 if ".lora_B." in name else 1))


@pytest.mark.parametrize(("name", "version"), [("sd", "SD1"), ("sd2", "SD2"), ("sdxl", "SDXL")])
def test_metadata(name: str, version: str, tmp_path: Path) -> None:
    if name == "sd2":  # a tiny SD2 is known by its width alone
        pipeline, family, model = adapted(name, r=4, lora_alpha=6)
        pipeline.unet.register_to_config(cross_attention_dim=1024)
        save_for_interfaces(family, model, tmp_path, "my taste", "me/base")
    else:
        save(name, tmp_path, r=4, lora_alpha=6)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    assert a1111_version(metadata) == version
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "6"
    assert metadata["ss_output_name"] == "my taste"
    assert metadata["ss_sd_model_name"] == "me/base"
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-")


def test_local_base_is_not_named_and_bytes_are_the_same(tmp_path: Path) -> None:
    _, family, model = adapted("sd", r=2)
    for folder in ("one", "two"):
        save_for_interfaces(family, model, tmp_path / folder, "my taste", "/home/someone/base")
    one, two = ((tmp_path / folder / FILE).read_bytes() for folder in ("one", "two"))
    assert one == two
    assert b"someone" not in one
    assert b"ss_sd_model_name" not in one


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("sd", {"use_dora": True}, "no DoRA or biases"),
        ("flux", {"lora_bias": True}, "no DoRA or biases"),
        ("sana", {}, "no LoRA for sana"),
    ],
)
def test_nothing_that_would_be_read_by_half(
    name: str, options: dict, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from bt_hf.diffusion import interfaces

    interfaces._log_once.cache_clear()
    _, family, model = adapted(name, **options)
    assert find_interface_name(family, model, "taste") is None
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            save_for_interfaces(family, model, tmp_path, "taste", None)
    assert not list(tmp_path.iterdir())
    assert [why in message for message in caplog.messages] == [True]
