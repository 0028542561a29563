"""The default LoRA of each family, and constants written as linear maps."""

import pytest
import torch
from peft import IA3Config
from torch import nn

from bt_hf.reward.collator import PreferenceCollator
from bt_hf.reward.lora import add_adapter, constant_direction, default_target_modules
from bt_hf.training.lora_options import LoraOptions
from tiny_models import FAMILIES, build, red_pairs

LAST_LAYERS = {
    "clip": ("text_projection", "visual_projection"),
    "siglip": ("text_model.head", "vision_model.head.mlp.fc2"),
    "siglip2": ("text_model.head", "vision_model.head.mlp.fc2"),
    "metaclip_2": ("text_projection", "visual_projection"),
    "altclip": ("text_projection", "visual_projection"),
    "chinese_clip": ("text_projection", "visual_projection"),
}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_adapts_the_last_layer_of_both_towers(family: str) -> None:
    model = add_adapter(build(family)[0], None)
    expected = {f"base_model.model.{layer}.lora_{ab}.default.weight" for layer in LAST_LAYERS[family] for ab in "AB"}
    assert trained(model) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_changes_nothing_and_those_layers_reach_the_embedding(family: str) -> None:
    base, processor = build(family)
    inputs = PreferenceCollator(processor)(list(red_pairs(2)))
    inputs = {name: value for name, value in inputs.items() if name not in ("preference", "weight")}
    with torch.no_grad():
        before = base(**inputs)
        model = add_adapter(base, None)
        fresh = model(**inputs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        moved = model(**inputs)
    for name in ("text_embeds", "image_embeds"):
        assert torch.equal(before[name], fresh[name])
        assert (moved[name] - before[name]).abs().amax(dim=1).min() > 1e-2


def test_rank_and_scale() -> None:
    config = add_adapter(build()[0], None, LoraOptions(lora_r=4)).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 4, 0.0)


def test_config_of_the_user_is_used() -> None:
    model = add_adapter(build()[0], IA3Config(target_modules=["visual_projection"], feedforward_modules=[]))
    assert trained(model) == {"base_model.model.visual_projection.ia3_l.default"}


def test_options() -> None:
    options = LoraOptions(lora_alpha=3, lora_dropout=0.5, lora_target_modules=["q_proj", "v_proj"])
    config = add_adapter(build()[0], None, options).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 3, 0.5)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_unknown_family() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_projection = nn.Linear(2, 2)  # but no visual one

    with pytest.raises(ValueError, match=r"no LoRA default for Odd: pass `peft_config=LoraConfig"):
        default_target_modules(Odd())


def test_constant_direction_is_exact_behind_a_layer_norm() -> None:
    """sum_j (x_j - beta_j) / gamma_j = 0 for what a layer norm puts out, so a_j = (1 / gamma_j) / sum(beta / gamma).

    That one is not the only one where inputs are few, so many are taken, and it is the only one.
    """
    norm = nn.LayerNorm(8).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        seen, unseen = norm(torch.randn(200, 8).double()), norm(3 * torch.randn(50, 8).double() + 1)
        expected = (1 / norm.weight) / (norm.bias / norm.weight).sum()
        direction = constant_direction(seen, ridge=1e-12)
    torch.testing.assert_close(direction, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(unseen @ direction, torch.ones(50).double(), atol=1e-5, rtol=0)


def test_constant_direction_with_the_default_ridge() -> None:
    norm = nn.LayerNorm(8)
    with torch.no_grad():
        norm.bias.normal_()
        features = norm(torch.randn(300, 8))
    torch.testing.assert_close(
        features.double() @ constant_direction(features), torch.ones(300).double(), atol=0.02, rtol=0
    )


def test_without_a_constant_direction_it_is_as_near_as_it_gets() -> None:
    """Rows x and -x: no vector gives 1 on both, and the best gives 0."""
    rows = torch.randn(20, 4)
    direction = constant_direction(torch.cat([rows, -rows]))
    torch.testing.assert_close(direction, torch.zeros(4).double(), atol=1e-6, rtol=0)
