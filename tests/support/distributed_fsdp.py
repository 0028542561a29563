"""Script of each process of `test_sharding.py`: both trainers, with their weights divided by FSDP2, on CPUs."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from transformers import Trainer

from distributed_lora import train as train_lora
from distributed_training import train as train_reward

CASES = {
    "reward": lambda folder, batch: train_reward(folder, batch, "uncached"),
    "reward-cached": lambda folder, batch: train_reward(folder, batch, "cached"),
    "lora": lambda folder, batch: train_lora(folder, batch, "cached"),
}


class FSDPOnCPU:
    """Within this context accelerate takes FSDP on CPUs, where it would use DDP and not say so. torch can do it."""

    def __enter__(self) -> None:
        self._create = create = Trainer.create_accelerator_and_postprocess

        def create_with_fsdp(trainer: Trainer) -> Any:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            return create(trainer)

        Trainer.create_accelerator_and_postprocess = create_with_fsdp

    def __exit__(self, *error: object) -> None:
        Trainer.create_accelerator_and_postprocess = self._create


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    with FSDPOnCPU():
        for name, train in CASES.items():
            facts = train(output / name, batch=2)
            rank = torch.distributed.get_rank()
            (output / f"{name}-{rank}.json").write_text(json.dumps(facts))
    # torch keeps the group of a divided model to the end: its threads may drop the last tensors in this second, not
    # while Python ends, which would abort the process.
    time.sleep(1)
