"""Streams: shared out row by row, walked through in step, and resumed where they were left."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState


def without_weight(batch: dict[str, Any], kept: int = 0) -> dict[str, Any]:
    """The batch with weight 0 for all but the first `kept` rows: a process goes along, but these count for nothing."""
    weight = batch["weight"].clone()
    weight[kept:] = 0
    return {**batch, "weight": weight}


class Position(TrainerCallback, ExportableState):
    """How many passes over the rows are done, and how many steps of the present one. Checkpoints hold it.

    The Trainer's own epoch won't do: it takes `max_steps` for the length of a stream.

    Attributes:
        passes: Complete passes; each of them saw every row once.
        steps: Steps since then.
        batches: The arguments that decide which rows of a stream these steps have seen.
    """

    DECISIVE = ("world_size", "dataloader_num_workers", "train_batch_size", "gradient_accumulation_steps")

    def __init__(self, passes: int = 0, steps: int = 0) -> None:
        self.passes = passes
        self.steps = steps
        self.batches: dict[str, int] = {}
        self.go_on_from(passes, steps)

    def go_on_from(self, passes: int, steps: int) -> None:
        """Where the next epoch of the Trainer begins."""
        self._next = (passes, steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes, self.steps = self._next
        self.batches = {name: getattr(args, name) for name in self.DECISIVE}
        self.go_on_from(self.passes + 1, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"passes": self.passes, "steps": self.steps}, "attributes": {"batches": self.batches}}

    @staticmethod
    def check_batches(saved: dict[str, int], args: TrainingArguments) -> None:
        """Raise a `ValueError` if steps that were counted with the `saved` numbers saw other rows than `args` say."""
        changes = [
            f"`{name}` was {number} and is {getattr(args, name)}"
            for name, number in saved.items()
            if getattr(args, name) != number
        ]
        if changes:
            raise ValueError(
                f"this checkpoint is in the middle of a pass over a stream, but {', '.join(changes)}: rows would be "
                "lost or seen twice. Resume with the same numbers, or begin the pass anew by `ignore_data_skip=True`."
            )


def fill_up(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The rows, and up to `size` of them copies of the last one with weight 0."""
    return rows + [{**rows[-1], "weight": 0.0}] * (size - len(rows))


def share_out(stream: IterableDataset, args: TrainingArguments, batch_size: int, collate: Any) -> DataLoaderShard:
    """Batches of this process's rows.

    `datasets` gives each row to one process: whole files where their number is a multiple of the processes, else
    every so manyth row. accelerate, left to itself, would fill the last batches with rows that were seen already.
    Here they are filled with rows of weight 0: what is gathered has to be of one size on all processes.
    """
    return DataLoaderShard(
        split_dataset_by_node(stream, args.process_index, args.world_size),
        device=args.device,
        batch_size=batch_size,
        collate_fn=partial(_collate_full, collate, batch_size),
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _collate_full(collate: Any, size: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collate(fill_up(rows, size))


def share_out_evenly(stream: IterableDataset, args: TrainingArguments, batch_size: int, collate: Any) -> "_Rounds":
    """Batches of this process's rows for evaluation: as many on each process, all of them full.

    Each process reads the whole stream, without dataloader workers: what is gathered is in the stream's order, and
    ends where the stream does.
    """
    return _Rounds(
        _RoundsOfRows(stream, batch_size, args.process_index, args.world_size),
        device=args.device,
        batch_size=batch_size,
        collate_fn=collate,
        pin_memory=args.dataloader_pin_memory,
    )


class _RoundsOfRows(torch.utils.data.IterableDataset):
    """Of rounds of a batch for each process, this process's; the last one is filled up with rows of weight 0."""

    def __init__(self, stream: IterableDataset, batch_size: int, process: int, processes: int) -> None:
        self.stream = stream
        self.size = batch_size * processes
        self.own = slice(batch_size * process, batch_size * (process + 1))
        self.last = 0  # rows of the newest round

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.stream)
        while found := list(islice(rows, self.size)):
            self.last = len(found)
            yield from fill_up(found, self.size)[self.own]


class _Rounds(DataLoaderShard):
    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if self.end_of_dataloader:  # how much of the last round `gather_for_metrics` keeps; 0 is all
                self.remainder = self.dataset.last % self.dataset.size
            yield batch
