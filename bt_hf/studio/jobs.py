"""Work in the background, one piece at a time: train the reward, train the pipeline, publish."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bt_hf.data.images import one_line

logger = logging.getLogger(__name__)

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"


class StoppedError(Exception):
    """The person has stopped the work."""


@dataclass
class Job:
    """Piece of work as the page shows it.

    Attributes:
        kind: "reward", "drawing" or "publish".
        state: "running", "done", "stopped" or "failed".
        progress: Share that is done; `None` if that is not known.
        message: One line.
        result: Depends on the kind; `None` until it is done.
    """

    kind: str
    state: str = RUNNING
    progress: float | None = None
    message: str = ""
    result: dict[str, Any] | None = None


class Handle:
    """Connection of the work to the job: tells its progress, and ends it when the person asks.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stopping = threading.Event()

    def say(self, message: str, progress: float | None = None) -> None:
        """Tell what is being done.

        Raises:
            StoppedError: The person has stopped it.
        """
        self.job.message, self.job.progress = message, progress
        if self.stopping.is_set():
            raise StoppedError

    def callback(self, message: str, start: float, end: float) -> TrainerCallback:
        """Return a callback that tells the progress of a training as a part of the whole, and stops it."""
        return _Progress(self, message, start, end)

    def callback_of_many(self, message: str, start: float, end: float, count: int) -> TrainerCallback:
        """Return a callback that tells the progress of up to so many trainings, and ends them by `StoppedError`."""
        return _ProgressOfMany(self, message, start, end, count)


class _Progress(TrainerCallback):
    def __init__(self, handle: Handle, message: str, start: float, end: float) -> None:
        self.handle, self.message, self.start, self.end = handle, message, start, end

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        done = state.global_step / max(1, state.max_steps)
        job = self.handle.job
        job.message = f"{self.message}, step {state.global_step} of {state.max_steps}"
        job.progress = self.start + (self.end - self.start) * done
        if self.handle.stopping.is_set():
            control.should_training_stop = True


class _ProgressOfMany(TrainerCallback):
    def __init__(self, handle: Handle, message: str, start: float, end: float, count: int) -> None:
        self.handle, self.message, self.start, self.end, self.count = handle, message, start, end, count
        self.begun = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun += 1
        self._tell(0.0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell(state.global_step / max(1, state.max_steps))

    def _tell(self, done: float) -> None:
        share = min(1.0, (self.begun - 1 + done) / self.count)
        self.handle.say(f"{self.message} (model {self.begun})", self.start + (self.end - self.start) * share)


Work = Callable[[Handle, Mapping[str, Any]], dict[str, Any] | None]


class Jobs:
    """The job of now, or the last one.

    Args:
        works: Kind -> the work, which returns its result.
    """

    def __init__(self, works: Mapping[str, Work]) -> None:
        self.works = works
        self._lock = threading.Lock()
        self._handle: Handle | None = None
        self._thread: threading.Thread | None = None

    def current(self) -> dict[str, Any] | None:
        """Return the job as the page shows it; `None` if there was none."""
        return None if self._handle is None else asdict(self._handle.job)

    @property
    def busy(self) -> bool:
        """True while one is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, kind: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Begin a job; `None` if one is running."""
        with self._lock:
            if self.busy:
                return None
            self._handle = Handle(Job(kind, message="Getting ready"))
            self._thread = threading.Thread(target=self._run, args=(self._handle, options), daemon=True)
            self._thread.start()
            return self.current()

    def stop(self, wait: float = 0.0) -> dict[str, Any] | None:
        """Ask the job to end at its next step, and wait for that for some seconds."""
        if self._handle is not None and self.busy:
            self._handle.stopping.set()
            if wait and self._thread is not None:
                self._thread.join(wait)
        return self.current()

    def _run(self, handle: Handle, options: Mapping[str, Any]) -> None:
        job = handle.job
        try:
            result = self.works[job.kind](handle, options)
        except StoppedError:
            job.state, job.message, job.progress = STOPPED, "Stopped; nothing was saved", None
        except Exception as error:
            known = isinstance(error, (ImportError, OSError, ValueError, TypeError, FloatingPointError))
            if not known:
                logger.exception("a job of the studio has failed")
            job.state, job.progress = FAILED, None
            job.message = one_line(error) if known else f"unexpected {type(error).__name__}: {one_line(error)}"
        else:
            job.result, job.progress, job.state = result, 1.0, DONE
