"""Options that the trainers of rewards and of preference LoRAs share."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class PreferenceConfig(TrainingArguments):
    """`transformers.TrainingArguments` for preference pairs. Subclasses add what they train with."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: the collator reads the columns of the row contract."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Share of clicks taken to be slips of the hand, in [0, 0.5], as in conservative DPO."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow to write over an adapter that `output_dir` already holds."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Dispatching cuts every tensor of a stream's batch to B rows, but of images there are 2B.
        self.accelerator_config.dispatch_batches = False
        # Pinned memory is for copies to a GPU; without one torch only warns about it.
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if not 0.0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"`label_smoothing` should be in [0, 0.5], but got {self.label_smoothing}.")
