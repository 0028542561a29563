"""Two processes give the preference LoRA that one gives with twice the batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed_lora import CASES, train
from launching import launch


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes wrote."""
    folder = tmp_path_factory.mktemp("two-processes")
    launch("distributed_lora.py", folder, 2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_twice_the_batch(case: str, two_processes: Path, tmp_path: Path) -> None:
    ranks = [json.loads((two_processes / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    assert [facts["world_size"] for facts in ranks] == [2, 2]
    one = train(tmp_path / "one", batch=4, case=case)
    assert one["world_size"] == 1

    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    found = load_file(two_processes / case / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert max(value.abs().max() for name, value in expected.items() if "lora_B" in name) > 1e-3  # zero at first
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0)

    # Logs and metrics are those of all pairs, not of one process. A margin is beta / 2 times a difference of errors of
    # about 1, each of which float32 knows to about 1e-7.
    close = 5e-7 * one["beta"]
    assert len(one["steps"]) == len(ranks[0]["steps"]) == 5
    for step, other in zip(one["steps"], ranks[0]["steps"], strict=True):
        assert other == pytest.approx(step, abs=close)
    for facts in ranks:
        assert facts["beta"] == pytest.approx(one["beta"], rel=1e-5)
        assert facts["metrics"] == pytest.approx(one["metrics"], abs=close)
