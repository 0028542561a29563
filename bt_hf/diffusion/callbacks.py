"""Callbacks of the trainer: guards against the usual failures of few pairs, which say what they saw."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bt_hf.training.finite import check_weights

logger = logging.getLogger(__name__)

_BEST = "best_adapter.safetensors"  # a file in each checkpoint


class BeginCallback(TrainerCallback):
    """Run a function when training begins: the trackers are there then, and the model has its precision."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin()


class Guard(TrainerCallback):
    """A callback that warns.

    Attributes:
        said: The warnings so far, for the card.
        stopped: True once it has stopped the training.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stopped = False

    def say(self, sentence: str) -> None:
        self.said.append(sentence)
        logger.warning(sentence)

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint that is being written; nothing by default."""

    def load(self, checkpoint: str | Path) -> None:
        """Load the state that was saved with a checkpoint, if there is one."""


class WinnerErrorGuard(Guard):
    """Say when the preferred images' denoising error rises against the base's.

    A preference loss rewards the difference of two errors. It may grow although both rise, and then images get worse.
    Looks at the held-out pairs, and where training evaluates none at those it trains on.

    Args:
        prefix: Prefix of the metrics of the held-out pairs; `None` to look at the training pairs instead.
        tolerance: Rise, as a share of the base's error, up to which nothing is said. Default 0.02.
    """

    def __init__(self, prefix: str | None = "eval", tolerance: float = 0.02) -> None:
        super().__init__()
        self.prefix = prefix
        self.tolerance = tolerance

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs.get("metrics") or {}
        change, base = (metrics.get(f"{self.prefix}_winner_error_{name}") for name in ("change", "base"))
        self._look(state, change, base, f"held-out{_set_name(self.prefix)}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.prefix is None:
            logs = kwargs.get("logs") or {}
            self._look(state, logs.get("winner_error_change"), logs.get("winner_error_base"), "training")

    def _look(self, state: TrainerState, found: float | None, base: float | None, where: str) -> None:
        if found is None or not base or found / base <= self.tolerance:
            return
        self.say(
            f"Step {state.global_step}: the denoising error of preferred {where} images is {found / base:.1%} above "
            "the base's, so images may get worse although preferences are predicted better. Stop earlier, lower "
            "`learning_rate`, or use `safeguard=True`."
        )
        self.tolerance = 2 * found / base  # said again only when it has doubled


class OverfittingGuard(Guard):
    """Stop when training accuracy is near 1 and held-out accuracy falls, and go back to the best adapter.

    Its state is saved with each checkpoint, so that a resumed run stops where it would have. Unlike
    `EarlyStoppingCallback`, it needs no checkpoint at each evaluation to go back to, and lets held-out accuracy fall
    for as long as training accuracy still has something to learn.

    Args:
        prefix: Prefix of the metrics of the held-out pairs; the others of several are guarded by others.
        near: Training accuracy that counts as near 1. Default 0.98.
        fall: Fall of held-out accuracy below its best that counts. Default 0.02.
        patience: So many evaluations in a row. Default 2.
    """

    def __init__(self, prefix: str = "eval", near: float = 0.98, fall: float = 0.02, patience: int = 2) -> None:
        super().__init__()
        self.prefix = prefix
        self._file = _BEST if prefix == "eval" else _BEST.replace(".", f"-{quote(prefix, safe='')}.")
        self.near, self.fall, self.patience = near, fall, patience
        self._training_accuracy = 0.0
        self._best, self._best_step = -1.0, 0
        self._best_state: dict[str, torch.Tensor] | None = None
        self._falls = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        self._training_accuracy = logs.get("accuracy", self._training_accuracy)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accuracy = (kwargs.get("metrics") or {}).get(f"{self.prefix}_accuracy")
        if accuracy is None or self.stopped:
            return
        if accuracy >= self._best:
            self._best, self._best_step, self._falls = accuracy, state.global_step, 0
            weights = get_peft_model_state_dict(_peft(kwargs["model"]), save_embedding_layers=False)
            self._best_state = {
                name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in weights.items()
            }
            return
        falls = self._training_accuracy >= self.near and accuracy <= self._best - self.fall
        self._falls = self._falls + 1 if falls else 0
        if self._falls >= self.patience:
            self.stopped = True
            control.should_training_stop = True
            self.say(
                f"Step {state.global_step}: training accuracy is {self._training_accuracy:.2f}, but held-out accuracy"
                f"{_set_name(self.prefix)} fell from {self._best:.3f} to {accuracy:.3f}: stopped, and back to "
                f"the adapter of step {self._best_step}."
            )

    def save(self, checkpoint: Path) -> None:
        best = self._best_state or {}
        # No process has the whole of sharded weights.
        if not best or any(type(value) is not torch.Tensor for value in best.values()):
            return
        check_weights(best, checkpoint.parent)
        known = [self._training_accuracy, self._best, self._best_step, self._falls, self.said]
        save_file(best, checkpoint / self._file, {"known": json.dumps(known)})

    def load(self, checkpoint: str | Path) -> None:
        path = Path(checkpoint) / self._file
        if path.is_file():
            self._best_state = load_file(path)
            with safe_open(path, "pt") as file:
                known = json.loads(file.metadata()["known"])
            self._training_accuracy, self._best, self._best_step, self._falls, self.said = known

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped and self._best_state is not None:
            set_peft_model_state_dict(_peft(kwargs["model"]), self._best_state)


class CollapseGuard(Guard):
    """Say when the validation images become alike: see `validation_images.mean_pairwise_distance`.

    Args:
        share: Share of the distance before training below which it is said. Default 0.5.
    """

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        now, before = logs.get("validation_distance"), logs.get("validation_distance_base")
        if now is None or not before or now >= self.share * before:
            return
        self.say(
            f"Step {state.global_step}: validation images differ from each other by {now:.3f}, {now / before:.0%} of "
            "what they did before training: they become all alike. Stop earlier or lower `learning_rate`."
        )
        self.share = 0.5 * now / before


def make_guards(args: TrainingArguments, evaluation: Any) -> list[Guard]:
    """Return the guards of a training; warn if it never evaluates the held-out pairs that it has.

    Args:
        args: Options of the training.
        evaluation: Held-out pairs, a dict of several, of which each has guards of its own, or `None`.
    """
    if evaluation is not None and args.eval_strategy == "no":
        logger.warning(
            "The held-out pairs are not looked at while training, so nothing stops at overfitting: pass "
            "`eval_strategy='steps'` for that."
        )
    if evaluation is None or args.eval_strategy == "no":
        prefixes: list[str] = []
    else:
        prefixes = [f"eval_{name}" for name in evaluation] if isinstance(evaluation, dict) else ["eval"]
    winners = [WinnerErrorGuard(prefix) for prefix in prefixes] or [WinnerErrorGuard(None)]
    return [*winners, *(OverfittingGuard(prefix) for prefix in prefixes), CollapseGuard()]


def _set_name(prefix: str | None) -> str:
    """Return the name of one of several sets of held-out pairs, in quotes; empty if there is one set."""
    name = (prefix or "").removeprefix("eval").removeprefix("_")
    return f" {name!r}" if name else ""


def _peft(model: Any) -> PeftModel:
    return model if isinstance(model, PeftModel) else model.module
