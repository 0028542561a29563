"""Rewards of images: their values and gradients, and their scale among the base's drawings."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_FILE = "reward.json"  # in each checkpoint


class Reward(Protocol):
    """Rewards that can be climbed, such as a `PreferenceScorer`."""

    def __call__(self, images: torch.Tensor, prompts: list[str], /) -> torch.Tensor:
        """Return rewards (B,) of images (B, 3, H, W) float32 in [0, 1], whose gradients reach the images."""


def check_reward(reward: Any) -> Reward:
    """Raise a `TypeError` unless a reward can be called."""
    if callable(reward):
        return reward
    known = ": load it with `PreferenceScorer.from_pretrained(...)`" if isinstance(reward, str | Path) else ""
    raise TypeError(
        "`reward` should be a `PreferenceScorer`, or a function of images (B, 3, H, W) in [0, 1] and their prompts "
        f"that returns rewards (B,), but got {type(reward).__name__}{known}."
    )


def values_and_gradients(
    reward: Reward, images: torch.Tensor, prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rewards (B,) and their gradients (B, 3, H, W), float32, both detached.

    Gradients of the images alone: those of the reward's own weights are not computed. Outside of any autocast, since
    in half precision the rewards of two similar images would be the same.

    Args:
        reward: The reward.
        images: (B, 3, H, W) in [0, 1].
        prompts: B prompts.

    Raises:
        FloatingPointError: A reward or a gradient is not finite; names the prompt.
        ValueError: The rewards are not a tensor (B,), or have no gradient.
    """
    leaf = images.detach().float().requires_grad_()
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        values = reward(leaf, list(prompts))
        if not isinstance(values, torch.Tensor) or values.shape != (len(images),):
            found = f"the shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(
                f"`reward` should return a tensor ({len(images)},), a reward for each image, but returned {found}."
            )
        if not values.requires_grad:
            raise ValueError(_without_gradient("has no gradient"))
        (gradients,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    if gradients is None:
        raise ValueError(_without_gradient("does not depend on the images"))
    values = values.detach().to(images.device, torch.float32)
    finite = values.isfinite() & gradients.flatten(1).isfinite().all(1)
    if not finite.all():
        index = int((~finite).nonzero()[0])
        what = "the reward" if not values[index].isfinite() else "the gradient of the reward"
        raise FloatingPointError(
            f"{what} is not finite for a drawing of {prompts[index]!r} (reward {values[index].item()}): look at the "
            "reward's numbers, such as a division by zero or half precision."
        )
    return values, gradients


def _without_gradient(what: str) -> str:
    return (
        f"`reward` {what}: compute it from the images by functions of torch alone, without `torch.no_grad()`, "
        "`detach()`, PIL or NumPy. A reward that can't be differentiated can rank drawings instead, see "
        "`generate_preference_pairs`."
    )


@dataclass(frozen=True)
class RewardScale:
    """Rewards of the base's drawings, by which those of the LoRA's are measured.

    Attributes:
        mean: Their mean.
        spread: Their standard deviation within a prompt.
    """

    mean: float
    spread: float

    @classmethod
    def of(cls, rewards: torch.Tensor) -> "RewardScale":
        """Return the scale of rewards (P, 2) of two drawings for each of P prompts.

        Raises:
            ValueError: The two are the same for every prompt.
        """
        rewards = rewards.double()
        spread = ((rewards[:, 0] - rewards[:, 1]).square().mean() / 2).sqrt().item()
        if not spread > torch.finfo(torch.float32).eps * rewards.abs().max().item():
            raise ValueError(
                f"`reward` is the same, {rewards.mean().item():.4g}, for different drawings of a prompt: it tells "
                "nothing about images, or has no slope where the base draws."
            )
        return cls(rewards.mean().item(), spread)

    def gain(self, rewards: torch.Tensor) -> torch.Tensor:
        """Return how many spreads rewards are above the mean."""
        return (rewards - self.mean) / self.spread

    def save(self, checkpoint: Path) -> None:
        (checkpoint / _FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: str | Path) -> "RewardScale | None":
        """Return the scale that a checkpoint holds, if it does."""
        file = Path(checkpoint) / _FILE
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
