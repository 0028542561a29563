"""Say what a training began with and whether it has learnt anything, against the base."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class AgainstBase(TrainerCallback):
    """Log figures of the base as step 0, and warn at the end of a training that has hardly left the base.

    Curves would otherwise begin after a warm start, which is most of what is learnt from few pairs, and a training
    accuracy of 1 may come from differences that nobody would see.

    Args:
        begin: Gives the figures of the base, by the names in the log.
        change: Gives how far the adapter is from the base, in the units of `least`, `None` where that is unknown.
        least: What counts as hardly.
        describe: Format of the change, with the words around it.
    """

    def __init__(
        self,
        begin: Callable[[], dict[str, float]],
        change: Callable[[], float | None],
        least: float,
        describe: str,
    ) -> None:
        self.begin, self.change, self.least, self.describe = begin, change, least, describe
        self.said: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step or not (figures := self.begin()):
            return
        if state.is_world_process_zero:
            state.log_history.append({**figures, "epoch": 0, "step": 0})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step:
            return
        change = self.change()
        if change is None or change >= self.least or not state.is_world_process_zero:
            return
        rate = getattr(args, "learning_rate", 0.0)
        self.said = (
            f"Hardly anything was learnt in {state.global_step} steps: {self.describe.format(change)} (below "
            f"{self.describe.format(self.least).rsplit(' ', 1)[-1]}), so accuracies say little. Raise `learning_rate` "
            f"(it is {rate:g}; ten times as much is usual for DoRA, LoHa and IA3), train for more steps, or take a "
            "plain LoRA with the default options."
        )
        logger.warning(self.said)
