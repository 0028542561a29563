"""Desk of the studio: answers what the page asks, from the session, the pool and the learner."""

import importlib.util
import random
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from bt_hf.data.clicks import FORMAT, Asked, Click
from bt_hf.data.images import one_line, to_rgb
from bt_hf.studio.drawer import Drawer
from bt_hf.studio.errors import RefusedError
from bt_hf.studio.jobs import Jobs
from bt_hf.studio.judging import tally, votes_of
from bt_hf.studio.learner import Learner
from bt_hf.studio.pictures import encode_shown, encode_thumbnail
from bt_hf.studio.pool import UPLOADED, Pool
from bt_hf.studio.questions import Questions
from bt_hf.studio.session import Session
from bt_hf.studio.sharing import FORMATS, WHAT, Sharing, why_not_published
from bt_hf.studio.training import Drawing, Workshop, last_drawing

# Images of a group, by the way of judging it.
GROUP = {"stars": 6, "best": 4, "rank": 5}
WAYS = ("pair", *GROUP)
SIDES = (64, 128, 256, 512)  # sides of thumbnails
MOST_UPLOADS = 10_000
_KEPT = 600  # thumbnails in memory
_NAMED = 200  # skipped images that are named


class Desk:
    """Everything that the page can ask for.

    Args:
        session, pool, learner: The parts.
        title: What the page calls the images.
        base: Hub id or folder of the base, to train a reward on.
        drawing: Pipeline to train; `None` without one.
        uploads: Take images from the page.

    Attributes:
        drawer: Draws candidates; set by whoever starts one.
    """

    def __init__(
        self,
        session: Session,
        pool: Pool,
        learner: Learner,
        title: str,
        base: str,
        drawing: Drawing | None = None,
        uploads: bool = False,
    ) -> None:
        self.uploads = uploads
        self.drawer: Drawer | None = None
        self.session, self.pool, self.learner, self.title = session, pool, learner, title
        self.questions = Questions(session, pool, learner.pick)
        self.workshop = Workshop(session, pool, self.questions, base, drawing)
        self.sharing = Sharing(session, pool, learner)
        works = {
            "reward": self.workshop.train_reward,
            "drawing": self.workshop.train_drawing,
            "publish": self.sharing.publish,
        }
        self.jobs = Jobs(works)
        self._lock = threading.RLock()
        self._thumbnails: OrderedDict[tuple[int, int], tuple[bytes, str]] = OrderedDict()
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
            "can": self._can(),
            "job": self.jobs.current(),
            "drawing": last_drawing(self.session.folder),
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
                model, base = self.learner.predict(log.asked[pair])
                line = {"click": click, "pair": pair, "choice": choice, "seconds": seconds}
                self.session.append({**line, "model": model, "base": base})
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
                self.session.append({"group": name, "prompt": prompt, "images": list(kept)})
                return {"id": name, "prompt": prompt, "images": list(kept)}
            groups = self.pool.by_prompt(least=2)
        raise RefusedError(404, "no prompt has two images to compare")

    def judge(self, judgement: str, group: str, way: str, values: dict[int, float]) -> dict[str, Any]:
        """Write a judgement to disk: values of at least two images of a group, of which the larger is better.

        Raises:
            NotSavedError: It is not on the disk.
            RefusedError: There is no such group, or it has other images.
        """
        with self._lock:
            if not self.session.log.knows(judgement):
                if group not in self.session.log.groups:
                    raise RefusedError(409, f"there is no group {group[:40]!r} in this session: take the next one")
                prompt, images = self.session.log.groups[group]
                if len(values) < 2 or not set(values) <= set(images):
                    raise RefusedError(400, f"expected a judgement of the images {', '.join(map(str, images))}")
                line = {"judged": judgement, "prompt": prompt, "way": way}
                self.session.append(line | {"images": list(values), "values": list(values.values())})
                self.learner.notice()
            return self._next()

    def images_of(self, group: str) -> tuple[int, ...]:
        """Return the images of a group; none if it is unknown."""
        return self.session.log.groups.get(group, ("", ()))[1]

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

    def upload(self, content: bytes, name: str, prompt: str) -> dict[str, Any]:
        """Take in an image, of which the pixels alone are kept.

        Raises:
            NotSavedError: It is not on the disk.
            RefusedError: Uploads are off, there are too many, or it is not an image.
        """
        if not self.uploads:
            raise RefusedError(403, "uploads are off: start the studio with --uploads")
        if len(self.pool.pictures) >= MOST_UPLOADS:
            raise RefusedError(409, f"a session takes at most {MOST_UPLOADS} images")
        try:
            picture = to_rgb(content)
        except ValueError as error:
            raise RefusedError(400, one_line(error)) from None
        number = self.pool.add(picture, name, prompt, UPLOADED)
        self.learner.notice()
        return {"image": number, "images": len(self.pool)}

    # --- Training, drawing, sharing ---

    def start(self, kind: str, options: dict[str, Any]) -> dict[str, Any]:
        """Begin a job.

        Raises:
            RefusedError: It can't be done, or another one is running.
        """
        can = self._can()["draw" if kind == "drawing" else "train" if kind == "reward" else "publish"]
        if not can["ok"]:
            raise RefusedError(409, can["why"])
        job = self.jobs.start(kind, options)
        if job is None:
            raise RefusedError(409, "a job is running: wait for it, or stop it")
        return job

    def blind(self) -> dict[str, Any]:
        """Return the next pair of drawings to compare, or what the votes say.

        Raises:
            RefusedError: There is nothing to compare.
        """
        drawing = last_drawing(self.session.folder)
        log = self.session.log
        run = drawing and drawing["run"]
        pairs = [pair for pair in list(log.asked.values()) if pair.kind == "blind" and pair.of == run]
        if not pairs:
            raise RefusedError(409, "there is nothing to compare: train the drawing first")
        left = [pair for pair in pairs if pair.id not in log.answered]
        if left:
            return {**_pair(left[0]), "judged": len(pairs) - len(left), "of": len(pairs)}
        return {"done": True, "of": len(pairs), **tally(votes_of(log, str(run)))}

    def vote(self, pair: str, choice: str) -> dict[str, Any]:
        """Write a vote to disk, which is a click on a pair of drawings, and return the next pair.

        Raises:
            NotSavedError: It is not on the disk.
            RefusedError: There is no such pair.
        """
        with self._lock:
            asked = self.session.log.asked.get(pair)
            if asked is None or asked.kind != "blind":
                raise RefusedError(409, "this pair is not one of the blind comparison: reload the page")
            if pair not in self.session.log.answered:
                self.session.append({"click": f"vote-{pair}", "pair": pair, "choice": choice, "seconds": None})
                self.learner.notice()
        return self.blind()

    def card(self, what: str | None, show_images: bool) -> dict[str, Any]:
        """Return the card as it would be published.

        Raises:
            RefusedError: Nothing is trained yet.
        """
        if what is not None and WHAT.get(what) is None:
            raise RefusedError(400, "what should be drawing or reward")
        try:
            return {"markdown": self.sharing.card(what, show_images)}
        except FileNotFoundError as error:
            raise RefusedError(409, str(error)) from None

    def export(self, kind: str, path: Path) -> str:
        """Write the pairs to a file, and return the name that it should have.

        Raises:
            RefusedError: There are none, or the format is unknown.
        """
        if kind not in FORMATS:
            raise RefusedError(400, f"format should be one of {', '.join(FORMATS)}")
        try:
            (self.sharing.parquet if kind == "parquet" else self.sharing.archive)(path)
        except ValueError as error:
            raise RefusedError(409, str(error)) from None
        return "pairs.parquet" if kind == "parquet" else "pairs.zip"

    def _can(self) -> dict[str, dict[str, Any]]:
        clicked = any(pair.preference != 0.5 for pair in self.session.log.pairs())
        few = None if clicked else "choose a picture first"
        draw = few
        if self.workshop.drawing is None:
            draw = "start the studio with --pipeline, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        elif importlib.util.find_spec("diffusers") is None:
            draw = "diffusers is not installed: run `pip install 'bt-hf[diffusion]'`"
        upload = None if self.uploads else "start the studio with --uploads"
        whys = {"draw": draw, "train": few, "publish": why_not_published(), "upload": upload}
        return {name: {"ok": why is None, "why": why} for name, why in whys.items()}

    def _next(self) -> dict[str, Any]:
        queue = [_pair(pair) for pair in self.questions.queue()]
        self.learner.look()
        return {"clicks": len(self.session.log.answers), "queue": queue, "taste": self.learner.told()}

    def _ways(self) -> list[str]:
        several = any(len(numbers) > 2 for numbers in self.pool.by_prompt(least=3).values())
        return list(WAYS) if several else ["pair"]

    def _why_empty(self) -> str:
        if self.drawer is not None and self.drawer.problem is not None:
            return self.drawer.problem[0].upper() + self.drawer.problem[1:]
        if self.drawer is not None and self.drawer.drawing:
            return "The next pictures are being drawn."
        if len(self.pool) < 2 and self.uploads:
            return "Add pictures to choose between."
        if not self.pool.by_prompt(least=2):
            return "No prompt has two images to compare: give one prompt for all of them with --prompt."
        return "You have compared every pair there is."


def _pair(pair: Asked) -> dict[str, Any]:
    return {"id": pair.id, "prompt": pair.prompt, "left": pair.left, "right": pair.right}
