"""Seconds of training steps that take turns, so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
Turn = Callable[[], list[float]]  # runs a few steps, and says how many seconds each took but the first


class Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next: all that the Trainer does in between, data included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(now())


def now() -> float:
    """Seconds, once the device has done all that it was asked to."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def train(trainer: Trainer) -> Turn:
    """A turn is a whole `trainer.train()`."""
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    own = dict(AcceleratorState._shared_state)

    def turn() -> list[float]:
        # One state serves all trainers of a process, that of the newest: it would say whether others are compiled.
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(own)
        trainer.train()
        return [end - start for start, end in pairwise(clock.ends)]

    return turn


def repeat(step: Callable[[], None], count: int) -> Turn:
    """A turn is `count` calls of `step`."""

    def turn() -> list[float]:
        ends = []
        for _ in range(count):
            step()
            ends.append(now())
        return [end - start for start, end in pairwise(ends)]

    return turn


def compare(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    """Median seconds of a step of each; the first turn of each is slower, and not counted."""
    for turn in turns.values():
        turn()
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name] += turn()
    return {name: statistics.median(values) for name, values in times.items()}
