"""Measure how well a taste is learnt from clicks, beside the baselines: the first tables of docs/results-reward.md.

    python examples/benchmarks/clicks.py                    # all kinds of people, about 25 minutes on 2 cores
    python examples/benchmarks/clicks.py --parts wrong --kinds house colour --seeds 1
    python examples/benchmarks/clicks.py --parts many --kinds colour mixture   # up to 4,096 clicks, about 10 minutes
    python examples/benchmarks/clicks.py --split train      # people of the training concepts, to choose defaults with

Each part writes its tables and every run to `docs/results/clicks_PART.json`, and goes on where it was cut. People,
their tastes and their drawings are those of `people.py`; clicks and tests are of different concepts. The rewards are
those of the trained adapter, through `BradleyTerryTrainer`; the baselines read the frozen embeddings of the images:

- probe: logistic regression of scikit-learn on differences of embeddings, at its default penalty;
- probe, cross-validated: the same with the penalty that 5-fold cross-validation chooses;
- mean difference: of chosen and rejected embeddings, with a temperature by leave-one-out.

Held-out concepts have drawings for some hundred clicks. The part `many` asks one person of each kind that has
thousands of pairs of the training concepts, and judges on other training concepts.

Calibration is measured in two ways. The expected calibration error of one person's 400 test pairs, in ten bins, is
never small: even true probabilities would show some hundredths, since a bin holds 40 pairs. So the test pairs of all
people of a kind are also judged together.
"""

import argparse
import gc
import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "icons"))
import timing
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.reward.cache import FeatureCache
from bt_hf.reward.collator import PreferenceCollator
from bt_hf.reward.lora import add_adapter
from looks import BASE
from people import KINDS, Person, people_of
from results import Report, make_parser

SIZES = (4, 8, 16, 32, 64, 128)
MANY = (512, 1024, 2048, 4096)
WRONG = (0.1, 0.2, 0.3)
METHODS = ("base", "probe", "probe, cross-validated", "mean difference", "**bt_hf**")
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
TEMPERATURES = np.exp(np.linspace(-2, 8, 60))


class Bench:
    """Fit many people on one base with one cache of frozen features."""

    def __init__(self, folder: str) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.base = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        adapted = add_adapter(self.base)
        self.cache = FeatureCache(adapted, PreferenceCollator(self.processor), max_bytes=8e9)
        self.base = adapted.unload()
        # The Trainer collects garbage at the end of each training: spare it what lives as long as this.
        gc.freeze()

    def measure(self, person: Person, split: str, n: int, seed: int, wrong: float) -> dict[str, list[float]]:
        """Return for each method accuracy, log-loss and the probabilities of what was chosen in the test."""
        clicks, test = person.pairs(split, n, seed, wrong), person.test(split, seed)
        torch.manual_seed(0)
        trainer = BradleyTerryTrainer(
            self.base,
            BradleyTerryConfig(self.scratch.name, **QUIET),
            train_dataset=self.cache.add(clicks),
            processing_class=self.processor,
        )
        trainer.remove_callback(PrinterCallback)
        rows, held_out = trainer.train_dataset, self.cache.add(test)
        known, unknown = self._differences(trainer, rows), self._differences(trainer, held_out)
        trainer.train()
        margins, base = trainer.predict(held_out).predictions
        self.base = trainer.model.unload()
        found = {"base": base, "**bt_hf**": margins}
        found |= {name: unknown @ weights for name, weights in _baselines(known).items()}
        return {name: _judge(np.asarray(found[name], dtype=float)) for name in METHODS}

    @torch.no_grad()
    def _differences(self, trainer: BradleyTerryTrainer, pairs: Any) -> np.ndarray:
        """Return base embeddings of chosen minus rejected images, (N, D)."""
        found = []
        for batch in trainer.read_batches(pairs):
            with trainer.base_model() as model:
                chosen, rejected = trainer._embed(model, batch)[1].chunk(2)
            found.append((chosen - rejected).double().numpy())
        return np.concatenate(found)


def _baselines(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the weights (D,) of each baseline."""
    penalty = min(10.0 ** np.arange(-2, 5), key=lambda penalty: _held_out_loss(rows, penalty))
    mean = rows.mean(0)
    left_out = ((rows.sum(0) - rows) * rows).sum(1) / max(len(rows) - 1, 1)
    size = np.square(rows).sum(1).mean()
    prior = 0.5 * np.square(np.log(TEMPERATURES) - np.log(5))
    losses = [np.logaddexp(0, -t * left_out / size).sum() for t in TEMPERATURES] + prior
    return {
        "probe": _probe(rows, 1.0),
        "probe, cross-validated": _probe(rows, penalty),
        "mean difference": TEMPERATURES[int(np.argmin(losses))] / size * mean,
    }


def _probe(rows: np.ndarray, penalty: float) -> np.ndarray:
    # Both orders of each pair: a preference has two sides, and scikit-learn needs two classes.
    probe = LogisticRegression(C=penalty, fit_intercept=False, max_iter=1000)
    return probe.fit(np.concatenate([rows, -rows]), np.repeat([1, 0], len(rows))).coef_[0]


def _held_out_loss(rows: np.ndarray, penalty: float) -> float:
    folds = KFold(min(5, len(rows)), shuffle=True, random_state=0).split(rows)
    return sum(np.logaddexp(0, -rows[test] @ _probe(rows[train], penalty)).sum() for train, test in folds)


def _judge(margins: np.ndarray) -> list[float]:
    """Return accuracy, log-loss, expected calibration error in ten bins of equal counts, and the gaps of ten others.

    The latter are of equal widths from one half to 1: the sum of each bin's confidence minus the pairs that are
    ordered rightly, over the number of all pairs. Their means over people are gaps of all pairs together.
    """
    accuracy = float((np.sign(margins) / 2 + 0.5).mean())
    confident = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.array_split(np.argsort(confident, kind="stable"), min(10, len(margins)))
    gaps = confident - (margins > 0)
    errors = [abs(gaps[rows].mean()) * len(rows) for rows in bins]
    place = np.minimum((20 * (confident - 0.5)).astype(int), 9)
    in_bins = np.bincount(place, weights=gaps, minlength=10) / len(margins)
    return [accuracy, float(np.logaddexp(0, -margins).mean()), float(sum(errors) / len(margins)), *in_bins.tolist()]


def part(
    bench: Bench,
    report: Report,
    args: argparse.Namespace,
    wrong: float = 0.0,
    sizes: tuple[int, ...] = SIZES,
    split: str | None = None,
    people_of_kind: int | None = None,
) -> None:
    """Measure all people, or the first ones of each kind, at each number of clicks."""
    split = split or args.split
    people = [person for kind in args.kinds for person in people_of(kind)[:people_of_kind] if split in person.splits]
    found: dict[tuple[str, int], list[Any]] = defaultdict(list)  # by kind and size: (methods, 13)
    jobs = [(person, n, seed) for person in people for n in sizes for seed in range(args.seeds)]
    for person, n, seed in tqdm(jobs, desc=f"{wrong:.0%} wrong", mininterval=10):
        try:
            values = report.run(
                f"{person.name}, N = {n}, {wrong:.0%} wrong, seed {seed}",
                lambda person=person, n=n, seed=seed: bench.measure(person, split, n, seed, wrong),
            )
        except ValueError:  # fewer drawings than that
            continue
        found[person.kind, n].append([values[name] for name in METHODS])
    kinds = [kind for kind in args.kinds if any(kind == key for key, _ in found)]
    columns = [f"N = {n}" for n in sizes]
    suffix = f", {wrong:.0%} of the clicks wrong" if wrong else ""
    name = f"_{wrong * 100:.0f}" if wrong else ""
    means = {
        (kind, n): np.mean(found[kind, n], axis=0) if found[kind, n] else np.full((len(METHODS), 13), np.nan)
        for kind in kinds
        for n in sizes
    }
    figures: dict[str, tuple[str, Callable[[np.ndarray], float]]] = {
        "accuracy": ("Accuracy", lambda values: values[0]),
        "log_loss": ("Log-loss", lambda values: values[1]),
        "calibration": ("Expected calibration error of a person", lambda values: values[2]),
        "calibration_together": ("Expected calibration error of a kind", lambda values: np.abs(values[3:]).sum()),
    }
    for metric, (title, figure) in figures.items():
        rows = [
            (method, *(_cell([figure(means[kind, n][index]) for kind in kinds]) for n in sizes))
            for index, method in enumerate(METHODS)
        ]
        report.table(f"{metric}{name}", f"{title}, mean over kinds of people{suffix}", columns, rows, ".3f")
        if wrong and metric != "accuracy":
            continue
        rows = [
            (f"{kind}, {method}", *(_cell([figure(means[kind, n][index])]) for n in sizes))
            for kind in kinds
            for index, method in enumerate(METHODS)
            if method != "base"
        ]
        report.table(f"{metric}_of_kinds{name}", f"{title} by kind of people{suffix}", columns, rows, ".3f")


def _cell(values: list[float]) -> float | None:
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("clean", "wrong", "many"), default=["clean", "wrong"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=1, help="times that each of the people clicks anew")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--base", default=str(BASE))
    args = parser.parse_args()
    timing.quiet()
    logging.disable(logging.INFO)
    bench = Bench(args.base)
    for name in args.parts:
        stem = f"clicks_{name}" + ("_tuning" if args.split == "train" else "")
        with Report.of_script(__file__, parser, args, name, stem) as report:
            if name == "clean":
                part(bench, report, args)
            elif name == "wrong":
                for wrong in WRONG:
                    part(bench, report, args, wrong, SIZES[:-1])
            else:
                part(bench, report, args, sizes=MANY, split="train", people_of_kind=1)


if __name__ == "__main__":
    main()
