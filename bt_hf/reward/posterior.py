"""Taste from few pairs of frozen embeddings: a Bayesian fit that chooses direction and strength apart.

The margin of two images of one prompt is linear in what the towers say about them,

    margin = caption * base_margin + (direction + by_prompt @ text)·(chosen - rejected) + by_feature·(x_c - x_r),

with normalised embeddings `text`, `chosen`, `rejected` and the inputs x of the image projection, which know more than
its output. A Gaussian prior on all weights makes this a Gaussian process classifier: its fit is a small convex problem
in one unknown a pair, solved by Newton steps (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
section 3.4).

Few pairs say little about how free the weights may be. A tight prior gives the mean difference of the embeddings,
which bears wrong clicks best; a loose one learns attributes that overlap. So many settings are fitted, and averaged by
how well each predicts the pairs that it has not seen. These leave-one-out predictions need no further fits (Opper and
Winther, Neural Computation 12, 2000), and they weigh strengths, too: temperatures of each fit. An average of
probabilities is less sure than an average of margins, but a linear taste has the latter; so it is brought to the
temperature at which it says of the pairs left out what the average of probabilities says.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from bt_hf.reward.laplace import leave_out, newton

# Standard deviation of a typical margin under the prior. The first gives, in effect, the mean difference.
STRENGTHS = (0.03, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
# Share of the prior variance that depends on the prompt.
PROMPT_SHARES = (0.0, 0.5)
# Weight of the caption's own margin, with the logarithm of its prior odds. For two images of one prompt that margin is
# mostly noise about taste; a little costs next to nothing, and rewards still say which image a prompt means.
CAPTION_WEIGHTS = {0.03: 0.0, 0.1: -0.5, 0.3: -3.0, 1.0: -6.0}
# Share of the prior variance for the inputs of the image projection, where they are known.
FEATURE_SHARES = (0.0, 0.5)
# Rates of wrong clicks, with the logarithm of their prior odds.
WRONG_CLICKS = {0.0: 0.0, 0.02: 0.0, 0.05: -0.3, 0.1: -0.7, 0.2: -1.5, 0.3: -2.5}
# Typical size of a margin: candidates, and the log-normal prior's median and standard deviation.
TEMPERATURES = torch.exp(torch.linspace(math.log(0.05), math.log(60.0), 40, dtype=torch.double))
TYPICAL_MARGIN, TYPICAL_SPREAD = 1.5, 1.2
# Factors by which the average margin may be less or more sure than the average probability.
FACTORS = torch.exp(torch.linspace(math.log(0.05), math.log(2.0), 80, dtype=torch.double))
# Price of a setting, see `_penalty`: a looser prior costs more by the first for a wrong click and by the second for
# one that small margins leave to chance; maps by prompt and inputs of the projection cost these nats.
COST_OF_WRONG_CLICKS, COST_OF_CHANCE = 40.0, 6.0
NATS_OF_PROMPTS, NATS_OF_FEATURES = 1.7, 2.0
# Settings are compared on this many pairs, and those that matter fitted to up to so many.
COMPARED_PAIRS, FITTED_PAIRS = 256, 1024
NEGLIGIBLE = 0.02


@dataclass
class Taste:
    """Linear taste, in logits.

    Attributes:
        direction: (D,) what the person likes in normalised image embeddings, whatever the prompt.
        by_prompt: (D, T) how that changes with the normalised text embedding.
        by_feature: (H,) what they like in the inputs of the image projection divided by the length of its output;
            `None` if these were not given.
        caption: Weight of the base's own margin.
    """

    direction: torch.Tensor
    by_prompt: torch.Tensor
    by_feature: torch.Tensor | None
    caption: float

    def margins(
        self,
        text: torch.Tensor,
        difference: torch.Tensor,
        base_margin: torch.Tensor,
        feature_difference: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return margins (N,) of images that differ by `difference` (N, D), for `text` (N, T)."""
        margin = self.caption * base_margin + ((self.direction + text @ self.by_prompt.T) * difference).sum(1)
        if self.by_feature is not None and feature_difference is not None:
            margin = margin + feature_difference @ self.by_feature
        return margin


@dataclass
class _Setting:
    """Setting of the prior."""

    strength: float
    prompt_share: float
    feature_share: float


@dataclass
class _Part:
    """Part of a setting in the average: its share, its weighted and tempered dual weights (N,), the caption's part."""

    share: float
    scaled_dual: torch.Tensor
    caption: float


@dataclass
class _Pairs:
    """Pairs as the fit sees them; rows of weight 0 are left out."""

    text: torch.Tensor  # (N, T), centred and of unit root mean square
    difference: torch.Tensor  # (N, D)
    feature_difference: torch.Tensor | None  # (N, H)
    base_margin: torch.Tensor  # (N,)
    preference: torch.Tensor  # (N,)
    weight: torch.Tensor  # (N,)
    cluster: torch.Tensor  # (N,) number of the prompt

    def __getitem__(self, rows: torch.Tensor) -> "_Pairs":
        features = self.feature_difference
        others = {name: value[rows] for name, value in vars(self).items() if name != "feature_difference"}
        return _Pairs(**others, feature_difference=None if features is None else features[rows])

    def kernels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return kernels (N, N) of images, of images and prompts, and of features, for typical margins of 1."""
        images = self.difference @ self.difference.T
        images = images / _typical_square(self.difference, self.weight)
        features = torch.zeros_like(images)
        if self.feature_difference is not None:
            features = self.feature_difference @ self.feature_difference.T
            features = features / _typical_square(self.feature_difference, self.weight)
        return images, images * (self.text @ self.text.T), features


def fit_taste(
    text: torch.Tensor,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    preference: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    *,
    features: tuple[torch.Tensor, torch.Tensor] | None = None,
    prior_weight: float = 0.5,
    label_smoothing: float = 0.0,
) -> Taste:
    """Fit a linear taste to pairs; settings of the prior are averaged by their leave-one-out likelihood.

    Pairs of one prompt are left out together, so copies of a pair don't vouch for each other. Where all pairs have the
    same prompt, copies of a pair are, either way round.

    Args:
        text, chosen, rejected: (N, D) normalised base embeddings.
        preference: (N,) P(chosen preferred), in [0, 1].
        weight: (N,) weights of at least 0; 2 counts like two copies.
        scale: exp(logit_scale) of the base.
        features: Inputs of the image projection divided by the length of its output, (N, H) for the chosen and for
            the rejected images; `None` where they can't be used.
        prior_weight: Nats of likelihood that a prior looser by a factor of e has to gain to be believed as much.
            Larger keeps closer to the mean difference.
        label_smoothing: Known share of wrong clicks, in [0, 0.5].

    Returns:
        The taste, float64; zeros if no pair has a weight and a preference.

    Source:
        Laplace approximation of Gaussian process classification: Rasmussen and Williams 2006, section 3.4; predictions
        for pairs left out: Opper and Winther 2000. With one setting, it is logistic regression without intercept.

    Example:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from bt_hf.reward.posterior import fit_taste
        >>> text, chosen, rejected = (normalize(torch.randn(16, 8), dim=-1) for _ in range(3))
        >>> chosen[:, 0] += 1  # what they like
        >>> taste = fit_taste(text, normalize(chosen, dim=-1), rejected, torch.ones(16), torch.ones(16), scale=20.0)
        >>> int(taste.direction.abs().argmax())
        0
    """
    text, chosen, rejected, preference, weight = (
        value.detach().double() for value in (text, chosen, rejected, preference, weight)
    )
    preference = preference * (1 - label_smoothing) + (1 - preference) * label_smoothing
    mean = weight @ text / weight.sum().clamp(min=1e-12)
    spread = ((weight @ (text - mean).square().sum(1)) / weight.sum().clamp(min=1e-12)).sqrt()
    difference = chosen - rejected
    centred = (text - mean) / spread if spread > 1e-6 else torch.zeros_like(text)
    pairs = _Pairs(
        text=centred,
        difference=difference,
        feature_difference=None if features is None else features[0].double() - features[1].double(),
        base_margin=scale * (text * difference).sum(1),
        preference=preference,
        weight=weight,
        cluster=_clusters(text, difference),
    )
    pairs = pairs[(weight > 0) & (difference.abs().sum(1) > 0)]
    if not len(pairs.weight) or not (pairs.preference != 0.5).any():
        width = text.shape[1]
        return Taste(torch.zeros(width).double(), torch.zeros(width, width).double(), None, 1.0)
    settings = [_Setting(*values) for values in product(STRENGTHS, PROMPT_SHARES, FEATURE_SHARES)]
    if features is None:
        settings = [setting for setting in settings if setting.feature_share == 0]
    if not pairs.text.any():
        settings = [setting for setting in settings if setting.prompt_share == 0]
    kept = _choose(pairs, COMPARED_PAIRS)
    found = _average(kept, settings, prior_weight)
    if len(kept.weight) < len(pairs.weight):
        settings = [setting for setting, part in zip(settings, found, strict=True) if part.share > NEGLIGIBLE]
        kept = _choose(pairs, FITTED_PAIRS)
        found = _average(kept, settings, prior_weight)
    taste = _in_primal(kept, settings, found)
    # Undo the centring: (direction + by_prompt @ centred)·d = (direction' + by_prompt' @ text)·d.
    if spread > 1e-6:
        taste.by_prompt = taste.by_prompt / spread
        taste.direction = taste.direction - taste.by_prompt @ mean
    return taste


def _choose(pairs: _Pairs, count: int) -> _Pairs:
    """Return up to `count` pairs, the same ones in every run."""
    if len(pairs.weight) <= count:
        return pairs
    rows = torch.randperm(len(pairs.weight), generator=torch.Generator().manual_seed(0))[:count]
    return pairs[rows.sort().values]


def _average(pairs: _Pairs, settings: list[_Setting], prior_weight: float) -> list[_Part]:
    """Weigh settings and strengths by the likelihood of pairs left out, averaged over what else varies."""
    fits = [fit for batch in _batches(settings, len(pairs.weight)) for fit in _fit(pairs, batch)]
    rates, captions = (torch.tensor(list(values)).double() for values in (WRONG_CLICKS, CAPTION_WEIGHTS))
    odds = torch.tensor([[a + b for b in WRONG_CLICKS.values()] for a in CAPTION_WEIGHTS.values()]).double()
    prior = -0.5 * ((TEMPERATURES / TYPICAL_MARGIN).log() / TYPICAL_SPREAD).square()
    scores, scales, margins = [], [], []
    for setting, (_, margin, left_out) in zip(settings, fits, strict=True):
        typical = ((pairs.weight @ margin.abs()) / pairs.weight.sum()).clamp(min=1e-12)
        tempered = TEMPERATURES[:, None] * left_out / typical  # (temperatures, N)
        tempered = tempered + captions[:, None, None, None] * pairs.base_margin  # (captions, 1, temperatures, N)
        right = (1 - 2 * rates[:, None, None]) * torch.sigmoid(tempered) + rates[:, None, None]
        right = right.clamp(1e-12, 1 - 1e-12)  # (captions, rates, temperatures, N)
        likelihood = (pairs.preference * right.log() + (1 - pairs.preference) * (1 - right).log()) @ pairs.weight
        likelihood = likelihood + prior + odds[..., None] - _penalty(setting, rates, prior_weight)
        scores.append(likelihood)  # (captions, rates, temperatures)
        margins.append(left_out / typical)
        scales.append(1 / typical)
    shape = (len(settings), *scores[0].shape)
    share = torch.softmax(torch.stack(scores).flatten(), 0).view(shape)
    by_temperature = share.sum((1, 2))  # (settings, temperatures)
    strengths = by_temperature @ TEMPERATURES  # (settings,), times the share of each
    chances = [
        part @ torch.sigmoid(TEMPERATURES[:, None] * margin)
        for part, margin in zip(by_temperature, margins, strict=True)
    ]
    factor = _as_sure(strengths @ torch.stack(margins), torch.stack(chances).sum(0), pairs.weight)
    return [
        _Part(
            share=float(part.sum()),
            scaled_dual=factor * strength * scale * dual,
            caption=float(part.sum((1, 2)) @ captions),
        )
        for part, strength, scale, (dual, _, _) in zip(share, strengths, scales, fits, strict=True)
    ]


def _as_sure(margin: torch.Tensor, chance: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the factor of `margin` (N,) whose probabilities are nearest to `chance` (N,); 1 if nothing tells."""
    if margin.abs().max() < 1e-9:  # a click by itself
        return torch.ones_like(FACTORS[0])
    scaled = FACTORS[:, None] * margin  # (factors, N)
    divergence = -(F.logsigmoid(scaled) - (1 - chance) * scaled) @ weight
    return FACTORS[divergence.argmin()]


def _penalty(setting: _Setting, rates: torch.Tensor, prior_weight: float) -> torch.Tensor:
    """Return the nats that a setting costs at each rate of wrong clicks and temperature: (rates, temperatures).

    Loose fits learn by heart what is wrong or left to chance, so they cost more where clicks are believed to be so.
    """
    freedom = max(0.0, math.log(setting.strength / STRENGTHS[1]))
    noise = COST_OF_WRONG_CLICKS * rates[:, None] + COST_OF_CHANCE * torch.sigmoid(-TEMPERATURES)
    shares = NATS_OF_PROMPTS * (setting.prompt_share > 0) + NATS_OF_FEATURES * (setting.feature_share > 0)
    return prior_weight * (1 + noise) * freedom + shares


def _batches(settings: list[_Setting], pairs: int) -> Iterator[list[_Setting]]:
    """Yield settings that are fitted together, in at most some 200 MB."""
    size = max(1, min(len(settings), 5_000_000 // pairs**2))
    for start in range(0, len(settings), size):
        yield settings[start : start + size]


def _fit(pairs: _Pairs, settings: list[_Setting]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Fit each setting; return its dual weights, margins, and margins of pairs left out with their prompt: (N,)."""
    images, prompts, features = pairs.kernels()
    kernels = torch.stack(
        [
            s.strength**2
            * (
                (1 - s.feature_share) * ((1 - s.prompt_share) * images + s.prompt_share * prompts)
                + s.feature_share * features
            )
            for s in settings
        ]
    )
    dual, margin = newton(kernels, pairs.preference, pairs.weight)
    left_out = leave_out(kernels, dual, margin, pairs.weight, pairs.cluster)
    return list(zip(dual, margin, left_out, strict=True))


def _in_primal(pairs: _Pairs, settings: list[_Setting], parts: list[_Part]) -> Taste:
    """Return the sum of the parts as weights of embeddings, features and caption."""
    duals = torch.stack([s.strength**2 * part.scaled_dual for s, part in zip(settings, parts, strict=True)])  # (S, N)
    by_prompts, by_features = (
        torch.tensor([getattr(s, name) for s in settings]).double() for name in ("prompt_share", "feature_share")
    )
    of_images = (1 - by_features) / _typical_square(pairs.difference, pairs.weight)  # (S,)
    direction = (of_images * (1 - by_prompts)) @ duals @ pairs.difference
    by_prompt = (pairs.difference * ((of_images * by_prompts) @ duals)[:, None]).T @ pairs.text
    by_feature = None
    if (x := pairs.feature_difference) is not None:
        by_feature = by_features @ duals @ x / _typical_square(x, pairs.weight)
    return Taste(direction, by_prompt, by_feature, sum(part.caption for part in parts))


def _typical_square(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ((weight @ rows.square().sum(1)) / weight.sum()).clamp(min=1e-12)


def _clusters(text: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Return (N,) numbers that are equal where prompts are or, if all are, where pairs are: to rounding."""
    prompts = torch.unique((text * 1e5).round(), dim=0, return_inverse=True)[1]
    if prompts.any():
        return prompts
    largest = difference.gather(1, difference.abs().argmax(1, keepdim=True))
    return torch.unique((difference * largest.sign() * 1e5).round(), dim=0, return_inverse=True)[1]
