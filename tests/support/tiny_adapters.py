"""Tiny dual encoders with an adapter, wherever it may sit."""

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from bt_hf.reward.collator import PreferenceCollator
from bt_hf.reward.lora import add_adapter
from tiny_models import build

# Where an adapter may sit, from the most that can be cached to nothing; the last says how many towers have a prefix.
PLACEMENTS = {
    "projections": (lambda: None, 2),
    "top vision layer": (lambda: LoraConfig(r=2, target_modules=r".*vision_model\..*layers?\.2\..*(q_proj|query)"), 2),
    "top text layer": (lambda: LoraConfig(r=2, target_modules=r".*text_model\..*layers?\.2\..*(q_proj|query|fc1)"), 2),
    "first vision layer": (lambda: LoraConfig(r=2, target_modules=r".*vision_model\..*layers?\.0\..*q_proj"), 1),
    "all layers": (lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj", "query", "value"]), 0),
    "patch embedding": (lambda: LoraConfig(r=2, target_modules=r".*vision_model.*patch_embedding"), 1),
}


def adapted(family: object = "clip", placement: str = "projections") -> tuple[PeftModel, PreferenceCollator]:
    """A model with an adapter that does something."""
    base, processor = build(family)
    torch.manual_seed(1)
    model = add_adapter(base, PLACEMENTS[placement][0]())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, PreferenceCollator(processor)
