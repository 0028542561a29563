"""Words of a taste: what it leans to and away from.

A word says something about an image by how well it fits it. A taste leans to a word if images that fit the word better
are liked better: the covariance, over images, of the fit with the taste. Only words count whose lean stays on its side
when the clicks are drawn again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bt_hf.reward.taste import EmbeddedPairs

# Words for the look of images, which vocabularies of topics lack.
LOOK_WORDS = (
    "flat", "shaded", "3d", "glossy", "matte", "shiny", "soft", "sharp", "rounded", "outline", "filled", "solid",
    "line art", "thin lines", "bold lines", "sketch", "hand drawn", "pencil drawing", "watercolour", "oil painting",
    "ink drawing", "cartoon", "comic", "anime", "pixel art", "low poly", "vector", "silhouette", "icon", "logo",
    "emoji", "photo", "photorealistic", "realistic", "rendered", "clay", "plastic", "paper", "wooden", "metallic",
    "glass", "neon", "black and white", "monochrome", "grey", "sepia", "colourful", "pastel", "vivid", "muted",
    "saturated", "pale", "dark", "bright", "warm colours", "cold colours", "high contrast", "low contrast", "gradient",
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "golden", "silver",
    "minimal", "simple", "detailed", "ornate", "geometric", "abstract", "organic", "symmetric", "cluttered", "empty",
    "close-up", "wide shot", "from above", "centred", "blurred", "grainy", "noisy", "textured", "smooth", "glowing",
    "foggy", "dreamy", "gloomy", "cheerful", "playful", "serious", "elegant", "cute", "scary", "vintage", "retro",
    "modern", "futuristic", "rustic", "cinematic", "two tone", "duotone", "serif", "sans serif", "handwriting",
)  # fmt: skip
STABLE = 0.95
RESAMPLES = 200


@dataclass(frozen=True)
class Lean:
    """Lean of a taste to a word.

    Attributes:
        word: The word.
        lean: Correlation, in [-1, 1], of how well the word fits an image with how much the image is liked.
        stability: Share of resampled clicks in which the lean has the same sign; `None` without clicks to resample.
    """

    word: str
    lean: float
    stability: float | None = None


def known_looks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the words of `LOOK_WORDS` that are pieces of the vocabulary: a model has met these, if any."""
    known = [look for look in LOOK_WORDS if len(tokenizer.tokenize(look)) == len(look.split())]
    return known or list(LOOK_WORDS)


def split_shift(text: torch.Tensor, base: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Split adapted text embeddings into a share of those of the base, and what the adapter added.

    Args:
        text: (K, D) adapted embeddings of many texts.
        base: (K, D) those of the base.

    Returns:
        The share, by least squares over the differences between texts, and text - share * base, (K, D).
    """
    one, other = text - text.mean(0), base - base.mean(0)
    share = float((one * other).sum() / other.square().sum().clamp(min=1e-12))
    return share, text - share * base


def leans(taste: torch.Tensor, images: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return the lean to each word, (K,).

    Args:
        taste: (N,) or (R, N) how much each image is liked, for one taste or for several.
        images: (N, D) base embeddings.
        words: (K, D) base embeddings.

    Returns:
        (K,) or (R, K) correlations over the images.
    """
    words = words - words.mean(0)
    fit = _standardised(images @ words.T, 0)  # (N, K)
    return _standardised(taste, -1) @ fit / len(images)


def _standardised(values: torch.Tensor, dim: int) -> torch.Tensor:
    centred = values - values.mean(dim, keepdim=True)
    return centred / centred.square().mean(dim, keepdim=True).sqrt().clamp(min=1e-9)


@torch.no_grad()
def explain_shift(
    shift: torch.Tensor, words: torch.Tensor, names: Sequence[str], covariance: torch.Tensor, top_k: int = 10
) -> list[Lean]:
    """Return the words that a shift of text embeddings leans to and away from most.

    Args:
        shift: (D,) what an adapter adds to texts.
        words: (K, D) base embeddings of `names`.
        names: The words.
        covariance: (D, D) of image embeddings, as far as it is known.
        top_k: Words on each side, at most.
    """
    words, shift = (words - words.mean(0)).double(), shift.double()
    liked = covariance @ shift
    size = ((words @ covariance) * words).sum(1).clamp(min=1e-12).sqrt() * (shift @ liked).clamp(min=1e-12).sqrt()
    return top_leans([Lean(*row) for row in zip(names, ((words @ liked) / size).tolist(), strict=True)], top_k)


def embedded_pairs(pairs: Dataset, text: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> EmbeddedPairs:
    """Return pairs of the row contract with their embeddings."""
    labels = (
        torch.tensor(pairs[name][:] if name in pairs.column_names else [1.0] * len(pairs)).double()
        for name in ("preference", "weight")
    )
    return EmbeddedPairs(text.double(), chosen.double(), rejected.double(), *labels)


def explain_pairs(pairs: EmbeddedPairs, words: torch.Tensor, names: Sequence[str], top_k: int = 10) -> list[Lean]:
    """Return the words that the clicks lean to and away from most, if resampled clicks agree.

    Args:
        pairs: Pairs as the base embeds them. Their taste is taken to be the mean difference of chosen and rejected.
        words: (K, D) base embeddings of `names`.
        names: The words.
        top_k: Words on each side, at most.

    Returns:
        Leans from the strongest liking to the strongest dislike; fewer where fewer are stable.

    Source:
        Bootstrap: Efron, Annals of Statistics 7, 1979.
    """
    images, count = torch.cat([pairs.chosen, pairs.rejected]), len(pairs.weight)
    clicks = (pairs.weight * (2 * pairs.preference - 1))[:, None] * (pairs.chosen - pairs.rejected)  # (N, D)
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    draws = torch.stack([torch.ones(count), *(torch.bincount(rows, minlength=count) for rows in drawn)]).double()
    found = leans(draws @ clicks @ images.T, images, words.double())  # (1 + resamples, K)
    lean, resampled = found[0], found[1:]
    stability = (resampled.sign() == lean.sign()).double().mean(0)
    return top_leans([Lean(*row) for row in zip(names, lean.tolist(), stability.tolist(), strict=True)], top_k)


def in_a_sentence(leans: Sequence[Lean]) -> str:
    """Return the leans as a sentence.

    Example:
        >>> in_a_sentence([Lean("shaded", 0.9), Lean("red", 0.2), Lean("flat", -0.8)])
        'It leans to shaded, red, and away from flat.'
    """
    liked = ", ".join(lean.word for lean in leans if lean.lean > 0)
    disliked = ", ".join(lean.word for lean in reversed(leans) if lean.lean < 0)
    if not liked and not disliked:
        return "The clicks lean to none of the words that were tried."
    parts = [f"to {liked}"] * bool(liked) + [f"away from {disliked}"] * bool(disliked)
    return f"It leans {', and '.join(parts)}."


def top_leans(leans: Sequence[Lean], top_k: int) -> list[Lean]:
    """Return the `top_k` strongest stable leans on each side, from liking to dislike."""
    kept = [lean for lean in leans if lean.lean and (lean.stability is None or lean.stability >= STABLE)]
    kept = sorted(kept, key=lambda lean: -lean.lean)
    liked = [lean for lean in kept if lean.lean > 0][:top_k]
    disliked = [lean for lean in kept if lean.lean < 0][-top_k:]
    return liked + disliked
