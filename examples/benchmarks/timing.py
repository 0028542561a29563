"""Time training steps that take turns, so that a noisy machine is noisy for all of them, and their memory."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from accelerate.state import AcceleratorState
from datasets import disable_progress_bars
from diffusers.utils import logging as diffusers_logging
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from bt_hf.training.precision import multiplies_bfloat16
from results import Report

DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")
BF16 = multiplies_bfloat16(use_cpu=DEVICE.type == "cpu")  # a CPU that emulates it is many times slower
PRECISION = "bf16" if BF16 else "fp32"
Turn = Callable[[], list[float]]  # runs a few steps; returns the seconds of each but the first
Build = Callable[[], Turn]


class Clock(TrainerCallback):
    """Time steps from end to end: all that the Trainer does in between, data included."""

    def __init__(self) -> None:
        self.began = 0.0
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began = now()
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(now())


def now() -> float:
    """Return seconds, once the device has done all its work."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


class Training:
    """Turn that is a whole `trainer.train()`.

    Attributes:
        before: Seconds that the first turn took before its first step.
        first: Seconds of that step.
    """

    def __init__(self, trainer: Trainer) -> None:
        trainer.remove_callback(PrinterCallback)
        self.trainer = trainer
        self.clock = Clock()
        trainer.add_callback(self.clock)
        self.state = dict(AcceleratorState._shared_state)
        self.before: float | None = None
        self.first: float | None = None

    def __call__(self) -> list[float]:
        # One state serves all trainers of a process, that of the newest: it would say whether others are compiled.
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(self.state)
        called = now()
        self.trainer.train()
        began, ends = self.clock.began, self.clock.ends
        if self.before is None:
            self.before, self.first = began - called, ends[0] - began
        return [end - start for start, end in pairwise(ends)]


def repeat(step: Callable[[], None], count: int) -> Turn:
    """Return a turn of `count` calls of `step`."""

    def turn() -> list[float]:
        ends = []
        for _ in range(count):
            step()
            ends.append(now())
        return [end - start for start, end in pairwise(ends)]

    return turn


def build(builds: Mapping[str, Build]) -> tuple[dict[str, Turn], dict[str, float]]:
    """Build the turns; return them and the seconds that each took to build."""
    turns, seconds = {}, {}
    for name, make in builds.items():
        began = now()
        turns[name] = make()
        seconds[name] = now() - began
    return turns, seconds


def compare(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each; the first turn of each is slower, and not counted."""
    for turn in turns.values():
        turn()
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name] += turn()
    return {name: statistics.median(values) for name, values in times.items()}


def tells_memory() -> bool:
    """Return True if the device counts the memory that it holds at most; a CPU does not."""
    return hasattr(torch.get_device_module(DEVICE), "max_memory_allocated")


def peaks(builds: Mapping[str, Build]) -> dict[str, float]:
    """Return the peak memory (GB) of a turn of each, its models included; empty if the device doesn't tell.

    Each is built once more, and counted by what it takes beyond what is there already.
    """
    if not tells_memory():
        return {}
    device = torch.get_device_module(DEVICE)
    found = {}
    for name, make in builds.items():
        gc.collect()
        held = device.memory_allocated()
        turn = make()
        gc.collect()
        device.reset_peak_memory_stats()
        turn()
        found[name] = (device.max_memory_allocated() - held) / 1e9
        del turn
    return found


def tabulate(
    report: Report,
    name: str,
    title: str,
    seconds: dict[str, float],
    pairs: int | dict[str, int],
    reference: str,
    memory: Mapping[str, float] | None = None,
) -> None:
    """Print and keep a table of the results of `compare` and `peaks`.

    Args:
        report: Report that the table goes to.
        name: Name of the table.
        title: Printed above it.
        seconds: Median seconds of a step, by row.
        pairs: Pairs of a step, one number or one by row.
        reference: Row whose rate is 1.
        memory: Peak memory in GB, by row.
    """
    count = pairs if isinstance(pairs, dict) else dict.fromkeys(seconds, pairs)
    rates = {row: count[row] / value for row, value in seconds.items()}
    columns, formats = ["seconds a step", "pairs a second", "times"], [".4g", ".2f", ".2f"]
    rows: list[list[str | float]] = [[row, seconds[row], rates[row], rates[row] / rates[reference]] for row in seconds]
    if memory:
        columns, formats = [*columns, "peak memory, GB"], [*formats, ".2f"]
        rows = [[*cells, memory[str(cells[0])]] for cells in rows]
    report.table(name, title, columns, rows, formats)


def quiet() -> None:
    """Silence everything but the tables."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    disable_progress_bars()
