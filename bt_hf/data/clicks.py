"""Log of clicks: an append-only JSONL file, of which every whole line counts.

A session of `bt-hf studio` is a folder with `session.json` (its format), `clicks.jsonl` (this log) and `images/`, the
pictures that were shown, by number. Lines of the log are

    {"asked": "p7", "prompt": "a cat", "left": 3, "right": 5, "kind": "random"}     a pair that was put
    {"click": "5f0c...", "pair": "p7", "choice": "left", "seconds": 1.2}            its answer: left, right, tie, skip
    {"group": "g4", "prompt": "a cat", "images": [3, 5, 8]}                         images that were put together
    {"judged": "77ab...", "prompt": "a cat", "images": [3, 5], "values": [5, 2]}    larger is better
    {"undo": "5f0c...", "id": "9e1d..."}                                            nothing is erased

and each ends with a line break, without which it was cut.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_hf.data.judgements import weighted_pairs

SESSION, CLICKS, IMAGES = "session.json", "clicks.jsonl", "images"
FORMAT = "bt_hf studio 1"  # raised with every change to what the files mean
CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5, "skip": None}  # P(left preferred)
KINDS = ("asked", "random", "repeat", "blind")
_SUFFIXES = (".png", ".jpg")


@dataclass(frozen=True)
class Asked:
    """Pair that was put to the person.

    Attributes:
        id: Its name in the log.
        prompt: What both images should show.
        left, right: Numbers of the images.
        kind: "asked" was chosen to teach most, "random" by chance, "repeat" comes back with its sides swapped, "blind"
            compares drawings of a pipeline with and without its LoRA.
        of: Pair that a repeat repeats.
        adapted: Side of the LoRA's drawing in a blind pair, "left" or "right".
    """

    id: str
    prompt: str
    left: int
    right: int
    kind: str = "random"
    of: str | None = None
    adapted: str | None = None


@dataclass(frozen=True)
class Click:
    """Answer to a pair.

    Attributes:
        id: Made by whoever clicks, so that a click that comes twice counts once.
        asked: The pair.
        choice: "left", "right", "tie" or "skip".
        seconds: Time that it took.
        model, base: Margins, left minus right, that the taste so far and the base predicted; `None` without one.
    """

    id: str
    asked: Asked
    choice: str
    seconds: float | None = None
    model: float | None = None
    base: float | None = None


@dataclass(frozen=True)
class Judged:
    """Stars, a best one or a ranking of several images of a prompt, as values of which the larger is better."""

    id: str
    prompt: str
    images: tuple[int, ...]
    values: tuple[float, ...]
    way: str = "stars"


@dataclass(frozen=True)
class NumberedPair:
    """Row of the contract, with the numbers of its images."""

    prompt: str
    chosen: int
    rejected: int
    preference: float
    weight: float


@dataclass
class ClickLog:
    """Everything that a log says.

    Attributes:
        asked: Pairs, by their ids.
        groups: Prompt and images of what was put to be judged together, by its id.
        answers: Clicks and judgements that stand, by their ids, in their order.
        undone: Ids of those that were taken back.
        undos: Ids of the undoings themselves.
        answered: Pairs with a click that stands, and how many.
        returned: Pairs whose click was taken back, and that have no other since; the last one last.
        damaged: Numbers of lines that could not be read.
    """

    asked: dict[str, Asked] = field(default_factory=dict)
    groups: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    answers: dict[str, Click | Judged] = field(default_factory=dict)
    undone: set[str] = field(default_factory=set)
    undos: set[str] = field(default_factory=set)
    answered: dict[str, int] = field(default_factory=dict)
    returned: dict[str, None] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """Take in a line.

        Raises:
            ValueError: It is not one of the kinds above, or names a pair that was never put.
        """
        try:
            self._add(line)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a line of a log of clicks ({type(error).__name__}: {error})") from error

    def _add(self, line: dict[str, Any]) -> None:
        if "asked" in line:
            pair = Asked(
                str(line["asked"]),
                str(line["prompt"]),
                int(line["left"]),
                int(line["right"]),
                str(line["kind"]),
                line.get("of"),
                line.get("adapted"),
            )
            self.asked[pair.id] = pair
        elif "click" in line:
            click = Click(
                str(line["click"]),
                self.asked[line["pair"]],
                str(line["choice"]),
                line.get("seconds"),
                line.get("model"),
                line.get("base"),
            )
            if click.choice not in CHOICES:
                raise ValueError(f"unknown choice {click.choice!r}")
            if not self.knows(click.id):
                self.answers[click.id] = click
                self.answered[click.asked.id] = self.answered.get(click.asked.id, 0) + 1
                self.returned.pop(click.asked.id, None)
        elif "group" in line:
            self.groups[str(line["group"])] = (str(line["prompt"]), tuple(map(int, line["images"])))
        elif "judged" in line:
            images, values = tuple(map(int, line["images"])), tuple(map(float, line["values"]))
            if len(images) != len(values):
                raise ValueError("images and values differ in number")
            judged = Judged(str(line["judged"]), str(line["prompt"]), images, values, str(line.get("way", "stars")))
            if not self.knows(judged.id):
                self.answers[judged.id] = judged
        elif "undo" in line:
            gone = self.answers.pop(str(line["undo"]), None)
            self.undone.add(str(line["undo"]))
            self.undos.add(str(line.get("id", line["undo"])))
            if isinstance(gone, Click):
                self.answered[gone.asked.id] -= 1
                if not self.answered[gone.asked.id]:
                    del self.answered[gone.asked.id]
                    self.returned[gone.asked.id] = None
        else:
            raise ValueError(f"unknown keys {sorted(line)[:3]}")

    def knows(self, answer: str) -> bool:
        """True if a click or judgement of this id was taken in, also if it was undone since."""
        return answer in self.answers or answer in self.undone

    @property
    def clicks(self) -> list[Click]:
        """Clicks that stand, in their order."""
        return [answer for answer in list(self.answers.values()) if isinstance(answer, Click)]

    def pairs(self) -> list[NumberedPair]:
        """Return the pairs that the answers make, as rows of the contract; a skipped pair makes none.

        Example:
            >>> log = ClickLog()
            >>> log.add({"asked": "p1", "prompt": "a cat", "left": 3, "right": 5, "kind": "random"})
            >>> log.add({"click": "a", "pair": "p1", "choice": "right"})
            >>> log.pairs()
            [NumberedPair(prompt='a cat', chosen=5, rejected=3, preference=1.0, weight=1.0)]
        """
        return [pair for answer in list(self.answers.values()) for pair in pairs_of(answer)]


def pairs_of(answer: Click | Judged) -> Iterator[NumberedPair]:
    """Yield the pairs of one answer; those of a judgement are weighted as `judgements.weighted_pairs` does."""
    if isinstance(answer, Judged):
        for better, worse, weight in weighted_pairs(answer.values):
            yield NumberedPair(answer.prompt, answer.images[better], answer.images[worse], 1.0, weight)
        return
    pair, left = answer.asked, CHOICES[answer.choice]
    if left is not None:
        images = (pair.right, pair.left) if left == 0 else (pair.left, pair.right)
        yield NumberedPair(pair.prompt, *images, max(left, 1 - left), 1.0)


def is_session(folder: Path) -> bool:
    """True if a folder is a session of clicks."""
    return (folder / SESSION).is_file() and ((folder / CLICKS).is_file() or (folder / IMAGES).is_dir())


def read_session(folder: Path) -> dict[str, Any]:
    """Read `session.json`.

    Raises:
        ValueError: It is of another version, or not readable.
    """
    try:
        found = json.loads((folder / SESSION).read_text(encoding="utf-8"))
        version = found["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"'{folder}': {SESSION} cannot be read ({type(error).__name__}); name another folder"
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"'{folder}' is a session of the format {str(version)[:40]!r}, and this version reads {FORMAT!r}: use the "
            "version of bt_hf that wrote it, or name another folder"
        )
    return dict(found)


def read_clicks(folder: Path) -> ClickLog:
    """Read the log of a session, as far as it was written; a last line without its end was never confirmed.

    Lines that cannot be read are left out, and their numbers are in `damaged`.
    """
    log = ClickLog()
    try:
        content = (folder / CLICKS).read_bytes()
    except FileNotFoundError:
        return log
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("not an object")
            log.add(found)
        except (ValueError, RecursionError):
            log.damaged.append(number)
    return log


def image_file(folder: Path, number: int) -> Path | None:
    """Return the file of a picture that was shown, `None` if it was not."""
    files = (folder / IMAGES / f"{number}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def same_picture(one: Path | None, other: Path | None) -> bool:
    """True if two pictures that were shown are equal."""
    return one is not None and other is not None and filecmp.cmp(one, other, shallow=False)


def rows_of_session(folder: Path) -> list[dict[str, Any]]:
    """Return the pairs of a session as rows of the contract, with images as paths in its folder.

    Pairs of two equal pictures are left out: there was nothing to prefer.

    Raises:
        ValueError: The session is of another version.
    """
    read_session(folder)
    rows = []
    for pair in read_clicks(folder).pairs():
        files = {"chosen": image_file(folder, pair.chosen), "rejected": image_file(folder, pair.rejected)}
        if same_picture(*files.values()):
            continue
        names = {name: None if file is None else f"{IMAGES}/{file.name}" for name, file in files.items()}
        rows.append({"prompt": pair.prompt, **names, "preference": pair.preference, "weight": pair.weight})
    return rows


def words_of(file_name: str) -> str:
    """Return the words of a file name without numbers at its end, as a caption.

    Example:
        >>> words_of("red_apple-02.png"), words_of("a cat (3).jpg")
        ('red apple', 'a cat')
    """
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", file_name)
    words = re.sub(r"[_\-.+]+", " ", stem)
    return " ".join(re.sub(r"[\s(\[]*\d+[)\]]*\s*$", "", words).split())
