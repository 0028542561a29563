"""Routes of the studio: what is asked, checked, and handed to the desk."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bt_hf.data.clicks import CHOICES
from bt_hf.studio.desk import GROUP, Desk, RefusedError
from bt_hf.studio.security import MAX_BODY, Gate, Guard, problem
from bt_hf.studio.session import NotSavedError

PAGE = Path(__file__).parent / "page"
_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_LONGEST_ID = 80
_WAIT = 2.0  # seconds that a request for a newer taste waits
Fields = dict[str, Any]


class _Page(StaticFiles):
    """Files of the page, which a browser asks about each time, so that an upgrade is seen."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def build_app(desk: Desk, guard: Guard) -> Starlette:
    """Return the application.

    Args:
        desk: Answers.
        guard: Rules of who may ask.
    """

    async def index(request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    async def login(request: Request) -> Response:
        form = await _form(request)
        opened = await run_in_threadpool(guard.opens, form.get("password", ""))
        return guard.let_in() if opened else guard.ask(403, "That is not the password.")

    async def state(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.state))

    async def image(request: Request) -> Response:
        size = request.query_params.get("size")
        side = None if size is None else _number(size, "size")
        content, suffix = await run_in_threadpool(desk.picture, request.path_params["number"], side)
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(content, media_type=_TYPES[suffix], headers=headers)

    async def click(fields: Fields) -> Any:
        choice = _one_of(fields, "choice", CHOICES)
        return await run_in_threadpool(desk.click, _id(fields), _id(fields, "pair"), choice, _seconds(fields))

    async def undo(fields: Fields) -> Any:
        named = None if fields.get("click") is None else _id(fields, "click")
        return await run_in_threadpool(desk.undo, _id(fields), named)

    async def group(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.group, request.query_params.get("way", "")))

    async def judge(fields: Fields) -> Any:
        name, way = _id(fields, "group"), _one_of(fields, "way", GROUP)
        values = _values(fields, way, desk.images_of(name))
        return await run_in_threadpool(desk.judge, _id(fields), name, way, values)

    async def taste(request: Request) -> Response:
        since = _number(request.query_params.get("since", "0"), "since")
        deadline = asyncio.get_running_loop().time() + _WAIT
        while desk.learner.told()["clicks"] < since and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return JSONResponse(desk.learner.told())

    routes = [
        Route("/", index),
        Route("/login", login, methods=["POST"]),
        Route("/api/state", state),
        Route("/api/images/{number:int}", image),
        Route("/api/drawings/{number:int}", image),
        Route("/api/clicks", _posted(click), methods=["POST"]),
        Route("/api/undo", _posted(undo), methods=["POST"]),
        Route("/api/group", group),
        Route("/api/judgements", _posted(judge), methods=["POST"]),
        Route("/api/taste", taste),
        Mount("/page", _Page(directory=PAGE)),
    ]
    handlers: Any = {
        RefusedError: lambda request, error: problem(error.status, str(error)),
        NotSavedError: lambda request, error: problem(507, f"not saved: {error.strerror or error}"),
        HTTPException: lambda request, error: problem(error.status_code, error.detail),
        Exception: lambda request, error: problem(500, f"unexpected {type(error).__name__}: see the terminal"),
    }
    return Starlette(routes=routes, middleware=[Middleware(Gate, guard=guard)], exception_handlers=handlers)


def _posted(answer: Callable[[Fields], Any]) -> Callable[[Request], Any]:
    """Return a route for JSON objects of a bounded size."""

    async def route(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "expected Content-Type: application/json")
        try:
            fields = json.loads(await _body(request, MAX_BODY))
        except (ValueError, RecursionError):
            raise RefusedError(400, "expected a JSON object") from None
        if not isinstance(fields, dict):
            raise RefusedError(400, "expected a JSON object")
        return JSONResponse(await answer(fields))

    return route


async def _body(request: Request, limit: int) -> bytes:
    """Read a body as it comes, and no more than the limit of it."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RefusedError(413, f"expected at most {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def _form(request: Request) -> dict[str, str]:
    from urllib.parse import parse_qsl

    return dict(parse_qsl((await _body(request, MAX_BODY)).decode("utf-8", "replace")))


def _id(fields: Fields, name: str = "id") -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID or not value.isascii():
        raise RefusedError(400, f"{name} should be a text of at most {_LONGEST_ID} letters")
    return value


def _one_of(fields: Fields, name: str, known: Any) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or value not in known:
        raise RefusedError(400, f"{name} should be one of {', '.join(known)}")
    return value


def _seconds(fields: Fields) -> float | None:
    value = fields.get("seconds")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RefusedError(400, "seconds should be a number of at least 0")
    return round(float(value), 3)


def _number(text: str, name: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise RefusedError(400, f"{name} should be a whole number")
    return int(text)


def _values(fields: Fields, way: str, images: tuple[int, ...]) -> dict[int, float]:
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
