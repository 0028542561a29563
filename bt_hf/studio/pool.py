"""Pool of numbered images: a number means the same picture for as long as the session lives."""

import threading
from collections import defaultdict
from dataclasses import dataclass

from PIL import Image

from bt_hf.data.images import one_line, to_rgb
from bt_hf.studio.session import Session
from bt_hf.studio.sources import NO_PROMPT, Source

# Origins of images: the source, drawn by a pipeline, uploaded by the person, drawn to be compared blind.
SOURCE, DRAWN, UPLOADED, BLIND = "source", "drawn", "upload", "blind"
_BATCH = 2000


@dataclass(frozen=True)
class Picture:
    """Image of the pool.

    Attributes:
        number: Its number, from 0.
        name: Its name where it came from.
        prompt: Its prompt.
        origin: One of the origins above.
    """

    number: int
    name: str
    prompt: str
    origin: str = SOURCE


class Pool:
    """Images of a session: those of a source, drawings and uploads.

    Args:
        session: Keeps the numbers.
        source: `None` for a session without one.

    Attributes:
        pictures: All images by number, also those that are gone.
        skipped: Name -> reason, for images that are left out.
        version: Counts changes of what is usable.
    """

    def __init__(self, session: Session, source: Source | None) -> None:
        self.session, self.source = session, source
        self.pictures: list[Picture] = []
        self.skipped: dict[str, str] = {}
        self.version = 0
        self._usable: dict[str, list[int]] = defaultdict(list)
        self._lock = threading.RLock()
        known = self._recall()
        self._list(known)

    def _recall(self) -> dict[tuple[str, str, str], int]:
        """Read the numbers that were given before; return those of the source's images by name, stamp and prompt."""
        known = {}
        for line in self.session.pool:
            try:
                number, origin = int(line["number"]), str(line["origin"])
                picture = Picture(number, str(line["file"]), str(line["prompt"]), origin)
            except (KeyError, TypeError, ValueError):
                continue
            if number != len(self.pictures):
                continue
            self.pictures.append(picture)
            if origin == SOURCE:
                known[picture.name, str(line["stamp"]), picture.prompt] = number
            elif origin in (DRAWN, UPLOADED) and self.session.picture_file(number) is not None:
                self._usable[picture.prompt].append(number)
        return known

    def _list(self, known: dict[tuple[str, str, str], int]) -> None:
        if self.source is None:
            return
        fresh = []
        for listed in self.source.listed():
            if listed.problem is not None:
                self.skipped[listed.name] = listed.problem
                continue
            prompt = listed.prompt or NO_PROMPT
            number = known.get((listed.name, listed.stamp, prompt))
            if number is None:
                number = len(self.pictures)
                self.pictures.append(Picture(number, listed.name, prompt))
                fresh.append(
                    {"number": number, "file": listed.name, "stamp": listed.stamp, "prompt": prompt, "origin": SOURCE}
                )
            self._usable[prompt].append(number)
        for start in range(0, len(fresh), _BATCH):
            self.session.pool.append(*fresh[start : start + _BATCH])

    def add(self, picture: Image.Image, name: str, prompt: str, origin: str) -> int:
        """Store a picture that no source has, and return its number.

        Raises:
            NotSavedError: There is no room for it.
            ValueError: The image is not usable.
        """
        picture = to_rgb(picture)
        with self._lock:
            number = len(self.pictures)
            self.session.keep_picture(number, picture)
            line = {"number": number, "file": name, "stamp": "", "prompt": prompt, "origin": origin}
            self.session.pool.append(line)
            self.pictures.append(Picture(number, name, prompt, origin))
            if origin in (DRAWN, UPLOADED):
                self._usable[prompt].append(number)
                self.version += 1
            return number

    def read(self, number: int) -> Image.Image:
        """Return a picture in RGB: the stored one, or that of the source.

        Raises:
            LookupError: There is no such number.
            ValueError: It is gone or not readable; it is left out from now on.
        """
        if not 0 <= number < len(self.pictures):
            raise LookupError(f"there is no image {number}")
        file = self.session.picture_file(number)
        if file is not None:
            return to_rgb(str(file))
        picture = self.pictures[number]
        try:
            if self.source is None or picture.origin != SOURCE:
                raise ValueError("image file missing: it is not in the session")
            return self.source.read(picture.name)
        except (ValueError, OSError, LookupError) as error:
            self.skip(number, one_line(error))
            raise ValueError(f"{picture.name}: {one_line(error)}") from None

    def skip(self, number: int, reason: str) -> None:
        """Leave an image out from now on."""
        picture = self.pictures[number]
        with self._lock:
            self.skipped[picture.name] = reason
            self.version += 1
            if number in self._usable.get(picture.prompt, ()):
                self._usable[picture.prompt].remove(number)
                if not self._usable[picture.prompt]:
                    del self._usable[picture.prompt]

    def by_prompt(self, least: int = 1) -> dict[str, list[int]]:
        """Return the numbers of usable images of each prompt that has at least `least` of them."""
        with self._lock:
            return {prompt: list(numbers) for prompt, numbers in self._usable.items() if len(numbers) >= least}

    def __len__(self) -> int:
        """Return how many images are usable."""
        with self._lock:
            return sum(map(len, self._usable.values()))
