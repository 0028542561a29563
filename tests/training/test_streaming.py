"""Training on streams: each pass sees each row once on whatever processes, and resuming is the same to the bit."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bt_hf import load_preference_pairs
from distributed_streaming import follow, make
from launching import launch, threads_at_exit
from tiny_models import red_pairs

# Files of so many rows. Of four files each process takes two, with 1 to 7 rows more on one of them. Three can't be
# divided, so that each process takes every second row: 6 and 5.
DATA = {"four": [7, 2, 3, 1], "three": [4, 5, 2], "uneven": [7, 2], "single": [9]}
EVALUATED = ["uneven", "single", "four"]
CASES: list[dict[str, Any]] = [
    {"name": "reward", "kind": "reward", "data": "four", "options": {"max_steps": 10}},
    {
        "name": "workers",
        "kind": "reward",
        "data": "four",
        "options": {"max_steps": 6, "dataloader_num_workers": 2, "kl_weight": 0},
    },
    {
        "name": "lora",
        "kind": "lora",
        "data": "three",
        "options": {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3},
    },
    {
        "name": "resumed",
        "kind": "lora",
        "data": "three",
        "options": {"max_steps": 4, "gradient_accumulation_steps": 2},
        "resume": "lora/checkpoint-3",
    },
    {
        "name": "kto",
        "kind": "kto",
        "data": "uneven",
        "options": {"max_steps": 6, "per_device_train_batch_size": 3},
    },
    {"name": "evaluated", "kind": "reward", "options": {"max_steps": 1}, "evaluate": EVALUATED},
    {"name": "evaluated-lora", "kind": "lora", "options": {"max_steps": 1}, "evaluate": EVALUATED},
]
PASSES = {
    "reward": 2,
    "workers": 1,
    "lora": 2,
    "kto": 1,
}  # complete ones: the files' order decides how long one is


def write(folder: Path) -> Path:
    for name, sizes in DATA.items():
        pairs, first = red_pairs(sum(sizes)), 0
        for shard, size in enumerate(sizes):
            pairs.select(range(first, first + size)).to_parquet(folder / name / f"part-{shard}.parquet")
            first += size
    return folder


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes wrote."""
    folder = tmp_path_factory.mktemp("two-processes")
    launch("distributed_streaming.py", folder, write(folder / "data"), json.dumps(CASES))
    return folder


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="thread names are those of Linux")
def test_no_thread_of_the_group_outlives_a_script_whose_trainer_is_global(two_processes: Path) -> None:
    assert not [name for name in threads_at_exit(two_processes) if "gloo" in name]


@pytest.mark.parametrize("case", PASSES)
def test_two_processes_see_each_row_once_a_pass(case: str, two_processes: Path) -> None:
    ranks = [json.loads((two_processes / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    assert [facts["world_size"] for facts in ranks] == [2, 2]
    data = next(found["data"] for found in CASES if found["name"] == case)
    prompts = list(red_pairs(sum(DATA[data]))["prompt"]) * (2 if case == "kto" else 1)  # it takes single images
    for done in range(PASSES[case]):
        seen = [Counter(row for row, weight, number in facts["seen"] if weight and number == done) for facts in ranks]
        assert seen[0] + seen[1] == Counter(prompts)
        assert len(seen[0]) != len(seen[1])
    # Both have taken as many steps, the one with fewer rows some that don't count.
    assert len({facts["steps"] for facts in ranks}) == 1
    assert any(not weight for facts in ranks for _, weight, _ in facts["seen"])


@pytest.mark.parametrize("data", EVALUATED)
@pytest.mark.parametrize("kind", ["reward", "lora"])
def test_two_processes_evaluate_each_row_of_a_stream_once(
    kind: str, data: str, two_processes: Path, tmp_path: Path
) -> None:
    pairs = load_preference_pairs(write(tmp_path / "data") / data)
    trainer = make(kind, tmp_path / "one", tmp_path / "data" / data, max_steps=1)
    expected = {**trainer.evaluate(pairs), "margins": trainer.last_evaluation["margins"].tolist()}
    assert len(expected["margins"]) == sum(DATA[data])
    name = "evaluated" if kind == "reward" else "evaluated-lora"
    for rank in (0, 1):
        found = json.loads((two_processes / f"{name}-{rank}.json").read_text())[data]
        assert sorted(found["margins"]) == pytest.approx(sorted(expected["margins"]), abs=1e-4)
        for metric in ("eval_loss", "eval_accuracy", "eval_accuracy_low", "eval_log_loss"):
            assert found[metric] == pytest.approx(expected[metric], abs=1e-5), metric


def test_two_processes_resume_the_same_to_the_bit(two_processes: Path) -> None:
    assert_same(adapter(two_processes / "resumed"), adapter(two_processes / "lora"))
    for rank in (0, 1):
        whole, resumed = (
            json.loads((two_processes / f"{case}-{rank}.json").read_text())["seen"] for case in ("lora", "resumed")
        )
        assert 0 < len(resumed) < len(whole)
        assert whole[-len(resumed) :] == resumed


@pytest.mark.parametrize("kind", ["reward", "lora"])
def test_resuming_a_stream_is_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data") / "three"  # 11 rows, 6 steps a pass
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = make(kind, tmp_path / "whole", data, max_steps=13, **options)
    seen = follow(whole)
    whole.train()
    whole.save_model()
    for step in (4, 6, 7):  # within a pass, at its end, in the next one
        resumed = make(kind, tmp_path / str(step), data, max_steps=13)
        rest = follow(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        resumed.save_model()
        assert rest == seen[len(seen) - len(rest) :]
        assert [number for _, _, number in rest][0] == step // 6
        assert_same(adapter(tmp_path / str(step)), adapter(tmp_path / "whole"))


def test_a_pass_begun_anew_is_counted_anew(tmp_path: Path) -> None:
    data = write(tmp_path / "data") / "three"  # 11 rows, 6 steps a pass
    options = {"save_strategy": "steps", "save_steps": 1}
    make("reward", tmp_path / "first", data, max_steps=2, **options).train()
    anew = make("reward", tmp_path / "anew", data, max_steps=5, ignore_data_skip=True, **options)
    seen = follow(anew)
    anew.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    last = make("reward", tmp_path / "last", data, max_steps=8)
    rest = follow(last)
    last.train(resume_from_checkpoint=str(tmp_path / "anew" / "checkpoint-5"))
    assert Counter(prompt for prompt, _, _ in seen + rest) == Counter(red_pairs(11)["prompt"])
    assert {number for _, _, number in seen + rest} == {0}


def test_the_middle_of_a_pass_needs_the_same_batches(tmp_path: Path) -> None:
    data = write(tmp_path / "data") / "three"
    make("reward", tmp_path / "first", data, max_steps=2, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "first" / "checkpoint-2"

    def resume(**options: Any) -> list[list]:
        trainer = make("reward", tmp_path / "resumed", data, max_steps=3, **options)
        seen = follow(trainer)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return seen

    for name, before, now in (
        ("dataloader_num_workers", 0, 2),
        ("train_batch_size", 2, 3),
        ("gradient_accumulation_steps", 1, 2),
    ):
        option = {name.replace("train_", "per_device_train_"): now}
        with pytest.raises(ValueError, match=f"`{name}` was {before} and is {now}.*ignore_data_skip=True"):
            resume(**option)
    assert resume(per_device_train_batch_size=3, ignore_data_skip=True)

    state = json.loads((checkpoint / "trainer_state.json").read_text())
    position = state["stateful_callbacks"]["Position"]
    position["attributes"]["batches"]["world_size"] = 2
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="`world_size` was 2 and is 1"):
        resume()
    position["attributes"] = {}  # as older versions wrote it
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert resume()


def test_a_run_can_be_prolonged(tmp_path: Path) -> None:
    # Its last checkpoint ends within a pass, where `max_steps` was.
    data = write(tmp_path / "data") / "three"
    options = {"lr_scheduler_type": "constant"}
    whole = make("lora", tmp_path / "whole", data, max_steps=8, **options)
    seen = follow(whole)
    whole.train()
    make("lora", tmp_path / "short", data, max_steps=4, save_strategy="steps", save_steps=4, **options).train()
    longer = make("lora", tmp_path / "longer", data, max_steps=8, **options)
    rest = follow(longer)
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-4"))
    assert rest == seen[8:]


def test_accumulated_batches_of_a_short_pass_are_one_step(tmp_path: Path) -> None:
    # 11 rows are 6 batches of 2: with 4 of them a step, the second step of a pass has the remaining 2.
    data = write(tmp_path / "data") / "three"
    trainer = make("reward", tmp_path / "out", data, max_steps=4, gradient_accumulation_steps=4)
    seen = follow(trainer)
    trainer.train()
    counted = Counter((prompt, number) for prompt, weight, number in seen if weight)
    assert counted == Counter((prompt, number) for number in (0, 1) for prompt in red_pairs(11)["prompt"])
