"""The table of `lora_speed.py` on a GPU, with the further options that only pay there.

    python examples/benchmarks/gpu.py

Not run by the authors yet: no GPU was at hand. Optimizers of 8 bits need bitsandbytes.
"""

import importlib.util
import sys
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path

import lora_step
import torch
from datasets import disable_progress_bars
from diffusers.utils import logging as diffusers_logging
from lora_speed import ROWS, save_pipeline, things
from transformers.utils import logging

FURTHER = {
    "+ gradient_checkpointing (less memory, more time)": {"gradient_checkpointing": True},
    "+ adamw_bnb_8bit": {"optim": "adamw_bnb_8bit"},
}


def main() -> None:
    if not torch.accelerator.is_available():
        sys.exit("No GPU here: `python examples/benchmarks/lora_speed.py` prints the table for this machine's CPU.")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    disable_progress_bars()
    lora_step.STEPS = 20
    rows = ROWS | FURTHER
    if importlib.util.find_spec("bitsandbytes") is None:
        del rows["+ adamw_bnb_8bit"]
    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as scratch:
        save_pipeline(Path(model))
        things(Path(model), Path(scratch), Namespace(no_compile=False, rounds=5), rows)


if __name__ == "__main__":
    main()
