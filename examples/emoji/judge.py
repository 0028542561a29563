"""Judge generated emoji independently: whose style is it, and what does it show?

    python examples/emoji/judge.py                  # trains, writes examples/emoji/judge
    python examples/emoji/judge.py --evaluate_only  # prints the figures of the shipped weights

Whoever trains a LoRA on the scores of a model can't ask that model how well it went. The judge shares nothing with
`clip/`, neither weights nor tokenizer, and no LoRA is trained on what it says. It has seen real drawings of the
training concepts only, in all five styles alike.

It will look at what a small diffusion model draws, through a blurry autoencoder. So it trains on drawings that were
moved, blurred, shrunk and enlarged, and stained: sharpness must not be what tells a style.
"""

import argparse
import random
import re
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from emoji import DIFFUSION_FOLDER, FOLDER, STYLES, fast_precision
from pretrain_clip import EmojiCorpus, augment

JUDGE_FOLDER = FOLDER / "judge"
STYLE_WEIGHT = 3.0  # captions have gradients enough: there are 1,326 of them to be told apart
CHOICES = 96  # captions that a drawing is measured against
SETS = 50  # sets of so many captions, the same ones each time


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.residual = inside == outside and stride == 1
        self.convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        update = F.relu(self.norm(self.convolution(hidden)))
        return hidden + update if self.residual else update


def pooled(values: torch.Tensor) -> torch.Tensor:
    """Return mean and maximum over the pixels of (N, C, H, W): (N, 2 C)."""
    return torch.cat([values.mean((2, 3)), values.amax((2, 3))], 1)


class Judge(nn.Module, PyTorchModelHubMixin):
    """Small CNN with a head for styles, and one for captions beside a bag of words and of pieces of words.

    Example:
        >>> judge = Judge.from_pretrained(JUDGE_FOLDER)
        >>> judge.style_probabilities([image]).argmax(1)  # of STYLES
        tensor([1])
        >>> judge.caption_ranks([apple, pear], ["red apple", "pear"])  # 0: its own caption is the nearest one
        tensor([0, 0])
    """

    def __init__(
        self, widths: Sequence[int] = (32, 64, 88), buckets: int = 3072, word_dim: int = 24, embedding_dim: int = 64
    ) -> None:
        super().__init__()
        self.buckets = buckets
        first, second, third = widths
        self.near = nn.Sequential(  # (N, 3, 64, 64) -> (N, second, 16, 16)
            Block(3, first, 5, 2), Block(first, second, 3, 2), Block(second, second)
        )
        self.far = nn.Sequential(Block(second, third, 3, 2), Block(third, third))  # -> (N, third, 8, 8)
        self.style_head = nn.Linear(2 * (second + third), len(STYLES))
        self.image_head = nn.Linear(2 * third, embedding_dim)
        self.words = nn.EmbeddingBag(buckets, word_dim, mode="sum")
        self.text_head = nn.Sequential(
            nn.Linear(word_dim, 2 * embedding_dim), nn.GELU(), nn.Linear(2 * embedding_dim, embedding_dim)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        nn.init.normal_(self.words.weight, std=0.5)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what a style is told by, surfaces and lines near by and the whole: (N, 304) of (N, 3, 64, 64)."""
        near = self.near((0.5 - pixels).contiguous(memory_format=torch.channels_last) * 2)
        far = self.far(near)
        return torch.cat([pooled(values) for values in (near, far)], 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits of the styles (N, 5) and normalised embeddings (N, D) of `pixels` (N, 3, 64, 64) in [0, 1]."""
        features = self.features(pixels)
        shown = self.image_head(features[:, -self.image_head.in_features :])  # the concept needs the whole drawing
        return self.style_head(features), F.normalize(shown.float(), dim=1)

    def embed_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Return normalised embeddings (N, D) of captions, in the space of `embed_images`."""
        pieces, weights, offsets = [], [], []
        for caption in captions:
            offsets.append(len(pieces))
            words = re.findall(r"\w+", caption.lower())
            for word in words:
                found, parts = word_pieces(word, self.buckets)
                pieces += found
                weights += [share / len(words) for share in parts]
        shares = torch.tensor(weights, dtype=self.words.weight.dtype)
        bag = self.words(torch.tensor(pieces, dtype=torch.long), torch.tensor(offsets), per_sample_weights=shares)
        return F.normalize(self.text_head(bag).float(), dim=1)

    @torch.no_grad()
    def look(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run `forward` without gradients and in small batches."""
        styles, embeddings = zip(*(self(chunk) for chunk in pixels.split(256)), strict=True)
        return torch.cat(styles), torch.cat(embeddings)

    def style_probabilities(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the probability of each of `STYLES` for each image: (N, 5)."""
        return self.look(to_pixels(images))[0].softmax(1)

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return normalised embeddings (N, D) of the concepts that the images show."""
        return self.look(to_pixels(images))[1]

    @torch.no_grad()
    def caption_ranks(self, images: Sequence[Image.Image], captions: Sequence[str]) -> torch.Tensor:
        """Count the distinct captions that are nearer to each image than its own.

        Args:
            images: N images of any size.
            captions: N captions: what each image was drawn for.

        Returns:
            (N,) integers; 0 if an image's own caption is the nearest one.

        Raises:
            ValueError: There is not one caption for each image.
        """
        if len(images) != len(captions):
            raise ValueError(f"`captions` should have one for each of {len(images)} images, but got {len(captions)}.")
        distinct = list(dict.fromkeys(captions))
        own = torch.tensor([distinct.index(caption) for caption in captions])
        return ranks(self.embed_images(images) @ self.embed_captions(distinct).T, own)


@cache
def word_pieces(word: str, buckets: int) -> tuple[list[int], list[float]]:
    """Return the buckets of a word and of its parts of three and four letters, and their shares.

    The word falls into two buckets, since two words that share one rarely share the other. Its parts are what a word
    has in common with others that nobody has seen in training.
    """
    marked = f"<{word}>"
    parts = [marked[start : start + size] for size in (3, 4) for start in range(len(marked) - size + 1)]
    pieces = [f"1{marked}", f"2{marked}", *parts]
    shares = [1.0, 1.0, *[1 / len(parts)] * len(parts)]
    return [zlib.crc32(piece.encode()) % buckets for piece in pieces], shares


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return images as pixels (N, 3, 64, 64) in [0, 1]."""
    resized = [
        image.convert("RGB") if image.size == (64, 64) else image.convert("RGB").resize((64, 64), Image.Resampling.BOX)
        for image in images
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).float() / 255


def ranks(scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Count the scores of a row (N, C) that are larger than the one at its place in `own` (N,)."""
    return (scores > scores.gather(1, own[:, None])).sum(1)


def degrade(pixels: torch.Tensor) -> torch.Tensor:
    """Spoil drawings (N, 3, H, W) as an autoencoder or a careless copy does, each in its own way, many of them little.

    Hues keep their places on the whole: they are part of a style.
    """
    count = len(pixels)

    def strength(share: float) -> torch.Tensor:
        """Draw amounts (N, 1, 1, 1) in [0, 1], 0 for all but about `share` of the drawings."""
        return torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < share)

    pixels = pixels + strength(0.4).sqrt() * (resample(pixels, random.uniform(0.35, 0.8)) - pixels)
    pixels = blur(pixels, 0.3 + 1.2 * strength(0.5).flatten())
    # Autoencoders, as JPEG, keep colours coarser than lines.
    grey = pixels.mean(1, keepdim=True)
    colour = pixels - grey
    colour = colour + strength(0.5).sqrt() * (resample(colour, random.uniform(0.1, 0.4)) - colour)
    pixels = grey + (1 - 0.4 * strength(0.4)) * colour
    # Stains of 1 to 16 pixels on what is drawn, since noise in latents leaves no grain; the paper stays white.
    grain = torch.randn(count, 3, *[random.choice([4, 8, 16, 32, 64])] * 2)
    stains = 0.12 * strength(0.5) * F.interpolate(grain, pixels.shape[-2:], mode="bilinear")
    ink = 1 + 0.3 * (strength(0.5) - strength(0.5)) + 0.1 * (torch.rand(count, 3, 1, 1) - 0.5) + stains
    return (1 - (1 - pixels) * ink + 0.03 * strength(0.4) * torch.randn_like(pixels)).clamp(0, 1)


def resample(pixels: torch.Tensor, scale: float) -> torch.Tensor:
    """Shrink images and enlarge them again."""
    small = F.interpolate(pixels, scale_factor=scale, mode="area")
    return F.interpolate(small, pixels.shape[-2:], mode="bilinear")


def blur(pixels: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Blur images (N, 3, H, W) with a Gaussian, each of its own width (N,) in pixels."""
    taps = torch.arange(-4, 5).float()
    kernels = torch.softmax(-(taps**2) / (2 * sigmas[:, None] ** 2), dim=1)  # (N, 9), sums to 1
    kernels = kernels.repeat_interleave(3, 0)[:, None]  # (N*3, 1, 9)
    padded = F.pad(pixels, (4, 4, 4, 4), mode="replicate").flatten(0, 1)[None]  # (1, N*3, H+8, W+8)
    blurred = F.conv2d(padded, kernels[:, :, None], groups=len(kernels))
    return F.conv2d(blurred, kernels[..., None], groups=len(kernels)).view_as(pixels)


def some(share: float, changed: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the changed drawings for about `share` of them, and the others as they were."""
    return torch.where(torch.rand(len(pixels), 1, 1, 1) < share, changed, pixels)


def caption_loss(images: torch.Tensor, captions: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Return the contrastive loss between images (N, D) and the captions (C, D) of all training concepts.

    Args:
        images: Scaled embeddings, S drawings after one another for each of N/S concepts.
        captions: Embeddings.
        drawn: (N,), the caption of each image.
    """
    logits = images @ captions.T
    own = drawn.unique_consecutive()
    # A caption should give each drawing of its concept the same share.
    to_images = logits[:, own].T.log_softmax(1).view(len(own), len(own), -1)
    return F.cross_entropy(logits, drawn, label_smoothing=0.05) - to_images.diagonal(dim1=0, dim2=1).mean()


def train(corpus: EmojiCorpus, steps: int, concepts: int, learning_rate: float) -> Judge:
    model = Judge().to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    styles = torch.arange(len(STYLES)).repeat(concepts)
    progress = tqdm(range(steps), desc="judge", mininterval=5)
    for step in progress:
        batch = random.sample(range(len(corpus)), concepts)
        pixels = corpus.pixels[batch].flatten(0, 1).float() / 255
        pixels = some(0.6, augment(pixels), pixels)
        pixels = some(0.75, degrade(pixels), pixels)
        texts = [corpus.bare_caption(concept) for concept in range(len(corpus))]
        with fast_precision():
            style, images = model(pixels)
            captions = model.embed_captions(texts)
        style_loss = F.cross_entropy(style.float(), styles)
        shown_loss = caption_loss(
            images * model.logit_scale.exp(), captions, torch.tensor(batch).repeat_interleave(len(STYLES))
        )
        optimizer.zero_grad()
        (shown_loss + STYLE_WEIGHT * style_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        if step % 50 == 49:
            progress.set_postfix(style=f"{style_loss.item():.3f}", caption=f"{shown_loss.item():.3f}")
    return average.module


@torch.no_grad()
def evaluate(model: Judge, pixels: torch.Tensor, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Measure the judge on `pixels` (concepts, styles, 3, 64, 64) in [0, 1].

    Returns:
        `confusion` (5, 5): shares of the drawings of a style (row) that are taken for each style (column).
        `recall@1`, `recall@5` (5,): share of the drawings of each style whose own caption is among the nearest one
        or five of 96, on the average of 50 sets of 96 concepts.
    """
    style, images = model.look(pixels.flatten(0, 1))
    drawn = torch.arange(len(STYLES)).repeat(len(captions))
    confusion = np.zeros((len(STYLES), len(STYLES)))
    np.add.at(confusion, (drawn.numpy(), style.argmax(1).numpy()), 1 / len(captions))
    scores = (images @ model.embed_captions(captions).T).view(len(captions), len(STYLES), -1)
    own = torch.arange(CHOICES).repeat_interleave(len(STYLES))
    found = []
    for seed in range(SETS):
        chosen = random.Random(seed).sample(range(len(captions)), CHOICES)
        found.append(ranks(scores[chosen][..., chosen].flatten(0, 1), own).view(CHOICES, len(STYLES)))
    places = torch.stack(found)  # (SETS, CHOICES, S)
    recalls = {f"recall@{k}": (places < k).float().mean((0, 1)).numpy() for k in (1, 5)}
    return {"confusion": confusion, **recalls}


@torch.no_grad()
def through_autoencoder(pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode drawings (N, 3, 64, 64) in [0, 1] with the autoencoder of `diffusion/`."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(DIFFUSION_FOLDER / "vae", dtype=torch.float32).eval()
    decoded = [vae.decode(vae.encode(chunk * 2 - 1).latent_dist.mode()).sample for chunk in pixels.split(64)]
    return ((torch.cat(decoded) + 1) / 2).clamp(0, 1)


def report(model: Judge) -> None:
    for split in ("train", "held_out"):
        corpus = EmojiCorpus(split)
        real = corpus.pixels.float() / 255
        seen = {"real drawings": real}
        if split == "held_out" and (DIFFUSION_FOLDER / "vae").is_dir():
            decoded = through_autoencoder(real.flatten(0, 1)).view_as(real)
            seen["drawings through the autoencoder"] = decoded
        for name, pixels in seen.items():
            figures = evaluate(model, pixels, corpus.captions)
            columns = "  ".join(f"{column:>9}" for column in (*STYLES, "mean"))
            print(f"{split}, {len(corpus)} concepts, {name}\n  {'':14}{columns}")
            rows = {"style accuracy": figures["confusion"].diagonal()}
            rows |= {f"{key} of {CHOICES}": figures[key] for key in ("recall@1", "recall@5")}
            for key, values in rows.items():
                print(f"  {key:14}" + "  ".join(f"{value:9.3f}" for value in [*values, values.mean()]))
            for style, shares in zip(STYLES, figures["confusion"], strict=True):
                print(f"  {style + ' as':14}" + "  ".join(f"{share:9.3f}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=JUDGE_FOLDER)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--concepts_per_batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate_only", action="store_true", help="print the figures of the judge in --output_dir")
    args = parser.parse_args()
    if not args.evaluate_only:
        set_seed(args.seed)
        model = train(EmojiCorpus("train"), args.steps, args.concepts_per_batch, args.learning_rate)
        model.half().save_pretrained(args.output_dir)
        (args.output_dir / "README.md").unlink()  # a draft of a card, which huggingface_hub puts there
    report(Judge.from_pretrained(args.output_dir))


if __name__ == "__main__":
    main()
