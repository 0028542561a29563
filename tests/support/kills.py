"""End or fail a piece of work at its k-th touch of a folder, in a process that is forked for it."""

import errno
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

KILL, FULL_DISK = "kill", "full disk"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


@dataclass
class Fault:
    """A SIGKILL at one touch, or a disk that is full from it on.

    A touch is a file or folder that is about to be opened for writing, made, moved, removed or synced; a file that has
    just been opened and is empty; and a file of torch or safetensors that is half written.

    Args:
        folder: Only what is in it counts.
        at: Number of the touch, from 1; 0 for none.
        kind: `KILL` or `FULL_DISK`.
    """

    folder: Path
    at: int
    kind: str
    count: int = 0
    _busy: bool = field(default=False, init=False)

    def install(self) -> None:
        """Begin to count, in this process to its end."""
        sys.addaudithook(self._audit)
        fsync, save, serialize = os.fsync, torch.save, safetensors.torch.serialize_file

        def synced(descriptor: int) -> None:
            if self._inside(os.readlink(f"/proc/self/fd/{descriptor}")):
                self._touch()
            fsync(descriptor)

        def saved(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            failure = RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing")
            self._foreign(file, lambda: save(value, file, *args, **kwargs), failure)

        def serialized(tensors: Any, filename: Any, metadata: Any = None) -> None:
            failure = SafetensorError("I/O error: No space left on device (os error 28)")
            self._foreign(filename, lambda: serialize(tensors, filename, metadata=metadata), failure)

        os.fsync, torch.save, safetensors.torch.serialize_file = synced, saved, serialized

    def _inside(self, path: Any) -> bool:
        return os.fsdecode(path).startswith(str(self.folder)) if isinstance(path, str | bytes | os.PathLike) else False

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITES and self._inside(path):
                self._touch()
                self._touch(lambda: self._open(path, flags))
        elif event in _CHANGES:
            relative = args[-1] != -1 and event in ("os.remove", "os.rmdir")  # to a folder that is being removed
            if relative or any(self._inside(path) for path in args[:2]):
                self._touch(frees=event in ("os.remove", "os.rmdir", "os.rename"))

    def _open(self, path: Any, flags: int) -> None:
        self._busy = True
        with suppress(OSError):  # a folder, which `tempfile` opens in a way of its own
            os.close(os.open(path, flags, 0o644))

    def _foreign(self, file: Any, write: Callable[[], None], failure: Exception) -> None:
        """Count a file that is written without Python: before it, and when half of it is there."""
        if not self._inside(file):
            return write()
        self._touch(failure=failure)
        self._busy = True
        write()
        self._busy = False
        self._touch(lambda: os.truncate(file, os.path.getsize(file) // 2), failure=failure)

    def _touch(
        self, before: Callable[[], None] | None = None, failure: Exception | None = None, frees: bool = False
    ) -> None:
        self.count += 1
        if not self.at or self.count < self.at:
            return
        if self.kind == KILL:
            self._busy = True
            if before:
                before()
            os.kill(os.getpid(), signal.SIGKILL)
        if not frees:  # a full disk still moves and removes
            raise failure or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class Outcome:
    """Result of a forked process, or the error that ended it, or neither after a SIGKILL."""

    touches: int = 0
    result: Any = None
    error: str | None = None
    killed: bool = False


def forked(work: Callable[[], Any], fault: Fault | None = None) -> Outcome:
    """Run `work` in a forked process, with a fault; `fault.count` is in the outcome."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        outcome = Outcome()
        try:
            if fault:
                fault.install()
            outcome.result = work()
        except BaseException as error:
            expected = isinstance(error, OSError) and fault is not None and fault.kind == FULL_DISK
            outcome.error = f"{type(error).__name__}: {error}" if expected else traceback.format_exc()
        if fault:
            outcome.touches, fault.at = fault.count, 0
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(outcome))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(sent) if sent else Outcome(killed=os.WTERMSIG(status) == signal.SIGKILL)


def restore(template: Path, folder: Path) -> None:
    """Bring a folder back to a state that was kept."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)


def touches(work: Callable[[], Any], template: Path, folder: Path) -> tuple[int, Any]:
    """Run `work` without a fault on a copy of `template`, and return how often it touches `folder`, and its result."""
    restore(template, folder)
    outcome = forked(work, Fault(folder, 0, KILL))
    assert outcome.error is None, outcome.error
    return outcome.touches, outcome.result


def each_fault(
    work: Callable[[], Any], template: Path, folder: Path, kind: str, count: int, most: int | None = None
) -> Iterator[tuple[int, Outcome]]:
    """Run `work` on copies of `template`, with the fault at each of `count` touches, and yield what came.

    Args:
        work: Touches `folder` `count` times.
        template: Old state of `folder`.
        folder: The folder.
        kind: Kind of the fault.
        count: Number of touches, about; a kill is tried until the work comes to its end.
        most: Only so many of them, from the first to the last.
    """
    most = min(most or count, count)
    places = sorted({1 + round(number * (count - 1) / (most - 1)) for number in range(most)})
    while places:
        at = places.pop(0)
        restore(template, folder)
        outcome = forked(work, Fault(folder, at, kind))
        assert outcome.killed or kind != KILL or at > outcome.touches, (at, outcome)
        if outcome.killed and not places:  # work that touches the folder a little more often this time has an end too
            assert at < 2 * count, (at, count)
            places.append(at + 1)
        yield at, outcome
