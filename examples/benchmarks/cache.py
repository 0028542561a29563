"""Time of a training step with and without the cache of frozen features, side by side in one run.

    python examples/benchmarks/cache.py

A step is what the Trainer does with a batch of 16 pairs: preprocessing, forward, backward. The two kinds of steps
alternate, so that a noisy machine is noisy for both; medians are compared.
"""

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from emoji import CLIP_FOLDER
from taste import preference_pairs

PAIRS, STEPS = 16, 7
TOP_TWO = r"(text_projection|visual_projection|vision_model\.encoder\.layers\.(10|11)\..*(q_proj|v_proj))"


def vit_b_32() -> tuple[CLIPModel, CLIPProcessor]:
    """A random model of the shape of openai/clip-vit-base-patch32, with the emoji tokenizer."""
    tokenizer = CLIPProcessor.from_pretrained(CLIP_FOLDER).tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=special, vision_config={}, projection_dim=512)
    return CLIPModel(config), CLIPProcessor(CLIPImageProcessor(), tokenizer)


def emoji_clip() -> tuple[CLIPModel, CLIPProcessor]:
    return (
        CLIPModel.from_pretrained(CLIP_FOLDER, dtype=torch.float32),
        CLIPProcessor.from_pretrained(CLIP_FOLDER),
    )


def step_times(build, peft_config: LoraConfig | None) -> tuple[float, float, float]:
    """Median seconds of an uncached and of a cached step, and the seconds that filling the cache took."""
    pairs = preference_pairs("fluent", PAIRS)
    trainers = {}
    filling = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for cached in (False, True):
            torch.manual_seed(0)
            model, processor = build()
            args = BradleyTerryConfig(scratch, cache_features=cached, report_to="none", use_cpu=True)
            began = time.perf_counter()
            trainers[cached] = BradleyTerryTrainer(
                model, args, pairs, processing_class=processor, peft_config=peft_config
            )
            filling = time.perf_counter() - began
            trainers[cached]._prepare(begin=True)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(STEPS):
            for cached, trainer in trainers.items():
                batches = iter(trainer.get_train_dataloader())
                began = time.perf_counter()
                trainer.training_step(trainer.model, next(batches), torch.tensor(float(PAIRS)))
                times[cached].append(time.perf_counter() - began)
                trainer.model.zero_grad()
    return statistics.median(times[False][1:]), statistics.median(times[True][1:]), filling


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    rows = (
        ("emoji CLIP, LoRA on both projections", emoji_clip, None),
        ("ViT-B/32 shape, LoRA on both projections", vit_b_32, None),
        ("ViT-B/32 shape, LoRA on the top 2 of 12 vision layers", vit_b_32, LoraConfig(r=8, target_modules=TOP_TWO)),
    )
    print("| | uncached, s | cached, s | ratio | filling the cache, s |\n|---|---:|---:|---:|---:|")
    for name, build, config in rows:
        uncached, cached, filling = step_times(build, config)
        print(f"| {name} | {uncached:.3f} | {cached:.3f} | {uncached / cached:.1f} | {filling:.1f} |", flush=True)


if __name__ == "__main__":
    main()
