"""Desk of the studio: answers what the page asks, from the session, the pool and the learner."""

import random
import threading
from collections import OrderedDict
from typing import Any

from bt_hf.data.clicks import FORMAT, Asked, Click
from bt_hf.studio.learner import Learner
from bt_hf.studio.pictures import encode_shown, encode_thumbnail
from bt_hf.studio.pool import Pool
from bt_hf.studio.questions import Questions
from bt_hf.studio.session import Session

# Images of a group, by the way of judging it.
GROUP = {"stars": 6, "best": 4, "rank": 5}
WAYS = ("pair", *GROUP)
SIDES = (64, 128, 256, 512)  # sides of thumbnails
_KEPT = 600  # thumbnails in memory
_NAMED = 200  # skipped images that are named


class RefusedError(Exception):
    """Request that can't be met.

    Args:
        status: HTTP status.
        text: One line with the way out.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Desk:
    """Everything that the page can ask for.

    Args:
        session, pool, learner: The parts.
        title: What the page calls the images.
    """

    def __init__(self, session: Session, pool: Pool, learner: Learner, title: str) -> None:
        self.session, self.pool, self.learner, self.title = session, pool, learner, title
        self.questions = Questions(session, pool, learner.pick)
        self._lock = threading.RLock()
        self._thumbnails: OrderedDict[tuple[int, int], tuple[bytes, str]] = OrderedDict()
        self._groups: OrderedDict[str, tuple[str, tuple[int, ...]]] = OrderedDict()
        self._random = random.Random()

    def state(self) -> dict[str, Any]:
        """Return everything that the page needs to begin."""
        queue = self.questions.queue()
        skipped = [{"file": name, "reason": reason} for name, reason in list(self.pool.skipped.items())]
        return {
            "format": FORMAT,
            "session": self.session.id,
            "title": self.title,
            "source": self.session.source,
            "images": len(self.pool),
            "prompts": len(self.pool.by_prompt()),
            "skipped": skipped[:_NAMED],
            "skipped_count": len(skipped),
            "clicks": len(self.session.log.answers),
            "queue": [_pair(pair) for pair in queue],
            "note": None if queue else self._why_empty(),
            "taste": self.learner.told(),
            "ways": self._ways(),
            "can": {"draw": _cannot("later"), "train": _cannot("later"), "publish": _cannot("later")},
            "job": None,
            "drawing": None,
        }

    def click(self, click: str, pair: str, choice: str, seconds: float | None) -> dict[str, Any]:
        """Write an answer to disk, and return what comes next; an answer that is there already is confirmed.

        Raises:
            NotSavedError: It is not on the disk.
            RefusedError: There is no such pair.
        """
        with self._lock:
            log = self.session.log
            if not log.knows(click):
                if pair not in log.asked:
                    raise RefusedError(409, f"there is no pair {pair[:40]!r} in this session: reload the page")
                self.session.append({"click": click, "pair": pair, "choice": choice, "seconds": seconds})
                self.learner.notice()
            return self._next()

    def undo(self, undo: str, click: str | None) -> dict[str, Any]:
        """Take back an answer, the last one if `click` is `None`; its pair comes first again.

        Raises:
            NotSavedError: It is not on the disk.
            RefusedError: There is no such answer.
        """
        with self._lock:
            log = self.session.log
            if undo not in log.undos:
                click = next(reversed(log.answers), None) if click is None else click
                if click is None or not log.knows(click):
                    raise RefusedError(409, "there is no click to take back")
                answer = log.answers.get(click)
                self.session.append({"undo": click, "id": undo})
                if isinstance(answer, Click):
                    self.questions.put_back(answer.asked)
                self.learner.notice()
            return self._next()

    def group(self, way: str) -> dict[str, Any]:
        """Return images of one prompt to be judged together.

        Raises:
            RefusedError: No prompt has enough images, or the way is unknown.
        """
        if way not in GROUP:
            raise RefusedError(400, f"way should be one of {', '.join(GROUP)}")
        groups = self.pool.by_prompt(least=2)
        while groups:
            prompt = self._random.choice(list(groups))
            numbers = self._random.sample(groups[prompt], min(GROUP[way], len(groups[prompt])))
            kept = tuple(number for number in numbers if self.questions.keep(number))
            if len(kept) >= 2:
                name = f"g-{self._random.getrandbits(64):016x}"
                with self._lock:
                    self._groups[name] = (prompt, kept)
                    while len(self._groups) > 1000:
                        self._groups.popitem(last=False)
                return {"id": name, "prompt": prompt, "images": list(kept)}
            groups = self.pool.by_prompt(least=2)
        raise RefusedError(404, "no prompt has two images to compare")

    def judge(self, judgement: str, group: str, way: str, values: dict[int, float]) -> dict[str, Any]:
        """Write a judgement of a group to disk: a value for each of its images, of which the larger is better.

        Raises:
            NotSavedError: It is not on the disk.
            RefusedError: There is no such group, or it has other images.
        """
        with self._lock:
            if not self.session.log.knows(judgement):
                if group not in self._groups:
                    raise RefusedError(409, "this group is from before a restart: take the next one")
                prompt, images = self._groups[group]
                if set(values) != set(images):
                    raise RefusedError(400, f"expected a judgement of the images {', '.join(map(str, images))}")
                order = [values[number] for number in images]
                line = {"judged": judgement, "prompt": prompt, "images": list(images), "values": order, "way": way}
                self.session.append(line)
                self.learner.notice()
            return self._next()

    def images_of(self, group: str) -> tuple[int, ...]:
        """Return the images of a group; none if it is unknown."""
        return self._groups.get(group, ("", ()))[1]

    def picture(self, number: int, side: int | None) -> tuple[bytes, str]:
        """Return a picture as (bytes, suffix), encoded anew.

        Raises:
            RefusedError: There is no such picture, or it is gone.
        """
        if side is None:
            file = self.session.picture_file(number)
            if file is not None:
                return file.read_bytes(), file.suffix
        else:
            side = min((known for known in SIDES if known >= side), default=SIDES[-1])
            if (number, side) in self._thumbnails:
                return self._thumbnails[number, side]
        try:
            picture = self.pool.read(number)
        except (LookupError, ValueError) as error:
            raise RefusedError(404, str(error)) from None
        if side is None:
            return encode_shown(picture)
        found = encode_thumbnail(picture, side)
        with self._lock:
            self._thumbnails[number, side] = found
            while len(self._thumbnails) > _KEPT:
                self._thumbnails.popitem(last=False)
        return found

    def _next(self) -> dict[str, Any]:
        queue = [_pair(pair) for pair in self.questions.queue()]
        return {"clicks": len(self.session.log.answers), "queue": queue, "taste": self.learner.told()}

    def _ways(self) -> list[str]:
        several = any(len(numbers) > 2 for numbers in self.pool.by_prompt(least=3).values())
        return list(WAYS) if several else ["pair"]

    def _why_empty(self) -> str:
        if not len(self.pool):
            return "There are no images yet."
        return "No prompt has two images to compare: give one prompt for all of them with --prompt."


def _pair(pair: Asked) -> dict[str, Any]:
    return {"id": pair.id, "prompt": pair.prompt, "left": pair.left, "right": pair.right}


def _cannot(why: str) -> dict[str, Any]:
    return {"ok": False, "why": why}
