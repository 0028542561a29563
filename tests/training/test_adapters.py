"""Adapters of every kind on a tiny base: off is the base to the bit and on is what PEFT loads, or a refusal."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from bt_hf.reward.collator import PreferenceCollator
from bt_hf.training.adapters import Untouched, check_names, put_on, take_over, train_in_float32, unwrapped
from tiny_models import build, red_pairs

LAYERS = ["text_projection", "visual_projection"]
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 7},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.4},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "rank pattern": {"rank_pattern": {"text_projection": 2}, "alpha_pattern": {"visual_projection": 9}},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["visual_projection"]},
    "tokens": {"trainable_token_indices": {"token_embedding": [1, 2]}},
    "parameters": {"target_modules": [], "target_parameters": ["text_projection.weight"]},
}
LOST = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, in steps": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "corda": {"init_lora_weights": "corda"},
    "all biases": {"bias": "all"},
    "biases": {"bias": "lora_only", "target_modules": ["q_proj"]},
}
# Options of kinds whose defaults are for larger layers.
TOLD: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "OFT": {"oft_block_size": 4},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["layer_norm1", "final_layer_norm"]},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "WAVEFT": {"n_frequency": 10},
    "ROAD": {"group_size": 4},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": LAYERS, **options})


def any_config(kind: str) -> Any:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(cls)}
    options = {"target_modules": LAYERS} if "target_modules" in names else {}
    if "r" in names and kind not in ("BOFT", "OFT", "ADALORA"):
        options["r"] = 4
    return cls(**{**options, **TOLD.get(kind, {})})


def embed(model: nn.Module, training: bool = False) -> torch.Tensor:
    """Embeddings of two pairs, (6, D)."""
    inputs = PreferenceCollator(build()[1])(list(red_pairs(2)))
    model.train(training)
    output = model(**{name: value for name, value in inputs.items() if name not in ("preference", "weight")})
    return torch.cat([output.text_embeds, output.image_embeds])


def moved(model: PeftModel) -> PeftModel:
    """The model, as if it had been trained: every trained weight is another."""
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn_like(value)
    return model


def assert_off_is_base_and_on_is_loaded(config: Any, folder: Path) -> None:
    base = build()[0]
    with torch.no_grad():
        expected = embed(base)
        model = put_on(base, config)
        for _ in ("fresh", "trained"):
            with model.disable_adapter():
                assert torch.equal(embed(model), expected)
            moved(model)
        on = embed(model)
        assert (on - expected).abs().max() > 1e-3
        model.save_pretrained(folder)
        torch.testing.assert_close(embed(PeftModel.from_pretrained(build()[0], folder)), on, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # PEFT of a bias of a LoRA
@pytest.mark.parametrize("name", LORAS)
def test_lora_off_is_the_base_and_on_is_what_peft_loads(name: str, tmp_path: Path) -> None:
    assert_off_is_base_and_on_is_loaded(lora(**LORAS[name]), tmp_path)


@pytest.mark.filterwarnings("ignore")  # PEFT warns of what some kinds do not support
@pytest.mark.parametrize("kind", [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_any_kind_is_switched_off_or_refused(kind: str, tmp_path: Path) -> None:
    base = build()[0]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    try:
        config = any_config(kind)
        put_on(base, config)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "\n" not in refused
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        assert base.state_dict().keys() == before.keys()
        return
    if kind in ("POLY", "TRAINABLE_TOKENS"):  # ask for further inputs, or for other layers
        return
    assert_off_is_base_and_on_is_loaded(config, tmp_path)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning")
@pytest.mark.parametrize("name", LOST)
def test_an_adapter_that_loses_the_base_is_refused_and_leaves_it_as_it_was(name: str) -> None:
    base = build()[0]
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(ValueError, match="init_lora_weights|bias|eigens") as error:
        put_on(base, lora(**LOST[name]))
    assert "\n" not in str(error.value)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(value.requires_grad for value in base.parameters())
    put_on(base, lora())  # and can be tried again


def test_a_prompt_cannot_be_switched_off() -> None:
    with pytest.raises(ValueError, match="PromptTuningConfig on CLIPModel"):
        put_on(build()[0], PromptTuningConfig(num_virtual_tokens=2))


def test_an_adapter_that_transformers_has_loaded() -> None:
    base = build()[0]
    base.add_adapter(lora())
    with pytest.raises(ValueError, match="has an adapter loaded already"):
        put_on(base, lora())


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(target_modules=["q_proj"], modules_to_save=["visual_projection", "text_projection"]),
        lora(trainable_token_indices={"token_embedding": [1, 2]}),
        lora(target_modules=[], target_parameters=["text_projection.weight"]),
        LNTuningConfig(target_modules=["layer_norm1"]),
        IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"]),
        BOFTConfig(target_modules=LAYERS, boft_block_size=4),
        OFTConfig(target_modules=LAYERS, oft_block_size=4),
        VBLoRAConfig(target_modules=LAYERS, vector_length=4, num_vectors=8),
        FourierFTConfig(target_modules=LAYERS, n_frequency=10),
        AdaLoraConfig(target_modules=LAYERS, init_r=4, target_r=2, total_step=10),
    ],
    ids=lambda config: config.peft_type.value,
)
@pytest.mark.filterwarnings("ignore")  # PEFT warns of what some kinds do not support
def test_restored_is_the_same_to_the_bit(config: Any) -> None:
    base = build()[0]
    names, before = [name for name, _ in base.named_modules()], {k: v.clone() for k, v in base.state_dict().items()}
    untouched = Untouched(base)
    with torch.no_grad():
        moved(put_on(base, config))
    assert untouched.restore() is base
    assert [name for name, _ in base.named_modules()] == names
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.requires_grad for value in base.parameters())


# --- Adapters that are there already ---


def saved(folder: Path, **options: Any) -> str:
    get_peft_model(build()[0], lora(**options)).save_pretrained(folder)
    return str(folder)


def test_loaded_for_use_alone_is_made_trainable(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(build()[0], saved(tmp_path))
    assert not any(value.requires_grad for value in model.parameters())
    take_over(model)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not model.active_peft_config.inference_mode


def test_adapters_that_would_be_saved_where_nobody_looks_are_refused(tmp_path: Path) -> None:
    other = PeftModel.from_pretrained(build()[0], saved(tmp_path), adapter_name="mine")
    with pytest.raises(ValueError, match=r"named 'mine'.*without `adapter_name`"):
        take_over(other)
    several = get_peft_model(build()[0], lora())
    several.add_adapter("second", lora())
    with pytest.raises(ValueError, match=r"several adapters \(default, second\)"):
        take_over(several)
    merged = get_peft_model(build()[0], lora(init_lora_weights=False))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        take_over(merged)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_an_adapter_on_a_changed_base_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="init_lora_weights='pissa'|bias='none'"):
        take_over(get_peft_model(build()[0], lora(**options)))


# --- Wrappers and names ---


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrappers_come_off(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    base = build()[0]
    names = set(base.state_dict())
    assert unwrapped(base) is base
    assert not caplog.text
    assert unwrapped(wrap(nn.DataParallel(base))) is base
    assert "torch_compile=True" in caplog.text
    base.vision_model = wrap(base.vision_model)
    base.text_model.encoder.layers[0] = wrap(base.text_model.encoder.layers[0])
    assert set(unwrapped(base).state_dict()) == names
    inside = get_peft_model(wrap(build()[0]), lora())
    assert not any("_orig_mod" in name or ".module." in name for name in unwrapped(inside).state_dict())
    check_names(inside)


def test_a_name_that_no_fresh_base_has_is_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    base = build()[0]
    base.visual_projection = Wrapper(base.visual_projection)
    with pytest.raises(ValueError, match=r"A fresh CLIPModel has no module 'visual_projection\.inner'"):
        put_on(base, lora(target_modules=["inner"]))
    with pytest.raises(ValueError, match="'visual_projection.inner'"):
        check_names(base)


# --- Precision ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_trained_is_float32(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = build()[0].to(dtype)
    train_in_float32(model)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert "half precision" in caplog.text
    caplog.clear()

    adapted = get_peft_model(build()[0].to(dtype), lora(), autocast_adapter_dtype=False)
    assert {value.dtype for value in adapted.parameters()} == {dtype}
    train_in_float32(adapted)
    assert {value.dtype for value in adapted.parameters() if value.requires_grad} == {torch.float32}
    assert {value.dtype for value in adapted.parameters() if not value.requires_grad} == {dtype}
    assert not caplog.text

    whole = get_peft_model(build()[0].to(dtype), lora(target_modules=["q_proj"], modules_to_save=["text_projection"]))
    train_in_float32(whole)
    assert "text_projection" in caplog.text
    assert "load the base in float32" in caplog.text
    caplog.clear()
    train_in_float32(build()[0])
    assert not caplog.text
