"""Learning rate that finds itself: it rises while the margins of training pairs lag behind a plan, else it falls."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from bt_hf.diffusion.callbacks import Guard

# Mean margin of a training pair at the end, to which the plan rises with the root of the steps: fast at first. Chosen
# on training prompts of the emoji domain. With `beta="auto"` a margin means the same for every model.
TARGET = 10.0
LOOKS = 40  # in a training
AHEAD = 4  # looks for which a margin is taken to grow on as it did since the last; without, the rate swings
GAIN = 1.5  # at most, of the rate at a look
REACH = 10.0  # the rate stays within a tenth and ten times of the one it began with
_FILE = "rate.json"  # in each checkpoint
_STATE = ("highest", "_factor", "_mean", "_weight", "_last")


class MarginRate(Guard):
    """Steer the learning rate by the margins of the pairs that are trained on.

    A rate that suits one pipeline is ten times too large or too small for another, and so is one for few steps where
    there are many. The loss itself sees margins: at 0 nothing is learnt, and far above there is nothing left to learn,
    while the denoiser goes on drifting from its base. So at each of 40 looks the rate is multiplied by the root of
    plan over margin, between 2/3 and 3/2. The plan is 10 sqrt(step / steps), the margin a running mean, extrapolated
    by four looks.

    Args:
        gather: Gives the rows of all processes' tensors, so that all take the same steps.

    Attributes:
        highest: Highest factor of the rate so far.
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gather = gather
        self.highest = self._factor = 1.0
        self._mean = self._weight = 0.0  # sums of a running mean that forgets
        self._last = 0.0  # the mean at the last look
        self._seen: list[torch.Tensor] = []

    def observe(self, margins: torch.Tensor, preference: torch.Tensor, weight: torch.Tensor) -> None:
        """Take in the margins (B,) of a batch; ties say nothing."""
        sign = 2 * preference - 1
        weight = weight * sign.abs()
        self._seen.append(torch.stack([(margins.detach() * sign.sign() * weight).sum(), weight.sum()]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._seen:
            return
        between = max(1, round(state.max_steps / LOOKS))
        total, weight = self.gather(torch.stack(self._seen).sum(0)[None]).sum(0).tolist()
        self._seen.clear()
        keep = 1 - 1 / (2 * between)
        self._mean, self._weight = keep * self._mean + total, keep * self._weight + weight
        step = state.global_step
        if step % between or step <= args.get_warmup_steps(state.max_steps) or not self._weight:
            return
        plan, mean = TARGET * math.sqrt(step / state.max_steps), self._mean / self._weight
        margin, self._last = mean + AHEAD * (mean - self._last), mean
        change = math.sqrt(plan / margin) if margin > plan / GAIN**2 else GAIN
        factor = min(max(self._factor * max(change, 1 / GAIN), 1 / REACH), REACH)
        self._scale(kwargs["optimizer"], kwargs["lr_scheduler"], factor / self._factor)
        self._factor, self.highest = factor, max(self.highest, factor)

    @staticmethod
    def _scale(optimizer: Any, scheduler: Any, ratio: float) -> None:
        """Multiply the rate, and what the schedule computes it from, which is saved with it."""
        schedule = getattr(scheduler, "scheduler", scheduler)  # within that of accelerate
        schedule.base_lrs = [rate * ratio for rate in schedule.base_lrs]
        schedule._last_lr = [rate * ratio for rate in schedule._last_lr]
        for group in optimizer.param_groups:
            group["lr"] *= ratio

    def save(self, checkpoint: Path) -> None:
        values = {name: getattr(self, name) for name in _STATE}
        (checkpoint / _FILE).write_text(json.dumps(values), encoding="utf-8")

    def load(self, checkpoint: str | Path) -> None:
        file = Path(checkpoint) / _FILE
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            for name in _STATE:
                setattr(self, name, values[name])
