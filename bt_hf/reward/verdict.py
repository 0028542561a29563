"""Judge a cross-validation: what belongs together, which clicks contradict each other, and a plain linear probe."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.optimize import minimize
from scipy.special import expit

from bt_hf.data.images import digest_pixels
from bt_hf.data.rows import image_name, undecoded
from bt_hf.metrics import (
    McNemarResult,
    agreement,
    mcnemar_test,
    paired_difference_interval,
    preference_metrics,
    verdict_sentence,
)

# The last words of a verdict, by whether folds hold whole prompts.
_ABOUT = {
    True: "This is about new prompts.",
    False: "This is about more pairs like those clicked, not about other prompts.",
}


@dataclass
class CrossValidation:
    """Result of `cross_validate`. Every pair was predicted by a model that did not see it.

    Attributes:
        margins: (N,) margins of the adapted models, out of fold.
        base_margins: (N,) margins of the untouched base.
        probe_margins: (N,) margins of a linear probe on the base's image embeddings, out of fold.
        preference: (N,) the labels.
        folds: (N,) fold of each pair.
        prompts: (N,) number of each pair's prompt; prompts that the model can't tell apart are one.
        by_prompt: True if that model did not see the pair's prompt either, so that the verdict is about new prompts;
            False if it is about new pairs of the prompts that were clicked on.
        contradictions: (contradicting, repeated) numbers of distinct pairs that were clicked more than once.
        metrics: As `metrics.preference_metrics`; those of the base have the prefix `base_`, of the probe `probe_`.
        test: Exact McNemar test, adapted against base on the same pairs, in clusters of one prompt.
        difference: (low, high) of the 95 % interval of the difference in accuracy.
        verdict: One or two plain sentences.
    """

    margins: np.ndarray
    base_margins: np.ndarray
    probe_margins: np.ndarray
    preference: np.ndarray
    folds: np.ndarray
    prompts: np.ndarray
    by_prompt: bool
    contradictions: tuple[int, int]
    metrics: dict[str, float]
    test: McNemarResult
    difference: tuple[float, float]
    verdict: str

    def __str__(self) -> str:
        m = self.metrics
        lines = [
            f"{len(np.unique(self.folds))}-fold cross-validation of {len(self.margins)} pairs, folds split by "
            f"{'prompt' if self.by_prompt else 'pair'}",
            f"{'':12}{'accuracy':>9}  {'95 % interval':>14}  {'log-loss':>9}",
        ]
        for name, prefix in (("base", "base_"), ("probe", "probe_"), ("adapted", "")):
            low, high = m[f"{prefix}accuracy_low"], m[f"{prefix}accuracy_high"]
            lines.append(
                f"{name:12}{m[f'{prefix}accuracy']:9.3f}  {f'{low:.3f} to {high:.3f}':>14}  "
                f"{m[f'{prefix}log_loss']:9.3f}"
            )
        return "\n".join([*lines, self.verdict])


def judge(
    margins: np.ndarray,
    base_margins: np.ndarray,
    probe_margins: np.ndarray,
    preference: np.ndarray,
    weight: np.ndarray,
    folds: np.ndarray,
    prompts: np.ndarray,
    groups: np.ndarray,
    by_prompt: bool,
    contradictions: tuple[int, int],
) -> CrossValidation:
    """Compare the margins of three models on the same pairs, all arguments as in `CrossValidation`.

    Args:
        margins, base_margins, probe_margins, preference, folds, prompts: (N,).
        weight: (N,) how much each pair counts, in all figures alike.
        groups: (N,) number of what shares a fold, and counts as one observation: the prompt or the pair of images.
        by_prompt: Whether that is the prompt.
        contradictions: As `count_contradictions` returns them.
    """
    metrics: dict[str, float] = {}
    for prefix, values in (("", margins), ("base_", base_margins), ("probe_", probe_margins)):
        found = preference_metrics(values, preference, weight, groups)
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
    correct, base_correct = agreement(margins, preference), agreement(base_margins, preference)
    unit = "prompts" if by_prompt else "different pairs"
    verdict = verdict_sentence(correct, base_correct, weight=weight, cluster=groups, cluster_name=unit)
    verdict += f" {_ABOUT[by_prompt]}"
    contradicting, repeated = contradictions
    if contradicting:
        verdict += f" Your clicks contradict each other on {contradicting} of {repeated} repeated pairs."
    return CrossValidation(
        margins=margins,
        base_margins=base_margins,
        probe_margins=probe_margins,
        preference=preference,
        folds=folds,
        prompts=prompts,
        by_prompt=by_prompt,
        contradictions=contradictions,
        metrics=metrics,
        test=mcnemar_test(correct, base_correct, weight, groups),
        difference=paired_difference_interval(correct, base_correct, weight=weight, cluster=groups),
        verdict=verdict,
    )


def number_prompts(tokenizer: Any, prompts: Sequence[str], limit: int) -> np.ndarray:
    """Number the prompts, (N,) int: those that differ in case or spaces alone, or give the same tokens, are one.

    Args:
        tokenizer: Tokenizer of the model.
        prompts: N prompts.
        limit: Tokens that the model reads; what comes after makes no difference.
    """
    plain = [" ".join(prompt.split()).casefold() for prompt in prompts]
    distinct = list(dict.fromkeys(plain))
    tokens = tokenizer(distinct, truncation=True, max_length=limit)["input_ids"] if distinct else []
    key = {text: tuple(ids) for text, ids in zip(distinct, tokens, strict=True)}
    number: dict[tuple[int, ...], int] = {}
    return np.array([number.setdefault(key[text], len(number)) for text in plain], dtype=int)


def number_pairs(dataset: Dataset) -> np.ndarray:
    """Number the pairs of images, (N,) int: those of the same two images are one, either way round."""
    number: dict[tuple[str, str], int] = {}
    rows = enumerate(undecoded(dataset.with_format(None)))
    return np.array([number.setdefault(_name_pair(row, place)[0], len(number)) for place, row in rows], dtype=int)


def count_contradictions(dataset: Dataset, prompts: np.ndarray) -> tuple[int, int]:
    """Count distinct pairs of images that stand there more than once for a prompt, and those with both answers.

    Args:
        dataset: Pairs in the row contract.
        prompts: (N,) number of each row's prompt.

    Returns:
        (contradicting, repeated). A tie contradicts nothing.
    """
    counts = np.bincount(prompts, minlength=1)
    rows = np.flatnonzero(counts[prompts] > 1)  # only these can repeat a pair: the others' images stay closed
    repeated = undecoded(dataset.with_format(None)).select(rows.tolist())
    answers: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for place, prompt, row in zip(rows.tolist(), prompts[rows], repeated, strict=True):
        pair, swapped = _name_pair(row, place)
        preference = float(row.get("preference", 1.0))
        answers[int(prompt), *pair].append(1 - preference if swapped else preference)
    found = [values for values in answers.values() if len(values) > 1]
    return sum(min(values) < 0.5 < max(values) for values in found), len(found)


def fit_probe(difference: np.ndarray, preference: np.ndarray, weight: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Fit a Bradley-Terry model that is linear in differences of embeddings: logistic regression without intercept.

    Minimises sum_i w_i loss(strength of i) + |v|^2 / (2 strength), as scikit-learn's LogisticRegression does with
    C = `strength`, on each pair once.

    Args:
        difference: (N, D) embedding of the chosen image minus that of the rejected one.
        preference: (N,) in [0, 1].
        weight: (N,) >= 0.
        strength: Inverse of the regularisation. Default 1, that of scikit-learn.

    Returns:
        (D,) v; margins are `difference @ v`.

    Source: Bradley and Terry 1952, https://doi.org/10.2307/2334029; the probe is that of CLIP, section 3.2 of
    https://arxiv.org/abs/2103.00020.
    """

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        margin = difference @ v
        loss = preference * np.logaddexp(0, -margin) + (1 - preference) * np.logaddexp(0, margin)
        gradient = difference.T @ (weight * (expit(margin) - preference))
        return float(weight @ loss) + float(v @ v) / (2 * strength), gradient + v / strength

    start = np.zeros(difference.shape[1])
    return np.asarray(minimize(objective, start, jac=True, method="L-BFGS-B").x)


def probe_margins(difference: np.ndarray, preference: np.ndarray, weight: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Return the margins (N,) of the probe, each fold's fitted on the others; see `fit_probe`."""
    margins = np.zeros(len(difference))
    for fold in np.unique(folds):
        rest = folds != fold
        margins[~rest] = difference[~rest] @ fit_probe(difference[rest], preference[rest], weight[rest])
    return margins


def _name_pair(row: dict[str, Any], number: int) -> tuple[tuple[str, str], bool]:
    """Return the digests of both images of row `number` in a fixed order, and True if the rejected one comes first."""
    first, second = (digest_pixels(row[name], image_name(row, name, number)) for name in ("chosen", "rejected"))
    return ((second, first), True) if second < first else ((first, second), False)
