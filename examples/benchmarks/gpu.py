"""Print the tables of `lora_speed.py` and `reward_step.py` on a GPU or another accelerator, with its peak memory.

    python examples/benchmarks/gpu.py            # --smoke: a few small steps, on a CPU too, to try the script

Not run by the authors yet on a GPU: none was at hand. Peak memory is that of the steps, model included, where the
accelerator counts it (CUDA and XPU do, MPS does not). Optimizers of 8 bits need bitsandbytes. The tables are written
to `docs/results/gpu_*.json`, or nowhere with `--smoke`.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

import lora_speed
import lora_step
import reward_step
import timing
from emoji import DIFFUSION_FOLDER
from results import Report, make_parser

FURTHER = {  # options that only pay on an accelerator
    "+ gradient_checkpointing (less memory, more time)": {"gradient_checkpointing": True},
    "+ adamw_bnb_8bit": {"optim": "adamw_bnb_8bit"},
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few steps on the small emoji models, on a CPU too")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch_compile")
    args = parser.parse_args()
    if not (torch.accelerator.is_available() or args.smoke):
        sys.exit("No GPU here: `lora_speed.py` and `reward_step.py` beside this file print the tables for a CPU.")
    timing.quiet()
    args.rounds = 1 if args.smoke else 5
    lora_step.STEPS = reward_step.STEPS = 2 if args.smoke else 20
    rows = lora_speed.ROWS | FURTHER
    if importlib.util.find_spec("bitsandbytes") is None:
        del rows["+ adamw_bnb_8bit"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            model, lora_speed.SIZE = DIFFUSION_FOLDER, 64
        else:
            model = Path(folder)
            lora_speed.save_pipeline(model)
        args.output_dir = Path(scratch) if args.smoke else args.output_dir
        with Report.of_script(__file__, parser, args, name="gpu_lora") as report:
            lora_speed.things(report, model, Path(scratch), args, rows)
        args.models = {"emoji CLIP": reward_step.emoji_clip} if args.smoke else reward_step.MODELS
        for part, measure in reward_step.PARTS.items():
            with Report.of_script(__file__, parser, args, name=f"gpu_reward_{part}") as report:
                measure(report, args)


if __name__ == "__main__":
    main()
