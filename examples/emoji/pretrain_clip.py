"""Pretrain the tiny neutral CLIP of the emoji domain from scratch and print what it can see.

    python examples/emoji/pretrain_clip.py                 # trains, writes examples/emoji/clip
    python examples/emoji/pretrain_clip.py --evaluate_only # prints the figures of the shipped weights

Only training concepts are used. Every batch holds each of its concepts in all five styles, so that no style is
preferred, and three kinds of captions, as a crawl of the web would have them:

- bare ("red apple", or its tags): all five drawings are equally right, which keeps bare captions neutral;
- styled ("red apple, twemoji"): only one of the five drawings is right, which makes style visible;
- styled or bare with the main colour of the drawing ("red apple, twemoji, green").
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from emoji import CLIP_FOLDER, STYLE_NAMES, STYLES, fast_precision, load_emoji

CONTEXT_LENGTH = 32
# The first template of each list is the one that the figures below are measured with.
STYLE_TEMPLATES = (
    "{caption}, {style}",
    "{style} {caption}",
    "{caption} in {style} style",
    "a {style} emoji of {caption}",
)
BARE_TEMPLATES = ("{caption}", "an emoji of {caption}", "a drawing of {caption}")


def train_tokenizer(texts: list[str], vocab_size: int = 2048) -> CLIPTokenizer:
    """Learn a byte-level BPE vocabulary in the layout of CLIP's tokenizer."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # The trainer keeps only the symbols that it met; CLIP's layout has every byte, inside and at the end of a word.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH)


def main_colour(pixels: np.ndarray) -> str:
    """Name the commonest colour of a drawing. `pixels`: (H, W, 3) uint8 on white."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(pixels).convert("HSV"), dtype=int), 2, 0)
    vivid = (saturation > 80) & (value > 80)
    if vivid.sum() < 100:
        return "black"
    edges = [10, 22, 42, 60, 110, 140, 180, 215, 245]  # hues on a scale of 256
    names = ["red", "orange", "yellow", "lime", "green", "teal", "blue", "purple", "pink", "red"]
    return names[np.digitize(np.bincount(hue[vivid], minlength=256).reshape(-1, 4).sum(1).argmax() * 4 + 2, edges)]


class EmojiCorpus:
    """Drawings and captions of one split, as tensors: `pixels` (concepts, styles, 3, H, W) uint8."""

    def __init__(self, split: str) -> None:
        rows = load_emoji(split).with_format("numpy")
        images = np.stack(rows["image"]).reshape(-1, len(STYLES), 64, 64, 3)
        self.pixels = torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous()
        self.captions = list(rows["caption"])[:: len(STYLES)]
        self.tags = [list(tags) for tags in rows["tags"]][:: len(STYLES)]
        self.colours = [[main_colour(pixels) for pixels in concept] for concept in images]

    def __len__(self) -> int:
        return len(self.captions)

    def bare_caption(self, concept: int) -> str:
        """Return a caption as the web may have it: the name, or some of the tags, or both."""
        tags = random.sample(self.tags[concept], min(len(self.tags[concept]), random.randint(1, 4)))
        kind = random.random()
        if kind < 0.25:
            return " ".join(tags)
        name = random.choice(BARE_TEMPLATES).format(caption=self.captions[concept])
        return name if kind < 0.7 else f"{name}, {' '.join(tags)}"

    def styled_caption(self, concept: int, style: int) -> str:
        """Return a caption that names the style and, once in four times, the main colour."""
        template = STYLE_TEMPLATES[0] if random.random() < 0.4 else random.choice(STYLE_TEMPLATES)
        caption = self.captions[concept]
        if random.random() < 0.3:
            caption = " ".join(random.sample(self.tags[concept], min(len(self.tags[concept]), random.randint(1, 3))))
        text = template.format(caption=caption, style=STYLE_NAMES[STYLES[style]])
        return f"{text}, {self.colours[concept][style]}" if random.random() < 0.25 else text


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Shift, scale and turn a little; colours are left alone, since they are part of a style."""
    count = len(pixels)
    angle = (torch.rand(count) - 0.5) * 0.35  # +-10 degrees
    scale = 0.85 + torch.rand(count) * 0.35
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = (torch.rand(count, 2) - 0.5) * 0.25  # +-4 pixels
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # Padding is with zeros: take the negative, so that the paper stays white.
    return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **tower,
                **special,
                "num_hidden_layers": 4,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": CONTEXT_LENGTH,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**tower, "num_hidden_layers": 6, "image_size": 64, "patch_size": 8},
            projection_dim=128,
        )
    )


def contrastive_loss(
    images: torch.Tensor, bare: torch.Tensor, others: torch.Tensor, styled: torch.Tensor
) -> torch.Tensor:
    """All embeddings are normalised and scaled; C concepts, S styles, concept-major.

    Args:
        images: (C*S, D).
        bare: (C, D), one bare caption for each concept.
        others: (K, D), bare captions of other concepts, as negatives.
        styled: (C*S, D), the caption of each drawing with its style's name.
    """
    concepts, styles = len(bare), len(images) // len(bare)
    drawn = torch.arange(concepts).repeat_interleave(styles)
    # A bare caption should give each of its drawings the same share.
    to_images = (bare @ images.T).float().log_softmax(1).view(concepts, concepts, styles)
    bare_loss = -to_images.diagonal(dim1=0, dim2=1).mean()
    bare_loss = bare_loss + F.cross_entropy((images @ torch.cat([bare, others]).T).float(), drawn)
    logits = (images @ styled.T).float()
    each = torch.arange(len(images))
    styled_loss = F.cross_entropy(logits, each) + F.cross_entropy(logits.T, each)
    # Only the style differs within a concept: its name has to tell the five drawings apart.
    own = logits.view(concepts, styles, concepts, styles).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (C, S, S)
    target = torch.arange(styles).expand(concepts, styles)
    style_loss = F.cross_entropy(own.transpose(1, 2), target) + F.cross_entropy(own, target)
    return bare_loss + styled_loss + style_loss


def pretrain(
    corpus: EmojiCorpus, processor: CLIPProcessor, steps: int, concepts: int, learning_rate: float
) -> CLIPModel:
    model = build_model(processor.tokenizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    normalise = pixel_normaliser(processor)
    progress = tqdm(range(steps), desc="pretraining", mininterval=5)
    for step in progress:
        drawn = random.sample(range(len(corpus)), concepts + 128)
        batch, negatives = drawn[:concepts], drawn[concepts:]
        pixels = normalise(augment(corpus.pixels[batch].flatten(0, 1).float() / 255))
        texts = [corpus.bare_caption(concept) for concept in drawn]
        texts += [corpus.styled_caption(concept, style) for concept in batch for style in range(len(STYLES))]
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with fast_precision():
            output = model(pixel_values=pixels, **tokens)
            scale = model.logit_scale.exp().clamp(max=100).sqrt()
            images, captions = output.image_embeds * scale, output.text_embeds * scale
            loss = contrastive_loss(images, *captions.split([len(batch), len(negatives), len(pixels)]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        if step % 50 == 49:
            progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
    return average.module


def pixel_normaliser(processor: CLIPProcessor):
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    return lambda pixels: (pixels - mean) / std


@torch.no_grad()
def evaluate(model: CLIPModel, processor: CLIPProcessor, corpus: EmojiCorpus) -> dict[str, np.ndarray]:
    """Measure what the model sees, with one figure for each style in every value.

    `bare`: the share of bare captions that prefer this style's drawing to another style's (0.5: neutral). `named`: the
    same when the caption names the style. `recall@5`: the share of bare captions that find their drawing among the
    drawings of all the corpus's concepts in this style.
    """
    model.eval()
    normalise = pixel_normaliser(processor)
    images = [
        F.normalize(model.get_image_features(pixel_values=normalise(chunk.float() / 255)).pooler_output, dim=-1)
        for chunk in corpus.pixels.flatten(0, 1).split(512)
    ]
    images = torch.cat(images).view(len(corpus), len(STYLES), -1)

    def encode(texts: list[str]) -> torch.Tensor:
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)

    bare = encode(corpus.captions)
    figures: dict[str, list[float]] = {"bare": [], "named": [], "recall@5": []}
    for index, style in enumerate(STYLES):
        rest = [other for other in range(len(STYLES)) if other != index]
        template = STYLE_TEMPLATES[0]
        named = encode([template.format(caption=text, style=STYLE_NAMES[style]) for text in corpus.captions])
        for key, texts in (("bare", bare), ("named", named)):
            scores = torch.einsum("cd,csd->cs", texts, images)  # (C, S)
            figures[key].append((scores[:, [index]] > scores[:, rest]).float().mean().item())
        found = (bare @ images[:, index].T).topk(5).indices  # (C, 5)
        figures["recall@5"].append((found == torch.arange(len(corpus))[:, None]).any(1).float().mean().item())
    return {key: np.array(values) for key, values in figures.items()}


def report(model: CLIPModel, processor: CLIPProcessor) -> None:
    for split in ("train", "held_out"):
        corpus = EmojiCorpus(split)
        print(f"{split}: {len(corpus)} concepts  " + "  ".join(f"{style:>9}" for style in STYLES) + "       mean")
        for key, values in evaluate(model, processor, corpus).items():
            print(f"  {key:24}" + "  ".join(f"{value:9.3f}" for value in [*values, values.mean()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=CLIP_FOLDER)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--concepts_per_batch", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate_only", action="store_true", help="print the figures of the model in --output_dir")
    args = parser.parse_args()
    if not args.evaluate_only:
        set_seed(args.seed)
        corpus = EmojiCorpus("train")
        texts = [*corpus.captions, *(" ".join(tags) for tags in corpus.tags), *list(STYLE_NAMES.values()) * 50]
        tokenizer = train_tokenizer(texts)
        image_processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
        processor = CLIPProcessor(image_processor, tokenizer)
        model = pretrain(corpus, processor, args.steps, args.concepts_per_batch, args.learning_rate)
        model.half().save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    processor = CLIPProcessor.from_pretrained(args.output_dir)
    report(CLIPModel.from_pretrained(args.output_dir, dtype=torch.float32), processor)


if __name__ == "__main__":
    main()
