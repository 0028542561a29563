"""Adapt text-image models to one person's taste from a handful of clicks.

The public names are imported when they are first used, so that `import bt_hf` is instant and a user of rewards
never imports diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "BradleyTerryConfig": "bt_hf.reward.config",
    "BradleyTerryTrainer": "bt_hf.reward.trainer",
    "ImageLibrary": "bt_hf.reward.library",
    "PreferenceLoRAConfig": "bt_hf.diffusion.config",
    "PreferenceLoRATrainer": "bt_hf.diffusion.trainer",
    "PreferenceScorer": "bt_hf.reward.scorer",
    "RewardLoRAConfig": "bt_hf.diffusion.guided.config",
    "RewardLoRATrainer": "bt_hf.diffusion.guided.trainer",
    "best_of_n": "bt_hf.diffusion.generation.generate",
    "bradley_terry_loss": "bt_hf.losses",
    "cross_validate": "bt_hf.reward.cross_validation",
    "generate_preference_pairs": "bt_hf.diffusion.generation.generate",
    "load_preference_pairs": "bt_hf.data.pairs",
    "pull_adapter": "bt_hf.hub.pull",
    "push_adapter": "bt_hf.hub.push",
    "select_pairs": "bt_hf.reward.asking",
}

__all__ = [
    "BradleyTerryConfig",
    "BradleyTerryTrainer",
    "ImageLibrary",
    "PreferenceLoRAConfig",
    "PreferenceLoRATrainer",
    "PreferenceScorer",
    "RewardLoRAConfig",
    "RewardLoRATrainer",
    "best_of_n",
    "bradley_terry_loss",
    "cross_validate",
    "generate_preference_pairs",
    "load_preference_pairs",
    "pull_adapter",
    "push_adapter",
    "select_pairs",
]

if TYPE_CHECKING:
    from bt_hf.data.pairs import load_preference_pairs
    from bt_hf.diffusion.config import PreferenceLoRAConfig
    from bt_hf.diffusion.generation.generate import best_of_n, generate_preference_pairs
    from bt_hf.diffusion.guided.config import RewardLoRAConfig
    from bt_hf.diffusion.guided.trainer import RewardLoRATrainer
    from bt_hf.diffusion.trainer import PreferenceLoRATrainer
    from bt_hf.hub.pull import pull_adapter
    from bt_hf.hub.push import push_adapter
    from bt_hf.losses import bradley_terry_loss
    from bt_hf.reward.asking import select_pairs
    from bt_hf.reward.config import BradleyTerryConfig
    from bt_hf.reward.cross_validation import cross_validate
    from bt_hf.reward.library import ImageLibrary
    from bt_hf.reward.scorer import PreferenceScorer
    from bt_hf.reward.trainer import BradleyTerryTrainer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'bt_hf' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        extra = importlib.import_module("bt_hf.cli.errors").name_extra(error)
        if extra is None:
            raise
        raise ImportError(f"{name}: {extra}", name=error.name) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
