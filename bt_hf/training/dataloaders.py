"""Dataloaders of streams: every row goes to one process, and all processes take the same number of batches."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import TrainingArguments


def without_weight(batch: dict[str, Any], kept: int = 0) -> dict[str, Any]:
    """Return the batch with weight 0 for all but the first `kept` rows, so that the others count for nothing."""
    weight = batch["weight"].clone()
    weight[kept:] = 0
    return {**batch, "weight": weight}


def pad_rows(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Return the rows, followed by copies of the last one with weight 0 until there are `size` of them."""
    return rows + [{**rows[-1], "weight": 0.0}] * (size - len(rows))


def train_dataloader(
    stream: IterableDataset, args: TrainingArguments, batch_size: int, collate: Any
) -> DataLoaderShard:
    """Return batches of this process's rows.

    `datasets` gives each row to one process: whole files where their number is a multiple of the processes, else
    every so manyth row. accelerate, left to itself, would fill the last batches with rows that were seen already.
    Here they are filled with rows of weight 0: what is gathered has to be of one size on all processes.
    """
    return DataLoaderShard(
        split_dataset_by_node(stream, args.process_index, args.world_size),
        device=args.device,
        batch_size=batch_size,
        collate_fn=partial(_collate_padded, collate, batch_size),
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def _collate_padded(collate: Any, size: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collate(pad_rows(rows, size))


def eval_dataloader(
    stream: IterableDataset, args: TrainingArguments, batch_size: int, collate: Any
) -> "_EvalDataLoader":
    """Return full batches of this process's rows, as many on each process.

    Each process reads the whole stream, without dataloader workers: what is gathered is in the stream's order, and
    ends where the stream does.
    """
    return _EvalDataLoader(
        _RoundRobin(stream, batch_size, args.process_index, args.world_size),
        device=args.device,
        batch_size=batch_size,
        collate_fn=collate,
        pin_memory=args.dataloader_pin_memory,
    )


class _RoundRobin(torch.utils.data.IterableDataset):
    """This process's batch of each round, in which every process gets one; rows of weight 0 fill the last round."""

    def __init__(self, stream: IterableDataset, batch_size: int, process: int, processes: int) -> None:
        self.stream = stream
        self.size = batch_size * processes
        self.own = slice(batch_size * process, batch_size * (process + 1))
        self.rows_of_last_round = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.stream)
        while found := list(islice(rows, self.size)):
            self.rows_of_last_round = len(found)
            yield from pad_rows(found, self.size)[self.own]


class _EvalDataLoader(DataLoaderShard):
    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if self.end_of_dataloader:  # rows of the last round that `gather_for_metrics` keeps; 0 is all
                self.remainder = self.dataset.rows_of_last_round % self.dataset.size
            yield batch
