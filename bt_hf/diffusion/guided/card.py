"""Model card of a LoRA that was guided by a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_hf.diffusion.card import LoRAFacts, lora_metadata, pipeline_facts
from bt_hf.diffusion.guided.callbacks import summarise
from bt_hf.diffusion.guided.config import RewardLoRAConfig
from bt_hf.hub.cards import write_card
from bt_hf.hub.facts import Option, schedule_options


@dataclass(frozen=True, kw_only=True)
class GuidedFacts(LoRAFacts):
    """Facts of a guided training, for the template `reward_lora.md`.

    Attributes:
        reward: Name of the reward's class or function.
        result: Sentence on rewards and distance; `None` before training.
    """

    reward: str
    result: str | None


def guided_facts(trainer: Any, args: RewardLoRAConfig, warnings: Sequence[str]) -> GuidedFacts:
    """Read the facts of a `RewardLoRATrainer` as it stands."""
    reward = trainer.reward
    name = getattr(reward, "__name__", type(reward).__name__)
    options: dict[str, Option] = {
        "reward": name,
        "size of the images": f"{trainer.size[1]} x {trainer.size[0]}",
        "denoising steps of a drawing": args.num_inference_steps,
        "guidance of a drawing": trainer.sampler.scale,
        "denoising steps with a gradient": args.gradient_steps,
        "noise samples of the last step": args.renoisings if args.renoisings > 1 else None,
        "weight of the distance from the base": args.anchor_weight,
        "limit of the reward, in spreads": args.reward_clip,
        **schedule_options(trainer, "prompts"),
    }
    return GuidedFacts.from_trainer(
        trainer,
        base=trainer.base_name,
        options=options,
        metrics=("reward",),
        libraries=("torch", "diffusers", "transformers", "peft", "datasets"),
        rows="prompts",
        warnings=warnings,
        loss="reward",
        beta=None,
        reward=name,
        result=summarise(trainer.state.log_history, trainer.state.global_step),
        **pipeline_facts(trainer, trainer.family, args),
    )


def write_guided_card(folder: Path, facts: GuidedFacts) -> None:
    """Write `README.md` into `folder`; it shows `before_after.png` and `training_curve.png` if they are there."""
    write_card(folder, "reward_lora.md", facts, lora_metadata(facts))
