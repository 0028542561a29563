"""Two processes give what one gives with twice the batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distributed_training import CASES, train
from launching import launch, threads_at_exit


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes wrote."""
    folder = tmp_path_factory.mktemp("two-processes")
    launch("distributed_training.py", folder, 4)
    return folder


# A thread of the process group that lives on when Python ends may abort the process.
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="thread names are those of Linux")
def test_no_thread_of_the_group_outlives_its_process(two_processes: Path) -> None:
    assert not [name for name in threads_at_exit(two_processes) if "gloo" in name]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_twice_the_batch(case: str, two_processes: Path, tmp_path: Path) -> None:
    ranks = [json.loads((two_processes / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    assert [facts["world_size"] for facts in ranks] == [2, 2]
    one = train(tmp_path / "one", batch=8, case=case)
    assert one["world_size"] == 1
    assert one["cached"] == ranks[0]["cached"] == (case != "uncached")

    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    found = load_file(two_processes / case / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)

    # Logs and metrics are those of all pairs, not of one process.
    assert len(one["steps"]) == len(ranks[0]["steps"]) == 6
    for step, other in zip(one["steps"], ranks[0]["steps"], strict=True):
        np.testing.assert_allclose(list(step.values()), list(other.values()), atol=1e-4)
    for facts in ranks:
        assert facts["metrics"] == pytest.approx(one["metrics"], abs=1e-5)


def test_two_processes_resume_in_the_middle_of_a_pass(two_processes: Path) -> None:
    whole, resumed = (load_file(two_processes / name / "adapter_model.safetensors") for name in ("cached", "resumed"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
