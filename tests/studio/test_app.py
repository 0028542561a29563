"""The page's requests, one after the other: choosing, taking back, judging, and what is learnt."""

import io
import json
import threading
import zipfile
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from bt_hf import load_preference_pairs
from studio_page import Client, is_red, make_desk, serving, write_images


def names_of(client: Client, tmp_path: Path) -> list[str]:
    """File names by number, as the session keeps them."""
    lines = (tmp_path / "session" / "pool.jsonl").read_text().splitlines()
    return [json.loads(line)["file"] for line in lines]


def click_red(client: Client, tmp_path: Path, count: int) -> None:
    """Click as a person who likes red and is indifferent otherwise."""
    files, queue = names_of(client, tmp_path), client.get("/api/state")["queue"]
    for number in range(count):
        left, right = (is_red(files[queue[0][side]]) for side in ("left", "right"))
        choice = "tie" if left == right else "left" if left else "right"
        reply = client.click(f"click-{number}", queue[0]["id"], choice)
        assert reply.status == 200
        queue = reply.json["queue"]


def test_state_tells_all_that_a_page_needs(client: Client) -> None:
    state = client.get("/api/state")
    assert (state["images"], state["prompts"], state["clicks"], state["skipped"]) == (16, 4, 0, [])
    assert len(state["queue"]) == 3
    assert state["ways"] == ["pair", "stars", "best", "rank"]
    assert set(state["can"]) == {"draw", "train", "publish", "upload"}
    assert not state["can"]["train"]["ok"]
    for pair in state["queue"]:
        for side in ("left", "right"):
            reply = client.request("GET", f"/api/images/{pair[side]}")
            assert Image.open(io.BytesIO(reply.content)).size == (24, 24)
            assert "immutable" in reply.headers["Cache-Control"]


def test_a_click_moves_the_queue_by_one(client: Client) -> None:
    queue = [pair["id"] for pair in client.get("/api/state")["queue"]]
    reply = client.click("a", queue[0])
    assert reply.json["clicks"] == 1
    after = [pair["id"] for pair in reply.json["queue"]]
    assert after[:2] == queue[1:]
    assert len(after) == 3
    assert [pair["id"] for pair in client.get("/api/state")["queue"]] == after  # as another tab sees it


def test_a_click_that_is_sent_again_is_confirmed_and_not_doubled(client: Client) -> None:
    pair = client.get("/api/state")["queue"][0]["id"]
    first, again = client.click("a", pair), client.click("a", pair)
    assert first.json["clicks"] == again.json["clicks"] == 1
    assert first.json["queue"] == again.json["queue"]


def test_clicks_of_one_id_at_the_same_time_count_once(client: Client) -> None:
    pair, replies = client.get("/api/state")["queue"][0]["id"], []
    threads = [threading.Thread(target=lambda: replies.append(client.click("a", pair))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {reply.status for reply in replies} == {200}
    assert client.get("/api/state")["clicks"] == 1


def test_two_tabs_and_two_people(client: Client, tmp_path: Path) -> None:
    """Both answer what they see, at once: every click is kept, and the log stays whole."""

    def person(name: str) -> None:
        queue = client.get("/api/state")["queue"]
        for number in range(15):
            reply = client.click(f"{name}-{number}", queue[0]["id"], "left")
            assert reply.status == 200
            queue = reply.json["queue"]

    threads = [threading.Thread(target=person, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "session" / "clicks.jsonl").read_text().splitlines()]
    assert sorted(line["click"] for line in lines if "click" in line) == sorted(
        f"{name}-{number}" for name in "ab" for number in range(15)
    )
    assert client.get("/api/state")["clicks"] == 30


def test_an_unknown_pair_is_refused(client: Client) -> None:
    reply = client.click("a", "p999")
    assert reply.status == 409
    assert "reload" in reply.json["error"]


def test_undo_brings_the_pair_back(client: Client, tmp_path: Path) -> None:
    queue = client.get("/api/state")["queue"]
    client.click("a", queue[0]["id"], "left")
    for undo in ("u", "u"):  # sent twice
        reply = client.post("/api/undo", {"id": undo, "click": None})
        assert reply.json["clicks"] == 0
        assert reply.json["queue"][0] == queue[0]
    reply = client.click("b", queue[0]["id"], "right")
    assert reply.json["clicks"] == 1
    assert client.post("/api/undo", {"id": "v", "click": "b"}).json["clicks"] == 0
    assert client.post("/api/undo", {"id": "w", "click": None}).status == 409
    assert client.post("/api/undo", {"id": "w", "click": "never"}).status == 409
    assert b'"undo"' in (tmp_path / "session" / "clicks.jsonl").read_bytes()  # nothing is erased


def test_stars_best_and_ranking_become_pairs(client: Client, tmp_path: Path) -> None:
    stars = client.get("/api/group?way=stars")
    given = {str(number): 5 - place for place, number in enumerate(stars["images"][:3])}
    assert (
        client.post("/api/judgements", {"id": "s", "group": stars["id"], "way": "stars", "stars": given}).status == 200
    )
    best = client.get("/api/group?way=best")
    answer = {"id": "b", "group": best["id"], "way": "best", "best": best["images"][2]}
    assert client.post("/api/judgements", answer).json["clicks"] == 2
    assert client.post("/api/judgements", answer).json["clicks"] == 2  # once more is the same
    rank = client.get("/api/group?way=rank")
    ranking = rank["images"][::-1]
    reply = client.post("/api/judgements", {"id": "r", "group": rank["id"], "way": "rank", "ranking": ranking})
    assert reply.json["clicks"] == 3
    pairs = load_preference_pairs(str(tmp_path / "session"))
    # 3 images in order: 2 choices; best of 4: one choice in 3 pairs; a ranking of 4: 3 choices in 6 pairs.
    assert len(pairs) == 3 + 3 + 6
    assert sum(pairs["weight"][:]) == pytest.approx(2 + 1 + 3)


@pytest.mark.parametrize(
    "answer",
    [{"way": "stars", "stars": {"0": 6}}, {"way": "stars", "stars": {"x": 3}}, {"way": "stars", "stars": {}},
     {"way": "best", "best": 10_000}, {"way": "best", "best": True}, {"way": "rank", "ranking": [0, 0]},
     {"way": "rank", "ranking": "all"}, {"way": "guess"}],
)  # fmt: skip
def test_judgements_that_make_no_sense_are_refused(client: Client, answer: dict) -> None:
    group = client.get("/api/group?way=rank")
    reply = client.post("/api/judgements", {"id": "x", "group": group["id"], **answer})
    assert reply.status == 400
    assert client.get("/api/state")["clicks"] == 0


def test_the_taste_is_learnt_while_clicking(client: Client, tmp_path: Path) -> None:
    click_red(client, tmp_path, 12)
    taste = client.learnt(12)
    files = names_of(client, tmp_path)
    best = [is_red(files[entry["image"]]) for entry in taste["ranking"]]
    assert len(best) == 16
    assert sum(best[:8]) >= 7  # eight of sixteen are red
    assert taste["fitted_ms"] < 2000
    assert all(isinstance(entry["move"], int) for entry in taste["ranking"])


def test_clicks_are_predicted_before_they_are_learnt_from(client: Client, tmp_path: Path) -> None:
    click_red(client, tmp_path, 1)
    client.learnt(1)
    queue = client.get("/api/state")["queue"]
    client.click("later", queue[0]["id"], "left")
    lines = [json.loads(line) for line in (tmp_path / "session" / "clicks.jsonl").read_text().splitlines()]
    clicks = {line["click"]: line for line in lines if "click" in line}
    assert clicks["click-0"]["model"] is None  # nothing was learnt yet
    assert isinstance(clicks["later"]["base"], float)


def test_exports_are_read_by_others(client: Client, tmp_path: Path) -> None:
    assert client.request("GET", "/api/export?format=parquet").status == 409  # nothing was clicked
    click_red(client, tmp_path, 12)
    expected = load_preference_pairs(str(tmp_path / "session"))
    reply = client.request("GET", "/api/export?format=parquet")
    assert 'filename="pairs.parquet"' in reply.headers["Content-Disposition"]
    (tmp_path / "pairs.parquet").write_bytes(reply.content)
    rows = load_preference_pairs(Dataset.from_parquet(str(tmp_path / "pairs.parquet")))
    archive = zipfile.ZipFile(io.BytesIO(client.request("GET", "/api/export?format=jsonl").content))
    archive.extractall(tmp_path / "archive")
    unpacked = load_preference_pairs(str(tmp_path / "archive"))
    for found in (rows, unpacked):
        assert found["prompt"][:] == expected["prompt"][:]
        assert found["preference"][:] == expected["preference"][:]
        assert [image.tobytes() for image in found["chosen"]] == [image.tobytes() for image in expected["chosen"]]
    assert client.request("GET", "/api/export?format=exe").status == 400


def test_images_that_vanish_while_the_page_is_open(client: Client, tmp_path: Path) -> None:
    """Shown ones are still there; the others are left out, named and counted."""
    state = client.get("/api/state")
    shown = {pair[side] for pair in state["queue"] for side in ("left", "right")}
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    for number in shown:
        assert client.request("GET", f"/api/images/{number}").status == 200
    gone = next(number for number in range(16) if number not in shown)
    assert client.request("GET", f"/api/images/{gone}").status == 404
    queue = state["queue"]
    while queue:
        reply = client.click(f"c-{queue[0]['id']}", queue[0]["id"])
        assert reply.status == 200
        queue = reply.json["queue"]
    state = client.get("/api/state")
    assert state["note"]
    assert state["skipped_count"] + state["images"] == 16
    assert all("missing" in one["reason"] for one in state["skipped"])


def test_two_images_are_one_pair(tmp_path: Path) -> None:
    with serving(make_desk(write_images(tmp_path / "images", 1, 2), tmp_path / "session")) as client:
        state = client.get("/api/state")
        assert len(state["queue"]) == 1
        assert state["ways"] == ["pair"]
        reply = client.click("a", state["queue"][0]["id"])
        assert reply.json["queue"] == []
        assert client.get("/api/state")["note"] == "You have compared every pair there is."
        assert client.request("GET", "/api/group?way=best").status == 200


def test_nothing_to_compare_blind_yet(client: Client) -> None:
    assert client.request("GET", "/api/ab").status == 409
    assert client.post("/api/ab", {"id": "p1", "choice": "left"}).status == 409
    assert client.request("GET", "/api/card").status == 409
    assert client.get("/api/jobs/current") is None
    for kind, why in (("reward", "choose a picture first"), ("drawing", "--pipeline"), ("publish", "hf auth login")):
        options = {"kind": kind, "repo_id": "me/taste"}
        reply = client.post("/api/jobs", options)
        assert (reply.status, why in reply.json["error"]) == (409, True)
