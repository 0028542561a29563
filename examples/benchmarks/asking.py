"""Measure what it saves to ask for the pairs that teach most, and how far the running accuracy can be believed.

    python examples/benchmarks/asking.py                  # 20 people of each kind, about 20 minutes on a core
    python examples/benchmarks/asking.py --parts speed
    python examples/benchmarks/asking.py --split train    # people of the training concepts, to choose settings with

Each part writes its tables and every run to `docs/results/asking_PART.json`, and goes on where it was cut. People,
their tastes and their drawings are those of `people.py`; half of the concepts is clicked on, the accuracy is measured
on the other half. Everybody clicks 60 times on pairs of `select_pairs`, and 60 times on pairs drawn at random; two
drawings that they like equally are a tie. What is learnt is the taste that the studio fits after each click, on frozen
embeddings.
"""

import argparse
import logging
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "icons"))
import timing
from bt_hf import PreferenceScorer, select_pairs
from bt_hf.reward.asking import AskedPair
from bt_hf.reward.posterior import Taste, fit_taste
from bt_hf.reward.running import Prediction, RunningAccuracy
from looks import BASE
from people import KINDS, Person, load_pool, people_of
from results import Report, make_parser

CHECKED = (10, 20, 30, 45, 60)
SHOWN = (10, 20, 30, 60)
WRONG = (0.0, 0.1)
ARMS = {"random": 1.0, "asked": 0.25}  # share of random pairs
CLICKS = (0, 60, 250, 1000)
CALLS = 30


class Bench:
    """Embed each pool once, and let people click.

    Args:
        folder: Folder of the base.
        cache: Folder that keeps the embeddings, or `None`.
    """

    def __init__(self, folder: str, cache: Path | None) -> None:
        self.scorer = PreferenceScorer.from_pretrained(folder, device="cpu")
        self.scale, self.cache = float(self.scorer.scale), cache
        self._known: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def embeddings(self, name: str, split: str) -> dict[str, torch.Tensor]:
        """Return `image` and `text` embeddings of all drawings of a pool, (M, D) each."""
        if (name, split) not in self._known:
            path = self.cache and self.cache / f"{name}_{split}_{self.scorer.digest()[:16]}.pt"
            if path and path.exists():
                self._known[name, split] = torch.load(path)
            else:
                pool = load_pool(name, split)
                captions = sorted(set(pool.captions))
                places = {caption: place for place, caption in enumerate(captions)}
                text = self.scorer.embed_texts(captions)[[places[caption] for caption in pool.captions]]
                found = {"image": self.scorer.embed_images(pool.images), "text": text}
                self._known[name, split] = found
                if path:
                    torch.save(found, path)
        return self._known[name, split]

    def measure(self, person: Person, split: str, seed: int, wrong: float) -> dict[str, Any]:
        """Return accuracies of both arms after `CHECKED` clicks, and what was predicted before clicks."""
        world = World(self, person, split, seed)
        found: dict[str, Any] = {"base": world.base}
        for arm, share in ARMS.items():
            found[arm], predictions = world.click(seed, wrong, share)
        return found | {"predictions": predictions}


class World:
    """Drawings that one person clicks on, and pairs that they are judged by."""

    def __init__(self, bench: Bench, person: Person, split: str, seed: int) -> None:
        rows, self.utility = person.drawings(split, seed)
        pool, embeddings = load_pool(person.pool, split), bench.embeddings(person.pool, split)
        self.gap, self.scale = person.gap, bench.scale
        self.prompts = [pool.concepts[row] for row in rows]
        self.image, self.text = (embeddings[name][rows] for name in ("image", "text"))
        better, worse = torch.tensor(person.test_rows(split, seed)).unbind(1)
        difference = (embeddings["image"][better] - embeddings["image"][worse]).double()
        text = embeddings["text"][better].double()
        self.test = (text, difference, self.scale * (text * difference).sum(1))
        self.base = _accuracy(self.test[2])

    def answer(self, left: int, right: int, rng: random.Random, wrong: float) -> float:
        """Return what they click, with a wrong click now and then."""
        difference = self.utility[left] - self.utility[right]
        if abs(difference) <= self.gap:
            return 0.5
        return float((difference > 0) != (rng.random() < wrong))

    def learn(self, answered: list[tuple[int, int, float]]) -> Taste:
        """Fit a taste to the clicks."""
        left, right, preference = (torch.tensor(column) for column in zip(*answered, strict=True))
        ones = torch.ones(len(answered))
        return fit_taste(self.text[left], self.image[left], self.image[right], preference, ones, self.scale)

    def predict(self, taste: Taste, left: int, right: int) -> tuple[float, float]:
        """Return the margins of a pair by a taste and by the base."""
        text, difference = self.text[[left]].double(), (self.image[[left]] - self.image[[right]]).double()
        base = self.scale * (text * difference).sum(1)
        return float(taste.margins(text, difference, base)), float(base)

    def click(self, seed: int, wrong: float, share: float) -> tuple[list[float], list[list[float]]]:
        """Click 60 times; return the accuracy after `CHECKED` clicks, and predictions of the random pairs."""
        rng = random.Random(f"{seed}/{wrong}/{share}")
        answered: list[tuple[int, int, float]] = []
        accuracy, predictions = [], []
        waiting: list[AskedPair] = []
        while len(answered) < CHECKED[-1]:
            if not waiting:  # random pairs don't depend on answers
                count = CHECKED[-1] if share == 1 else 1
                waiting = select_pairs(self.image, self.prompts, answered, count, seed=seed, random_share=share)
            pair = waiting.pop(0)
            preference = self.answer(pair.left, pair.right, rng, wrong)
            if pair.random and share < 1:
                learnt = any(answer[2] != 0.5 for answer in answered)
                margins = self.predict(self.learn(answered), pair.left, pair.right) if learnt else (0.0, 0.0)
                predictions.append([len(answered), *margins, preference])
            answered.append((pair.left, pair.right, preference))
            if len(answered) in CHECKED:
                accuracy.append(_accuracy(self.learn(answered).margins(*self.test)))
        return accuracy, predictions


def _accuracy(margins: torch.Tensor) -> float:
    return float((margins.sign() / 2 + 0.5).mean())


def accuracy(report: Report, bench: Bench, args: argparse.Namespace) -> None:
    """Compare asked with random pairs, and the running accuracy with the one on other concepts."""
    found: dict[float, dict[str, list[Any]]] = {wrong: defaultdict(list) for wrong in WRONG}
    jobs = [(wrong, kind, number) for number in range(args.people) for wrong in WRONG for kind in args.kinds]
    for wrong, kind, number in tqdm(jobs, mininterval=10):
        people = [person for person in people_of(kind) if args.split in person.splits]
        if not people:
            continue
        person, seed = people[number % len(people)], number // len(people)
        values = report.run(
            f"{person.name}, seed {seed}, {wrong:.0%} wrong",
            lambda person=person, seed=seed, wrong=wrong: bench.measure(person, args.split, seed, wrong),
        )
        found[wrong][kind].append(values)
    for wrong, kinds in found.items():
        suffix, name = (f", {wrong:.0%} of the clicks wrong", f"_{wrong * 100:.0f}") if wrong else ("", "")
        _compare(report, kinds, suffix, name)
    _cover(report, found)


def _compare(report: Report, kinds: dict[str, list[Any]], suffix: str, name: str) -> None:
    columns = [f"{n} clicks" for n in SHOWN]
    places = [CHECKED.index(n) for n in SHOWN]
    rows: list[Any] = []
    gains: list[Any] = []
    everybody = {arm: np.array([run[arm] for runs in kinds.values() for run in runs]) for arm in ARMS}
    groups = {kind: {arm: np.array([run[arm] for run in runs]) for arm in ARMS} for kind, runs in kinds.items()}
    for kind, arms in {"**all**": everybody, **groups}.items():
        rows += [(f"{kind}, {arm}", *(_with_interval(values[:, at]) for at in places)) for arm, values in arms.items()]
        gain = arms["asked"] - arms["random"]
        saved = saved_clicks(arms["asked"].mean(0), arms["random"].mean(0)[-1])
        gains.append((kind, *(_with_interval(gain[:, at], "+.3f") for at in places), saved))
    report.table(f"accuracy{name}", f"Accuracy on other concepts, mean and 95 % interval{suffix}", columns, rows)
    title = f"Accuracy of asked minus that of random pairs, and clicks saved to reach random's at 60{suffix}"
    report.table(f"saved{name}", title, [*columns, "clicks saved"], gains)


def _with_interval(values: np.ndarray, spec: str = ".3f") -> str:
    return f"{values.mean():{spec}} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.3f}"


def saved_clicks(asked: np.ndarray, wanted: float) -> str:
    """Return how many clicks before the last of `CHECKED` the accuracies (C,) reach `wanted`."""
    for place, value in enumerate(asked):
        if value >= wanted and place == 0:
            return f"{CHECKED[-1] - CHECKED[0]} or more"
        if value >= wanted:
            part = (wanted - asked[place - 1]) / (value - asked[place - 1])
            reached = CHECKED[place - 1] + part * (CHECKED[place] - CHECKED[place - 1])
            return f"{CHECKED[-1] - reached:.0f}"
    return "none"


def _cover(report: Report, found: dict[float, dict[str, list[Any]]]) -> None:
    """Tell how often the interval of the running accuracy holds the present accuracy on other concepts."""
    rows = []
    for wrong, kinds in found.items():
        for clicks in SHOWN[1:]:
            figures = []
            for run in (run for runs in kinds.values() for run in runs):
                clicked = [Prediction(*row[1:], random=True) for row in run["predictions"] if row[0] < clicks]
                share = RunningAccuracy(clicked).now
                # A right prediction of a wrong click counts as wrong, so clicks are what the accuracy is measured on.
                truth = wrong + (1 - 2 * wrong) * run["asked"][CHECKED.index(clicks)]
                if share.n:
                    figures.append(
                        (share.low <= truth <= share.high, share.n, share.model, truth, share.high - share.low)
                    )
            means = np.mean(np.array(figures, dtype=float), axis=0)
            rows.append((f"{clicks} clicks, {wrong:.0%} wrong".replace("%", " %"), len(figures), *means.tolist()))
    columns = ["people", "covered", "pairs judged", "running accuracy", "on other concepts", "width of the interval"]
    title = "How often the interval of the running accuracy covers the accuracy on other concepts"
    report.table("coverage", title, columns, rows, ["d", ".3f", ".1f", ".3f", ".3f", ".3f"])


def speed(report: Report) -> None:
    """Time the choice of a pair among 10,000 images, in processor time of one core."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(10_000, 512)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    rows = []
    for name, prompts in {
        "2,500 prompts": [f"prompt {image // 4}" for image in range(10_000)],
        "one prompt": ["prompt"] * 10_000,
    }.items():
        order = rng.permutation(10_000 // 4)
        for clicks in CLICKS:
            answered = [(4 * int(group), 4 * int(group) + 1, float(rng.integers(2))) for group in order[:clicks]]

            def measure(prompts: list[str] = prompts, answered: Any = answered) -> list[float]:
                return [_milliseconds(embeddings, prompts, answered, seed) for seed in range(CALLS)]

            times = report.run(f"{name}, {clicks} clicks", measure)
            rows.append((f"{name}, {clicks} clicks", statistics.median(times), float(np.quantile(times, 0.95))))
    title = f"Milliseconds of one core to choose a pair among 10,000 images of 512 numbers, {CALLS} calls"
    report.table("speed", title, ["median", "95th percentile"], rows, ".1f")


def _milliseconds(embeddings: np.ndarray, prompts: list[str], answered: Any, seed: int) -> float:
    begin = time.thread_time()
    select_pairs(embeddings, prompts, answered, seed=seed, random_share=0.0)
    return 1000 * (time.thread_time() - begin)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("accuracy", "speed"), default=["accuracy", "speed"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--people", type=int, default=20, help="people of each kind; the same one clicks on other halves"
    )
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--base", default=str(BASE))
    parser.add_argument("--embeddings", type=Path, help=argparse.SUPPRESS)  # folder that keeps them
    args = parser.parse_args()
    timing.quiet()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    for name in args.parts:
        stem = f"asking_{name}" + ("_tuning" if args.split == "train" else "")
        with Report.of_script(__file__, parser, args, name, stem) as report:
            if name == "accuracy":
                accuracy(report, Bench(args.base, args.embeddings), args)
            else:
                speed(report)


if __name__ == "__main__":
    main()
