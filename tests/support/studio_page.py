"""A studio on a real port, and a client that speaks to it as a browser does."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from PIL import Image

from bt_hf.reward.scorer import PreferenceScorer
from bt_hf.studio.app import build_app
from bt_hf.studio.desk import Desk
from bt_hf.studio.learner import Learner
from bt_hf.studio.pool import Pool
from bt_hf.studio.security import Guard
from bt_hf.studio.server import bind
from bt_hf.studio.session import Session
from bt_hf.studio.sources import FolderSource
from tiny_models import build, picture

RED, BLUE = (220, 60, 60), (60, 60, 220)


def write_images(folder: Path, concepts: int = 4, each: int = 4) -> Path:
    """Pictures of some prompts, in files such as `house-1.png`: those of odd numbers are red, the others blue."""
    folder.mkdir(parents=True, exist_ok=True)
    for concept in range(concepts):
        for number in range(each):
            image = picture(RED if number % 2 else BLUE, seed=100 * concept + number, size=(24, 24))
            image.save(folder / f"{'abcdefghij'[concept] * 3}-{number}.png")
    return folder


def is_red(file: str) -> bool:
    """True for a picture of `write_images` that is red, by its file name."""
    return int(file.rsplit("-", 1)[1].split(".")[0]) % 2 == 1


def make_desk(images: Path, session: Path, start: bool = True, **options: Any) -> Desk:
    """A desk on a folder of images, with a tiny base."""
    source = FolderSource(images, options.pop("prompt", None))
    held = Session(session, source.title)
    pool = Pool(held, source)
    learner = Learner(held, pool, PreferenceScorer(*build("clip")))
    desk = Desk(held, pool, learner, source.title, options.pop("base", "unused"), **options)
    if start:
        learner.start()
    return desk


def close(desk: Desk) -> None:
    """Stop what runs, and let the session go."""
    desk.jobs.stop(wait=30)
    desk.learner.stop()
    desk.session.close()


@contextmanager
def serving(desk: Desk, host: str = "127.0.0.1", **rules: Any) -> Iterator["Client"]:
    """Serve a desk on a free port, and yield a client that has opened the printed address."""
    listening = bind(host, 0)
    guard = Guard(host, listening.getsockname()[1], **rules)
    config = uvicorn.Config(build_app(desk, guard), lifespan="off", log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Client(guard.address)
    finally:
        server.should_exit = True
        thread.join()
        close(desk)


class Reply:
    """Answer of a server."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.status, self.content = answer.status, answer.read()
        self.headers = answer.headers

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Client:
    """A browser's requests by `http.client`, with the cookie of the printed address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.host = urlsplit(address).netloc
        self.cookie: str | None = None
        entered = self.request("GET", f"/?{urlsplit(address).query}")
        assert entered.status == 303, entered.content
        self.cookie = entered.headers["Set-Cookie"].split(";")[0]
        self.entered = entered

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None) -> Reply:
        """Send exactly what is given, besides the cookie."""
        connection = http.client.HTTPConnection("127.0.0.1", int(self.host.rsplit(":", 1)[1]), timeout=60)
        try:
            known = {"Host": self.host} | ({"Cookie": self.cookie} if self.cookie else {})
            connection.request(method, path, body, {**known, **(headers or {})})
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        reply = self.request("GET", path)
        assert reply.status == 200, (path, reply.status, reply.content)
        return reply.json

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """Post JSON as the page does."""
        known = {"Content-Type": "application/json", "Origin": f"http://{self.host}"}
        return self.request("POST", path, json.dumps(body).encode(), {**known, **headers})

    def click(self, id: str, pair: str, choice: str = "left") -> Reply:
        return self.post("/api/clicks", {"id": id, "pair": pair, "choice": choice, "seconds": 0.5})

    def raw(self, text: bytes) -> bytes:
        """Send bytes as they are, and return the first of the answer."""
        with socket.create_connection(("127.0.0.1", int(self.host.rsplit(":", 1)[1])), timeout=10) as connection:
            connection.sendall(text)
            return connection.recv(65536)

    def learnt(self, clicks: int, timeout: float = 20.0) -> Any:
        """Wait until the taste has taken in so many clicks."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            taste = self.get(f"/api/taste?since={clicks}")
            if taste["clicks"] >= clicks:
                return taste
        raise AssertionError(f"the taste stays at {taste['clicks']} clicks")


def photo(path: Path, size: tuple[int, int] = (640, 480)) -> Path:
    """A JPEG with a place, a comment and a thumbnail in its metadata."""
    image = picture((200, 180, 40), seed=7, size=size)
    exif = Image.Exif()
    exif[0x010E] = "SECRET-DESCRIPTION"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # latitude
    exif.get_ifd(0x8825)[1] = "N"
    image.save(path, "JPEG", exif=exif, comment=b"SECRET-COMMENT")
    return path
