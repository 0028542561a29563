"""Choose the pairs of images that teach most about a person's taste.

A Bayesian logistic model of the clicks so far, linear in differences of image embeddings, tells for any pair p, the
probability that the left image is preferred, and v, the posterior variance of its margin. A click on it adds p (1 - p)
to the precision along its difference. So it teaches most, for its own sake, where p (1 - p) v is largest, the greedy
step of a D-optimal design; but such pairs are often outliers, from which little follows for others. So the pair is
chosen whose click lowers the variance of all other pairs' margins most (V-optimal design).

Chosen pairs are hard by choice, so how often they are predicted rightly says little about other pairs. A part of all
pairs is drawn at random instead, and marked: accuracy is judged by these (`running.py`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bt_hf.reward.inputs import check_count, list_texts
from bt_hf.reward.laplace import newton

# Standard deviation of a typical margin under the prior. A tight prior keeps the choice from believing few clicks, of
# which some are wrong: with a looser one, pairs are asked that only a wrong belief makes interesting.
STRENGTH = 1.0
# The model reads this many of the latest pairs.
READ_PAIRS = 256
# Images nearer to each other than this part of the typical squared distance are taken for the same.
NEAR, TYPICAL_PAIRS = 0.02, 500
# A random pair is the first of this many that differ.
RANDOM_CANDIDATES = 100
# The variance of this many of the candidates is to be lowered.
REFERENCE_PAIRS = 300
# Factors of the score for each time that one of the images, or the prompt, was shown before.
SHOWN_IMAGE, SHOWN_PROMPT = 0.7, 0.7
# Pools of up to this many pairs are listed; of larger ones, candidates are drawn.
LISTED_PAIRS = 20_000


class AskedPair(NamedTuple):
    """Pair of images to ask about.

    Attributes:
        left, right: Numbers of the images, on the sides where they are to be shown.
        random: True if it was drawn at random, so that predictions of such pairs are a fair sample.
    """

    left: int
    right: int
    random: bool


def select_pairs(
    embeddings: Any,
    prompts: Sequence[str],
    answered: Sequence[tuple[int, int, float | None]] = (),
    count: int = 1,
    *,
    weight: Sequence[float] | None = None,
    seed: int = 0,
    random_share: float = 0.25,
    candidates: int = 1000,
) -> list[AskedPair]:
    """Choose the next pairs to ask a person about: those that teach most, and a part at random.

    Only images of one prompt are compared. A pair is never asked twice, images that hardly differ are not asked about,
    and images and prompts that were shown already count less. The choice depends on the arguments alone.

    Args:
        embeddings: (M, D) array or tensor of image embeddings, normalised; `PreferenceScorer.embed_images` makes them.
        prompts: Prompt of each image; the same one for all compares any two.
        answered: Pairs that were asked so far, in their order: the left and the right image and the preference, 1 for
            the left image, 0 for the right one, 0.5 for a tie, `None` for a pair that was skipped or waits for its
            answer.
        count: How many pairs. The second one is chosen as if the first had been answered as expected, and so on.
        weight: How much each answer counts, N numbers of at least 0. Default 1.
        seed: Another seed draws other candidates.
        random_share: Share of the pairs that are drawn at random, in [0, 1]. At 0.25 it is each fourth one.
        candidates: Pairs among which the best is looked for.

    Returns:
        The pairs; fewer than `count` where no others are left. Sides are shuffled.

    Raises:
        TypeError: `prompts` is not a list of texts.
        ValueError: Shapes don't agree, numbers are not finite or out of range, an answered pair is not one of two
            images of one prompt, or no two images share a prompt.

    Source:
        Variance reduction for logistic regression: Schein and Ungar 2007, https://doi.org/10.1007/s10994-007-5019-5,
        after Cohn, Ghahramani and Jordan, https://arxiv.org/abs/cs/9603104. D-optimal designs for preferences:
        https://arxiv.org/abs/2502.04354; that random pairs are hard to beat: https://arxiv.org/abs/2604.02766.

    Example:
        >>> import numpy as np
        >>> from bt_hf import select_pairs
        >>> embeddings = np.random.default_rng(0).normal(size=(6, 4))
        >>> pairs = select_pairs(embeddings, ["a cat"] * 4 + ["a dog"] * 2, answered=[(0, 1, 1.0)], count=4)
        >>> sum(pair.random for pair in pairs), {pair.left // 4 == pair.right // 4 for pair in pairs}
        (1, {True})
    """
    embeddings = _check_embeddings(embeddings)
    prompts = list_texts(prompts, "prompts")
    if len(prompts) != len(embeddings):
        raise ValueError(
            f"`prompts` should have one prompt for each of the {len(embeddings)} images, but has {len(prompts)}."
        )
    check_count(count, "count", 1)
    check_count(candidates, "candidates", 1)
    check_count(seed, "seed", 0)
    if not 0 <= random_share <= 1:
        raise ValueError(f"`random_share` should be between 0 and 1, but got {random_share}.")
    pool = _Pool(embeddings, prompts)
    answers = _Answers.check(answered, weight, pool)
    rng = np.random.default_rng((seed, len(answered)))
    phase = np.random.default_rng(seed).random()
    pool.show(answers.pairs)
    model: _Model | None = None
    found: list[AskedPair] = []
    for turn in range(len(answered), len(answered) + count):
        random = math.floor((turn + 1) * random_share + phase) > math.floor(turn * random_share + phase)
        drawn, difference = pool.draw(RANDOM_CANDIDATES if random else candidates, rng)
        if not len(drawn):
            break
        best = 0
        if not random:
            if model is None:
                model = _Model(embeddings, answers, difference)
                model.expect(_differences(embeddings, np.array([pair[:2] for pair in found], dtype=int)))
            best = int((model.scores(difference) * pool.spread(drawn)).argmax())
        pick = drawn[best : best + 1]
        pool.show(pick)
        if model is not None:
            model.expect(difference[best : best + 1])
        left, right = rng.permutation(pick[0]).tolist()
        found.append(AskedPair(left, right, random))
    return found


def _check_embeddings(embeddings: Any) -> torch.Tensor:
    found = torch.as_tensor(embeddings).detach().cpu()
    if found.ndim != 2 or not found.dtype.is_floating_point:
        raise ValueError(
            f"`embeddings` should be floats of shape (images, D), but got {found.dtype} of shape {tuple(found.shape)}."
        )
    found = found if found.dtype == torch.double else found.float()
    if not torch.isfinite(found.sum()):  # quicker than a look at each
        for image in (~torch.isfinite(found).all(1)).nonzero()[:1, 0].tolist():
            raise ValueError(f"`embeddings` should be finite, but image {image} has one that is not.")
    return found


class _Pool:
    """Images by prompt, the pairs asked so far, and how often each image and each prompt was shown."""

    def __init__(self, embeddings: torch.Tensor, prompts: Sequence[str]) -> None:
        self.embeddings = embeddings
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        self.prompt = np.fromiter(map(numbers.__getitem__, prompts), dtype=int, count=len(prompts))
        self.size = np.bincount(self.prompt)
        self.several = np.flatnonzero(self.size > 1)
        if not len(self.several):
            raise ValueError(
                f"Pairs are of images of one prompt, but no two of the {len(prompts)} images share theirs: add "
                "images, or pass one prompt for all to compare any two."
            )
        self.order = np.argsort(self.prompt, kind="stable")  # images, those of a prompt together
        self.start = np.cumsum(self.size) - self.size
        self.image_shown = np.zeros(len(prompts), dtype=int)
        self.prompt_shown = np.zeros(len(self.size), dtype=int)
        self.asked = np.zeros(0, dtype=int)
        total = int((self.size * (self.size - 1) // 2).sum())
        self.listed = self._list() if total <= LISTED_PAIRS else None
        some = self._candidates(TYPICAL_PAIRS, np.random.default_rng(0))
        self.near = NEAR * float(_differences(embeddings, some).square().sum(1).median())

    def _list(self) -> np.ndarray:
        """Return all pairs of images of one prompt, (P, 2)."""
        found = []
        for size in np.unique(self.size[self.several]):
            first = self.start[self.several[self.size[self.several] == size]]
            places = np.stack([first[:, None] + place for place in np.triu_indices(size, 1)], axis=-1)
            found.append(self.order[places.reshape(-1, 2)])
        return np.concatenate(found)

    def show(self, pairs: np.ndarray) -> None:
        """Count pairs (P, 2) as asked."""
        np.add.at(self.image_shown, pairs, 1)
        np.add.at(self.prompt_shown, self.prompt[pairs[:, 0]], 1)
        self.asked = np.concatenate([self.asked, self._code(pairs)])

    def _code(self, pairs: np.ndarray) -> np.ndarray:
        return pairs.min(axis=1) * len(self.prompt) + pairs.max(axis=1)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, torch.Tensor]:
        """Draw up to `count` pairs (P, 2) that differ and were not asked, and the differences (P, D)."""
        for drawn in (count, LISTED_PAIRS):  # where the first ones hardly differ, look further
            pairs = self._candidates(drawn, rng)
            difference = _differences(self.embeddings, pairs)
            differ = difference.square().sum(1) > self.near
            if differ.any():
                break
        return pairs[differ.numpy()], difference[differ]

    def _candidates(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw up to `count` pairs (P, 2) that were not asked: each prompt alike, and each pair of a prompt alike."""
        if self.listed is not None:
            pairs = self.listed[~np.isin(self._code(self.listed), self.asked)]
            size = self.size[self.prompt[pairs[:, 0]]]
            # The first of random times of rates 1 / (pairs of its prompt) is a weighted draw, and so is the next.
            time = rng.exponential(size=len(pairs)) * size * (size - 1)
            return pairs[np.argsort(time, kind="stable")[:count]]
        prompt = rng.choice(self.several, size=count)
        left = rng.integers(self.size[prompt])
        right = (left + rng.integers(1, self.size[prompt])) % self.size[prompt]
        pairs = self.order[self.start[prompt][:, None] + np.stack([left, right], axis=1)]
        return pairs[~np.isin(self._code(pairs), self.asked)]

    def spread(self, pairs: np.ndarray) -> np.ndarray:
        """Return a factor (P,) in (0, 1], smaller for what was shown often."""
        images = self.image_shown[pairs].sum(axis=1)
        return SHOWN_IMAGE**images * SHOWN_PROMPT ** self.prompt_shown[self.prompt[pairs[:, 0]]]


class _Answers(NamedTuple):
    """Checked answers: pairs (N, 2), preference (N,), nan without an answer, and weight (N,)."""

    pairs: np.ndarray
    preference: np.ndarray
    weight: np.ndarray

    @classmethod
    def check(
        cls, answered: Sequence[tuple[int, int, float | None]], weight: Sequence[float] | None, pool: _Pool
    ) -> "_Answers":
        pairs = np.zeros((len(answered), 2), dtype=int)
        preference = np.full(len(answered), np.nan)
        images = len(pool.prompt)
        for number, (left, right, answer) in enumerate(answered):
            if not (0 <= left < images and 0 <= right < images) or pool.prompt[left] != pool.prompt[right]:
                raise ValueError(
                    f"`answered` should hold pairs of images of one prompt, by numbers below {images}, but pair "
                    f"{number} is of {left} and {right}."
                )
            if left == right:
                raise ValueError(f"`answered` should hold pairs of two images, but pair {number} is of {left} alone.")
            pairs[number] = left, right
            if answer is not None and not 0 <= answer <= 1:
                raise ValueError(
                    f"A preference should be between 0 and 1, or None without an answer, but that of pair {number} is "
                    f"{answer}."
                )
            preference[number] = np.nan if answer is None else answer
        weights = np.ones(len(answered)) if weight is None else np.asarray(weight, dtype=float)
        if weights.shape != preference.shape or not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(
                f"`weight` should be {len(answered)} finite numbers of at least 0, one for each answered pair."
            )
        return cls(pairs, preference, weights)


class _Model:
    """Posterior of a logistic model that is linear in differences of embeddings, in its dual.

    Args:
        embeddings: (M, D).
        answers: What was answered. Pairs without an answer count as design points, at the answer that is expected.
        candidates: (P, D) differences, which tell a typical one where there is no answer.
    """

    def __init__(self, embeddings: torch.Tensor, answers: _Answers, candidates: torch.Tensor) -> None:
        pairs, preference, weight = (values[-READ_PAIRS:] for values in answers)
        known = ~np.isnan(preference) & (weight > 0)
        rows = _differences(embeddings, pairs[known])
        typical = rows if len(rows) else candidates
        unit = typical.square().sum(1).mean().clamp(min=1e-12).sqrt()
        self.scale = float(STRENGTH / unit)  # rows in units of the prior: margins are w·row with w ~ N(0, 1)
        self.rows = self.scale * rows
        counts = torch.as_tensor(weight[known])
        dual, margin = newton((self.rows @ self.rows.T)[None], torch.as_tensor(preference[known]), counts)
        self.dual, self.curvature = dual[0], counts * _curvature(margin[0])
        self.expect(_differences(embeddings, pairs[np.isnan(preference)]))

    def predict(self, difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Describe the posterior of the margins of P differences (P, D), of which the first R are the reference.

        Returns:
            Mean (P,), variance (P,), and covariance (P, R) with those of the reference, `REFERENCE_PAIRS` or fewer.
        """
        rows = self.scale * difference
        # L^-1 X rows^T with L L^T = X X^T + W^-1: the squares of a column are the variance that the clicks took.
        root = torch.linalg.cholesky(self.rows @ self.rows.T + torch.diag(1 / self.curvature))
        known = torch.linalg.solve_triangular(root, self.rows @ rows.T, upper=False)  # (N, P)
        variance = rows.square().sum(1) - known.square().sum(0)
        short, short_known = rows.float(), known.float()  # most of the time goes into these two products
        covariance = short @ short[:REFERENCE_PAIRS].T - short_known.T @ short_known[:, :REFERENCE_PAIRS]
        return rows @ (self.rows.T @ self.dual), variance, covariance

    def scores(self, difference: torch.Tensor) -> np.ndarray:
        """Return how much a click on each candidate is expected to teach about the others, (P,).

        With c = p (1 - p), a click on pair i takes c_i cov(i, j)^2 / (1 + c_i v_i) off the variance of the margin of
        pair j. Of that it is the sum over the reference, weighted by c_j: the change of a probability with its margin,
        which is largest where the answer is open.
        """
        margin, variance, covariance = self.predict(difference)
        curvature = _curvature(margin)
        gain = covariance.square() @ curvature[:REFERENCE_PAIRS].float()
        return (curvature * gain / (1 + curvature * variance)).numpy()

    def expect(self, difference: torch.Tensor) -> None:
        """Count pairs as answered as expected: margins stay, and what is like them gets surer."""
        rows = self.scale * difference
        self.curvature = torch.cat([self.curvature, _curvature(rows @ self.rows.T @ self.dual)])
        self.dual = torch.cat([self.dual, torch.zeros(len(rows), dtype=torch.double)])
        self.rows = torch.cat([self.rows, rows])


def _curvature(margin: torch.Tensor) -> torch.Tensor:
    win = torch.sigmoid(margin)
    return (win * (1 - win)).clamp(min=1e-10)


def _differences(embeddings: torch.Tensor, pairs: np.ndarray) -> torch.Tensor:
    """Return embeddings of left minus right images, (P, D) float64."""
    left, right = torch.as_tensor(pairs.reshape(-1, 2)).unbind(1)
    return (embeddings[left] - embeddings[right]).double()
