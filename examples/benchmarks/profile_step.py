"""Profile a training step: its time in the network and outside of it, and by operators.

    python examples/benchmarks/profile_step.py --trainer lora
    python examples/benchmarks/profile_step.py --trainer reward --uncached

First the clock alone, since a profiler slows down what is small: seconds in forwards and backwards of the network, in
the optimizer's step, and in all the rest of a step. Then the same steps under the profiler of torch: operators by the
time they take themselves. The first table is written to `docs/results/profile_step_TRAINER.json`. For Python's share,
`py-spy record -o step.svg -- python ...` takes this script as it is.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

import lora_step
import reward_step
import timing

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from emoji import DIFFUSION_FOLDER
from results import Report, make_parser
from taste import preference_pairs


class Stopwatch(TrainerCallback):
    """Time the network and the optimizer, from the end of the first step on; a profiler begins there, too."""

    def __init__(self, trainer: Trainer) -> None:
        self.spent: dict[str, float] = {}
        self.began: dict[str, float] = {}
        self.profiler: profile | None = None
        trainer.model.register_forward_pre_hook(lambda *_: self.start("forward"))
        trainer.model.register_forward_hook(lambda *_: self.stop("forward"))
        backward = trainer.accelerator.backward

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            self.start("backward")
            backward(*args, **kwargs)
            self.stop("backward")

        trainer.accelerator.backward = timed_backward
        trainer.add_callback(self)

    def start(self, name: str) -> None:
        self.began[name] = timing.now()

    def stop(self, name: str) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + timing.now() - self.began[name]

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.start("optimizer's step")

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.stop("optimizer's step")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.spent = {}
            if self.profiler:
                self.profiler.start()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trainer", choices=["reward", "lora"], default="lora")
    parser.add_argument("--uncached", action="store_true", help="read and encode at every step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--operators", type=int, default=15, help="how many to print")
    args = parser.parse_args()
    timing.quiet()
    lora_step.STEPS = reward_step.STEPS = args.steps + 1  # the first is not counted
    pairs = preference_pairs("fluent", 64)
    with tempfile.TemporaryDirectory() as scratch:
        if args.trainer == "lora":
            turn = lora_step.train(DIFFUSION_FOLDER, pairs, Path(scratch), cache_latents=not args.uncached)
        else:
            cached = not args.uncached
            turn = reward_step.train(reward_step.emoji_clip, None, pairs, scratch, cache_features=cached)
        watch = Stopwatch(turn.trainer)
        total = sum(turn())
        spent = watch.spent | {"all else": total - sum(watch.spent.values())}
        rows = [(name, value / args.steps, value / total) for name, value in (spent | {"in all": total}).items()]
        title = f"Without the profiler, a step of {lora_step.BATCH} pairs"
        with Report.of_script(__file__, parser, args, name=f"profile_step_{args.trainer}") as report:
            report.table("spent", title, ["seconds", "share"], rows, [".5f", ".3f"])
        activities = [ProfilerActivity.CPU]
        if timing.DEVICE.type in ("cuda", "xpu"):
            activities.append(getattr(ProfilerActivity, timing.DEVICE.type.upper()))
        watch.profiler = profile(activities=activities)
        turn()
        watch.profiler.stop()
    order = f"self_{timing.DEVICE.type if len(activities) > 1 else 'cpu'}_time_total"
    print("\n" + watch.profiler.key_averages().table(sort_by=order, row_limit=args.operators))


if __name__ == "__main__":
    main()
