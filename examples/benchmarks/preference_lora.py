"""How well a pipeline learns to draw one person's way from 64 pairs: the figures of the README.

    python examples/benchmarks/preference_lora.py                       # everything: hours on 2 cores
    python examples/benchmarks/preference_lora.py --parts taste         # one part: see --help
    python examples/benchmarks/preference_lora.py --parts beta --prompts_of train   # for choosing defaults

People are simulated on the emoji domain: each prefers one of five styles to all others, and shows it on 64 pairs of
drawings of training concepts. What the pipeline then draws is judged by `examples/emoji/judge.py`, which no LoRA was
ever trained with: whose style is it, and is its caption still among the 5 nearest of all the captions drawn? Defaults
were chosen on training prompts only.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from bt_hf import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PreferenceLoRAConfig,
    PreferenceLoRATrainer,
    PreferenceScorer,
    generate_preference_pairs,
)
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER, STYLE_NAMES, STYLES, load_emoji
from judge import JUDGE_FOLDER, Judge
from taste import preference_pairs

PAIRS = 64
LORA = {  # of every run below, where it does not say otherwise
    "learning_rate": 1e-3,
    "max_steps": 120,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
}
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64}
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
METHODS = {
    "sft on winners": {"loss_type": "sft"},
    "bt": {"loss_type": "bt"},
    "dpo": {"loss_type": "dpo"},
    "dpo with safeguard": {"loss_type": "dpo", "safeguard": True},
}
COLUMNS = (*STYLES, "mean", "caption", "both", "distance")


class Studio:
    """Prompts, the judge, and what both say of a pipeline."""

    def __init__(self, splits: Iterable[str], count: int) -> None:
        self.judge = Judge.from_pretrained(JUDGE_FOLDER).eval()
        self.prompts = {}
        for split in splits:
            captions = list(dict.fromkeys(load_emoji(split)["caption"]))
            self.prompts[split] = captions[:: len(captions) // count][:count]
        self.cache = tempfile.TemporaryDirectory()

    @staticmethod
    def pipeline() -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline.from_pretrained(DIFFUSION_FOLDER, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def draw(self, pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
        images = []
        for start in range(0, len(prompts), 48):
            chunk = prompts[start : start + 48]
            generators = [torch.Generator().manual_seed(10_000 * seed + start + i) for i in range(len(chunk))]
            with torch.autocast("cpu", torch.bfloat16):
                images += pipeline(chunk, generator=generators, **DRAWING).images
        return images

    def measure(self, pipeline: StableDiffusionPipeline, seed: int) -> dict[str, dict[str, Any]]:
        """For each split: what came out.

        `shares` (5,) of the styles, `caption` (recall@5), `both` (5,) shares of the styles with the right caption, and
        `distance` (mean pairwise, 0 to 2).
        """
        found = {}
        for split, prompts in self.prompts.items():
            images = self.draw(pipeline, prompts, seed)
            styles = self.judge.style_probabilities(images).argmax(1).numpy()
            right = (self.judge.caption_ranks(images, prompts) < 5).numpy()
            embeddings = self.judge.embed_images(images)
            distances = (2 - 2 * embeddings @ embeddings.T).clamp(min=0).sqrt()
            found[split] = {
                "shares": np.bincount(styles, minlength=len(STYLES)) / len(images),
                "caption": right.mean(),
                "both": np.bincount(styles[right], minlength=len(STYLES)) / len(images),
                "distance": distances[np.triu_indices(len(images), 1)].mean().item(),
            }
        return found

    def fit(self, pairs: Any, seed: int, **options: Any) -> tuple[StableDiffusionPipeline, dict[str, float]]:
        """Train a LoRA; returns the pipeline that draws with it, and what it took."""
        pipeline = self.pipeline()
        config = PreferenceLoRAConfig("unused", seed=seed, cache_dir=self.cache.name, **{**QUIET, **LORA, **options})
        trainer = PreferenceLoRATrainer(pipeline, config, train_dataset=pairs)
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        return pipeline, {"seconds": time.perf_counter() - began, "beta": trainer.beta or 0.0}


def row(name: str, results: list[dict[str, dict[str, Any]]], tastes: Iterable[str], note: str = "") -> str:
    """A line of a table: for each split the share of each preferred style, and the means of all that was measured."""
    cells = [f"| {name:32}"]
    order = list(tastes)
    for split in results[0]:
        measured = [result[split] for result in results]
        shares, both = (
            {
                taste: np.mean(
                    [one[key][STYLES.index(taste)] for one, own in zip(measured, order, strict=True) if own == taste]
                )
                for taste in dict.fromkeys(order)
            }
            for key in ("shares", "both")
        )
        cells += [f"{shares[taste]:.2f}" if taste in shares else "-" for taste in STYLES]
        cells.append(f"**{np.mean(list(shares.values())):.2f}**")
        cells.append(f"{np.mean([one['caption'] for one in measured]):.3f}")
        cells.append(f"{np.mean(list(both.values())):.2f}")
        cells.append(f"{np.mean([one['distance'] for one in measured]):.2f}")
    return " | ".join(cells) + f" | {note} |"


def header(studio: Studio, title: str) -> None:
    print(f"\n{title}\n")
    names = [f"{split}: {column}" for split in studio.prompts for column in COLUMNS]
    print("| | " + " | ".join(names) + " | |")
    print("|---" * (len(names) + 2) + "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("base", "taste", "losses", "loop", "draws", "beta")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--tastes", nargs="+", choices=STYLES, default=STYLES)
    parser.add_argument("--seeds", type=int, default=3, help="of part taste; the others use one")
    parser.add_argument("--prompts", type=int, default=96, help="drawn for each split")
    parser.add_argument("--prompts_of", nargs="+", choices=["train", "held_out"], default=["train", "held_out"])
    scale = DRAWING["guidance_scale"]
    parser.add_argument("--guidance_scale", type=float, default=scale, help=f"of all drawings, by default {scale}")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="of every training, as in LORA")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bt_hf").setLevel(logging.ERROR)
    DRAWING["guidance_scale"] = args.guidance_scale
    LORA.update({name: number(value) for name, value in (option.split("=") for option in args.options)})
    studio = Studio(args.prompts_of, args.prompts)
    for part in args.parts:
        globals()[part](studio, args)


def number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return {"True": True, "False": False}.get(text, text)


def before(studio: Studio, tastes: Iterable[str], seeds: Iterable[int]) -> None:
    base = studio.pipeline()
    results = {seed: studio.measure(base, seed) for seed in seeds}
    pairs = [(taste, seed) for taste in tastes for seed in seeds]
    print(row("before", [results[seed] for _, seed in pairs], [taste for taste, _ in pairs]), flush=True)


def run(studio: Studio, name: str, tastes: Iterable[str], seeds: Iterable[int], **options: Any) -> None:
    results, order, seconds, betas = [], [], [], []
    for taste in tastes:
        for seed in seeds:
            pipeline, facts = studio.fit(preference_pairs(taste, PAIRS, seed=seed), seed, **options)
            results.append(studio.measure(pipeline, seed))
            order.append(taste)
            seconds.append(facts["seconds"])
            betas.append(facts["beta"])
    note = f"{np.median(seconds):.0f} s, beta {np.median(betas):.3g}"
    print(row(name, results, order, note), flush=True)


def base(studio: Studio, args: argparse.Namespace) -> None:
    """Is the untouched pipeline neutral, and does it know the styles by name?"""
    print("\nThe untouched pipeline: share of each style\n")
    print("| | " + " | ".join(STYLES) + " | caption |")
    print("|---" * (len(STYLES) + 2) + "|", flush=True)
    pipeline = studio.pipeline()
    for split, found in studio.measure(pipeline, 0).items():
        print(f"| {split}, bare captions | " + " | ".join(f"{share:.2f}" for share in found["shares"]), end="")
        print(f" | {found['caption']:.3f} |", flush=True)
        shares, captions = [], []
        for index, style in enumerate(STYLES):
            texts = studio.prompts[split]
            images = studio.draw(pipeline, [f"{text}, {STYLE_NAMES[style]}" for text in texts], 0)
            shares.append((studio.judge.style_probabilities(images).argmax(1) == index).float().mean().item())
            captions.append((studio.judge.caption_ranks(images, texts) < 5).float().mean().item())
        print(f"| {split}, captions that name this style | " + " | ".join(f"{share:.2f}" for share in shares) + " | |")
        cells = " | ".join(f"{share:.3f}" for share in captions)
        print(f"| {split}, captions of these drawings | {cells} | {np.mean(captions):.3f} |", flush=True)


def taste(studio: Studio, args: argparse.Namespace) -> None:
    """The default, all tastes, several people each."""
    header(studio, f"The default loss, {args.seeds} people for each taste: share of the preferred style")
    before(studio, args.tastes, range(args.seeds))
    run(studio, "after", args.tastes, range(args.seeds))


def losses(studio: Studio, args: argparse.Namespace) -> None:
    """Which loss to take, at the same number of steps."""
    header(studio, "Losses, one person for each taste: share of the preferred style")
    before(studio, args.tastes, [0])
    for name, options in METHODS.items():
        run(studio, name, args.tastes, [0], **options)


def draws(studio: Studio, args: argparse.Namespace) -> None:
    """What fixed draws of noise and timestep do to quality, and what they save."""
    header(studio, "Fixed draws of noise and timestep for each pair: share of the preferred style")
    for count in (8, 32, 128, None):
        run(studio, f"{count or 'new'} draws", args.tastes, [0], num_noise_samples=count)
    # What makes steps faster: see lora_speed.py.
    run(studio, "8 draws, bf16", args.tastes, [0], num_noise_samples=8, bf16=True)


def beta(studio: Studio, args: argparse.Namespace) -> None:
    """beta="auto" beside a grid."""
    header(studio, "beta: share of the preferred style")
    for value in ("auto", 30.0, 100.0, 300.0, 1000.0):
        run(studio, f"beta {value}", args.tastes, [0], beta=value)


def loop(studio: Studio, args: argparse.Namespace) -> None:
    """From clicks only: 64 clicks -> reward -> pairs of the pipeline's own drawings -> LoRA."""
    header(studio, "From clicks to images, the LoRA never sees a real drawing: share of the preferred style")
    before(studio, args.tastes, [0])
    captions = list(dict.fromkeys(load_emoji("train")["caption"]))
    prompts = captions[3 :: len(captions) // PAIRS][:PAIRS]
    scorers = {taste: reward(taste) for taste in args.tastes}
    named = ["{prompt}", *(f"{{prompt}}, {style}" for style in STYLE_NAMES.values())]
    for name, templates in (("bare prompts", ["{prompt}"]), ("and prompts naming styles", named)):
        results = []
        for taste in args.tastes:
            with torch.autocast("cpu", torch.bfloat16):
                pairs = generate_preference_pairs(
                    studio.pipeline(),
                    prompts,
                    scorers[taste],
                    candidates=12,
                    pairs_per_prompt=2,
                    prompt_templates=templates,
                    batch_size=48,
                    **DRAWING,
                )
            results.append(studio.measure(studio.fit(pairs, 0)[0], 0))
        print(row(f"after: {name}", results, args.tastes), flush=True)


def reward(taste: str) -> PreferenceScorer:
    """What 64 clicks taught."""
    clicks = preference_pairs(taste, PAIRS, split="held_out")
    trainer = BradleyTerryTrainer(CLIP_FOLDER, BradleyTerryConfig("unused", **QUIET), train_dataset=clicks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    scorer = PreferenceScorer(trainer.model, trainer.processing_class)
    scorer.set_scale(8)  # so it asks for the taste before the caption: all drawings of a prompt show the same thing
    return scorer


if __name__ == "__main__":
    main()
