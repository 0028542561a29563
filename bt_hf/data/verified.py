"""Files with a digest beside them, which tells a damaged one apart."""

import hashlib
import logging
import os
from pathlib import Path

from bt_hf.data.atomic import sync

logger = logging.getLogger(__name__)


def is_whole(path: Path) -> bool:
    """True if a file is there and has the digest that was written beside it; one that hasn't is told and removed."""
    if not path.exists():
        return False
    try:
        if _digest_file(path) == _digest_path(path).read_text():
            return True
        problem = "it is not what was written"
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    logger.warning("The cache file '%s' is damaged (%s): encoding it anew.", path, problem)
    path.unlink()
    return False


def move_into_place(part: Path, path: Path) -> None:
    """Move a file into place once it is on the disk, behind its digest: what is at `path` is whole or told apart."""
    sync(part)
    told = path.with_suffix(".sha256.part")
    told.write_text(_digest_file(part))
    sync(told)
    told.replace(_digest_path(path))
    part.replace(path)
    if os.name == "posix":  # the names too
        sync(path.parent)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
