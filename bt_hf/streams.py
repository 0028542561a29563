"""Training on streams: shared out row by row, walked through in step, and resumed where they were left."""

from typing import Any

from accelerate.data_loader import DataLoaderShard
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState


class Filler(dict):
    """A batch whose rows have weight 0: what a process goes along with that has no rows left."""

    @classmethod
    def of(cls, batch: dict[str, Any]) -> "Filler":
        return cls(batch, weight=batch["weight"] * 0)


class Position(TrainerCallback, ExportableState):
    """How many passes over the rows are done, and how many steps of the present one. Checkpoints hold it.

    The Trainer's own epoch won't do: it takes `max_steps` for the length of a stream.

    Attributes:
        passes: Complete passes; each of them saw every row once.
        steps: Steps since then.
    """

    def __init__(self, passes: int = 0, steps: int = 0) -> None:
        self.passes = passes
        self.steps = steps
        self.go_on_from(passes, steps)

    def go_on_from(self, passes: int, steps: int) -> None:
        """Where the next epoch of the Trainer begins."""
        self._next = (passes, steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes, self.steps = self._next
        self.go_on_from(self.passes + 1, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"passes": self.passes, "steps": self.steps}, "attributes": {}}


def share_out(stream: IterableDataset, args: TrainingArguments, batch_size: int, collate: Any) -> DataLoaderShard:
    """Batches of this process's rows.

    `datasets` gives each row to one process: whole files where their number is a multiple of the processes, else
    every so manyth row. accelerate, left to itself, would fill the last batches with rows that were seen already.
    """
    return DataLoaderShard(
        split_dataset_by_node(stream, args.process_index, args.world_size),
        device=args.device,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
