"""The folder of a run: it can be written, one training at a time writes there, and errors name what is intact."""

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

from safetensors import SafetensorError

from bt_hf.data.atomic import SCRATCH, recover, try_lock
from bt_hf.hub.contract import ADAPTER_CONFIG, MODEL_CONFIG
from bt_hf.training.resume import newest_checkpoint

logger = logging.getLogger(__name__)

LOCK = ".training.lock"  # in the folder, while a training runs
_PROBE_BYTES = 1 << 20


def check_writable(folder: str | Path, size: int = 0) -> None:
    """Raise an `OSError` unless a file can be written into `folder`, which is made and taken away for the trial.

    Args:
        folder: Folder of a run.
        size: Bytes that will be written there.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".probe-{os.getpid()}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with probe.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, f"{size / 1e6:,.0f} MB are needed, {os.strerror(errno.ENOSPC).lower()}")
    except OSError as error:
        raise OSError(
            error.errno,
            f"`output_dir` '{folder}' can't be written ({error.strerror}): choose another one, or make room and allow "
            f"to write there. Nothing has begun. {intact(folder)}",
        ) from error
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def intact(run: str | Path, folder: str | Path | None = None) -> str:
    """Say in a sentence what is still whole.

    Args:
        run: Folder of the run, with its checkpoints.
        folder: Folder of an adapter or model; default `run`.
    """
    folder = Path(folder or run)
    try:
        checkpoint = newest_checkpoint(run)
        saved = any((folder / name).is_file() for name in (ADAPTER_CONFIG, MODEL_CONFIG))
    except OSError:
        return ""
    held = [f"the checkpoint '{checkpoint}', from which `resume_from_checkpoint=True` goes on"] if checkpoint else []
    held += [f"what was saved in '{folder}' before"] if saved else []
    return f"Still intact: {', and '.join(held)}." if held else "Nothing had been saved there before."


@contextmanager
def readable_errors(doing: str, run: str | Path, folder: str | Path | None = None) -> Iterator[None]:
    """Turn errors of writing into an `OSError` of one line, which says what is intact.

    Args:
        doing: What is not done, such as "the checkpoint of step 3 was not written".
        run: Folder of the run, with its checkpoints.
        folder: Folder that is written; default `run`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number, reason = _reason(error, run)
        if number is None or isinstance(error, _SaveError):
            raise
        raise _SaveError(
            number, f"{doing} ({reason}). {intact(run, folder)} Make room on the disk, or name another folder."
        ) from error


class _SaveError(OSError):
    """An error that has been made readable."""


def _reason(error: Exception, folder: str | Path) -> tuple[int | None, str]:
    """Return number and reason of an error of writing; no number for another error."""
    if isinstance(error, OSError):
        return error.errno, str(error.strerror)
    text = str(error)
    # torch and safetensors write by themselves, and tell the system's reason in words, if at all.
    if not isinstance(error, SafetensorError) and "PytorchStreamWriter" not in text and "inline_container" not in text:
        return None, text
    full = os.strerror(errno.ENOSPC) in text or shutil.disk_usage(folder).free < _PROBE_BYTES
    return (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, "a file could not be written")


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
