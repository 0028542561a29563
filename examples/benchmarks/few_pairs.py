"""Measure how well a taste is learnt from few pairs, and what it costs: the tables of docs/results-reward.md.

    python examples/benchmarks/few_pairs.py                    # everything, about 15 minutes on 2 cores
    python examples/benchmarks/few_pairs.py --parts accuracy   # one part: see --help

Each part writes its tables and every run to `docs/results/few_pairs_PART.json`, and goes on where it was cut.

People are simulated on the emoji domain (`examples/emoji/taste.py`). They click on drawings of training concepts
or, with `--clicks held_out`, of some held-out ones; everything is measured on held-out concepts that they did not
click on. Nothing was ever tuned on held-out concepts.
"""

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPProcessor
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import timing
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, cross_validate
from bt_hf.reward.cache import FeatureCache
from bt_hf.reward.collator import PreferenceCollator
from bt_hf.reward.lora import add_adapter
from emoji import CLIP_FOLDER, STYLES, load_emoji
from results import Report, make_parser
from taste import preference_pairs, warmth

SIZES = (4, 8, 16, 32, 64, 128)
STRONG = 2.0  # scale of the adapter that puts taste above everything
CLICKERS = 3  # people of each taste, asked for every number of pairs
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}


class Bench:
    """Fit many people on one base with one cache of frozen features."""

    def __init__(self, split: str, seeds: int, clicks: str = "train") -> None:
        self.clicks = clicks
        self.scratch = tempfile.TemporaryDirectory()
        self.base = CLIPModel.from_pretrained(CLIP_FOLDER, dtype=torch.float32).eval()
        self.processor = CLIPProcessor.from_pretrained(CLIP_FOLDER)
        adapted = add_adapter(self.base)
        self.cache = FeatureCache(adapted, PreferenceCollator(self.processor))
        self.base = adapted.unload()
        self.seeds = range(seeds)
        self.split = split
        self.concepts = self._concepts(split)
        drawings = load_emoji(split)
        captions = list(drawings["caption"])[:: len(STYLES)]
        keep = [index for index, name in enumerate(list(drawings["concept"])[:: len(STYLES)]) if name in self.concepts]
        pixels = self.processor.image_processor(list(drawings["image"]), return_tensors="pt")["pixel_values"]
        tokens = self.processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            # Only the two projections come behind these features, and only they are adapted.
            chunks = [self.base.vision_model(pixel_values=chunk).pooler_output for chunk in pixels.split(256)]
            self.images = torch.cat(chunks).view(len(captions), len(STYLES), -1)[keep]
            self.texts = self.base.text_model(**tokens).pooler_output[keep]
        names = list(drawings["concept"])[:: len(STYLES)]
        self.names = [names[index] for index in keep]
        heat = np.array(warmth(split)).reshape(-1, len(STYLES))[keep]
        self.heat = torch.from_numpy(heat)
        self.base_embeddings = self.embed(self.base)
        self.base_recall = recall(*self.base_embeddings)
        # The Trainer collects garbage at the end of each training: spare it what lives as long as this.
        gc.freeze()

    @staticmethod
    def _concepts(split: str) -> frozenset[str]:
        """Return the concepts to measure on: all held-out ones or, for choosing defaults, a fifth of the others."""
        names = list(dict.fromkeys(load_emoji(split)["concept"]))
        return frozenset(names if split == "held_out" else names[::5])

    def embed(self, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised texts (C, D) and images (C, S, D) of the measured concepts."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        with torch.no_grad():
            texts, images = base.text_projection(self.texts), base.visual_projection(self.images)
        return F.normalize(texts, dim=-1), F.normalize(images, dim=-1)

    def pairs(self, taste: str, count: int, seed: int, flipped: float = 0.0):
        exclude = self.concepts if self.split == "train" else frozenset()
        return preference_pairs(taste, count, split=self.clicks, seed=seed, flipped=flipped, exclude=exclude)

    def unseen(self, pairs) -> torch.Tensor:
        """Return (C,) bool: True for measured concepts that none of `pairs` shows."""
        clicked = set(pairs["concept"])
        return torch.tensor([name not in clicked for name in self.names])

    def fit(self, pairs, measure: Callable[[PeftModel], object], **options: float) -> object:
        """Train on `pairs`, measure, and take the adapter off again."""
        torch.manual_seed(0)
        trainer = BradleyTerryTrainer(
            self.base,
            BradleyTerryConfig(self.scratch.name, **{**QUIET, **options}),
            train_dataset=self.cache.add(pairs),
            processing_class=self.processor,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        result = measure(trainer.model.eval())
        self.base = trainer.model.unload()
        return result

    def preferred(self, taste: str) -> torch.Tensor:
        """Return (C, S, S) bool: True where this person prefers the first drawing of a concept to the second."""
        if taste == "warm":
            return self.heat[:, :, None] - self.heat[:, None, :] > 20
        wanted = torch.tensor([style == taste for style in STYLES])
        return (wanted[:, None] & ~wanted[None, :]).expand(len(self.texts), -1, -1)

    def accuracy(self, taste: str, scores: torch.Tensor, keep: torch.Tensor | None = None) -> float:
        """Return the share of this person's pairs that `scores` (C, S) order rightly; a tie counts half."""
        difference = scores[:, :, None] - scores[:, None, :]
        right = (difference > 0).float() + 0.5 * (difference == 0).float()
        preferred = self.preferred(taste)
        return right[preferred if keep is None else preferred & keep[:, None, None]].mean().item()

    def measure(self, taste: str, model: torch.nn.Module, pairs=None) -> tuple[float, float]:
        """Return preference accuracy on the concepts that `pairs` does not show, and recall@5 on all."""
        texts, images = self.embed(model)
        keep = None if pairs is None else self.unseen(pairs)
        return self.accuracy(taste, torch.einsum("cd,csd->cs", texts, images), keep), recall(texts, images)

    def probe(self, taste: str, pairs) -> float:
        """Return the accuracy of logistic regression (scikit-learn's defaults, no intercept) on image embeddings."""
        embedded = []
        for column in ("chosen", "rejected"):
            pixels = self.processor.image_processor(list(pairs[column]), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                features = self.base.get_image_features(pixel_values=pixels).pooler_output
            embedded.append(F.normalize(features, dim=-1).numpy())
        rows = embedded[0] - embedded[1]
        model = LogisticRegression(fit_intercept=False, max_iter=1000)
        # Both orders of each pair: a preference has two sides, and scikit-learn needs two classes.
        model.fit(np.concatenate([rows, -rows]), np.repeat([1, 0], len(rows)))
        scores = self.base_embeddings[1] @ torch.from_numpy(model.coef_[0]).float()
        return self.accuracy(taste, scores, self.unseen(pairs))


def recall(texts: torch.Tensor, images: torch.Tensor, k: int = 5) -> float:
    """Return the share of captions with their drawing among the first `k` of all in one style; mean over styles."""
    target = torch.arange(len(texts))[:, None]
    found = [((texts @ images[:, style].T).topk(k).indices == target).any(1).float().mean() for style in range(5)]
    return torch.stack(found).mean().item()


def along_scale(bench: Bench, model: PeftModel, taste: str, scales: Iterable[float], pairs=None) -> list:
    """Return accuracy and recall@5 with the adapter at each of `scales`."""
    points = []
    for scale in scales:
        for layer in (module for module in model.modules() if hasattr(module, "set_scale")):
            layer.set_scale("default", scale)
        points.append(bench.measure(taste, model, pairs))
    return points


def part_accuracy(bench: Bench, report: Report, flipped: float = 0.0, tastes: tuple[str, ...] = STYLES) -> None:
    """Measure accuracy by number of pairs."""
    found = np.zeros((len(tastes), len(SIZES), len(bench.seeds), 4))
    jobs = [(t, n, s) for t in range(len(tastes)) for n in range(len(SIZES)) for s in bench.seeds]
    for t, n, s in tqdm(jobs, desc="fits", mininterval=10):
        pairs = bench.pairs(tastes[t], SIZES[n], s, flipped)

        def measure(taste: str = tastes[t], pairs: Dataset = pairs) -> list[float]:
            fitted = bench.fit(pairs, lambda model: along_scale(bench, model, taste, (1.0, STRONG), pairs))
            (adapted, recalled), (strong, _) = fitted
            return [adapted, strong, bench.probe(taste, pairs), recalled]

        found[t, n, s] = report.run(f"{tastes[t]}, N = {SIZES[n]}, seed {s}", measure)
    columns = [f"N = {n}" for n in SIZES]
    adapted, strong, probe, recalls = np.moveaxis(found.mean((0, 2)), -1, 0)
    base_scores = torch.einsum("cd,csd->cs", *bench.base_embeddings)
    base = np.mean([bench.accuracy(taste, base_scores) for taste in tastes])
    rows = [
        ("base", *[base] * len(SIZES)),
        ("**bt_hf**", *adapted),
        (f"bt_hf, adapter scaled by {STRONG:g}", *strong),
        ("logistic regression on embedding differences", *probe),
    ]
    wrong = f", {flipped:.0%} of the clicks wrong" if flipped else ""
    report.table("clicks", f"Accuracy by number of pairs{wrong}", columns, rows, ".3f")
    rows = [(taste, *values) for taste, values in zip(tastes, found.mean(2)[..., 0], strict=True)]
    rows.append((f"recall@5 of the caption (base {bench.base_recall:.3f})", *recalls))
    report.table("tastes", f"Accuracy of bt_hf for each taste{wrong}", columns, rows, ".3f")


def part_frontier(bench: Bench, report: Report) -> None:
    """Weigh taste against captions, by `kl_weight` and by scale of the adapter."""
    scales = (0.25, 0.5, 1.0, 2.0, 4.0)
    default = BradleyTerryConfig.kl_weight
    for count in (8, 64):
        rows: list[tuple[str, float, float]] = [("base", 0.5, bench.base_recall)]
        by_scale = []
        for weight in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0):
            results = []
            for taste in STYLES:
                for seed in bench.seeds:
                    results.append(
                        report.run(
                            f"N = {count}, weight {weight:g}, {taste}, seed {seed}",
                            lambda taste=taste, seed=seed, count=count, weight=weight: bench.fit(
                                bench.pairs(taste, count, seed),
                                lambda model: along_scale(bench, model, taste, scales),
                                kl_weight=weight,
                            ),
                        )
                    )
            means = np.array(results).mean(0)  # (scales, 2)
            name = f"**kl_weight {weight:g} (default)**" if weight == default else f"kl_weight {weight:g}"
            rows.append((name, *means[scales.index(1.0)]))
            if weight == default:
                by_scale = [
                    (f"default, scaled by {scale:g}", *mean)
                    for scale, mean in zip(scales, means, strict=True)
                    if scale != 1.0
                ]
        with_share = [(*row, row[2] / bench.base_recall) for row in [*rows, *by_scale]]
        columns = ["accuracy", "recall@5", "share of the base's recall"]
        report.table(f"n{count}", f"Accuracy against recall at N = {count}", columns, with_share, ".3f")


def part_retrieval(bench: Bench, report: Report) -> None:
    """Search all drawings of all held-out concepts for a held-out caption, and judge the first one found."""

    def top_one(model: torch.nn.Module, taste: str) -> tuple[float, float, float]:
        texts, images = bench.embed(model)
        best = (texts @ images.flatten(0, 1).T).argmax(1)
        right = best // len(STYLES) == torch.arange(len(texts))
        liked = best % len(STYLES) == STYLES.index(taste)
        # Classification the other way round: the caption, of all, that a drawing gets.
        classes = ((images.flatten(0, 1) @ texts.T).argmax(1) == torch.arange(len(texts)).repeat_interleave(5)).float()
        return right.float().mean().item(), liked[right].float().mean().item(), classes.mean().item()

    rows = []
    for taste in STYLES:
        before = top_one(bench.base, taste)
        after = [
            report.run(
                f"{taste}, seed {seed}",
                lambda taste=taste, seed=seed: bench.fit(
                    bench.pairs(taste, 64, seed), lambda model: top_one(model, taste)
                ),
            )
            for seed in bench.seeds
        ]
        rows.append((taste, *np.stack([before, np.mean(after, 0)], 1).flatten()))
    rows.append(("**mean**", *np.mean([values for _, *values in rows], 0)))
    columns = ["right concept, base", "adapted", "preferred style if so, base", "adapted", "drawing's caption, base"]
    report.table("first", "Retrieval and classification, N = 64", [*columns, "adapted"], rows, ".3f")


def part_verdict(bench: Bench, report: Report, people: int) -> None:
    """Measure coverage of the cross-validated interval, and count verdicts of 'better', by number of pairs."""
    config = BradleyTerryConfig(bench.scratch.name, **QUIET)
    sizes = (8, 16, 32, 64)
    asked = min(people, CLICKERS * len(STYLES))  # for every number of pairs; the others only for 32
    better: dict[int, list[bool]] = {size: [] for size in sizes}
    covered = []
    jobs = [(person, size) for person in range(people) for size in sizes if size == 32 or person < asked]
    for person, size in tqdm(jobs, desc="people", mininterval=10):
        taste = STYLES[person % len(STYLES)]

        def measure(person: int = person, size: int = size, taste: str = taste) -> dict[str, Any]:
            pairs = bench.pairs(taste, size, seed=1000 + person)
            result = cross_validate(bench.base, pairs, config, processing_class=bench.processor, progress=False)
            found = {"better": result.verdict.startswith("Better")}
            if size == 32:
                found["interval"] = [result.metrics["accuracy_low"], result.metrics["accuracy_high"]]
                found["accuracy"] = bench.fit(pairs, lambda model: bench.measure(taste, model, pairs))[0]
            return found

        found = report.run(f"person {person}, N = {size}", measure)
        if person < asked:
            better[size].append(found["better"])
        if size == 32:
            low, high = found["interval"]
            covered.append(low <= found["accuracy"] <= high)
    columns = [f"N = {size}" for size in sizes]
    rows = [
        ("people asked", *[asked] * len(sizes)),
        ('verdict "better than the base"', *[sum(better[size]) for size in sizes]),
    ]
    report.table("verdict", "People for whom the verdict is 'better than the base'", columns, rows, "d")
    rows = [("5-fold cross-validation on 32 pairs", len(covered), sum(covered), np.mean(covered))]
    columns = ["people", "95 % interval holds the held-out accuracy", "share"]
    report.table("interval", "Coverage of the interval", columns, rows, ["d", "d", ".3f"])


CLICKED = ("accuracy", "flipped", "warm", "verdict")  # parts whose people may click on held-out concepts
PARTS: dict[str, Callable[[Bench, Report, argparse.Namespace], None]] = {
    "accuracy": lambda bench, report, args: part_accuracy(bench, report),
    "flipped": lambda bench, report, args: part_accuracy(bench, report, flipped=0.2),
    "warm": lambda bench, report, args: part_accuracy(bench, report, tastes=("warm",)),
    "frontier": lambda bench, report, args: part_frontier(bench, report),
    "retrieval": lambda bench, report, args: part_retrieval(bench, report),
    "verdict": lambda bench, report, args: part_verdict(bench, report, args.people),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--people", type=int, default=100, help="simulated people for the coverage of the interval")
    parser.add_argument(
        "--split",
        choices=("held_out", "train"),
        default="held_out",
        help="concepts to measure on; `train` measures on a fifth of the training concepts, to choose defaults with",
    )
    parser.add_argument(
        "--clicks",
        choices=("train", "held_out"),
        default="train",
        help="concepts to click on: those that the base was pretrained on, or held-out ones (for accuracy, flipped, "
        "warm and verdict; what was clicked on is then left out of what is measured)",
    )
    args = parser.parse_args()
    timing.quiet()
    logging.disable(logging.INFO)
    bench = Bench(args.split, args.seeds, args.clicks)
    for part in args.parts:
        name = f"few_pairs_{part}" + ("_on_training" if part in CLICKED and args.clicks == "train" else "")
        name += "_tuning" if args.split == "train" else ""
        with Report.of_script(__file__, parser, args, part, name) as report:
            PARTS[part](bench, report, args)


if __name__ == "__main__":
    main()
