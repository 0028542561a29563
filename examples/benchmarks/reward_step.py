"""What a training step of a reward costs beyond its network, and what the cache of frozen features saves.

    python examples/benchmarks/reward_step.py

Compared are, with batches of 16 pairs:

- bare: forwards without and with the LoRA, one backward, and the optimizer's step, on one batch that lies in memory;
- uncached: `BradleyTerryTrainer.train` from the end of one step to the end of the next, images read and fitted for it;
- cached: the same, with what lies below the first trained layer computed once for each image and prompt.

They take turns of a few steps, and medians are compared.
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import timing

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, bradley_terry_loss
from emoji import CLIP_FOLDER
from taste import preference_pairs

BATCH, STEPS, ROUNDS = 16, 4, 3
VISION = r"vision_model\.encoder\.layers\.{}\..*(q_proj|v_proj)"
Build = Callable[[], tuple[CLIPModel, CLIPProcessor]]


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


def make(build: Build, targets: str | None, pairs: Dataset, cached: bool, scratch: str) -> BradleyTerryTrainer:
    torch.manual_seed(0)
    model, processor = build()
    args = BradleyTerryConfig(
        scratch,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        cache_features=cached,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    peft_config = LoraConfig(r=8, target_modules=targets) if targets else None
    return BradleyTerryTrainer(model, args, pairs, processing_class=processor, peft_config=peft_config)


def bare(trainer: BradleyTerryTrainer, pairs: Dataset) -> timing.Turn:
    """The network of a trainer without the trainer."""
    model = trainer.model.train()
    inputs = trainer.data_collator([pairs[index] for index in range(BATCH)])
    inputs = {name: value for name, value in inputs.items() if name not in ("preference", "weight")}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)

    def margins() -> torch.Tensor:
        output = model(**inputs)
        chosen, rejected = output.image_embeds.chunk(2)
        return model.logit_scale.exp() * (output.text_embeds * (chosen - rejected)).sum(-1)

    def step() -> None:
        with torch.no_grad(), model.disable_adapter():
            margins()
        bradley_terry_loss(margins(), 1.0).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return timing.repeat(step, STEPS)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: tuple[tuple[str, Build, str | None], ...] = (
        ("emoji CLIP, LoRA on both projections", emoji_clip, None),
        ("ViT-B/32 shape, LoRA on both projections", vit_b_32, None),
        ("ViT-B/32 shape, LoRA on the top 2 of 12 vision layers", vit_b_32, VISION.format(r"(10|11)")),
        ("ViT-B/32 shape, LoRA on all vision layers", vit_b_32, VISION.format(r"\d+")),
    )
    print(f"Seconds a step of {BATCH} pairs, {torch.get_num_threads()} threads\n")
    print("| | bare | uncached | cached | uncached to bare | uncached to cached | filling the cache |")
    print("|---" + "|---:" * 6 + "|", flush=True)
    pairs = preference_pairs("fluent", STEPS * BATCH)
    for name, build, targets in rows:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = partial(make, build, targets, pairs, scratch=scratch)
            began = time.perf_counter()
            cached = trainer(cached=True)
            filling = time.perf_counter() - began
            turns = {
                "bare": bare(trainer(cached=False), pairs),
                "uncached": timing.train(trainer(cached=False)),
                "cached": timing.train(cached),
            }
            seconds = timing.compare(turns, ROUNDS)
        cells = [f"{value:.4f}" for value in seconds.values()]
        cells += [f"{seconds['uncached'] / seconds[other]:.2f}" for other in ("bare", "cached")]
        print(f"| {name} | {' | '.join(cells)} | {filling:.1f} |", flush=True)


if __name__ == "__main__":
    main()
