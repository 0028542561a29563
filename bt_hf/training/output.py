"""Folder of a run: try if it can be written, and name what is intact where it can't."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bt_hf.hub.contract import ADAPTER_CONFIG, MODEL_CONFIG
from bt_hf.training.resume import newest_checkpoint

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
