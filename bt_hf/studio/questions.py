"""Questions that are put: the next pairs, and now and then an old one with its sides swapped."""

import itertools
import random
import secrets
import threading
from collections.abc import Callable

from bt_hf.data.clicks import CHOICES, Asked, ClickLog, same_picture
from bt_hf.studio.errors import NotSavedError
from bt_hf.studio.pool import Pool
from bt_hf.studio.session import Session

# Pairs that are ready: the one on the screen and the two after it, which the page decodes in advance.
AHEAD = 3
# One pair in so many comes back swapped, at the earliest after so many others.
REPEAT_EVERY, REPEAT_AFTER = 12, 6
_TRIES = 20

# Picks a pair: (left, right, kind), or None if there is no pair to ask about.
Pick = Callable[[], tuple[int, int, str] | None]


class Questions:
    """Queue of pairs; each is in the log before it is put.

    Args:
        session: The session, whose unanswered pairs come first.
        pool: Its images.
        pick: Chooses the next pair.
    """

    def __init__(self, session: Session, pool: Pool, pick: Pick) -> None:
        self.session, self.pool, self.pick = session, pool, pick
        self._lock = threading.RLock()
        self._random = random.Random(secrets.randbits(64))
        log = session.log
        returned = [log.asked[name] for name in reversed(log.returned)]
        known = {*log.answered, *log.returned}
        waiting = [pair for pair in log.asked.values() if pair.id not in known and pair.kind != "blind"]
        first = [*(pair for pair in returned if pair.kind != "blind"), *waiting[-AHEAD:]]
        self._queue = [pair for pair in first if self._shown(pair)]
        self._number = len(log.asked)
        self._repeated = {pair.of for pair in log.asked.values() if pair.of}

    def queue(self) -> list[Asked]:
        """Return the pairs that are ready, filled up to `AHEAD`, the one to show first.

        Raises:
            NotSavedError: A pair could not be stored, and there is none.
        """
        with self._lock:
            answered = self.session.log.answered
            self._queue = [pair for pair in self._queue if pair.id not in answered]
            try:
                while len(self._queue) < AHEAD:
                    pair = self._next()
                    if pair is None:
                        break
                    self._queue.append(pair)
            except NotSavedError:
                if not self._queue:
                    raise
            return list(self._queue)

    def put_back(self, pair: Asked) -> None:
        """Put a pair first, whose answer was taken back."""
        with self._lock:
            if pair.kind != "blind":
                self._queue = [pair, *(one for one in self._queue if one.id != pair.id)]

    def put(self, prompt: str, left: int, right: int, kind: str, of: str | None = None, adapted: str = "") -> Asked:
        """Write a pair to the log, and return it.

        Raises:
            NotSavedError: It is not in the log.
        """
        with self._lock:
            self._number += 1
            name = f"p{self._number}-{secrets.token_hex(3)}"
            line = {"asked": name, "prompt": prompt, "left": left, "right": right, "kind": kind}
            self.session.append(line | ({"of": of} if of else {}) | ({"adapted": adapted} if adapted else {}))
            return self.session.log.asked[name]

    def _next(self) -> Asked | None:
        again = self._due()
        if again is not None and self._shown(again):
            self._repeated.add(again.id)
            return self.put(again.prompt, again.right, again.left, "repeat", of=again.id)
        for _ in range(_TRIES):  # images may have vanished since
            found = self.pick()
            if found is None:
                return None
            left, right, kind = found
            if self._random.random() < 0.5:
                left, right = right, left
            if not (self.keep(left) and self.keep(right)):
                continue
            if not same_picture(self.session.picture_file(left), self.session.picture_file(right)):
                return self.put(self.pool.pictures[left].prompt, left, right, kind)
        return None

    def _due(self) -> Asked | None:
        """Return a pair to put once more, if it is time for one."""
        clicks = self.session.log.clicks
        if len(clicks) < REPEAT_AFTER or len(clicks) // REPEAT_EVERY < len(self._repeated) + (
            len(clicks) % REPEAT_EVERY < REPEAT_EVERY // 2
        ):
            return None
        old = [
            click.asked
            for click in clicks[-REPEAT_EVERY * 3 : -REPEAT_AFTER + 1]
            if CHOICES[click.choice] in (0.0, 1.0)
            and click.asked.kind in ("asked", "random")
            and click.asked.id not in self._repeated
        ]
        return self._random.choice(old) if old else None

    def _shown(self, pair: Asked) -> bool:
        return self.keep(pair.left) and self.keep(pair.right)

    def keep(self, number: int) -> bool:
        """Store a picture; False if it is not there any more."""
        if self.session.picture_file(number) is not None:
            return True
        try:
            self.session.keep_picture(number, self.pool.read(number))
        except (LookupError, ValueError):
            return False
        return True


def any_pair(pool: Pool, log: ClickLog, generator: random.Random) -> tuple[int, int, str] | None:
    """Pick two images of one prompt by chance that were not put together before; `None` if there are no others."""
    groups = pool.by_prompt(least=2)
    asked = {frozenset((pair.left, pair.right)) for pair in list(log.asked.values())}
    prompts = list(groups)
    for _ in range(_TRIES if prompts else 0):
        left, right = generator.sample(groups[generator.choice(prompts)], 2)
        if frozenset((left, right)) not in asked:
            return left, right, "random"
    generator.shuffle(prompts)
    for prompt in prompts:  # few are left
        others = [pair for pair in itertools.combinations(groups[prompt], 2) if frozenset(pair) not in asked]
        if others:
            return (*generator.choice(others), "random")
    return None
