"""Work in the background: a reward and a LoRA from clicks, blind votes, and publishing to a Hub of our own."""

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel
from transformers import CLIPModel

import tiny_models
import tiny_pipelines
from bt_hf import PreferenceScorer, load_preference_pairs
from bt_hf.data.clicks import Asked, Click
from bt_hf.data.images import to_rgb
from bt_hf.reward.trainer import BradleyTerryTrainer
from bt_hf.studio.errors import RefusedError
from bt_hf.studio.fields import job_options, one_of
from bt_hf.studio.jobs import Handle, Job, Jobs
from bt_hf.studio.judging import tally
from bt_hf.studio.training import Drawing
from hub_server import STRANGER, Hub
from studio_page import Client, close, make_desk, serving, write_images

pytest_plugins = ["hub_fixtures"]
TINY = {
    "max_steps": 2,
    "learning_rate": 0.05,
    "per_device_train_batch_size": 2,
    "validation_inference_steps": 1,
    "resolution": 16,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("base") / "clip")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pipelines.save(tmp_path_factory.mktemp("pipeline") / "sd")


@pytest.fixture
def client(tmp_path: Path, base: str, pipeline: str) -> Iterator[Client]:
    """A client of a studio that can train, with four clicks."""
    images = write_images(tmp_path / "images", 8, 2)
    options = {**TINY, "cache_dir": str(tmp_path / "cache")}
    desk = make_desk(images, tmp_path / "session", base=base, drawing=Drawing(pipeline, options=options))
    with serving(desk) as client:
        queue = client.get("/api/state")["queue"]
        for number in range(4):
            queue = client.click(f"c{number}", queue[0]["id"], "left").json["queue"]
        yield client


def finished(client: Client, timeout: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        job = client.get("/api/jobs/current")
        if job["state"] != "running":
            return job
        assert job["progress"] is None or 0 <= job["progress"] <= 1
        time.sleep(0.05)
    raise AssertionError(f"still at {job}")


def test_a_reward_of_the_clicks_is_loaded_by_anyone_and_published(
    client: Client,
    tmp_path: Path,
    hub: Any,
    online: Path,
    base: str,
) -> None:
    """Publishing is private, and shows no images of the person, unless asked."""
    assert client.post("/api/jobs", {"kind": "reward"}).json["state"] == "running"
    assert client.post("/api/jobs", {"kind": "reward"}).status == 409  # one at a time
    job = finished(client)
    assert job["state"] == "done", job
    assert job["result"]["pairs"] == 4
    folder = tmp_path / "session" / "reward"
    plain = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder)
    assert any("lora" in name for name, _ in plain.named_parameters())
    image = load_preference_pairs(str(tmp_path / "session"))[0]["chosen"]
    assert len(PreferenceScorer.from_pretrained(folder).score("a cat", [image])) == 1
    card = client.get("/api/card?what=reward")["markdown"]
    assert card == (folder / "README.md").read_text(encoding="utf-8")
    assert "favourites.png" not in card
    assert "favourites.png" in client.get("/api/card?what=reward&show_images=true")["markdown"]
    assert str(tmp_path) not in card
    api = HfApi()
    api.create_repo("me/base")
    api.upload_folder(repo_id="me/base", folder_path=base)
    client.learnt(4)
    for show in (False, True):
        options = {"kind": "publish", "repo_id": "me/taste", "base_model": "me/base", "show_images": show}
        assert client.post("/api/jobs", options).status == 200
        job = finished(client)
        assert job["state"] == "done", job
        assert "me/taste" in job["result"]["url"]
        info = api.model_info("me/taste")
        assert info.private
        assert ("favourites.png" in [file.rfilename for file in info.siblings]) == show
    assert not (folder / "favourites.png").exists()


def test_pairs_leave_by_the_checks_of_an_adapter(tmp_path: Path) -> None:
    """A token in a prompt is found before anything is asked of the Hub."""
    desk = make_desk(write_images(tmp_path / "images"), tmp_path / "session")
    for number in (0, 1):
        desk.session.keep_picture(number, desk.pool.read(number))
    prompt = f"a cat {'hf_' + 'a1B2c3D4' * 4}"
    desk.session.append({"asked": "p", "prompt": prompt, "left": 0, "right": 1, "kind": "random"})
    desk.click("a", "p", "left", None)
    with pytest.raises(ValueError, match="the prompt of row 0 of `pairs` contains what looks like a token"):
        desk.sharing.publish(Handle(Job("publish")), {"repo_id": "me/clicks", "what": "pairs"})
    close(desk)


@pytest.mark.parametrize("private", [True, False])
def test_pairs_are_published_as_a_dataset(tmp_path: Path, hub: Hub, online: Path, private: bool) -> None:
    """By the client of `datasets`: private unless asked, and what the Hub gives back are the clicks."""
    desk = make_desk(write_images(tmp_path / "images"), tmp_path / "session")
    for number in range(4):
        desk.session.keep_picture(number, desk.pool.read(number))
    for number, choice in enumerate(("left", "tie")):
        line = {
            "asked": f"p{number}",
            "prompt": "a cat",
            "left": 2 * number,
            "right": 2 * number + 1,
            "kind": "random",
        }
        desk.session.append(line)
        desk.click(f"c{number}", f"p{number}", choice, None)
    options = {"repo_id": "me/clicks", "what": "pairs"} | ({} if private else {"private": False})
    job = Job("publish")
    found = desk.sharing.publish(Handle(job), options)
    assert found == {"url": f"{hub.endpoint}/datasets/me/clicks"}
    assert job.message == f"Published, for {'you alone' if private else 'everybody to see'}."
    assert HfApi().dataset_info("me/clicks").private is private
    own = load_preference_pairs(str(tmp_path / "session"))
    back = load_dataset("me/clicks", split="train", cache_dir=str(tmp_path / "cache"))
    for pairs in (back, load_preference_pairs("me/clicks")):
        assert len(pairs) == 2
        for one, other in zip(pairs, own, strict=True):
            assert {name: one[name] for name in ("prompt", "preference", "weight")} == {
                name: other[name] for name in ("prompt", "preference", "weight")
            }
            assert all(to_rgb(one[side]).tobytes() == to_rgb(other[side]).tobytes() for side in ("chosen", "rejected"))
    with pytest.raises(RepositoryNotFoundError) if private else nullcontext():
        HfApi(token=STRANGER).dataset_info("me/clicks")
    desk.click("again", desk.state()["queue"][0]["id"], "left", None)
    desk.sharing.publish(Handle(job), options)  # once more, with what was clicked since
    content = hub.files("datasets/me/clicks")["data/train-00000-of-00001.parquet"]
    assert len(pq.read_table(io.BytesIO(content))) == 3
    close(desk)
    assert str(tmp_path).encode() not in hub.everything()


def test_clicks_on_one_prompt_are_judged_too(tmp_path: Path, base: str) -> None:
    """With one prompt for all images, folds are by pair."""
    images = write_images(tmp_path / "images")
    desk = make_desk(images, tmp_path / "session", base=base)
    for number in range(8):
        desk.session.keep_picture(number, desk.pool.read(number))
    for number in range(0, 8, 2):
        line = {"asked": f"p{number}", "prompt": "a", "left": number, "right": number + 1, "kind": "random"}
        desk.session.append(line)
        desk.click(f"c{number}", f"p{number}", "left", None)
    found = desk.workshop.train_reward(Handle(Job("reward")), {})
    assert found["verdict"].endswith("not about other prompts.")
    close(desk)


def test_drawing_before_and_after_and_a_blind_comparison(client: Client, tmp_path: Path) -> None:
    client.post("/api/jobs", {"kind": "drawing"})
    job = finished(client)
    assert job["state"] == "done", job
    result = job["result"]
    assert len(result["prompts"]) == len(result["before"]) == len(result["after"]) > 0
    assert client.get("/api/state")["drawing"] == result
    first, second = (client.request("GET", f"/api/drawings/{result[when][0]}").content for when in ("before", "after"))
    assert first[:4] == second[:4] == b"\x89PNG"
    assert (tmp_path / "session" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    # Votes: who wins is known from the log alone, and nothing that the page gets tells the sides apart.
    lines = [json.loads(line) for line in (tmp_path / "session" / "clicks.jsonl").read_text().splitlines()]
    adapted = {line["asked"]: line["adapted"] for line in lines if line.get("kind") == "blind"}
    answered = {line["pair"] for line in lines if "click" in line}
    clicked = {line["prompt"] for line in lines if line.get("asked") in answered}
    before, seen = len(load_preference_pairs(str(tmp_path / "session"))), []
    reply = client.get("/api/ab")
    while "id" in reply:
        assert set(reply) == {"id", "prompt", "left", "right", "judged", "of"}
        assert reply["judged"] == len(seen)
        assert reply["prompt"] not in clicked
        seen.append(reply["id"])
        choice = adapted[reply["id"]] if len(seen) > 1 else "tie"
        answer = client.post("/api/ab", {"id": reply["id"], "choice": choice})
        assert client.post("/api/ab", {"id": reply["id"], "choice": "left"}).json == answer.json  # counted once
        reply = answer.json
    assert sorted(seen) == sorted(adapted)
    assert (reply["done"], reply["base"], reply["ties"], reply["lora"]) == (True, 0, 1, len(seen) - 1)
    assert reply["share"] == pytest.approx((len(seen) - 0.5) / len(seen))
    assert "LoRA" in reply["sentence"]
    assert len(load_preference_pairs(str(tmp_path / "session"))) == before + len(seen)  # votes are pairs again


def test_judging_stops_at_its_next_step(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not go on with the other trainings of the cross-validation."""
    begun = []
    train = BradleyTerryTrainer.train

    def counted(self: BradleyTerryTrainer, *args: Any, **kwargs: Any) -> Any:
        begun.append(self.state.global_step)
        client.post("/api/jobs/stop", {})
        return train(self, *args, **kwargs)

    monkeypatch.setattr(BradleyTerryTrainer, "train", counted)
    client.post("/api/jobs", {"kind": "reward"})
    job = finished(client)
    assert job["state"] == "stopped", job
    assert len(begun) == 1
    assert not (tmp_path / "session" / "reward").exists()
    monkeypatch.undo()
    client.post("/api/jobs", {"kind": "reward"})
    assert finished(client)["state"] == "done"


def test_a_job_stops_at_its_next_step(client: Client, tmp_path: Path) -> None:
    client.post("/api/jobs", {"kind": "drawing", "max_steps": 100_000})
    while "step" not in client.get("/api/jobs/current")["message"]:
        time.sleep(0.02)
    client.post("/api/jobs/stop", {})
    job = finished(client)
    assert job["state"] == "stopped"
    assert not (tmp_path / "session" / "lora" / "adapter_config.json").exists()
    assert client.click("after", client.get("/api/state")["queue"][0]["id"]).status == 200


def test_what_fails_is_told_in_one_line() -> None:
    def work(handle: Handle, options: Any) -> None:
        raise ValueError("the pipeline\nis gone")

    jobs = Jobs({"reward": work})
    jobs.start("reward", {})
    while jobs.busy:
        time.sleep(0.005)
    assert jobs.current() == {
        "kind": "reward", "state": "failed", "progress": None, "message": "the pipeline is gone", "result": None,
    }  # fmt: skip


def test_a_stopped_job_does_not_go_on() -> None:
    entered, done = threading.Event(), []

    def work(handle: Handle, options: Any) -> None:
        entered.set()
        while True:
            handle.say("working", 0.5)
            time.sleep(0.005)

    jobs = Jobs({"reward": work})
    jobs.start("reward", {})
    entered.wait()
    assert jobs.start("reward", {}) is None
    job = jobs.stop(wait=5)
    assert job is not None
    assert (job["state"], done) == ("stopped", [])


@pytest.mark.parametrize(
    ("body", "text"),
    [({"kind": "dance"}, "kind"), ({"kind": "drawing", "max_steps": 0}, "max_steps"),
     ({"kind": "drawing", "learning_rate": 9.0}, "learning_rate"), ({"kind": "publish"}, "repo_id"),
     ({"kind": "publish", "repo_id": "../x"}, "repo_id"),
     ({"kind": "publish", "repo_id": "a", "private": 1}, "private"),
     ({"kind": "publish", "repo_id": "a", "what": "disk"}, "what")],
)  # fmt: skip
def test_options_are_checked(body: dict, text: str) -> None:
    with pytest.raises(RefusedError, match=text) as error:
        job_options(one_of(body, "kind", ["reward", "drawing", "publish"]), body)
    assert error.value.status == 400


def test_votes_are_counted_as_published_formulas_have_it() -> None:
    def vote(choice: str, adapted: str, number: int) -> Click:
        return Click(str(number), Asked(f"p{number}", "a cat", 0, 1, "blind", "run", adapted), choice)

    sides = ["left", "right"] * 5
    won = [vote(side, side, number) for number, side in enumerate(sides)]
    found = tally([*won, vote("left", "right", 10), vote("tie", "left", 11)])
    assert (found["lora"], found["base"], found["ties"]) == (10, 1, 1)
    assert found["share"] == pytest.approx(10.5 / 12)
    # Wilson's interval for 10.5 of 12, from its formula.
    z, n, p = 1.959964, 12, 10.5 / 12
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * (p * (1 - p) / n + z * z / 4 / n**2) ** 0.5,
    )
    assert (found["low"], found["high"]) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert "better than the base" in found["sentence"]
    assert tally([])["share"] is None
