"""Two processes give the guided LoRA that one gives with twice the batch."""

import json
from pathlib import Path

import pytest
import torch

from distributed_guided import train
from launching import launch
from tiny_trainers import adapter


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    launch("distributed_guided.py", tmp_path / "two", 2)
    ranks = [json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [facts["world_size"] for facts in ranks] == [2, 2]
    one = train(tmp_path / "one", batch=4)
    expected, found = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert max(value.abs().max() for name, value in expected.items() if "lora_B" in name) > 1e-3  # zero at first
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=0)
    for facts in ranks:
        assert facts["scale"] == pytest.approx(one["scale"], rel=1e-4)
    for step, other in zip(one["steps"], ranks[0]["steps"], strict=True):
        assert other == pytest.approx(step, abs=1e-3)
