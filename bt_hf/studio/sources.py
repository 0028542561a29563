"""Sources of images: a folder, a dataset, and the default that is embedded in the repository."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, Image, List
from PIL import Image as PILImage

from bt_hf.data.clicks import is_session, words_of
from bt_hf.data.formats import PROMPTS
from bt_hf.data.images import one_line, to_rgb
from bt_hf.data.places import IMAGE, Place
from bt_hf.data.reading import open_dataset
from bt_hf.data.rows import undecoded
from bt_hf.data.tables import TABLES, read_table

# Prompt of images that have none.
NO_PROMPT = "a picture"
_CHECKOUT = Path(__file__).parents[2]  # the repository; an installed package has no examples beside it
_EMOJI, _SPLIT = _CHECKOUT / "examples/emoji/emoji64.parquet", _CHECKOUT / "examples/emoji/split.json"
DEFAULT_BASE = _CHECKOUT / "examples/icons/base"
DEFAULT_PIPELINE = _CHECKOUT / "examples/emoji/diffusion"
# Captions that the default's small pipeline draws so that one can see what they are.
DEFAULT_SHOWN = ("face exhaling", "man running", "prohibited", "woman wearing turban")


@dataclass(frozen=True)
class Listed:
    """Image that a source has, not opened yet.

    Attributes:
        name: Its name in the source.
        stamp: Changes if the image does, as far as can be told without reading it.
        prompt: Its prompt; `None` if it has none.
        problem: Reason to leave it out; `None` for a good one.
    """

    name: str
    stamp: str
    prompt: str | None
    problem: str | None = None


class Source(Protocol):
    """Images by name.

    Attributes:
        title: What the page calls it.
    """

    title: str

    def listed(self) -> Iterator[Listed]:
        """Yield what is there."""

    def read(self, name: str) -> PILImage.Image:
        """Return an image in RGB; raises a `ValueError` of one line if it is not readable (any more)."""


class FolderSource:
    """Images of a folder and of the folders in it.

    A prompt stands in `metadata.jsonl` (`.csv`, ...) with `file_name` and `prompt`, `caption` or `text`, or in `x.txt`
    beside `x.png`. Where none has one, images are grouped by the words of their file names without numbers, if most
    of them then have company.

    Args:
        folder: The folder.
        prompt: One prompt for all images, whatever they have.
    """

    def __init__(self, folder: Path, prompt: str | None = None) -> None:
        self.folder, self.prompt = folder, prompt
        self.title = folder.resolve().name or str(folder)
        self._place = Place.folder(folder, False)

    def listed(self) -> Iterator[Listed]:
        found = list(self._files())
        captions: dict[str, str | None] = {}
        if self.prompt is None:
            tables = self._tables()
            for name, problem in found:
                if problem is None:
                    captions[name] = tables.get(name) or self._text_beside(name)
            if not any(captions.values()):
                captions = _from_names(list(captions))
        for name, problem in found:
            prompt = self.prompt or captions.get(name)
            yield Listed(name, self._stamp(name), prompt, problem)

    def _files(self) -> Iterator[tuple[str, str | None]]:
        """Yield images by their paths in the folder, with the problem of those that are left out."""
        suffixes = PILImage.registered_extensions()
        unread: list[OSError] = []
        for place, folders, files in os.walk(self.folder, onerror=unread.append):
            kept = [name for name in folders if not name.startswith(".") and not is_session(Path(place, name))]
            folders[:] = sorted(kept)
            for file in sorted(files):
                if Path(file).suffix.lower() not in suffixes:
                    continue
                name = Path(place, file).relative_to(self.folder).as_posix()
                yield name, "hidden file" if file.startswith(".") else None
        for error in unread:
            if Path(error.filename) == self.folder:
                raise error
            yield f"{Path(error.filename).relative_to(self.folder).as_posix()}/", f"{error.strerror}"

    def _tables(self) -> dict[str, str]:
        captions: dict[str, str] = {}
        for table in sorted(self.folder.rglob("metadata.*")):
            if table.suffix.lower() not in TABLES or not table.is_file():
                continue
            roles = dict.fromkeys(PROMPTS, "text") | {"file_name": "image"}
            try:
                rows = read_table(table, lambda names, roles=roles: roles)  # type: ignore[misc]
            except ValueError as error:
                raise ValueError(f"{table.name}: cannot be read ({one_line(error)})") from error
            column = next((name for name in PROMPTS if name in rows.column_names), None)
            if column is None or "file_name" not in rows.column_names:
                continue
            below = table.parent.relative_to(self.folder)
            for file, text in zip(rows["file_name"], rows[column], strict=True):
                if isinstance(file, str) and isinstance(text, str) and text.strip():
                    captions[(below / file).as_posix()] = text.strip()
        return captions

    def _text_beside(self, name: str) -> str | None:
        file = (self.folder / name).with_suffix(".txt")
        if not file.is_file() or file.is_symlink():
            return None
        return file.read_text(encoding="utf-8-sig", errors="replace").strip() or None

    def _stamp(self, name: str) -> str:
        try:
            found = os.stat(self.folder / name)
        except OSError:
            return "gone"
        return f"{found.st_size}-{found.st_mtime_ns}"

    def read(self, name: str) -> PILImage.Image:
        return to_rgb(self._place.encode(name))


class DatasetSource:
    """Images of a dataset: all of its columns of images, under its prompts.

    Args:
        rows: The dataset.
        title: What the page calls it.
        prompt: One prompt for all images, whatever they have.

    Raises:
        ValueError: There is no column of images.
    """

    def __init__(self, rows: Dataset, title: str, prompt: str | None = None, place: Place | None = None) -> None:
        self.rows, self.title, self.prompt = undecoded(rows.with_format(None)), title, prompt
        self._place = place or Place()
        features = self.rows.features
        self.columns = [name for name, feature in features.items() if isinstance(feature, Image)]
        lists = [name for name, one in features.items() if isinstance(one, List) and one.feature == IMAGE]
        paths = [name for name in ("file_name", "image_path", "chosen", "rejected", "image") if name in features]
        self.columns = self.columns or paths
        if not self.columns:
            more = f"; {lists[0]!r} holds lists of them, of which each should have its own row" if lists else ""
            raise ValueError(f"{title}: no column of images among {', '.join(features)}{more}")
        self._prompts = next((name for name in PROMPTS if name in features), None)

    def listed(self) -> Iterator[Listed]:
        prompts = [None] * len(self.rows) if self._prompts is None else list(self.rows[self._prompts])
        for row, text in enumerate(prompts):
            text = text.strip() if isinstance(text, str) and text.strip() else None
            for column in self.columns:
                yield Listed(f"row {row}, {column}", "", self.prompt or text)

    def read(self, name: str) -> PILImage.Image:
        row, column = name.removeprefix("row ").split(", ", 1)
        return to_rgb(self._place.encode(self.rows[int(row)][column]))


def open_source(source: str | None, prompt: str | None = None) -> Source:
    """Open a folder of images, a dataset (a Hub id, file or folder), or with `None` the embedded default.

    Raises:
        FileNotFoundError: There is no default beside an installed package.
        ValueError: There are no images.
    """
    if source is None:
        if not _EMOJI.is_file():
            raise FileNotFoundError(
                "the default images and models are in examples/ of the repository of bt_hf, which is not beside this "
                "installation: name a folder of your own images, as in bt-hf studio my-photos/"
            )
        concepts = set(json.loads(_SPLIT.read_text())["held_out"])
        rows, _, _ = open_dataset(str(_EMOJI), None, streaming=False)
        kept = [row for row, concept in enumerate(rows["concept"]) if concept in concepts]
        return DatasetSource(rows.select(kept), "emoji", prompt)
    path = Path(source)
    if path.is_dir() and not _is_dataset(path):
        return FolderSource(path, prompt)
    if not path.exists() and (path.is_absolute() or source.startswith(".") or source.endswith(os.sep)):
        raise FileNotFoundError(f"no such folder: '{source}'")
    roles: Any = lambda names: dict.fromkeys(PROMPTS, "text") | {"file_name": "image"}  # noqa: E731
    rows, place, label = open_dataset(source, None, streaming=False, roles=roles)
    return DatasetSource(rows, label, prompt, place)


def default_unseen() -> list[str]:
    """Return captions of the default's other concepts, which the person never clicks on."""
    concepts = set(json.loads(_SPLIT.read_text())["train"])
    rows, _, _ = open_dataset(str(_EMOJI), None, streaming=False)
    pairs = zip(rows["concept"], rows["caption"], strict=True)
    return list(dict.fromkeys(caption for concept, caption in pairs if concept in concepts))


def _is_dataset(folder: Path) -> bool:
    """True for a folder that `datasets` wrote, or one of Parquet files and no images."""
    return (
        any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
        or any(folder.glob("*.parquet"))
        or any(folder.glob("data/*.parquet"))
    )


def _from_names(names: list[str]) -> dict[str, str | None]:
    """Return the words of file names as captions, if most images share theirs with another one."""
    captions = {name: words_of(name.rsplit("/", 1)[-1]) for name in names}
    counts = Counter(captions.values())
    shared = sum(count for words, count in counts.items() if words and count > 1)
    if not names or 2 * shared < len(names):
        return dict.fromkeys(names)
    return {name: words or None for name, words in captions.items()}
