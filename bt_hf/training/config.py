"""Options that the trainers of rewards and of preference LoRAs share."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from bt_hf.training.lora_options import LoraOptions
from bt_hf.training.optimizers import check_optimizer
from bt_hf.training.option_checks import check_bounds, check_names, is_given
from bt_hf.training.trainer_options import check_trainer_options

logger = logging.getLogger(__name__)


@dataclass
class PreferenceConfig(LoraOptions, TrainingArguments):
    """`transformers.TrainingArguments` with the LoRA and other options that both trainers take."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: the collator reads the columns of the row contract."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Log the mean of earlier losses where one is not finite. Off: it should show, and looking for it "
            "would wait for the device at every step."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Share of clicks taken to be slips of the hand, in [0, 0.5], as in conservative DPO."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow to write over an adapter that `output_dir` already holds."}
    )

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse unknown options with a near match, which the `__init__` of a dataclass would not name."""
        check_names(cls, options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_trainer_options(self)
        check_bounds(self, {"label_smoothing": (0, 0.5, "in [0, 0.5]")})
        # Processes that were started together on a machine without a GPU join on CPUs. If nothing said so, each would
        # take itself for the only one, train by itself, and write into the same folder. And only with this the
        # Trainer takes bfloat16 on a CPU.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if (several or self.bf16) and not torch.accelerator.is_available():
            self.use_cpu = True
        # DeepSpeed takes the precision of `accelerate launch`, and the Trainer refuses to start with one that these
        # arguments don't name. Without DeepSpeed, it takes that of `accelerate launch` itself.
        by_launcher = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not self.deepspeed
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if by_launcher and precision in ("bf16", "fp16") and not (self.bf16 or self.fp16):
            setattr(self, precision, True)
        super().__post_init__()
        # Else transformers would divide a model among the processes as soon as it is loaded, whatever
        # `zero3_init_flag` says; bt_hf looks at the base before it is divided. The Trainer puts this back.
        if by_launcher:
            unset_hf_deepspeed_config()
        # Dispatching cuts every tensor of a stream's batch to B rows, but of images there are 2B.
        self.accelerator_config.dispatch_batches = False
        # Pinned memory is for copies to a GPU; without one torch only warns about it.
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        check_optimizer(self)

    def warn_of_two_lengths(self) -> None:
        """Warn if both numbers of epochs and of steps are given."""
        given = is_given(self, "num_train_epochs") and is_given(self, "max_steps")
        if given and self.num_train_epochs != TrainingArguments.num_train_epochs and self.max_steps > 0:
            logger.warning(
                "`num_train_epochs=%g` has no effect beside `max_steps=%d`.", self.num_train_epochs, self.max_steps
            )

    def refuse_without_effect(self, needs: Mapping[str, tuple[bool, str]]) -> None:
        """Raise a `ValueError` for an option that is given, but has no effect beside the others.

        Args:
            needs: Name of an option -> whether it has an effect, and what it would need for that.
        """
        for name, (has_effect, needed) in needs.items():
            if is_given(self, name) and not has_effect:
                value = getattr(self, name)
                raise ValueError(f"`{name}={value!r}` has no effect without {needed}: leave it out, or ask for that.")
