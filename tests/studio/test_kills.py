"""A server that is killed, a disk that is full: no confirmed click is ever lost."""

import json
import random
import resource
import signal
import threading
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

from bt_hf import load_preference_pairs
from bt_hf.data.clicks import read_clicks
from bt_hf.studio import server
from studio_page import Client, write_images
from studio_process import Studios, end

KILLS = 30
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc, to see that a process is gone")


@pytest.fixture(scope="module")
def studios() -> Iterator[Studios]:
    found = Studios()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def images(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2, 24)


def test_a_studio_is_closed_also_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of its output may be gone, as in `bt-hf studio | head -1`."""
    monkeypatch.setattr(server, "build_app", lambda desk, guard: None)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    closed = []
    studio = SimpleNamespace(desk=None, guard=SimpleNamespace(address="x"), close=lambda: closed.append(True))

    def say(text: str) -> None:
        if text.startswith("Closing"):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        server.serve(studio, None, False, say)
    assert closed == [True]


def test_killed_at_random_moments_no_confirmed_click_is_lost(studios: Studios, tmp_path: Path) -> None:
    """A person clicks on, and sends again what was not confirmed, while the server is killed under them."""
    generator, confirmed, count = random.Random(0), {}, 0
    taken_back: set[str] = set()  # as far as confirmed
    to_take_back: set[str] = set()
    waiting: tuple[str, str, str] | None = None
    seen: list[str] = []
    for _ in range(KILLS):
        pid, address = studios.start(tmp_path)
        client = Client(address)
        state = client.get("/api/state")
        queue = state["queue"]
        if seen:  # it goes on at the same pair, unless the answer that was under way had arrived
            answered = read_clicks(tmp_path / "session").answered
            assert queue[0]["id"] == next(pair for pair in seen if pair not in answered)
        assert len(confirmed) - len(to_take_back) <= state["clicks"] <= len(confirmed) + 1 - len(taken_back)
        killer = threading.Timer(generator.uniform(0.0, 0.25), end, (pid,))
        killer.start()
        try:
            while True:
                if waiting is None:
                    count += 1
                    waiting = (f"click-{count}", queue[0]["id"], generator.choice(["left", "right", "tie", "skip"]))
                reply = client.click(*waiting)
                assert reply.status == 200
                confirmed[waiting[0]] = waiting[1:]
                waiting, queue = None, reply.json["queue"]
                seen = [pair["id"] for pair in queue]
                if generator.random() < 0.1:
                    last = f"click-{count}"
                    to_take_back.add(last)
                    if client.post("/api/undo", {"id": f"undo-{count}", "click": last}).status == 200:
                        taken_back.add(last)
                        queue = client.get("/api/state")["queue"]
                        seen = [pair["id"] for pair in queue]
        except (OSError, HTTPException):
            killer.join()
            seen = [] if taken_back else seen  # an undo that was under way may have moved the queue
        log = read_clicks(tmp_path / "session")
        for name, (pair, choice) in confirmed.items():
            if name in taken_back:
                assert name in log.undone
            elif name not in to_take_back or name not in log.undone:
                click = log.answers[name]
                assert (click.asked.id, click.choice) == (pair, choice)  # type: ignore[union-attr]
        assert not log.damaged
    assert len(confirmed) > KILLS
    pid, address = studios.start(tmp_path)
    assert Client(address).get("/api/state")["clicks"] == len(read_clicks(tmp_path / "session").answers)
    assert len(load_preference_pairs(str(tmp_path / "session"))) == len(read_clicks(tmp_path / "session").pairs())
    end(pid)


def test_a_line_that_was_cut_is_recovered(studios: Studios, tmp_path: Path) -> None:
    pid, address = studios.start(tmp_path)
    client = Client(address)
    queue = client.get("/api/state")["queue"]
    client.click("a", queue[0]["id"])
    end(pid)
    log = tmp_path / "session" / "clicks.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"click": "b", "pair": "p')
    pid, address = studios.start(tmp_path)
    client = Client(address)
    state = client.get("/api/state")
    assert state["clicks"] == 1
    assert state["queue"][0]["id"] == queue[1]["id"]
    assert client.click("b", queue[1]["id"]).status == 200
    end(pid)
    assert list(read_clicks(tmp_path / "session").answers) == ["a", "b"]
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_full_disk_at_a_click(studios: Studios, tmp_path: Path) -> None:
    """The page hears that the click is not saved, and saves it by the same request once there is room."""
    pid, address = studios.start(tmp_path)
    client = Client(address)
    pair = client.get("/api/state")["queue"][0]["id"]
    client.learnt(0)
    log = tmp_path / "session" / "clicks.jsonl"
    before = log.read_bytes()
    # As on a full disk, files do not grow beyond what they are; a part of a line still fits.
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (len(before) + 10, resource.RLIM_INFINITY))
    for _ in range(2):
        reply = client.click("a", pair)
        assert reply.status == 507
        assert "not saved" in reply.json["error"]
        assert log.read_bytes() == before
    assert client.request("GET", "/api/state").status in (200, 507)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert client.click("a", pair).json["clicks"] == 1
    end(pid)
    assert list(read_clicks(tmp_path / "session").answers) == ["a"]


def test_a_second_server_on_a_session_is_refused(studios: Studios, tmp_path: Path) -> None:
    pid, address = studios.start(tmp_path)
    with pytest.raises(ValueError, match=r"another studio has the session .* open"):
        studios.start(tmp_path)
    port = int(address.split(":")[2].split("/")[0])
    with pytest.raises(ValueError, match=f"port {port} is taken, perhaps by another studio.*--port"):
        studios.start(tmp_path, port, "other")
    assert Client(address).get("/api/state")["images"] == 48
    end(pid)
    pid, _ = studios.start(tmp_path)  # nothing of the killed one is in the way
    end(pid, signal.SIGINT)
