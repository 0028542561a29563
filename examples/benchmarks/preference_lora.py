"""Measure how well a pipeline learns to draw one person's way from 64 pairs: the tables of docs/results-drawing.md.

    python examples/benchmarks/preference_lora.py                       # everything: hours on 2 cores
    python examples/benchmarks/preference_lora.py --parts taste         # one part: see --help
    python examples/benchmarks/preference_lora.py --parts beta --prompts_of train   # for choosing defaults

People are simulated on the emoji domain: each prefers one of five styles to all others, and shows it on 64 pairs of
drawings of training concepts. What the pipeline then draws is judged by `examples/emoji/judge.py`, which no LoRA was
ever trained with: whose style is it, and is its caption still among the 5 nearest of all the captions drawn? Defaults
were chosen on training prompts only.

Each part writes its tables and every run to `docs/results/preference_lora_PART.json`, and goes on where it was cut; a
run that several parts share is made once.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from PIL import Image
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import lora_speed
import timing
from bt_hf import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PreferenceLoRAConfig,
    PreferenceLoRATrainer,
    PreferenceScorer,
    RewardLoRAConfig,
    RewardLoRATrainer,
    generate_preference_pairs,
)
from bt_hf.cli.lora import unpair
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER, STYLE_NAMES, STYLES, fast_precision, load_emoji
from judge import JUDGE_FOLDER, Judge
from results import Report, make_parser
from taste import preference_pairs
from unseen import UNSEEN, House

PAIRS = 64
LORA = {  # for every run below, where it does not say otherwise
    "bf16": False,  # alike on every machine
    "rpo_alpha": 0.0,  # the preference alone, so that losses can be compared
    "learning_rate": 1e-3,
    "max_steps": 120,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
}
GUIDED = {  # chosen on training prompts
    "learning_rate": 3e-3,
    "max_steps": 60,
    "warmup_steps": 3,
    "per_device_train_batch_size": 8,
    "num_inference_steps": 10,
    "gradient_steps": 6,
    "guidance_scale": 3.0,
    "bf16": False,
}
NAMED = ["{prompt}", *(f"{{prompt}}, {style}" for style in STYLE_NAMES.values())]
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64}
SOME = ("noto", "fluent_3d", "mono")
PART_TASTES = {
    "losses": SOME,
    "beta": SOME,
    "draws": ("fluent", "mono"),
    "rate": ("mono",),
    "larger": ("fluent_3d",),
    "guided": SOME[1:],
    "frontier": SOME,
}  # others: all five
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
METHODS = {
    "sft on winners": {"loss_type": "sft"},
    "bt": {"loss_type": "bt"},
    "**dpo (default)**": {},
    "dpo with safeguard": {"safeguard": True},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "mapo": {"loss_type": "mapo"},
    "kto, 32 single images a step": {"loss_type": "kto", "per_device_train_batch_size": 32},
}
SCALES = (0.5, 0.75, 1.0, 1.25)  # strengths of the LoRA when drawing
FRONTIER: dict[str, dict[str, Any]] = {"preference alone": {"rpo_alpha": 0.0}, "**default**": {}}
SPLIT_NAMES = {"held_out": "held-out", "train": "training"}
Found = dict[str, dict[str, Any]]  # by split, what `Studio.measure` returns


class Studio:
    """Train pipelines, let them draw prompts, and judge the drawings."""

    def __init__(self, splits: Iterable[str], count: int) -> None:
        self.judge = Judge.from_pretrained(JUDGE_FOLDER).eval()
        self.prompts = {}
        for split in splits:
            captions = list(dict.fromkeys(load_emoji(split)["caption"]))
            self.prompts[split] = captions[:: len(captions) // count][:count]
        self.cache = tempfile.TemporaryDirectory()
        self.trained: dict[str, tuple[StableDiffusionPipeline, dict[str, float | None]]] = {}

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
            with fast_precision():
                images += pipeline(chunk, generator=generators, **DRAWING).images
        return images

    def measure(self, pipeline: StableDiffusionPipeline, seed: int) -> Found:
        """Draw the prompts of each split and judge the drawings.

        Returns:
            For each split `shares` (5,) of the styles, `caption` (recall@5), `both` (5,) shares of the styles with the
            right caption, and `distance` (mean pairwise, 0 to 2).
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

    def named(self, report: Report, split: str, style: str) -> list[float]:
        """Return share of the style, and captions, of what the untouched pipeline draws when asked for it by name."""

        def measure() -> list[float]:
            prompts = self.prompts[split]
            images = self.draw(self.pipeline(), [f"{text}, {STYLE_NAMES[style]}" for text in prompts], 0)
            own = self.judge.style_probabilities(images).argmax(1) == STYLES.index(style)
            return [own.float().mean().item(), (self.judge.caption_ranks(images, prompts) < 5).float().mean()]

        return report.run(f"{split}, named {style}", measure)

    def before(self, report: Report, seed: int) -> Found:
        """Return the judgement of the untouched pipeline's drawings."""
        return report.run(f"before, seed {seed}", lambda: self.measure(self.pipeline(), seed))

    def after(self, report: Report, taste: str, seed: int, **options: Any) -> dict[str, Any]:
        """Return the judgement after a LoRA of this person, with `beta` and CPU `seconds` of the training."""
        chosen = "".join(f", {name}={value}" for name, value in options.items())

        def measure() -> dict[str, Any]:
            pairs = preference_pairs(taste, PAIRS, seed=seed)
            if options.get("loss_type") == "kto":
                pairs = unpair(pairs)
            pipeline, facts = self.fit(pairs, seed, **options)
            return self.measure(pipeline, seed) | facts

        return report.run(f"{taste}, seed {seed}{chosen}", measure)

    def at_scale(self, report: Report, taste: str, scale: float = 1.0, **options: Any) -> dict[str, Any]:
        """Return what `after` does, of the trainer's own defaults, with the LoRA at this scale."""
        chosen = "".join(f", {name}={value}" for name, value in options.items())
        name = f"{taste}, own=True{chosen}"

        def measure() -> dict[str, Any]:
            if name not in self.trained:
                self.trained[name] = self.fit(preference_pairs(taste, PAIRS), 0, own=True, **options)
            pipeline, facts = self.trained[name]
            for layer in pipeline.unet.modules():
                if isinstance(layer, LoraLayer):
                    layer.set_scale("default", scale)
            return self.measure(pipeline, 0) | facts

        return report.run(f"{name}, scale {scale:g}", measure)

    def fit(
        self, pairs: Any, seed: int, own: bool = False, **options: Any
    ) -> tuple[StableDiffusionPipeline, dict[str, float | None]]:
        """Train a LoRA, by the trainer's `own` defaults or by `LORA`; return pipeline, CPU seconds and beta."""
        pipeline = self.pipeline()
        given = {**QUIET, **({} if own else LORA), **options}
        config = PreferenceLoRAConfig(f"{self.cache.name}/run", seed=seed, cache_dir=self.cache.name, **given)
        trainer = PreferenceLoRATrainer(pipeline, config, train_dataset=pairs)
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
        return pipeline, {
            "seconds": time.process_time() - began,
            "beta": None if config.loss_type == "sft" else trainer.beta,
        }


def preferred(found: Sequence[Found], tastes: Sequence[str], split: str, key: str) -> float:
    """Return the mean share of the preferred style over people, each with a result and a taste."""
    return np.mean([one[split][key][STYLES.index(own)] for one, own in zip(found, tastes, strict=True)]).item()


def tastes_row(name: str, found: Sequence[Found], tastes: Sequence[str], split: str) -> list[str | float | None]:
    """Return the share of each preferred style, their mean, captions that are right, and both."""
    shares = []
    for taste in STYLES:
        own = [one for one, of in zip(found, tastes, strict=True) if of == taste]
        shares.append(preferred(own, [taste] * len(own), split, "shares") if own else None)
    mean = np.mean([share for share in shares if share is not None]).item()
    caption = np.mean([one[split]["caption"] for one in found]).item()
    return [name, *shares, mean, caption, preferred(found, tastes, split, "both")]


def means_row(name: str, found: Sequence[dict[str, Any]], tastes: Sequence[str], splits: Iterable[str]) -> list[Any]:
    """Return the means over tastes for each split, and the median beta if there was one."""
    row: list[Any] = [name]
    for split in splits:
        row += tastes_row(name, found, tastes, split)[-3:]
    return [*row, np.median([one["beta"] for one in found]).item() if found[0].get("beta") else None]


def means_columns(splits: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the columns of `means_row` and their formats."""
    names = [f"{SPLIT_NAMES[split]}: {what}" for split in splits for what in ("share", "caption", "both")]
    return [*names, "beta"], [".2f", ".3f", ".2f"] * len(splits) + [".3g"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--tastes",
        nargs="+",
        choices=STYLES,
        help="by default all five; of losses, beta, draws, rate, guided, frontier and larger fewer",
    )
    parser.add_argument("--seeds", type=int, default=3, help="people for each taste in part taste; the others ask one")
    parser.add_argument("--prompts", type=int, default=96, help="drawn for each split")
    parser.add_argument("--prompts_of", nargs="+", choices=["held_out", "train"], default=["held_out", "train"])
    scale = DRAWING["guidance_scale"]
    parser.add_argument("--guidance_scale", type=float, default=scale, help=f"of all drawings, by default {scale}")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="of every training, as in LORA")
    parser.add_argument("--name", help="stem of the JSON, by default preference_lora_PART")
    args = parser.parse_args()
    timing.quiet()
    logging.getLogger("bt_hf").setLevel(logging.ERROR)
    DRAWING["guidance_scale"] = args.guidance_scale
    LORA.update({name: number(value) for name, value in (option.split("=") for option in args.options)})
    studio = Studio(args.prompts_of, args.prompts)
    known: dict[str, Any] = {}  # runs that parts share
    for part in args.parts:
        tastes = args.tastes or PART_TASTES.get(part, STYLES)
        with Report.of_script(__file__, parser, args, part, args.name, known) as report:
            PARTS[part](studio, report, tastes, args.seeds)


def number(text: str) -> Any:
    """Return the number or the truth value that a word stands for, or the word."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


def base(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Ask the untouched pipeline for each style: is it neutral, and does it know the styles by name?"""
    rows = []
    for split in studio.prompts:
        bare = studio.before(report, 0)[split]
        shares, captions = zip(*(studio.named(report, split, style) for style in STYLES), strict=True)
        name = f"{SPLIT_NAMES[split]} prompts"
        rows.append((f"{name}: share of the style", *bare["shares"], None))
        rows.append((f"{name}, style named: its share", *shares, np.mean(shares)))
        rows.append((f"{name}: caption", *[bare["caption"]] * len(STYLES), bare["caption"]))
        rows.append((f"{name}, style named: caption", *captions, np.mean(captions)))
    report.table("named", "The untouched pipeline", [*STYLES, "mean"], rows, ".3f")


def taste(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Train with the defaults: all tastes, several people each."""
    people = [(taste, seed) for taste in tastes for seed in range(seeds)]
    order = [taste for taste, _ in people]
    before = [studio.before(report, seed) for _, seed in people]
    after = [studio.after(report, *person) for person in tqdm(people, desc="people", mininterval=10)]
    rows = []
    for split in studio.prompts:
        name = f"{SPLIT_NAMES[split]} prompts"
        rows.append(tastes_row(f"{name}, before", before, order, split))
        rows.append(tastes_row(f"**{name}, after**", after, order, split))
    title = f"The default loss, {seeds} people for each taste: share of the preferred style"
    formats = [*[".2f"] * (len(STYLES) + 1), ".3f", ".2f"]
    report.table("styles", title, [*STYLES, "mean", "caption", "both"], rows, formats)


def grid(
    studio: Studio, report: Report, title: str, tastes: Sequence[str], methods: Mapping[str, dict[str, Any]]
) -> None:
    """Train one person of each taste with each of some options, and print a table of means."""
    columns, formats = means_columns(list(studio.prompts))
    rows = [means_row("before", [studio.before(report, 0)] * len(tastes), tastes, studio.prompts)]
    for name, options in methods.items():
        found = [studio.after(report, taste, 0, **options) for taste in tastes]
        rows.append(means_row(name, found, tastes, studio.prompts))
        report.table("means", title, columns, rows, formats)


def losses(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Compare losses at the same number of steps."""
    grid(studio, report, f"Losses, one person for each of {len(tastes)} tastes", tastes, METHODS)


def draws(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Fix the noise samples of each pair, so that the errors of the base are computed once."""
    # Seconds are measured by lora_speed.py.
    methods = {
        "**new noise in every epoch (default)**": {},
        "8 noise samples for each pair": {"num_noise_samples": 8},
        "8 noise samples, bf16": {"num_noise_samples": 8, "bf16": True},
    }
    grid(studio, report, f"Fixed noise, one person for each of {', '.join(tastes)}", tastes, methods)


def beta(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Compare beta="auto" with a grid."""
    methods = {"**auto (default)**": {}} | {f"{value:g}": {"beta": value} for value in (30.0, 100.0, 300.0, 1000.0)}
    grid(studio, report, f"beta, one person for each of {', '.join(tastes)}", tastes, methods)


def rate(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Compare learning rates at the trainer's own 200 steps of 4 pairs."""
    own = {"max_steps": 200, "per_device_train_batch_size": 4}
    methods = {"**found by itself (default)**": own | {"learning_rate": None}}
    methods |= {f"learning rate {value:g}": own | {"learning_rate": value} for value in (1e-3, 1e-4)}
    grid(studio, report, f"200 steps of 4 pairs, one person of {', '.join(tastes)}", tastes, methods)


def frontier(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Vary the LoRA's scale with and without retention: what does a share of the style cost in captions?"""
    columns, formats = means_columns(list(studio.prompts))
    rows = [means_row("before", [studio.before(report, 0)] * len(tastes), tastes, studio.prompts)[:-1]]
    asked = [{split: studio.named(report, split, taste) for split in studio.prompts} for taste in tastes]
    means = [np.mean([one[split] for one in asked], 0).tolist() for split in studio.prompts]
    rows.append(["style asked for by name", *(cell for share, caption in means for cell in (share, caption, None))])
    for name, options in FRONTIER.items():
        for scale in SCALES:
            found = [studio.at_scale(report, taste, scale, **options) for taste in tastes]
            rows.append(means_row(f"{name}, scale {scale:g}", found, tastes, studio.prompts)[:-1])
        title = f"The trainer's own steps and rate, one person for each of {len(tastes)} tastes"
        report.table("means", title, columns[:-1], rows, formats[:-1])


def defaults(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Pass nothing but pairs and a folder: for the houses of the pretraining, then for two that it never saw."""
    rows = []
    before = [studio.before(report, 0)] * len(tastes)
    after = [studio.at_scale(report, taste) for taste in tastes]
    for split in studio.prompts:
        name = f"{SPLIT_NAMES[split]} prompts"
        rows.append(tastes_row(f"{name}, before", before, tastes, split))
        rows.append(tastes_row(f"**{name}, after**", after, tastes, split))
    title = "Nothing passed but pairs and a folder: share of the preferred style"
    formats = [*[".2f"] * (len(STYLES) + 1), ".3f", ".2f"]
    report.table("styles", title, [*STYLES, "mean", "caption", "both"], rows, formats)
    if "held_out" not in studio.prompts:  # there are no others of these
        return
    columns = ["before", "after", "its real drawings", "caption, before", "caption, after"]
    found = [(house, *report.run(f"{house}, own=True", lambda house=house: unseen(studio, house))) for house in UNSEEN]
    report.table("unseen", "Houses that the pipeline never saw: share on held-out prompts", columns, found, ".2f")


def unseen(studio: Studio, name: str) -> list[float]:
    """Return share before, after and of real drawings through the decoder, and captions before and after."""
    house = House(name, PAIRS)
    ceiling = house.fit_probe(studio.judge)
    count = len(studio.prompts["held_out"])
    prompts = house.captions[:: len(house.captions) // count][:count]
    shares, captions = [], []
    for pipeline in (studio.pipeline(), studio.fit(house.pairs, 0, own=True)[0]):
        images = studio.draw(pipeline, prompts, 0)
        shares.append(house.share(images))
        captions.append((studio.judge.caption_ranks(images, prompts) < 5).float().mean().item())
    return [*shares, ceiling, *captions]


def larger(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Train with the defaults on the random network of lora_speed.py: do they diverge at another size?"""

    def measure() -> list[list[float]]:
        with tempfile.TemporaryDirectory() as folder:
            lora_speed.save_pipeline(Path(folder))
            options = QUIET | {
                "logging_strategy": "steps",
                "resolution": lora_speed.SIZE,
                "max_steps": 40,
                "bf16": False,
            }
            config = PreferenceLoRAConfig(f"{folder}/run", cache_dir=f"{folder}/cache", **options)
            trainer = PreferenceLoRATrainer(folder, config, train_dataset=preference_pairs(tastes[0], PAIRS))
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        logs = [entry for entry in trainer.state.log_history if "margin" in entry]
        return [
            [
                *(entry[name] for name in ("step", "loss", "margin")),
                100 * entry["winner_error_change"] / entry["winner_error_base"],
                entry["learning_rate"],
            ]
            for entry in logs
        ]

    rows = [(f"step {step}", *values) for step, *values in report.run(f"{tastes[0]}, 71 M", measure)]
    columns = ["loss", "margin", "error of preferred images, % above the base's", "learning rate"]
    report.table("log", "40 steps with the defaults on a random UNet of 71 M parameters", columns, rows, ".3g")


def loop(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Go from clicks only: 64 clicks -> reward -> pairs of the pipeline's own drawings -> LoRA."""
    found: dict[str, list[dict[str, Any]]] = {"before": [studio.before(report, 0)] * len(tastes)}
    for name, templates in (
        ("**drawn from prompts that name styles, too**", NAMED),
        ("drawn from bare prompts", NAMED[:1]),
    ):
        found[name] = [from_drawings(studio, report, taste, templates) for taste in tastes]
    rows = [
        tastes_row(f"{SPLIT_NAMES[split]} prompts: {name}", results, tastes, split)
        for split in studio.prompts
        for name, results in found.items()
    ]
    title = "From clicks to images, the LoRA never sees a real drawing: share of the preferred style"
    formats = [*[".2f"] * (len(STYLES) + 1), ".3f", ".2f"]
    report.table("styles", title, [*STYLES, "mean", "caption", "both"], rows, formats)


def guided(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Go from clicks only, by pairs of the pipeline's own drawings and by the reward's gradient."""
    nothing = {"drawing": None, "seconds": None}
    found: dict[str, list[dict[str, Any]]] = {"before": [studio.before(report, 0) | nothing] * len(tastes)}
    for name, options in {"": {}, ", anchor_weight=2": {"anchor_weight": 2.0}}.items():
        found[f"**guided by the reward, from bare prompts{name}**"] = [
            report.run(f"{taste}, guided{name}", partial(by_gradient, studio, taste, **options)) for taste in tastes
        ]
    found["pairs drawn from prompts that name styles, too"] = [
        from_drawings(studio, report, taste, NAMED) for taste in tastes
    ]
    rows = [
        [*tastes_row(f"{SPLIT_NAMES[split]} prompts: {name}", results, tastes, split), *costs(results)]
        for split in studio.prompts
        for name, results in found.items()
    ]
    title = "From clicks to images, with and without drawn pairs: share of the preferred style"
    columns = [*STYLES, "mean", "caption", "both", "CPU seconds of drawing", "of training"]
    report.table("styles", title, columns, rows, [*[".2f"] * (len(STYLES) + 1), ".3f", ".2f", ".0f", ".0f"])


def clicks(studio: Studio, report: Report, tastes: Sequence[str], seeds: int) -> None:
    """Go from clicks only, by the reward's gradient: all tastes."""
    before = [studio.before(report, 0)] * len(tastes)
    after = [report.run(f"{taste}, guided", partial(by_gradient, studio, taste)) for taste in tastes]
    rows = []
    for split in studio.prompts:
        rows.append(tastes_row(f"{SPLIT_NAMES[split]} prompts, before", before, tastes, split))
        rows.append(tastes_row(f"**{SPLIT_NAMES[split]} prompts, after**", after, tastes, split))
    title = "From 64 clicks, guided by the reward: share of the preferred style"
    formats = [*[".2f"] * (len(STYLES) + 1), ".3f", ".2f"]
    report.table("styles", title, [*STYLES, "mean", "caption", "both"], rows, formats)


def costs(results: Sequence[Mapping[str, float]]) -> list[float | None]:
    """Return the mean seconds of drawing pairs and of training; `None` where nothing was."""
    values = [[one[name] for one in results] for name in ("drawing", "seconds")]
    return [None if None in some else np.mean(some).item() for some in values]


def prompts_to_draw() -> list[str]:
    captions = list(dict.fromkeys(load_emoji("train")["caption"]))
    return captions[3 :: len(captions) // PAIRS][:PAIRS]


def from_drawings(studio: Studio, report: Report, taste: str, templates: Sequence[str]) -> dict[str, Any]:
    """Return the judgement after a LoRA of pairs that the pipeline has drawn and a reward of 64 clicks has ranked."""

    def measure() -> dict[str, Any]:
        scorer, began = reward(taste), time.process_time()
        with fast_precision():
            pairs = generate_preference_pairs(
                studio.pipeline(),
                prompts_to_draw(),
                scorer,
                candidates=12,
                pairs_per_prompt=2,
                prompt_templates=list(templates),
                batch_size=48,
                **DRAWING,
            )
        drawing = time.process_time() - began
        pipeline, facts = studio.fit(pairs, 0)
        return studio.measure(pipeline, 0) | facts | {"drawing": drawing}

    return report.run(f"{taste}, {len(templates)} templates", measure)


def by_gradient(studio: Studio, taste: str, **options: Any) -> dict[str, Any]:
    """Return the judgement after a LoRA that a reward of 64 clicks has guided, with CPU `seconds` of the training."""
    pipeline, scorer = studio.pipeline(), reward(taste)
    config = RewardLoRAConfig(
        f"{studio.cache.name}/run", cache_dir=studio.cache.name, **{**QUIET, **GUIDED, **options}
    )
    trainer = RewardLoRATrainer(pipeline, config, scorer, prompts_to_draw())
    trainer.remove_callback(PrinterCallback)
    began = time.process_time()
    trainer.train()
    facts = {"drawing": None, "seconds": time.process_time() - began}
    return studio.measure(pipeline, 0) | facts


def reward(taste: str) -> PreferenceScorer:
    """Train a reward on 64 clicks."""
    clicks = preference_pairs(taste, PAIRS, split="held_out")
    with tempfile.TemporaryDirectory() as folder:
        trainer = BradleyTerryTrainer(CLIP_FOLDER, BradleyTerryConfig(folder, **QUIET), train_dataset=clicks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    scorer = PreferenceScorer(trainer.model, trainer.processing_class)
    scorer.set_scale(8)  # so it asks for the taste before the caption: all drawings of a prompt show the same thing
    return scorer


PARTS: dict[str, Callable[[Studio, Report, Sequence[str], int], None]] = {
    "base": base,
    "taste": taste,
    "losses": losses,
    "rate": rate,
    "beta": beta,
    "draws": draws,
    "loop": loop,
    "guided": guided,
    "clicks": clicks,
    "defaults": defaults,
    "frontier": frontier,
    "larger": larger,
}


if __name__ == "__main__":
    main()
