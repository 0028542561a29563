"""Session on disk: a click is in the log, synced, before it is confirmed."""

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from bt_hf.data.atomic import locked, sync, write_file
from bt_hf.data.clicks import CLICKS, FORMAT, IMAGES, SESSION, ClickLog, image_file, is_session, read_clicks
from bt_hf.data.clicks import read_session as read_header
from bt_hf.studio.errors import NotSavedError
from bt_hf.studio.pictures import encode_shown

POOL = "pool.jsonl"


class JsonLines:
    """Append-only file of JSON objects, a line each; a line is there whole or not at all.

    Args:
        path: The file, made if there is none. What follows its last line break was never confirmed, and is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._file).st_size
        self._cut_tail()
        sync(path.parent)

    def _cut_tail(self) -> None:
        end, block = self._size, 1 << 16
        while end > 0:
            start = max(0, end - block)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < self._size:
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        self._size = end

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Write lines and sync them.

        Raises:
            NotSavedError: They are not on the disk; the file is as it was before.
        """
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        try:
            written = 0
            while written < len(content):
                written += os.write(self._file, content[written:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
            raise NotSavedError(error.errno, f"'{self.path}' cannot be written ({error.strerror})") from error
        self._size += len(content)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the objects; lines that are damaged are left out."""
        for line in self.path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Session:
    """Folder of one person's clicks, held by one server at a time.

    Args:
        folder: Made if need be; a session in it goes on.
        source: Where the images come from, in words, for a new session. Of an old one it has to be the same.

    Attributes:
        log: Everything that the log says.
        pool: Lines on images, see `Pool`.
        id: Name of the session, by which a browser tells it from others.

    Raises:
        OSError: The folder can't be written.
        ValueError: Another server has the folder, it is a session of another version or source, or holds other files.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.folder, self.source = folder, source
        self._lock = threading.RLock()
        self._held = ExitStack()
        try:
            self._begin()
        except BaseException:
            self._held.close()
            raise

    def _begin(self) -> None:
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"--session: '{folder}' is not a folder; name another one") from None
        except OSError as error:
            raise OSError(
                error.errno, f"'{folder}' cannot be made ({error.strerror}); name a folder in --session"
            ) from error
        try:
            self._held.enter_context(locked(folder, wait=0))
        except TimeoutError:
            raise ValueError(
                f"another studio has the session '{folder}' open: use that one, or name another folder in --session"
            ) from None
        if is_session(folder) or (folder / SESSION).is_file():
            known = read_header(folder).get("source")
            if known != self.source:
                raise ValueError(
                    f"'{folder}' holds clicks on {known!r}, not on {self.source!r}: name another folder in --session"
                )
        elif any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(f"'{folder}' holds other files and is not a session: name a new folder in --session")
        try:
            (folder / IMAGES).mkdir(exist_ok=True)
            if not (folder / SESSION).is_file():
                header = {"format": FORMAT, "source": self.source, "id": secrets.token_hex(8)}
                write_file(folder / SESSION, json.dumps(header, ensure_ascii=False, indent=1).encode())
            self._clicks = JsonLines(folder / CLICKS)
            self._held.callback(self._clicks.close)
            self.pool = JsonLines(folder / POOL)
            self._held.callback(self.pool.close)
        except OSError as error:
            raise OSError(
                error.errno, f"'{folder}' cannot be written ({error.strerror}); name a folder in --session"
            ) from error
        self.id = str(read_header(folder).get("id", ""))
        self.log: ClickLog = read_clicks(folder)

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Write lines of the log, synced, and take them in.

        Raises:
            NotSavedError: Nothing was written or taken in.
            ValueError: A line is not valid, see `ClickLog.add`.
        """
        with self._lock:
            self._clicks.append(*lines)
            for line in lines:
                self.log.add(dict(line))

    def reading(self) -> AbstractContextManager[Any]:
        """Return a lock under which nothing is added to the log."""
        return self._lock

    def keep_picture(self, number: int, picture: Image.Image) -> None:
        """Store a picture that is about to be shown, if it is not there yet: pixels alone, no metadata.

        Raises:
            NotSavedError: There is no room for it.
        """
        if image_file(self.folder, number) is not None:
            return
        content, suffix = encode_shown(picture)
        try:
            write_file(self.folder / IMAGES / f"{number}{suffix}", content)
        except OSError as error:
            raise NotSavedError(
                error.errno, f"'{self.folder / IMAGES}' cannot be written ({error.strerror})"
            ) from error

    def picture_file(self, number: int) -> Path | None:
        """Return the file of a stored picture."""
        return image_file(self.folder, number)

    def close(self) -> None:
        """Close the files, and let another server have the folder."""
        self._held.close()
