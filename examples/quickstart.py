"""From 64 clicks to a reward model of one person's taste, and to a pipeline that draws to it, on the emoji domain.

    make demo        # or: python examples/quickstart.py --taste mono --pairs 32

1. a simulated person clicks on pairs of drawings; 2. cross-validation says what the clicks prove; 3. the adapter is
trained and saved; 4. it is measured on concepts that it never saw; 5. pictures show what changed; 6. a diffusion
pipeline draws, and the reward chooses among its drawings; 7. a preference LoRA is trained on these pairs alone;
8. an independent judge says whose style the pipeline draws in, before and after.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "emoji"))
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from bt_hf import (
    BradleyTerryConfig,
    BradleyTerryTrainer,
    PreferenceLoRAConfig,
    PreferenceLoRATrainer,
    PreferenceScorer,
    cross_validate,
    generate_preference_pairs,
)
from bt_hf.plots import (
    contact_sheet,
    plot_accuracy_by_pairs,
    plot_reliability,
    plot_training_curve,
)
from emoji import CLIP_FOLDER, DIFFUSION_FOLDER, STYLE_NAMES, STYLES, fast_precision, load_emoji
from judge import JUDGE_FOLDER, Judge
from taste import preference_pairs

# Options of the tiny pipeline's call. The judge finds as many styles and captions in ten steps as in twenty.
DRAWING = {"num_inference_steps": 10, "guidance_scale": 3.0, "height": 64, "width": 64}

# Words for styles vary the drawings that the reward chooses from; it has to find out which of them the person likes.
TEMPLATES = ["{prompt}", *(f"{{prompt}}, {style}" for style in STYLE_NAMES.values())]

# Captions that the tiny pipeline draws so that one can see what they are. None is among the prompts of the LoRA.
SHOWN = ["pig face", "orange heart", "ten o’clock", "person wearing turban", "cat face", "military medal"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taste", choices=[*STYLES, "warm"], default="fluent_3d", help="what the person prefers")
    parser.add_argument("--pairs", type=int, default=64, help="how often the person clicks, at most 200")
    parser.add_argument("--prompts", type=int, default=64, help="prompts that the pipeline draws to learn from, or 0")
    parser.add_argument("--steps", type=int, default=120, help="training steps of the preference LoRA")
    parser.add_argument("--output_dir", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    began = time.perf_counter()

    # 1. The clicks, on drawings that the base was not pretrained on, as a user's are. To measure on: the same person's
    # pairs of all other such concepts.
    clicks = preference_pairs(args.taste, args.pairs, split="held_out")
    clicked = frozenset(clicks["concept"])
    held_out = preference_pairs(args.taste, split="held_out", exclude=clicked)
    print(f"{len(clicks)} clicks of a person who prefers {args.taste!r}, for example: {clicks[0]['prompt']!r}")

    # 2. What do the clicks prove? No held-out data needed.
    config = BradleyTerryConfig(str(args.output_dir), report_to="none", save_strategy="no", overwrite_output_dir=True)
    validation = cross_validate(CLIP_FOLDER, clicks, config)
    print(f"\n{validation}\n")

    # 3. Train on all of them, and save.
    trainer = BradleyTerryTrainer(CLIP_FOLDER, config, train_dataset=clicks, eval_dataset=held_out)
    trainer.verdict = validation.verdict
    trainer.train()
    trainer.save_model()

    # 4. Measure on concepts that neither the base nor the adapter was trained on.
    metrics = trainer.evaluate()
    print(f"\nOn {len(held_out)} pairs of held-out concepts:")
    print(f"{'':10}{'accuracy':>10}{'log-loss':>10}{'Brier':>10}{'calibration error':>20}")
    for name, prefix in (("base", "eval_base_"), ("adapted", "eval_")):
        values = [metrics[prefix + key] for key in ("accuracy", "log_loss", "brier_score", "calibration_error")]
        print(f"{name:10}{values[0]:10.3f}{values[1]:10.3f}{values[2]:10.3f}{values[3]:20.3f}")

    # 5. Pictures.
    folder = args.output_dir
    plot_training_curve(trainer.state.log_history, folder / "training_curve.png")
    plot_reliability(**trainer.last_evaluation, path=folder / "reliability.png")
    trainer.create_model_card()  # now with figures and pictures
    plot_accuracy_by_pairs({"bt_hf": learning_curve(trainer, clicks)}, folder / "accuracy_by_pairs.png")
    draw_ranking(args, clicked, folder / "before_after.png")
    print(f"\nThe adapter and its card: {folder}/  The pictures:")
    for path in sorted(folder.glob("*.png")):
        print(f"  {path}")
    if args.prompts:
        learn_to_draw(args, folder / "lora")
    print(f"Done in {time.perf_counter() - began:.0f} s.")


def learning_curve(trainer: BradleyTerryTrainer, clicks: Dataset) -> list[tuple[int, float, float | None]]:
    """Measure held-out accuracy after the first 4, 8, 16, ... clicks, on the features that `trainer` has cached."""
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    base, cache = trainer.model.unload(), trainer.cache
    points: list[tuple[int, float, float | None]] = []
    for count in (2**power for power in range(2, 20) if 2**power <= len(clicks)):
        pairs = cache.add(clicks.select(range(count)))
        with tempfile.TemporaryDirectory() as folder:
            config = BradleyTerryConfig(folder, **quiet)
            few = BradleyTerryTrainer(base, config, pairs, trainer.eval_dataset, trainer.processing_class)
            few.remove_callback(PrinterCallback)
            few.train()
            points.append((count, few.evaluate()["eval_accuracy"], None))
        base = few.model.unload()
    return points


def draw_ranking(args: argparse.Namespace, clicked: frozenset[str], path: Path) -> None:
    """Draw six captions that were not clicked on: their five drawings, ranked by the base and by the adapter."""
    drawings = load_emoji("held_out")
    before, after, masks = [], [], ([], [])
    base, adapted = PreferenceScorer.from_pretrained(CLIP_FOLDER), PreferenceScorer.from_pretrained(args.output_dir)
    unseen = [row for row in range(0, len(drawings), len(STYLES)) if drawings[row]["concept"] not in clicked]
    starts = unseen[:: len(unseen) // 6][:6]
    captions = [drawings[start]["caption"] for start in starts]
    for start, caption in zip(starts, captions, strict=True):
        images = [drawings[start + style]["image"] for style in range(len(STYLES))]
        for scorer, sheet, mask in ((base, before, masks[0]), (adapted, after, masks[1])):
            order = [index for index, _ in scorer.rank(caption, images)]
            sheet.append([images[index] for index in order])
            mask.append([STYLES[index] == args.taste for index in order])
    contact_sheet(
        before, after, path, captions, before_mask=masks[0], after_mask=masks[1], mask_label="preferred style"
    )


def learn_to_draw(args: argparse.Namespace, folder: Path) -> None:
    """Teach a pipeline the taste of the reward; it never sees a drawing that the person clicked on."""
    began = time.perf_counter()
    captions = list(dict.fromkeys(load_emoji("train")["caption"]))
    held_out = list(dict.fromkeys(load_emoji("held_out")["caption"]))[::5][:48]

    # 6. The pipeline draws some prompts, and the reward of step 3 takes the best and the worst of each.
    prompts = captions[:: len(captions) // args.prompts][: args.prompts]
    # Turned up, it asks for the taste before the caption: all drawings of a prompt show the same thing.
    scorer = PreferenceScorer.from_pretrained(args.output_dir)
    scorer.set_scale(8)
    with fast_precision():
        pairs = generate_preference_pairs(
            str(DIFFUSION_FOLDER),
            prompts,
            scorer,
            candidates=12,
            pairs_per_prompt=2,
            prompt_templates=TEMPLATES,
            batch_size=48,
            **DRAWING,
        )
    print(f"\n{len(pairs)} pairs of the pipeline's own drawings, ranked by the reward")

    # 7. The preference LoRA. The validation prompts are drawn before and after, with the same seeds.
    config = PreferenceLoRAConfig(
        str(folder),
        max_steps=args.steps,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        validation_prompts=SHOWN,
        validation_inference_steps=DRAWING["num_inference_steps"],
        validation_guidance_scale=DRAWING["guidance_scale"],
        report_to="none",
        save_strategy="no",
        overwrite_output_dir=True,
    )
    trainer = PreferenceLoRATrainer(str(DIFFUSION_FOLDER), config, train_dataset=pairs)
    trainer.train()
    trainer.save_model()

    # 8. An unmodified pipeline with the LoRA, looked at by a judge that no LoRA was trained with.
    judge = Judge.from_pretrained(JUDGE_FOLDER).eval()
    shares = {}
    for name in ("before", "after"):
        pipeline = DiffusionPipeline.from_pretrained(DIFFUSION_FOLDER, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if name == "after":
            pipeline.load_lora_weights(folder)
        with fast_precision():
            images = pipeline(held_out, generator=torch.Generator().manual_seed(0), **DRAWING).images
        found = judge.style_probabilities(images).argmax(1)
        shares[name] = [(found == index).float().mean().item() for index in range(len(STYLES))]
    print(f"\nStyle of the drawings of {len(held_out)} held-out prompts, as an independent judge sees it:")
    print(f"{'':10}" + "".join(f"{style:>12}" for style in STYLES))
    for name, values in shares.items():
        print(f"{name:10}" + "".join(f"{value:12.2f}" for value in values))
    print(f"The LoRA, its card and the sheet {folder / 'before_after.png'}: {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
