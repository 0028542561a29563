"""Sum a training up in one sentence: whether it learnt, what it cost, and whether to go on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

CLEAR = 0.01  # change of an accuracy that counts
DRIFT = 0.02  # rise of the error of preferred images, as a share of the base's, up to which captions are mostly kept


class Summary(TrainerCallback):
    """Log a sentence at the end of a training.

    Args:
        summarise: Makes it from the log's entries and the number of steps; `None` where nothing was measured.

    Attributes:
        said: The sentence; `None` before the end, and where nothing was measured.
    """

    def __init__(self, summarise: Callable[[Sequence[Mapping[str, float]], int], str | None]) -> None:
        self.summarise = summarise
        self.said: str | None = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.said = self.summarise(state.log_history, state.global_step)
        if self.said is not None and state.is_world_process_zero:
            logger.info(self.said)


def summarise(history: Sequence[Mapping[str, float]], steps: int) -> str | None:
    """Return the sentence.

    Args:
        history: Entries of the log, with `step`; of held-out pairs `eval_accuracy` and `eval_accuracy_low`, else of
            training pairs `accuracy`; and `winner_error_base`, `winner_error_change` of the same.
        steps: Steps of the training.

    Returns:
        The sentence; `None` if the log has no accuracies.

    Example:
        >>> held_out = {"eval_accuracy_low": 0.7, "eval_winner_error_base": 0.5, "eval_winner_error_change": -0.01}
        >>> history = [{"step": 80, "eval_accuracy": 0.79}, {"step": 100, "eval_accuracy": 0.81, **held_out}]
        >>> for part in summarise(history, 100).split(", "):
        ...     print(part)
        Held-out preference 0.81
        +0.02 in the last fifth
        preferred images denoised 2.0 % better than by the base: more steps would help.
    """
    prefix = "eval_" if any("eval_accuracy" in entry for entry in history) else ""
    found = [entry for entry in history if f"{prefix}accuracy" in entry]
    if not found:
        return None
    # Training accuracies are means over few pairs: several together are steadier.
    recent = [entry[f"{prefix}accuracy"] for entry in found if entry["step"] > 0.8 * steps] or [
        found[-1][f"{prefix}accuracy"]
    ]
    before = [entry[f"{prefix}accuracy"] for entry in found if 0.6 * steps <= entry["step"] <= 0.8 * steps]
    now = recent[-1] if prefix else float(np.mean(recent))
    then = (before[-1] if prefix else float(np.mean(before))) if before else None
    low = found[-1].get("eval_accuracy_low")
    change = None if then is None else now - then
    parts = [f"{'Held-out' if prefix else 'Training'} preference {now:.2f}"]
    if change is not None:
        parts.append(f"{change:+.2f} in the last fifth")
    last = next((entry for entry in reversed(found) if entry.get(f"{prefix}winner_error_base")), None)
    drift = None if last is None else last[f"{prefix}winner_error_change"] / last[f"{prefix}winner_error_base"]
    if drift is not None:
        how = "worse" if drift > 0 else "better"
        parts.append(f"preferred images denoised {100 * abs(drift):.1f} % {how} than by the base")
    return ", ".join(parts) + f": {_advice(now, low, change, drift, bool(prefix))}."


def _advice(now: float, low: float | None, change: float | None, drift: float | None, held_out: bool) -> str:
    if drift is not None and drift > DRIFT:
        return "more steps would cost captions; fewer, or half of the LoRA (`set_adapters`), keep more of them"
    if (low is not None and low <= 0.5) or now <= 0.55:
        return "it has not learnt this taste; more pairs or steps may help"
    if change is not None and change > CLEAR:
        return "more steps would help"
    if change is not None and change < -CLEAR and held_out:
        return "fewer steps would do better"
    return "more steps would change little"
