"""Lock the folder of a run, so that one training at a time writes there."""

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bt_hf.data.atomic import SCRATCH, recover, try_lock

logger = logging.getLogger(__name__)

LOCK = ".training.lock"  # in the folder, while a training runs


def check_no_training(folder: str | Path) -> None:
    """Raise a `BlockingIOError` if a training that is alive writes into `folder`."""
    path = Path(folder) / LOCK
    if path.is_file():
        with path.open("rb") as file:
            if not try_lock(file.fileno()):
                _refuse_living(path)


@contextmanager
def training_lock(folder: str | Path) -> Iterator[None]:
    """Let no other training write into `folder`, and remove what cut ones left half done there.

    The system gives the lock back when a process ends, however it ends.

    Raises:
        BlockingIOError: Another training writes there; names its process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        remove_scratch(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if try_lock(descriptor):
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            else:
                _refuse_living(path)
                path.unlink(missing_ok=True)  # its process is gone; a worker of it still holds the file
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one who had it has removed it meanwhile


def _refuse_living(path: Path) -> None:
    """Raise a `BlockingIOError` unless the process that wrote the lock is known to be gone."""
    try:
        holder: dict[str, Any] = json.loads(path.read_bytes())
        pid, host = int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, TypeError, KeyError):
        who = "another process"
    else:
        if host == socket.gethostname() and not _alive(pid):
            logger.warning("%s is of process %d, which has ended: it is taken over.", path, pid)
            return
        who = f"process {pid} on {host}"
    raise BlockingIOError(
        errno.EWOULDBLOCK, f"{who} is training into '{path.parent}': wait for it, or choose another `output_dir`"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remove_scratch(folder: Path, held: bool = False) -> None:
    """Finish or undo saves that were cut in the folder of a run (see `recover`), and remove older scratch."""
    recover(folder, held)
    for left in (*folder.glob(f"{SCRATCH}-*"), *folder.glob(f"checkpoint-*/{SCRATCH}*")):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(".probe-*"):
        left.unlink(missing_ok=True)
