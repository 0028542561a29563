"""One training at a time in a folder: a second one is refused, and one that was killed is not in the way."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.training.lock import LOCK, check_no_training, training_lock
from tiny_models import build, red_pairs
from tiny_trainers import make

QUIET = {"report_to": "none", "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}


def reward(folder: Path) -> BradleyTerryTrainer:
    model, processor = build("clip")
    return BradleyTerryTrainer(
        model, BradleyTerryConfig(str(folder), **QUIET), red_pairs(8), processing_class=processor
    )


HOLD = """
import pathlib, sys, time
from bt_hf.training.lock import training_lock
with training_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_training_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    trainer = reward(folder)
    with hold(folder) as other:
        for refused in (trainer.train, lambda: reward(folder), lambda: make(tmp_path)):
            with pytest.raises(BlockingIOError, match=f"process {other.pid} on .* is training into '.*out': wait"):
                refused()
        os.kill(other.pid, signal.SIGKILL)
    assert (folder / LOCK).is_file()  # stale
    reward(folder).train()
    assert not (folder / LOCK).exists()


def test_a_lock_that_only_a_worker_of_a_dead_process_holds_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = HOLD.replace("time.sleep(60)", "import os\n    os.fork() or time.sleep(4)\n    os._exit(0)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    process.wait(timeout=60)
    holder = json.loads((tmp_path / LOCK).read_text())
    assert holder["pid"] == process.pid
    with caplog.at_level(logging.WARNING), training_lock(tmp_path):
        pass
    assert f"process {process.pid}, which has ended: it is taken over" in caplog.text
    assert process.stdout is not None
    process.stdout.close()


def test_the_same_process_may_not_train_twice_at_once_but_one_after_the_other(tmp_path: Path) -> None:
    class Second(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
                check_no_training(tmp_path)

    trainer = reward(tmp_path)
    trainer.add_callback(Second())
    trainer.train()
    trainer.train()
    assert not (tmp_path / LOCK).exists()
