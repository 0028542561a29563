"""Replace a set of files all or nothing, whatever ends the process."""

import errno
import filecmp
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: a set is whole there too, but two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

SCRATCH = ".saving"  # a folder in the one that is written to; nothing that reads models looks into it
_NEW, _OLD, _JOURNAL = "new", "old-", "journal.json"
_WAIT = 60.0  # seconds for another process that saves into the same folder


def write_file(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write one file: synced under a temporary name, and moved into place.

    Args:
        path: The file; its folder is made.
        content: The bytes.
        scratch: Folder of the temporary name, on the same file system; default: that of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (scratch or path.parent) / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replaced(folder: Path, gates: Sequence[str] = (), drop: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yield a scratch folder, whose files replace those of `folder` at the end, all of them or none.

    A list of what is to be moved is written before the first move. If the process ends before the list, the old files
    are all there; if it ends after it, `recover` finishes the moves.

    Args:
        folder: Made if need be. Its other files stay.
        gates: Files without which no program loads the others. Where more than one file changes, they are removed
            before the moves and come last, so that programs that know no list never load old files with new ones.
        drop: True for the name of an old file that goes, if there is no new one of the name.

    Raises:
        TimeoutError: Another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _recover(folder)
        new = folder / SCRATCH / _NEW
        try:
            new.mkdir(parents=True)
            yield new
            _write_journal(folder, gates, drop or (lambda name: False))
        except BaseException:
            if not (folder / SCRATCH / _JOURNAL).exists():
                shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            raise
        _recover(folder)


def place_folder(name: str, folder: Path) -> None:
    """Move the folder `name` from the scratch of `folder` into it, over an old one; for use while it is `locked`."""
    source, target, old = folder / SCRATCH / name, folder / name, folder / SCRATCH / f"{_OLD}{name}"
    for path in (*source.rglob("*"), source):
        sync(path)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    sync(folder)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)


def recover(folder: str | Path, held: bool = False) -> None:
    """Finish or undo a save that was cut, if there is one; whoever reads `folder` calls this first.

    Args:
        folder: The folder.
        held: True if it is `locked` by the caller.

    Raises:
        OSError: `folder` can't be written.
    """
    folder = Path(folder)
    if (folder / SCRATCH).is_dir():
        with nullcontext() if held else locked(folder):
            _recover(folder)


def _recover(folder: Path) -> None:
    scratch = folder / SCRATCH
    if scratch.is_symlink() or not scratch.is_dir():
        return
    journal = _read_journal(scratch)
    try:
        if journal is not None:
            _finish(folder, journal)
        for old in scratch.glob(f"{_OLD}*"):
            name = old.name.removeprefix(_OLD)
            if not (folder / name).exists():  # it was moved aside for a whole one
                os.rename(scratch / name if (scratch / name).is_dir() else old, folder / name)
        shutil.rmtree(scratch)
    except OSError as error:
        raise OSError(
            error.errno,
            f"a save into '{folder}' was cut, and can't be finished ({error.strerror}): make room, or allow to write "
            "there, and try again",
        ) from error


def _write_journal(folder: Path, gates: Sequence[str], drop: Callable[[str], bool]) -> None:
    """Write the list of moves, which commits to them."""
    new = folder / SCRATCH / _NEW
    names = sorted(file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file())
    changed = [name for name in names if not _same(new / name, folder / name)]
    for name in changed:
        sync(new / name)
    changed.sort(key=lambda name: (name in gates, name))
    gone = sorted(file.name for file in folder.iterdir() if file.is_file() and drop(file.name))
    gone = [name for name in gone if name not in names]
    together = len(changed) + len(gone) > 1
    shut = [name for name in gates if together and name in names and (folder / name).exists()]
    # A gate that does not change is removed and put back too: what it belongs to is changing.
    changed += [name for name in shut if name not in changed]
    sync(new)
    journal = {"remove": [*shut, *gone], "move": changed}
    write_file(folder / SCRATCH / _JOURNAL, json.dumps(journal).encode())


def _read_journal(scratch: Path) -> dict[str, Any] | None:
    """Return the list of moves; `None` without one, or with one that leads out of the folder."""
    try:
        journal = json.loads((scratch / _JOURNAL).read_bytes())
        names = [*journal["remove"], *journal["move"]]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    inside = all(isinstance(name, str) and _is_inside(scratch, name) for name in names)
    return journal if inside else None


def _is_inside(scratch: Path, name: str) -> bool:
    """True if `name` is below the folder, and so is what is moved there: a folder may be somebody else's."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts or "\\" in name:
        return False
    roots = (scratch / _NEW, scratch.parent)
    return all((root / name).parent.resolve().is_relative_to(root.resolve()) for root in roots)


def _finish(folder: Path, journal: dict[str, Any]) -> None:
    """Do the moves that are left; may be cut, and be done again."""
    new, moves = folder / SCRATCH / _NEW, journal["move"]
    for name in journal["remove"]:
        if name not in moves or (new / name).exists():  # else it is the new one already
            (folder / name).unlink(missing_ok=True)
    sync(folder)
    for name in moves:
        if (new / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
    sync(folder)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and not other.is_symlink() and filecmp.cmp(one, other, shallow=False)


def sync(path: Path) -> None:
    """Write what the system holds back of a file or folder to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems do not sync
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, wait: float = _WAIT) -> Iterator[None]:
    """Keep other processes from saving into `folder`. The lock is on the folder, so none is left behind.

    Raises:
        TimeoutError: Another process holds it for longer than `wait` seconds.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + wait
        while not try_lock(descriptor):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process is saving into '{folder}': try again when it is done.")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; False if somebody else has. Always True without locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network drives have no locks
        return error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
    return True
