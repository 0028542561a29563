"""Routes of the studio: what is asked, checked, and handed to the desk."""

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from bt_hf.data.clicks import CHOICES
from bt_hf.studio.desk import GROUP, Desk
from bt_hf.studio.errors import NotSavedError, RefusedError
from bt_hf.studio.fields import (
    MAX_UPLOAD,
    Fields,
    job_options,
    name_of,
    number_of,
    one_of,
    posted,
    read_body,
    read_form,
    seconds_of,
    text_of,
    values_of,
)
from bt_hf.studio.security import Gate, Guard, problem
from bt_hf.studio.sources import NO_PROMPT

PAGE = Path(__file__).parent / "page"
_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_WAIT = 2.0  # seconds that a request for a newer taste waits


class _Page(StaticFiles):
    """Files of the page, which a browser asks about each time, so that an upgrade is seen."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def build_app(desk: Desk, guard: Guard) -> Gate:
    """Return the application behind its gate.

    Args:
        desk: Answers.
        guard: Rules of who may ask.
    """

    async def index(request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    async def login(request: Request) -> Response:
        form = await read_form(request)
        opened = await guard.opens(form.get("password", ""))
        return guard.let_in() if opened else guard.ask(403, "That is not the password.")

    async def state(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.state))

    async def image(request: Request) -> Response:
        size = request.query_params.get("size")
        side = None if size is None else number_of(size, "size")
        content, suffix = await run_in_threadpool(desk.picture, request.path_params["number"], side)
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return Response(content, media_type=_TYPES[suffix], headers=headers)

    async def upload(request: Request) -> Response:
        if not request.headers.get("content-type", "").startswith("image/"):
            raise RefusedError(415, "expected Content-Type: image/png, or that of another image")
        name, prompt = text_of(request, "name", "upload"), text_of(request, "prompt", NO_PROMPT)
        content = await read_body(request, MAX_UPLOAD)
        return JSONResponse(await run_in_threadpool(desk.upload, content, name, prompt))

    async def click(fields: Fields) -> Any:
        choice = one_of(fields, "choice", CHOICES)
        return await run_in_threadpool(
            desk.click, name_of(fields), name_of(fields, "pair"), choice, seconds_of(fields)
        )

    async def undo(fields: Fields) -> Any:
        named = None if fields.get("click") is None else name_of(fields, "click")
        return await run_in_threadpool(desk.undo, name_of(fields), named)

    async def group(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.group, request.query_params.get("way", "")))

    async def judge(fields: Fields) -> Any:
        name, way = name_of(fields, "group"), one_of(fields, "way", GROUP)
        values = values_of(fields, way, desk.images_of(name))
        return await run_in_threadpool(desk.judge, name_of(fields), name, way, values)

    async def taste(request: Request) -> Response:
        since = number_of(request.query_params.get("since", "0"), "since")
        deadline = asyncio.get_running_loop().time() + _WAIT
        while desk.learner.told()["clicks"] < since and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return JSONResponse(desk.learner.told())

    async def job(fields: Fields) -> Any:
        kind = one_of(fields, "kind", desk.jobs.works)
        return await run_in_threadpool(desk.start, kind, job_options(kind, fields))

    async def current_job(request: Request) -> Response:
        return JSONResponse(desk.jobs.current())

    async def stop(fields: Fields) -> Any:
        return desk.jobs.stop()

    async def blind(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.blind))

    async def vote(fields: Fields) -> Any:
        return await run_in_threadpool(desk.vote, name_of(fields), one_of(fields, "choice", CHOICES))

    async def card(request: Request) -> Response:
        shown = request.query_params.get("show_images") == "true"
        return JSONResponse(await run_in_threadpool(desk.card, request.query_params.get("what"), shown))

    async def export(request: Request) -> Response:
        descriptor, path = tempfile.mkstemp(prefix="bt_hf-studio-")
        os.close(descriptor)
        try:
            name = await run_in_threadpool(desk.export, request.query_params.get("format", "parquet"), Path(path))
        except BaseException:
            os.unlink(path)
            raise
        return FileResponse(
            path, filename=name, media_type="application/octet-stream", background=BackgroundTask(os.unlink, path)
        )

    routes = [
        Route("/", index),
        Route("/login", login, methods=["POST"]),
        Route("/api/state", state),
        Route("/api/images/{number:int}", image),
        Route("/api/images", upload, methods=["POST"]),
        Route("/api/drawings/{number:int}", image),
        Route("/api/clicks", posted(click), methods=["POST"]),
        Route("/api/undo", posted(undo), methods=["POST"]),
        Route("/api/group", group),
        Route("/api/judgements", posted(judge), methods=["POST"]),
        Route("/api/taste", taste),
        Route("/api/jobs", posted(job), methods=["POST"]),
        Route("/api/jobs/current", current_job),
        Route("/api/jobs/stop", posted(stop), methods=["POST"]),
        Route("/api/ab", blind, methods=["GET"]),
        Route("/api/ab", posted(vote), methods=["POST"]),
        Route("/api/export", export),
        Route("/api/card", card),
        Mount("/page", _Page(directory=PAGE)),
    ]
    handlers: Any = {
        RefusedError: lambda request, error: problem(error.status, str(error)),
        NotSavedError: lambda request, error: problem(507, f"not saved: {error.strerror or error}"),
        HTTPException: lambda request, error: problem(error.status_code, error.detail),
        Exception: lambda request, error: problem(500, f"unexpected {type(error).__name__}: see the terminal"),
    }
    return Gate(Starlette(routes=routes, exception_handlers=handlers), guard)
