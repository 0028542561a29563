"""Ratings, likes, rankings and best ones of the images of one prompt, and their pairs, each judgement counted once.

An image that beats m others was one choice among m + 1: the first of them in a ranking, as Plackett (1975, "The
analysis of permutations") and Luce have it, is a choice among all, the next one among those that are left, and so on.
Breaking a choice into m pairs (Azari Soufiani et al. 2013, "Generalized method-of-moments for rank aggregation")
makes no more judgements of it, so each of these pairs gets the weight 1/m.
"""

from __future__ import annotations

import hashlib
import math
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bt_hf.data.images import short

RANKS = ("rank", "ranking", "ranks", "rankings")
_ANY = (-math.inf, math.inf)
_RATING, _STARS = (0.0, math.inf), (0.0, 5.0)
RATINGS = {  # the smallest and the largest value
    "rating": _RATING,
    "ratings": _RATING,
    "rating_value": _RATING,
    "user_rating": _RATING,
    "stars": _STARS,
    "star_rating": _STARS,
    "score": _ANY,
    "scores": _ANY,
    "likes": _ANY,  # a count, or words
}
LIKES = ("liked", "like", "is_liked")
BEST = ("best", "best_index", "best_image")
_YES = {"true", "yes", "y", "like", "liked", "likes", "good", "up", "1", "1.0", "+1", "👍"}
_NO = {"false", "no", "n", "dislike", "disliked", "dislikes", "bad", "down", "0", "0.0", "-1", "-1.0", "👎"}
PARTNERS = 16  # lower images that one image is compared with at most: pairs of a prompt grow with its images alone
_GOLDEN = (math.sqrt(5) - 1) / 2


def weighted_pairs(values: Sequence[float]) -> Iterator[tuple[int, int, float]]:
    """Pair each image with those below it.

    An image above more than `PARTNERS` others meets that many of them, evenly spread from the lowest to the highest,
    and other images of the same value meet other ones. No chance is involved.

    Args:
        values: One number an image; the larger is the better one, equal ones make no pair.

    Yields:
        (better, worse, weight): two positions and 1/m, where the better image is in m pairs as the better one.

    Example:
        >>> list(weighted_pairs([5, 3, 3]))
        [(0, 1, 0.5), (0, 2, 0.5)]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    ascending = [values[index] for index in order]
    for better, value in enumerate(values):
        lower = order[: bisect_left(ascending, value)]
        if len(lower) > PARTNERS:
            start, step = better * _GOLDEN % 1, len(lower) / PARTNERS
            lower = [lower[int((number + start) * step)] for number in range(PARTNERS)]
        for worse in sorted(lower):
            yield better, worse, 1 / len(lower)


@dataclass(frozen=True)
class Judgement:
    """A column that judges images.

    Attributes:
        column: Its name.
        kind: "rank" has 1 for the best, of "rating" the larger is better, "like" tells liked from disliked, "best" is
            the best of a list by its index or file name, and "order" lists file names, the best first.
        low: The smallest value of a rating.
        high: The largest one.

    Example:
        >>> Judgement("stars", "rating", 0, 5).value(4), Judgement("rank", "rank").value(2)
        (4.0, -2.0)
    """

    column: str
    kind: Literal["rank", "rating", "like", "best", "order"]
    low: float = -math.inf
    high: float = math.inf

    @property
    def meaning(self) -> str:
        """Direction in which the column is read, for messages."""
        return {
            "rank": "1 is the best",
            "rating": "larger is better",
            "like": "liked ones against disliked ones",
            "best": "the best against each other one",
            "order": "file names, the best first",
        }[self.kind]

    def value(self, judged: Any) -> float:
        """Return what one image was judged as a number, of which the larger is better.

        Raises:
            ValueError: `reason: detail` of what is not such a judgement.
        """
        if self.kind == "like":
            return self._like(judged)
        try:
            number = float(judged)
        except (OverflowError, TypeError, ValueError):
            raise ValueError(f"not a number: '{self.column}' is {short(judged)}") from None
        if math.isnan(number):
            raise ValueError(f"not a number: '{self.column}' is {short(judged)}")
        if self.kind == "rank":
            if isinstance(judged, bool) or number < 0 or not (2 * number).is_integer():  # 2.5: second and third
                raise ValueError(
                    f"rank out of range: '{self.column}' is {short(judged)}, expected 1 for the best, 2 for the next; "
                    "if larger is better, call the column 'rating'"
                )
            return -number
        if math.isinf(number) or not self.low <= number <= self.high:
            numbers = "a finite number" if self.low == -math.inf else f"a number >= {self.low:g}"
            numbers = numbers if self.high == math.inf else f"a number from {self.low:g} to {self.high:g}"
            way_out = "; if it has another scale, call the column 'score'" if (self.low, self.high) != _ANY else ""
            raise ValueError(f"rating out of range: '{self.column}' is {short(judged)}, expected {numbers}{way_out}")
        return number

    def _like(self, judged: Any) -> float:
        word = str(judged).strip().lower()
        if word in _YES or word in _NO:
            return float(word in _YES)
        raise ValueError(
            f"not a like: '{self.column}' is {short(judged)}, expected true or false, 1 or 0, 'like' or 'dislike', "
            "'yes' or 'no'"
        )

    def values(self, row: Mapping[str, Any], images: str) -> list[float]:
        """Return what a row says of each of its images, as `value` does.

        Args:
            row: A row.
            images: The column of it that lists the images.

        Raises:
            ValueError: `reason: detail`: no lists of one length, a value that is not of its kind, an image that is
                not there, or is there twice.
        """
        pictures, judged = row[images], row[self.column]
        if not isinstance(pictures, list) or (self.kind == "best" and not pictures):
            raise ValueError(f"images missing: '{images}' is {short(pictures)}, expected a list of them")
        _check_distinct(pictures, images)
        if self.kind == "best":
            best = self._position(judged, pictures)
            return [float(index == best) for index in range(len(pictures))]
        if not isinstance(judged, list) or len(judged) != len(pictures):
            raise ValueError(
                f"images without {self.kind}s: '{images}' and '{self.column}' must be lists of one length"
                if self.kind != "order"
                else f"incomplete ranking: '{self.column}' must name each of the {len(pictures)} images once"
            )
        if self.kind != "order":
            return [self.value(one) for one in judged]
        places = [self._position(name, pictures) for name in judged]
        if len(set(places)) < len(places):
            raise ValueError(f"image twice: '{self.column}' names an image more than once: {short(judged)}")
        return [-float(places.index(index)) for index in range(len(pictures))]

    def _position(self, wanted: Any, pictures: list[Any]) -> int:
        """Return the position of an image by its index, its path as it stands there, or its file name."""
        if isinstance(wanted, str):
            paths = [_path(picture) for picture in pictures]
            found = [index for index, path in enumerate(paths) if path == wanted]
            names = [os.path.basename(path) if path else None for path in paths]
            found = found or [index for index, name in enumerate(names) if name == wanted]
            if len(found) == 1:
                return found[0]
            problem = "several images are called so" if found else f"expected one of {short(names)}"
            if not (self.kind == "best" and wanted.isdecimal() and not found):
                raise ValueError(f"unknown image: '{self.column}' is {short(wanted)}, {problem}")
        if isinstance(wanted, bool) or not isinstance(wanted, int | float | str) or float(wanted) % 1 != 0:
            raise ValueError(f"unknown image: '{self.column}' is {short(wanted)}, expected an index or a file name")
        if not 0 <= float(wanted) < len(pictures):
            raise ValueError(
                f"unknown image: '{self.column}' is {short(wanted)}, expected an index from 0 to {len(pictures) - 1}"
            )
        return int(float(wanted))


def is_place(value: float, all_values: Sequence[float]) -> bool:
    """True if a rank is a place among the ranks of a prompt, by any of the usual ways to number ties, from 0 or 1.

    Example:
        >>> [is_place(rank, [1, 2, 2, 4]) for rank in (1, 2, 4)], is_place(5, [5, 5, 1])
        ([True, True, True], False)
    """
    better = [one for one in all_values if one < value]
    place = value + (min(all_values) < 1)
    return len(set(better)) + 1 <= place <= len(better) + all_values.count(value)


def identity(image: Any) -> Any:
    """Return what equal images of a dataset share, without opening them: their bytes or else their path, or `None`."""
    if isinstance(image, Mapping):
        content = image.get("bytes")
        return identity(image.get("path") if content is None else content)
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    if isinstance(image, os.PathLike):
        return os.fspath(image)
    return image if image is None or isinstance(image, str | int) else id(image)


def _check_distinct(pictures: list[Any], images: str) -> None:
    keys = [key for key in map(identity, pictures) if key is not None]
    if len(set(keys)) < len(keys):
        raise ValueError(f"image twice: '{images}' has an image more than once; judge each image of a prompt once")


def _path(picture: Any) -> str | None:
    path = picture.get("path") if isinstance(picture, Mapping) else picture
    return os.fspath(path) if isinstance(path, str | os.PathLike) else None
