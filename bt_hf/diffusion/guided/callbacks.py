"""Guard against reward hacking, and the sentence at the end of a guided training."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from bt_hf.diffusion.callbacks import Guard

_MEMORY = 10  # steps over which the mean distance forgets
_LITTLE = 0.5  # spreads of the base's rewards, up to which a gain may be chance
_FILE = "anchor.json"  # in each checkpoint


class AnchorGuard(Guard):
    """Stop when the mean distance from the base runs off: drawings may then please the reward and nobody else.

    Args:
        limit: Mean distance, over about ten steps, that counts, in nats for each value of the latents.
        gather: Gives the rows of all processes' tensors, so that all stop at the same step.
    """

    def __init__(self, limit: float, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.limit = limit
        self.gather = gather
        self._seen: list[torch.Tensor] = []
        self._sum = self._weight = 0.0

    def observe(self, anchors: torch.Tensor) -> None:
        """Take in the distances (B,) of a batch."""
        self._seen.append(anchors.detach())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._seen:
            return
        found = self.gather(torch.cat(self._seen).mean()[None]).mean().item()
        self._seen.clear()
        keep = 1 - 1 / _MEMORY
        self._sum, self._weight = keep * self._sum + found, keep * self._weight + 1
        if self._sum / self._weight > self.limit and not self.stopped:
            self.stopped = control.should_training_stop = True
            self.say(
                f"Step {state.global_step}: the distance from the base is {self._sum / self._weight:.3g}, above "
                f"`max_anchor={self.limit:g}`, where a reward is often hacked: stopped. Raise `anchor_weight` or "
                "lower `learning_rate`."
            )

    def save(self, checkpoint: Path) -> None:
        (checkpoint / _FILE).write_text(json.dumps([self._sum, self._weight, self.said]), encoding="utf-8")

    def load(self, checkpoint: str | Path) -> None:
        file = Path(checkpoint) / _FILE
        if file.is_file():
            self._sum, self._weight, self.said = json.loads(file.read_text(encoding="utf-8"))


def summarise(history: Sequence[Mapping[str, float]], steps: int) -> str | None:
    """Return the sentence; `None` if the log has no rewards.

    Args:
        history: Entries of the log, with `step`: `reward_base` and `reward_spread`, then `reward` and `anchor`.
        steps: Steps of the training.

    Example:
        >>> base = {"step": 0, "reward_base": 1.0, "reward_spread": 0.5}
        >>> summarise([base, {"step": 90, "reward": 2.0, "anchor": 0.01}], 90)
        'Reward 1 -> 2 (+2.0 spreads of the base), at a distance of 0.01 from the base.'
        >>> summarise([base, {"step": 90, "reward": 0.9, "anchor": 0.01}], 90).partition("; ")[2]
        'it has learnt little: more steps or a smaller `anchor_weight` may help.'
    """
    base = next((entry for entry in history if "reward_base" in entry), None)
    found = [entry for entry in history if "reward" in entry]
    if base is None or not found:
        return None
    recent = [entry for entry in found if entry["step"] > 0.8 * steps] or found[-1:]
    reward, anchor = (float(np.mean([entry[name] for entry in recent])) for name in ("reward", "anchor"))
    gain = (reward - base["reward_base"]) / base["reward_spread"]
    advice = "" if gain > _LITTLE else "; it has learnt little: more steps or a smaller `anchor_weight` may help"
    return (
        f"Reward {base['reward_base']:.3g} -> {reward:.3g} ({gain:+.1f} spreads of the base), at a distance of "
        f"{anchor:.2g} from the base{advice}."
    )
