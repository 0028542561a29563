"""Fields of requests, checked one by one before anything is done."""

import json
import math
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bt_hf.hub.contract import check_repo_id
from bt_hf.studio.errors import RefusedError

MAX_BODY = 64 * 1024  # bytes of a JSON request
MAX_UPLOAD = 20 * 1024 * 1024  # bytes of an uploaded picture
_LONGEST_ID, _LONGEST_TEXT = 80, 200
Fields = dict[str, Any]
Answer = Callable[[Fields], Awaitable[Any]]


def posted(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """Return a route for JSON objects of a bounded size."""

    async def route(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "expected Content-Type: application/json")
        try:
            fields = json.loads(await read_body(request, MAX_BODY))
        except (ValueError, RecursionError):
            raise RefusedError(400, "expected a JSON object") from None
        if not isinstance(fields, dict):
            raise RefusedError(400, "expected a JSON object")
        return JSONResponse(await answer(fields))

    return route


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body as it comes, and no more than the limit of it."""
    told = request.headers.get("content-length", "0")
    if not told.isdecimal() or int(told[:20]) > limit:
        raise RefusedError(413, f"expected at most {limit} bytes")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RefusedError(413, f"expected at most {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def read_form(request: Request) -> dict[str, str]:
    """Read the fields of an HTML form."""
    return dict(parse_qsl((await read_body(request, MAX_BODY)).decode("utf-8", "replace")))


def name_of(fields: Fields, name: str = "id") -> str:
    """Return the name of something: a short text of plain letters."""
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID or not value.isascii():
        raise RefusedError(400, f"{name} should be a text of at most {_LONGEST_ID} letters")
    return value


def one_of(fields: Fields, name: str, known: Any) -> str:
    """Return one of some words."""
    value = fields.get(name)
    if not isinstance(value, str) or value not in known:
        raise RefusedError(400, f"{name} should be one of {', '.join(known)}")
    return value


def text_of(request: Request, name: str, default: str) -> str:
    """Return a text of a query, on one line."""
    value = " ".join(request.query_params.get(name, "").split())
    if len(value) > _LONGEST_TEXT or not value.isprintable():
        raise RefusedError(400, f"{name} should be a text of at most {_LONGEST_TEXT} letters")
    return value or default


def seconds_of(fields: Fields) -> float | None:
    """Return how long the person took, in seconds."""
    value = fields.get("seconds")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RefusedError(400, "seconds should be a number of at least 0")
    return round(float(value), 3)


def number_of(text: str, name: str) -> int:
    """Return a whole number of a query."""
    if not text.isdecimal() or len(text) > 9:
        raise RefusedError(400, f"{name} should be a whole number")
    return int(text)


def values_of(fields: Fields, way: str, images: tuple[int, ...]) -> dict[int, float]:
    """Return a judgement as a value for each image, of which the larger is better."""
    if way == "stars":
        stars = fields.get("stars")
        if isinstance(stars, dict) and all(
            name.isdecimal() and type(value) is int and 1 <= value <= 5 for name, value in stars.items()
        ):
            return {int(name): float(value) for name, value in stars.items()}
        raise RefusedError(400, "stars should map each image to a whole number from 1 to 5")
    if way == "best":
        if type(fields.get("best")) is int and fields["best"] in images:
            return {number: float(number == fields["best"]) for number in images}
        raise RefusedError(400, f"best should be one of the images {', '.join(map(str, images))}")
    order = fields.get("ranking")
    if isinstance(order, list) and all(type(number) is int for number in order) and len(set(order)) == len(order):
        return {number: -float(place) for place, number in enumerate(order)}
    raise RefusedError(400, "ranking should list each image once, the best first")


def job_options(kind: str, fields: Fields) -> Fields:
    """Return the options of a job; others are left out."""
    if kind == "reward":
        return {}
    if kind == "drawing":
        steps, rate = fields.get("max_steps"), fields.get("learning_rate")
        if steps is not None and not (type(steps) is int and 1 <= steps <= 100_000):
            raise RefusedError(400, "max_steps should be a whole number from 1 to 100000")
        if rate is not None and not (isinstance(rate, float) and 0 < rate <= 1):
            raise RefusedError(400, "learning_rate should be a number above 0, at most 1")
        return {"max_steps": steps, "learning_rate": rate}
    found: Fields = {name: _text(fields, name) for name in ("repo_id", "what", "base_model")}
    try:
        check_repo_id(found["repo_id"] or "")
    except ValueError:
        raise RefusedError(400, "repo_id should be 'name' or 'owner/name'") from None
    if found["what"] not in (None, "drawing", "reward", "pairs"):
        raise RefusedError(400, "what should be one of drawing, reward, pairs")
    for name, default in (("private", True), ("show_images", False)):
        found[name] = fields.get(name, default)
        if not isinstance(found[name], bool):
            raise RefusedError(400, f"{name} should be true or false")
    return found


def _text(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= _LONGEST_TEXT):
        raise RefusedError(400, f"{name} should be a text of at most {_LONGEST_TEXT} letters")
    return value or None
