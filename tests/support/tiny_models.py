"""Tiny random dual encoders of every supported family, their processors, and pairs of coloured images.

Real classes of transformers at the smallest configurations that still have several layers; vocabularies are written
here, so nothing is downloaded.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch import nn
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    GemmaTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    MobileNetV2Config,
    Qwen2Tokenizer,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    T5Tokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    XLMRobertaTokenizer,
)
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.processing_utils import ProcessorMixin

WORDS = [
    "a", "the", "of", "and", "photo", "drawing", "red", "green", "blue", "small", "large", "old", "new",
    "apple", "house", "tree", "boat", "bird", "lamp", "chair",
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT = 16
SIZE = 16
WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}


# --- Tokenizers: whole words where the vocabulary has them, letters otherwise ---


def bpe(ends: str = "", starts: str = "") -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges that join the letters of each word from left to right."""
    pieces = dict.fromkeys([*LETTERS, *(letter + ends for letter in LETTERS if ends), *starts])
    merges = {}
    for word in WORDS:
        letters = [*starts, *word[:-1], word[-1] + ends]
        joined = letters[0]
        for letter in letters[1:]:
            merges[joined, letter] = None
            joined += letter
            pieces[joined] = None
    return list(pieces), list(merges)


def number(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def clip_tokenizer() -> CLIPTokenizer:
    pieces, merges = bpe(ends="</w>")
    vocab = number([*pieces, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def xlm_roberta_tokenizer() -> XLMRobertaTokenizer:
    words = [("▁" + word, -1.0) for word in WORDS]
    letters = [(piece, -9.0) for letter in LETTERS for piece in (letter, "▁" + letter) if piece != "▁a"]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    return XLMRobertaTokenizer(vocab=[*special, *words, *letters, ("▁", -9.0)], model_max_length=CONTEXT)


def bert_tokenizer() -> BertTokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = number([*special, *WORDS, *LETTERS, *("##" + letter for letter in LETTERS)])
    return BertTokenizer(vocab=vocab, model_max_length=CONTEXT)


def siglip_tokenizer(**kwargs) -> Siglip2Tokenizer:
    """As published: padded on the right, no mask, no limit of its own."""
    pieces, merges = bpe(ends="", starts="▁")
    first_word, _ = bpe()  # the first word has no space in front of it
    vocab = number(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *pieces, *first_word])
    kwargs = {"padding_side": "right", "model_input_names": ["input_ids"]} | kwargs
    return Siglip2Tokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT, **kwargs)


def t5_tokenizer() -> T5Tokenizer:
    """As published, except that it has no sentinels: nothing of a prompt is masked."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    words = [("▁" + word, -1.0) for word in WORDS]
    letters = [(piece, -9.0) for letter in LETTERS for piece in (letter, "▁" + letter) if piece != "▁a"]
    return T5Tokenizer(vocab=[*special, *words, *letters, ("▁", -9.0)], extra_ids=0, model_max_length=CONTEXT)


def gemma_tokenizer() -> GemmaTokenizer:
    pieces, merges = bpe(starts="▁")
    first_word, _ = bpe()  # the first word has no space in front of it
    vocab = number(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *pieces, *first_word])
    return GemmaTokenizer(vocab=vocab, merges=merges)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """As published: a chat template with an empty thought, and bytes written as letters, a space as "Ġ"."""
    pieces, merges = bpe(starts="Ġ")
    first_word, first_merges = bpe()  # the first word has no space in front of it
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    return Qwen2Tokenizer(
        vocab=number([*pieces, *first_word, "Ċ", *special]),
        merges=[*merges, *first_merges],
        extra_special_tokens=special[1:],
        chat_template=template,
    )


# --- Families ---


def clip_images() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def clip_like(model: type, config: type, tokenizer, text: dict | None = None, **kwargs) -> nn.Module:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    positions = {"max_position_embeddings": CONTEXT, "vocab_size": len(tokenizer), "projection_dim": 12}
    text = {**WIDTH, **positions, "pad_token_id": tokenizer.pad_token_id, **special, **(text or {})}
    vision = {**WIDTH, "image_size": SIZE, "patch_size": 8, "projection_dim": 12}
    return model(config(text_config=text, vision_config=vision, projection_dim=12, **kwargs))


def make_clip() -> tuple[nn.Module, ProcessorMixin]:
    tokenizer = clip_tokenizer()
    return clip_like(CLIPModel, CLIPConfig, tokenizer), CLIPProcessor(clip_images(), tokenizer)


def make_metaclip_2() -> tuple[nn.Module, ProcessorMixin]:
    tokenizer = xlm_roberta_tokenizer()
    return clip_like(MetaClip2Model, MetaClip2Config, tokenizer), CLIPProcessor(clip_images(), tokenizer)


def make_altclip() -> tuple[nn.Module, ProcessorMixin]:
    tokenizer = xlm_roberta_tokenizer()
    # Dropout off: the cache computes frozen layers once, without it.
    text = {"project_dim": 12, "max_position_embeddings": CONTEXT + 2, "hidden_dropout_prob": 0.0}
    return clip_like(AltCLIPModel, AltCLIPConfig, tokenizer, text), AltCLIPProcessor(clip_images(), tokenizer)


def make_chinese_clip() -> tuple[nn.Module, ProcessorMixin]:
    tokenizer = bert_tokenizer()
    text = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = clip_like(ChineseCLIPModel, ChineseCLIPConfig, tokenizer, text)
    images = ChineseCLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False)
    return model, ChineseCLIPProcessor(images, tokenizer)


def siglip_text(tokenizer) -> dict:
    return {
        **WIDTH,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


def make_siglip() -> tuple[nn.Module, ProcessorMixin]:
    tokenizer = siglip_tokenizer()
    vision = {**WIDTH, "image_size": SIZE, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=siglip_text(tokenizer), vision_config=vision))
    return model, SiglipProcessor(SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizer)


def make_siglip2(**kwargs) -> tuple[nn.Module, ProcessorMixin]:
    """NaFlex: images of any shape as a row of patches, with a mask."""
    tokenizer = siglip_tokenizer(**kwargs)
    vision = {**WIDTH, "patch_size": 8, "num_patches": 4}
    model = Siglip2Model(Siglip2Config(text_config=siglip_text(tokenizer), vision_config=vision))
    return model, Siglip2Processor(Siglip2ImageProcessorPil(patch_size=8, max_num_patches=6), tokenizer)


def make_dual_encoder() -> tuple[nn.Module, ProcessorMixin]:
    """A convolutional tower with batch norms, joined to a text tower."""
    tokenizer = clip_tokenizer()
    vision = MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32, hidden_size=1280, tf_padding=False)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = CLIPTextConfig(**WIDTH, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **ids)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=12)
    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    return VisionTextDualEncoderModel(config), VisionTextDualEncoderProcessor(images, tokenizer)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, ProcessorMixin]]] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "siglip2": make_siglip2,
    "metaclip_2": make_metaclip_2,
    "altclip": make_altclip,
    "chinese_clip": make_chinese_clip,
}
# Towers of other kinds, for what does not look inside them.
ALL_FAMILIES = FAMILIES | {"dual_encoder": make_dual_encoder}
# Defaults of the classes: pad on the left, and give a mask.
SIGLIP2_MASKED = partial(make_siglip2, padding_side="left", model_input_names=["input_ids", "attention_mask"])


def build(family: str | Callable = "clip", seed: int = 0) -> tuple[nn.Module, ProcessorMixin]:
    """A random model, the same for the same seed, and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = (ALL_FAMILIES[family] if isinstance(family, str) else family)()
        # The usual initialisation is made for wide layers: at width 16 all inputs would look alike.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0  # as from_pretrained makes it
        # SigLIP begins at 1; trained models end at 10 to 100.
        model.logit_scale.data.fill_(float(np.log(14.3)))
    return model.eval(), processor


def save(folder: Path, family: str = "clip", seed: int = 0) -> str:
    """A model folder as the Hub has it."""
    model, processor = build(family, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


# --- Data ---


def picture(colour, seed: int = 0, size: tuple[int, int] = (20, 20)) -> PILImage.Image:
    """A colour with a little noise, so that every picture differs."""
    noise = np.random.default_rng(seed).integers(-20, 21, (size[1], size[0], 3))
    return PILImage.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def prompts(count: int) -> list[str]:
    """Prompts of different lengths, each different from the others."""
    nouns = WORDS[13:]
    stems = ["{}", "a {}", "the old {}", "a photo of a small {}", "a drawing of the {} and {}"]
    return [stems[i % 5].format(nouns[i % 7], nouns[i // 7 % 7]) + " and a" * (i // 35) for i in range(count)]


def red_pairs(count: int = 12, seed: int = 0, **columns: list[float]) -> Dataset:
    """Pairs of the row contract in which the redder picture is preferred.

    Args:
        count: Rows, each with a prompt of its own.
        seed: Decides the pictures.
        columns: Further columns, such as `preference` and `weight`.
    """
    generator = np.random.default_rng(seed)
    rows: dict[str, list] = {"prompt": prompts(count), "chosen": [], "rejected": []}
    for index in range(count):
        other = generator.integers(40, 216, 2)
        red, pale = generator.integers(170, 236), generator.integers(20, 90)
        rows["chosen"].append(picture((red, *other), 1000 * seed + 2 * index))
        rows["rejected"].append(picture((pale, *other), 1000 * seed + 2 * index + 1))
    features = {"prompt": Value("string"), "chosen": Image(), "rejected": Image()}
    features |= {name: Value("float32") for name in columns}
    return Dataset.from_dict({**rows, **columns}, features=Features(features))
