"""Time what a person waits for: a reward from clicks, its fit alone, and a search of a large library.

    python examples/benchmarks/reward_time.py                   # a minute or two
    python examples/benchmarks/reward_time.py --parts vit_l     # a CLIP of the shape of ViT-L/14, 2 GB of memory

Each part writes its table to `docs/results/reward_time_PART.json`. The base is `examples/icons/base`, clicks are of
`people.py`. Seconds are those that one thread keeps a core busy, medians after a first call that is not counted: on an
idle machine that is the time to wait, and on a busy one it is still the same.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "icons"))
sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import bt_hf.reward.library as library_module
import timing
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, ImageLibrary, PreferenceScorer
from bt_hf.reward.posterior import fit_taste
from emoji import CLIP_FOLDER
from looks import BASE
from people import PEOPLE
from results import Report, make_parser

SIZES = (8, 64)
LIBRARY = 100_000
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of the processor for a call, after a first one."""
    call()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return statistics.median(found)


def clicks(count: int) -> Dataset:
    return PEOPLE["noto"].pairs("train", count, seed=0)


def train(pairs: Dataset, base: str | nn.Module, processor: ProcessorMixin | None = None) -> BradleyTerryTrainer:
    """Train and save with the defaults, from the call on: load, embed, fit, train, save."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = BradleyTerryTrainer(
            base, BradleyTerryConfig(folder, **QUIET), train_dataset=pairs, processing_class=processor
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(folder)
    return trainer


def part_clicks(report: Report, args: argparse.Namespace) -> None:
    """Time a whole training, and the fit of its embeddings alone."""
    columns, rows = [f"N = {n}" for n in SIZES], {"from the call to the saved folder": [], "the fit alone": []}
    for n in SIZES:
        pairs = clicks(n)

        def measure(pairs: Dataset = pairs) -> list[float]:
            whole = seconds(lambda: train(pairs, args.base), args.repeats)
            trainer = train(pairs, args.base)
            known = trainer.embedded_base
            assert known is not None  # there was a warm start
            given = (known.text, known.chosen, known.rejected, known.preference, known.weight)
            scale = float(trainer.model.get_base_model().logit_scale.exp())
            return [whole, seconds(lambda: fit_taste(*given, scale, features=known.features), args.repeats)]

        for row, value in zip(rows.values(), report.run(f"N = {n}", measure), strict=True):
            row.append(value)
    title = "Seconds, by number of clicks"
    report.table("seconds", title, columns, [(name, *values) for name, values in rows.items()], ".2f")


def part_search(report: Report, args: argparse.Namespace) -> None:
    """Time a search for a caption in a library that is indexed already, with and without FAISS.

    Its embeddings are random ones. Without FAISS installed, both rows are the same.
    """

    def measure() -> list[float]:
        trainer = train(clicks(64), args.base)
        scorer = PreferenceScorer.from_pretrained(trainer.model, processor=trainer.processing_class)
        width = trainer.model.get_base_model().config.projection_dim
        images = normalize(torch.randn(LIBRARY, width, generator=torch.Generator().manual_seed(0)), dim=-1)
        found = []
        for least in (LIBRARY + 1, 0):  # without an index, and with one
            library_module.INDEXED_FROM = least
            library = ImageLibrary([str(number) for number in range(LIBRARY)], images, images, scorer.digest())
            began = time.process_time()
            scorer.search("a red apple", library, top_k=10)
            found.append(time.process_time() - began)
            found.append(seconds(partial(scorer.search, "a blue boat", library, top_k=10), 10 * args.repeats))
        return found

    first, product, built, indexed = report.run("search", measure)
    rows = [
        ("first search, which looks at what the adapter does to words", 1000 * first),
        ("every other, by a product with all embeddings", 1000 * product),
        ("the first by FAISS, where it is installed, which builds its index", 1000 * built),
        ("every other by FAISS", 1000 * indexed),
    ]
    report.table("milliseconds", f"Milliseconds to search {LIBRARY:,} images", ["milliseconds"], rows, ".1f")


def part_vit_l(report: Report, args: argparse.Namespace) -> None:
    """Time the same fit on a CLIP of the shape of openai/clip-vit-large-patch14, with random weights."""

    def measure() -> list[float]:
        tokenizer = AutoProcessor.from_pretrained(CLIP_FOLDER).tokenizer
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
        text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
        vision |= {"image_size": 224, "patch_size": 14}
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).eval()
        model.logit_scale.data.fill_(4.6052)  # 100, as in the published weights
        for module in model.text_model.modules():  # trained layer norms have biases, and a constant shift needs one
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.bias)
        processor = CLIPProcessor(CLIPImageProcessorPil(), tokenizer)
        pairs = clicks(8)
        began = time.process_time()
        trainer = train(pairs, model, processor)
        took = time.process_time() - began
        margins, _ = trainer.predict(pairs).predictions
        size = sum(value.numel() for value in model.parameters()) / 1e6
        return [size, took, float((margins > 0).mean()), float(abs(margins).mean())]

    columns = ["million weights", "seconds to the saved folder", "accuracy on the 8 clicks", "typical margin"]
    row = report.run("vit_l", measure)
    report.table("fit", "The fit on a CLIP of the shape of ViT-L/14", columns, [("8 clicks", *row)], ".2f")


PARTS = {"clicks": part_clicks, "search": part_search, "vit_l": part_vit_l}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["clicks", "search"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--base", default=str(BASE))
    args = parser.parse_args()
    timing.quiet()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    for name in args.parts:
        with Report.of_script(__file__, parser, args, name) as report:
            PARTS[name](report, args)


if __name__ == "__main__":
    main()
