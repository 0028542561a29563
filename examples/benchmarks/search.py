"""Measure `scorer.search` and `scorer.explain`: is the right thing found, in the right look, and named?

    python examples/benchmarks/search.py                    # some minutes
    python examples/benchmarks/search.py --split train      # people of the training concepts, to choose defaults with

People like one of the five houses of the emoji, and click on pairs. The captions of concepts without clicks are then
looked for in a library of all their drawings, five of each:

- the base: its own order;
- rank: all drawings by the adapted reward, as `PreferenceScorer.rank` orders them;
- search: `PreferenceScorer.search`;
- an oracle that knows the house of each drawing: the base's order of the liked house's drawings alone, as of an order
  that puts liked ones first whatever they show.

Of the ten first, recall counts five; the liked one is first if it comes before the other drawings of its concept.

The words are those of `scorer.explain` over the default vocabulary and the names of the houses. The right ones are the
house's name and what pretraining called its look (`HOUSES` of `examples/icons/pretrain.py`): "flat" is right for two
houses.
"""

import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "icons"))
sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import timing
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer
from bt_hf.reward.library import TASTE_WEIGHT
from bt_hf.reward.words import known_looks
from emoji import STYLES, load_emoji
from looks import BASE
from people import PEOPLE
from results import Report, make_parser

QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
LOOKS = {
    "noto": {"noto", "colour"},
    "twemoji": {"twemoji", "flat"},
    "fluent": {"fluent", "flat"},
    "fluent_3d": {"fluent 3d", "shaded"},
    "mono": {"mono", "black and white"},
}
COLUMNS = ["recall@5", "share of the base's", "liked one first"]
WAYS = ("base", "rank", "**search**", "an oracle: the base among liked drawings alone")
TOP, TOP_K = 5, 10


def train(pairs: Dataset, base: str) -> BradleyTerryTrainer:
    """Train with the defaults."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = BradleyTerryTrainer(base, BradleyTerryConfig(folder, **QUIET), train_dataset=pairs)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def find(orders: list[list[int]], rows: Dataset, concepts: list[str], house: str) -> list[float]:
    """Return the share of captions whose concept is among the first five, and of those found, whose best is liked.

    Args:
        orders: Places in the library, best first, for each caption.
        rows: The library.
        concepts: Concept of each caption.
        house: The liked house.
    """
    concept, style = list(rows["concept"]), list(rows["style"])
    found, liked = [], []
    for order, wanted in zip(orders, concepts, strict=True):
        found.append(any(concept[place] == wanted for place in order[:TOP]))
        right = [place for place in order if concept[place] == wanted]
        if right:
            liked.append(style[right[0]] == house)
    return [float(np.mean(found)), float(np.mean(liked))]


def measure(house: str, clicks: int, split: str, base: str) -> list[float]:
    """Return the recall of each of `WAYS`, its share with the liked drawing first, and the place of the right word."""
    pairs = PEOPLE[house].pairs(split, clicks, seed=0)
    clicked = set(pairs["prompt"])
    rows = load_emoji(split)
    rows = rows.filter(lambda caption: caption not in clicked, input_columns="caption")
    trainer = train(pairs, base)
    scorer = PreferenceScorer.from_pretrained(trainer.model, processor=trainer.processing_class)
    library = scorer.index(rows["image"][:])
    captions = dict(zip(rows["caption"], rows["concept"], strict=True))
    with torch.no_grad():
        rewards = scorer.embed_texts(list(captions)) @ scorer.embed_images(rows["image"][:]).T

    def search(taste_weight: float) -> list[list[int]]:
        found = [scorer.search(caption, library, TOP_K, taste_weight) for caption in captions]
        return [[image.index for image in images] for images in found]

    ranked = rewards.argsort(1, descending=True)[:, :TOP_K].tolist()
    liked = torch.tensor([style == house for style in rows["style"]])
    with torch.no_grad(), trainer.model.disable_adapter():
        fits = scorer.embed_texts(list(captions)) @ library.base.T
    oracle = fits.masked_fill(~liked, -torch.inf).argsort(1, descending=True)[:, :TOP_K].tolist()
    orders = [search(0), ranked, search(TASTE_WEIGHT), oracle]
    figures = [find(order, rows, list(captions.values()), house) for order in orders]
    names = [style.replace("_", " ") for style in STYLES]
    leans = scorer.explain([*known_looks(scorer.processor.tokenizer), *names], 10, pairs)
    words = [lean.word for lean in leans if lean.lean > 0]
    place = next((number for number, word in enumerate(words, 1) if word in LOOKS[house]), 0)
    return [*(figure[0] for figure in figures), *(figure[1] for figure in figures), float(place)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--clicks", type=int, default=64)
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--base", default=str(BASE))
    args = parser.parse_args()
    timing.quiet()
    logging.disable(logging.INFO)
    with Report.of_script(__file__, parser, args) as report:
        found = {
            house: report.run(house, lambda house=house: measure(house, args.clicks, args.split, args.base))
            for house in STYLES
        }
        mean = np.mean(list(found.values()), axis=0)
        recalls, liked, _ = np.split(mean, [len(WAYS), 2 * len(WAYS)])
        rows = [(way, x, x / recalls[0], first) for way, x, first in zip(WAYS, recalls, liked, strict=True)]
        report.table("search", "Captions of concepts that were not clicked on, mean over houses", COLUMNS, rows, ".3f")
        columns = ["recall of rank", "recall of search", "liked first by rank", "liked first by search"]
        rows = [(house, x[1] / x[0], x[2] / x[0], x[5], x[6]) for house, x in found.items()]
        report.table("houses", "The same by house, recall as share of the base's", columns, rows, ".3f")
        rows = [(house, figures[-1]) for house, figures in found.items()]
        report.table("words", "Place of the first right word among those the taste leans to", ["place"], rows, ".0f")


if __name__ == "__main__":
    main()
