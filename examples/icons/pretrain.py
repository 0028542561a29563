"""Pretrain the text tower and the projections of the default base on a frozen ImageNet tower.

    python examples/icons/render.py FOLDER
    python examples/icons/pretrain.py FOLDER             # features, then training; writes examples/icons/base
    python examples/icons/pretrain.py FOLDER --validate  # leaves out 221 training concepts, and judges by them
    python examples/icons/pretrain.py FOLDER --start examples/icons/base    # goes on from a base
    python examples/icons/evaluate_base.py               # prints the figures of the shipped weights

Locked-image tuning (Zhai et al., arXiv 2111.07991): the image tower never changes, so its features are computed once.
A caption names a drawing, and often looks of it: its house, "line" or "filled", or its colour. Every drawing that a
caption fits counts as equally right, so that bare captions prefer no look. Another term compares the drawings of one
name alone; without it, words for looks mean nothing.
"""

import argparse
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    MobileNetV2Model,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))

from captions import Captions, Drawings
from emoji import STYLES, fast_precision, load_emoji
from evaluate_base import BASE, Encoder, evaluate, report
from pretrain_clip import train_tokenizer
from tower import WIDTH, compute_features, fetch_package, image_processor, load_tower

CONTEXT_LENGTH = 24
DIMENSION = 256
NAMES, PER_NAME, OTHERS = 128, 6, 3072  # names of a batch, drawings of each, and other drawings as negatives
CAPTIONS_PER_NAME = 3
LEFT_OUT = 6  # `--validate` leaves out every sixth training concept
EMOJI_SHARE = 4  # emoji are drawn so much oftener than icons: their houses are named nowhere else
WITHIN = 2.0  # weight of the terms within names


def contrast(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy between the softmax of each row and an even spread over what fits."""
    some = fits.any(1)
    target = fits[some].float()
    return -(target * logits[some].log_softmax(1)).sum(1).div(target.sum(1)).mean()


def contrast_within(logits: torch.Tensor, fits: torch.Tensor, same_name: torch.Tensor) -> torch.Tensor:
    """Contrast among what has the same name, where some fits and some doesn't."""
    telling = fits.any(1) & (same_name & ~fits).any(1)
    return contrast(logits[telling].masked_fill(~same_name[telling], -1e4), fits[telling])


class TextSide(torch.nn.Module):
    """Everything that is trained: text tower, both projections, and the logit scale."""

    def __init__(self, tokenizer: CLIPTokenizer, spread: torch.Tensor) -> None:
        super().__init__()
        width = 192
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_model = CLIPTextModel(config)
        self.text_projection = torch.nn.Linear(width, DIMENSION, bias=False)
        self.visual_projection = torch.nn.Linear(WIDTH, DIMENSION, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("spread", spread)

    def embed_texts(self, tokens: list[list[int]], pad: int) -> torch.Tensor:
        """Embed tokenized captions in four parts of about equal length: padding is what costs most."""
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        parts = []
        for part in np.array_split(order, min(4, len(order))):
            longest = len(tokens[part[-1]])
            ids = torch.tensor([tokens[index] + [pad] * (longest - len(tokens[index])) for index in part])
            # Causal attention: what follows the first end of text changes nothing, so no mask is needed.
            parts.append(self.text_projection(self.text_model(input_ids=ids).pooler_output))
        back = torch.tensor(order).argsort()
        return F.normalize(torch.cat(parts)[back].float(), dim=-1)

    def embed_images(self, features: torch.Tensor) -> torch.Tensor:
        return self.embed_scaled(features / self.spread)

    def embed_scaled(self, features: torch.Tensor) -> torch.Tensor:
        """Embed drawings by features that were divided by their spread."""
        return F.normalize(self.visual_projection(features).float(), dim=-1)

    def start_from(self, base: VisionTextDualEncoderModel) -> None:
        """Take the weights of a base that `assemble` returned."""
        self.text_model.load_state_dict(base.text_model.state_dict())
        self.text_projection.load_state_dict(base.text_projection.state_dict())
        with torch.no_grad():
            self.visual_projection.weight.copy_(base.visual_projection.weight * self.spread)
            self.logit_scale.copy_(base.logit_scale)


class Pretraining:
    """Training that lasts a number of seconds, and goes on from its last checkpoint if it was killed."""

    def __init__(
        self,
        drawings: Drawings,
        seconds: float,
        checkpoint: Path,
        learning_rate: float = 1e-3,
        start: Path | None = None,
    ) -> None:
        self.seconds, self.checkpoint, self.step, self.passed = seconds, checkpoint, 0, 0.0
        self.learning_rate = learning_rate
        self.captions = Captions(drawings)
        if start is None:
            described = zip(drawings.names, drawings.looks, drawings.tags, strict=True)
            texts = [" ".join([name, *looks, *tags]) for name, looks, tags in described]
            self.tokenizer = train_tokenizer(texts, vocab_size=6000)
        else:
            self.tokenizer = CLIPTokenizer.from_pretrained(start)
        self.tokenizer.model_max_length = CONTEXT_LENGTH
        spread = drawings.features.float().std(0) + 1e-3
        self.model = TextSide(self.tokenizer, spread)
        if start is not None:
            self.model.start_from(VisionTextDualEncoderModel.from_pretrained(start, dtype=torch.float32))
        self.features = (drawings.features / spread).bfloat16()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        decayed = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
        self.rows_of: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(drawings.names):
            self.rows_of[name].append(row)
        emoji = {name for name, looks in zip(drawings.names, drawings.looks, strict=True) if "emoji" in looks}
        self.shares = [min(len(rows), 6) * (EMOJI_SHARE if n in emoji else 1) for n, rows in self.rows_of.items()]
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            for name in ("model", "average", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.passed = state["step"], state["passed"]

    def loss(self) -> torch.Tensor:
        names = dict.fromkeys(random.choices(list(self.rows_of), self.shares, k=NAMES))
        drawn = [random.sample(self.rows_of[name], min(PER_NAME, len(self.rows_of[name]))) for name in names]
        of = [row for rows in drawn for row in rows[:CAPTIONS_PER_NAME]]
        texts, told = zip(*(self.captions.write(row) for row in of), strict=True)
        tokens = self.tokenizer(list(texts), truncation=True, max_length=CONTEXT_LENGTH)["input_ids"]
        rows = [row for rows in drawn for row in rows]
        own = len(rows)
        rows += random.sample(range(len(self.features)), OTHERS)
        same_name, fits = self.captions.fitting(of, list(told), rows)
        with fast_precision():
            embedded = self.model.embed_texts(tokens, self.tokenizer.pad_token_id)
            # All drawings of a step lose the same features, which is far cheaper.
            kept = F.dropout(torch.ones(self.features.shape[1]), 0.1)
            images = self.model.embed_scaled(self.features[rows].float() * kept)
        logits = self.model.logit_scale.exp() * embedded @ images.T  # (captions, rows)
        back, back_fits, back_name = logits.T[:own], fits.T[:own], same_name.T[:own]
        within = contrast_within(logits[:, :own], fits[:, :own], same_name[:, :own])
        within = within + contrast_within(back, back_fits, back_name)
        return contrast(logits, fits) + contrast(back, back_fits) + WITHIN * within

    def run(self) -> tuple[TextSide, CLIPTokenizer]:
        """Train; return the averaged weights and the tokenizer."""
        last = time.monotonic()
        while self.passed < self.seconds:
            share = self.passed / self.seconds
            for group in self.optimizer.param_groups:
                decay = 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
                group["lr"] = self.learning_rate * min(1, (self.step + 1) / 50) * decay
            loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=math.log(100))
            self.average.update_parameters(self.model)
            self.step += 1
            self.passed, last = self.passed + time.monotonic() - last, time.monotonic()
            if self.step % 50 == 0:
                scale = self.model.logit_scale.exp().item()
                print(f"{self.passed:5.0f} s, step {self.step}: loss {loss.item():.3f}, scale {scale:.1f}", flush=True)
                self.save_checkpoint()
        return self.average.module, self.tokenizer

    def save_checkpoint(self) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({**state, "step": self.step, "passed": self.passed}, temporary)
        temporary.replace(self.checkpoint)


def assemble(tower: MobileNetV2Model, side: TextSide) -> VisionTextDualEncoderModel:
    """Put tower, text tower and projections together as an ordinary dual encoder."""
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        tower.config, side.text_model.config, projection_dim=DIMENSION
    )
    model = VisionTextDualEncoderModel(config).eval()
    model.vision_model.load_state_dict(tower.state_dict())
    model.text_model.load_state_dict(side.text_model.state_dict())
    model.text_projection.load_state_dict(side.text_projection.state_dict())
    with torch.no_grad():
        # Dividing features by their spread is folded into the projection.
        model.visual_projection.weight.copy_(side.visual_projection.weight / side.spread)
        model.logit_scale.copy_(side.logit_scale)
    return model


def cached(file: Path, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return a tensor that is computed once."""
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        torch.save(compute(), temporary)
        temporary.replace(file)
    return torch.load(file, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of render.py; features and the checkpoint are kept there")
    parser.add_argument("--output_dir", type=Path, default=BASE)
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, help="base to go on from, with its tokenizer")
    parser.add_argument(
        "--validate", action="store_true", help="leave out every sixth training concept, judge by them"
    )
    args = parser.parse_args()
    if args.validate and args.start:
        parser.error("--validate judges by concepts that the base of --start has seen: leave out one of them.")
    set_seed(args.seed)
    tower = load_tower(fetch_package())
    drawn = cached(args.folder / "emoji.pt", lambda: compute_features(tower, list(load_emoji("train")["image"])))
    pixels = np.load(args.folder / "icons.npy", mmap_mode="r")
    icons = cached(args.folder / "icons.pt", lambda: compute_features(tower, pixels))
    emoji = Drawings.of_emoji(drawn, "train")
    if args.validate:
        emoji = emoji.select([row for row in range(len(emoji.names)) if row // len(STYLES) % LEFT_OUT])
    drawings = Drawings.of_icons(icons, args.folder / "icons.json") + emoji
    pretraining = Pretraining(drawings, args.seconds, args.folder / "checkpoint.pt", args.learning_rate, args.start)
    side, tokenizer = pretraining.run()
    model = assemble(tower, side)
    processor = VisionTextDualEncoderProcessor(image_processor(), tokenizer)
    if args.validate:
        rows = load_emoji("train")
        validation = rows.select([row for row in range(len(rows)) if row // len(STYLES) % LEFT_OUT == 0])
        report("validation", Encoder(model, processor), validation)
        return
    # Half the size; `load_dual_encoder` reads it in float32.
    model.half().save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    evaluate(args.output_dir)


if __name__ == "__main__":
    main()
