"""Position in the training rows: saved with each checkpoint, so that a resumed run sees the rows that are left."""

from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState


class Position(TrainerCallback, ExportableState):
    """Epochs completed, and steps taken in the present one.

    The Trainer's own epoch won't do: it takes `max_steps` for the length of a stream.

    Attributes:
        epochs_completed: Complete passes over the rows; each of them saw every row once.
        steps: Steps since then.
        batches: Values of the arguments that decide which rows of a stream these steps have seen.
    """

    BATCH_ARGUMENTS = ("world_size", "dataloader_num_workers", "train_batch_size", "gradient_accumulation_steps")

    def __init__(self, epochs_completed: int = 0, steps: int = 0) -> None:
        self.epochs_completed = epochs_completed
        self.steps = steps
        self.batches: dict[str, int] = {}
        self.start_from(epochs_completed, steps)

    def start_from(self, epochs_completed: int, steps: int) -> None:
        """Let the next epoch of the Trainer begin here."""
        self._next = (epochs_completed, steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs_completed, self.steps = self._next
        self.batches = {name: getattr(args, name) for name in self.BATCH_ARGUMENTS}
        self.start_from(self.epochs_completed + 1, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {
            "args": {"epochs_completed": self.epochs_completed, "steps": self.steps},
            "attributes": {"batches": self.batches},
        }

    @staticmethod
    def check_batches(saved: dict[str, int], args: TrainingArguments) -> None:
        """Raise a `ValueError` if steps that were counted with the `saved` values saw other rows than `args` give."""
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
