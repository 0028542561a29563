"""The choice of pairs against dense linear algebra and scikit-learn, and what each choice promises."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bt_hf import select_pairs
from bt_hf.reward import asking


def images(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def by_prompt(count: int, each: int) -> list[str]:
    return [f"prompt {image // each}" for image in range(count)]


def click_all(embeddings: np.ndarray, prompts: list[str], clicks: int, taste: np.ndarray, **kwargs: Any) -> list[Any]:
    """Return the answers of somebody who likes what lies along `taste`, to pairs that are asked one by one."""
    answered: list[Any] = []
    for _ in range(clicks):
        (pair,) = select_pairs(embeddings, prompts, answered, **kwargs)
        answered.append((pair.left, pair.right, float((embeddings[pair.left] - embeddings[pair.right]) @ taste > 0)))
    return answered


def model(embeddings: np.ndarray, answered: list[Any], weight: list[float] | None = None) -> asking._Model:
    tensor = torch.as_tensor(embeddings)
    pool = asking._Pool(tensor, ["one"] * len(embeddings))
    return asking._Model(tensor, asking._Answers.check(answered, weight, pool), differences(embeddings, [(0, 1)]))


def differences(embeddings: np.ndarray, pairs: Any) -> torch.Tensor:
    left, right = np.array(pairs).T
    return torch.as_tensor(embeddings[left] - embeddings[right])


def some_answers(rng: np.random.Generator) -> list[Any]:
    return [(*rng.choice(30, 2, replace=False), float(rng.integers(2))) for _ in range(14)]


# --- Against independent truth ---


@pytest.mark.parametrize("strength", [1.0, 8.0])
def test_posterior_against_the_dense_hessian_and_scikit_learn(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "STRENGTH", strength)
    embeddings, rng = images(30), np.random.default_rng(1)
    answered = some_answers(rng)
    weight = rng.uniform(0.5, 2, size=14)
    found = model(embeddings, answered, weight.tolist())
    left, right, preference = (np.array(column) for column in zip(*answered, strict=True))
    rows = embeddings[left] - embeddings[right]
    prior = strength**2 / np.square(rows).sum(1).mean()  # variance of each weight
    fitted = LogisticRegression(C=prior, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fitted.fit(rows, preference.astype(int), sample_weight=weight)
    win = 1 / (1 + np.exp(-rows @ fitted.coef_[0]))
    hessian = np.eye(8) / prior + (rows * (weight * win * (1 - win))[:, None]).T @ rows
    others = differences(embeddings, list(itertools.combinations(range(30), 2)))
    margin, variance, found_covariance = found.predict(others)
    others = others.numpy()
    np.testing.assert_allclose(margin.numpy(), others @ fitted.coef_[0], atol=1e-3)
    expected = ((others @ np.linalg.inv(hessian)) * others).sum(1)
    np.testing.assert_allclose(variance.numpy(), expected, rtol=1e-4)
    covariance = others @ np.linalg.inv(hessian) @ others[:20].T
    np.testing.assert_allclose(found_covariance[:, :20].numpy(), covariance, rtol=1e-4, atol=1e-4)


def test_the_score_is_the_variance_that_a_click_takes_off_the_others() -> None:
    """A click on each of 15 candidates is expected in a model of its own; variances are weighted by p (1 - p)."""
    embeddings, answered = images(30), some_answers(np.random.default_rng(3))
    candidates = differences(embeddings, list(itertools.combinations(range(6), 2)))
    found = model(embeddings, answered)
    margin, variance, _ = found.predict(candidates)
    win = torch.sigmoid(margin)
    scores = found.scores(candidates)
    for number in range(len(candidates)):
        after = model(embeddings, answered)
        after.expect(candidates[number : number + 1])
        expected = (win * (1 - win)) @ (variance - after.predict(candidates)[1])
        assert scores[number] == pytest.approx(float(expected), rel=1e-4)


def test_an_expected_answer_is_a_rank_one_update() -> None:
    embeddings, rng = images(30), np.random.default_rng(2)
    found = model(embeddings, some_answers(rng))
    pairs = differences(embeddings, list(itertools.combinations(range(12), 2)))
    margin, variance, covariance = found.predict(pairs)
    curvature = torch.sigmoid(margin[0]) * torch.sigmoid(-margin[0])
    found.expect(pairs[:1])
    after_margin, after, _ = found.predict(pairs)
    torch.testing.assert_close(after_margin, margin)
    expected = variance - covariance[:, 0].double() ** 2 * curvature / (1 + curvature * variance[0])
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_the_pair_of_the_highest_score_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty images of one prompt have 190 pairs, which are all candidates."""
    monkeypatch.setattr(asking, "REFERENCE_PAIRS", 10_000)
    monkeypatch.setattr(asking, "SHOWN_IMAGE", 1.0)
    monkeypatch.setattr(asking, "SHOWN_PROMPT", 1.0)
    embeddings = images(20)
    answered = click_all(embeddings, ["one"] * 20, 8, embeddings[3], seed=5)
    (pair,) = select_pairs(embeddings, ["one"] * 20, answered, random_share=0.0)
    asked = {frozenset(answer[:2]) for answer in answered}
    others = np.array([pair for pair in itertools.combinations(range(20), 2) if frozenset(pair) not in asked])
    best = others[int(model(embeddings, answered).scores(differences(embeddings, others)).argmax())]
    assert {pair.left, pair.right} == set(best.tolist())


def test_asked_pairs_teach_more_than_random_ones() -> None:
    """Ten clicks leave less variance in the margins of all 300 pairs, for embeddings that vary in few directions."""
    shrinking = 0.7 ** np.arange(16)
    for seed in range(5):
        embeddings, prompts = images(200, 16, seed) * shrinking, by_prompt(200, 4)
        pairs = [(4 * of + a, 4 * of + b) for of in range(50) for a, b in itertools.combinations(range(4), 2)]
        left = []
        for share in (0.0, 1.0):
            answered = click_all(embeddings, prompts, 10, np.eye(16)[seed], random_share=share, seed=seed)
            everything = differences(embeddings, pairs)
            found = model(embeddings, answered)
            _, variance, _ = found.predict(everything)
            left.append(float(variance.sum() / (found.scale * everything).square().sum()))
        assert left[0] < 0.97 * left[1], left


# --- What a choice promises ---


@pytest.mark.parametrize(("count", "each"), [(60, 3), (300, 300)])  # listed pairs, and drawn ones
def test_pairs_share_a_prompt_and_none_comes_twice(count: int, each: int) -> None:
    embeddings, prompts = images(count), by_prompt(count, each)
    answered = click_all(embeddings, prompts, 30, embeddings[0], candidates=300)
    assert len({frozenset(pair[:2]) for pair in answered}) == 30
    assert all(prompts[left] == prompts[right] and left != right for left, right, _ in answered)
    assert len({left < right for left, right, _ in answered}) == 2  # sides are shuffled


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_random_pairs(share: float, seed: int) -> None:
    """Also where pairs are asked a few at a time."""
    embeddings, prompts = images(80), by_prompt(80, 4)
    answered: list[Any] = []
    random = []
    for _ in range(7):
        for pair in select_pairs(embeddings, prompts, answered, 4, random_share=share, seed=seed, candidates=100):
            answered.append((pair.left, pair.right, 1.0))
            random.append(pair.random)
        assert sum(random[-4:]) == 4 * share


def test_random_pairs_are_fair_over_prompts() -> None:
    """A prompt of ten images is drawn as often as one of two: 6 prompts, 1,200 draws of 200 each."""
    sizes = (2, 3, 4, 5, 8, 10)
    prompts = [f"prompt {number}" for number, size in enumerate(sizes) for _ in range(size)]
    pool = asking._Pool(torch.as_tensor(images(len(prompts))), prompts)
    for listed in (pool.listed, None):
        pool.listed = listed
        rng = np.random.default_rng(0)
        firsts = [pool.prompt[pool.draw(40, rng)[0][0, 0]] for _ in range(1200)]
        counts = np.bincount(firsts, minlength=6)
        assert ((counts - 200) ** 2 / 200).sum() < 20.5, counts  # chi-squared of 5 degrees, p = 0.001


def test_a_small_pool_is_asked_whole_and_then_nothing() -> None:
    embeddings, prompts = images(7), ["a"] * 3 + ["b"] * 3 + ["alone"]
    pairs = select_pairs(embeddings, prompts, count=50)
    assert sorted(tuple(sorted(pair[:2])) for pair in pairs) == [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    answered = [(pair.left, pair.right, None) for pair in pairs]
    assert select_pairs(embeddings, prompts, answered) == []
    assert select_pairs(embeddings, prompts, answered[1:])[0][:2] in {answered[0][:2], answered[0][1::-1]}


def test_two_images_are_enough() -> None:
    (pair,) = select_pairs(images(2), ["", ""], count=3)
    assert {pair.left, pair.right} == {0, 1}


def test_images_that_hardly_differ_are_not_asked_about() -> None:
    embeddings = images(8)
    embeddings[1], embeddings[3] = embeddings[0], embeddings[2] + 1e-3
    pairs = {frozenset(pair[:2]) for pair in select_pairs(embeddings, ["one"] * 8, count=100)}
    assert len(pairs) == 28 - 2
    assert not pairs & {frozenset((0, 1)), frozenset((2, 3))}
    assert select_pairs(embeddings[:2], ["one"] * 2) == []


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_one_image_that_differs_is_found(share: float) -> None:
    """All images but one are the same, so that 199 of 19,900 pairs differ."""
    embeddings = np.tile(images(1), (200, 1))
    embeddings[7] *= -1
    pairs = select_pairs(embeddings, ["one"] * 200, count=4, random_share=share, candidates=10)
    assert len(pairs) == 4
    assert all(7 in pair[:2] for pair in pairs)


def test_a_batch_and_a_queue_are_not_alike() -> None:
    """Pairs of a batch and pairs that wait for an answer keep new ones from asking the same."""
    axis = np.zeros((40, 8))
    axis[:, 0] = np.linspace(-1, 1, 40)  # half of the prompts differ along one axis alone, and more than all others
    embeddings = np.concatenate([3 * axis, images(40)])
    pairs = select_pairs(embeddings, by_prompt(80, 20), count=8, random_share=0.0)
    assert len({pair.left // 40 for pair in pairs}) == 2
    waiting = [(pair.left, pair.right, None) for pair in pairs[:4]]
    images_before = {image for pair in waiting for image in pair[:2]}
    after = select_pairs(embeddings, by_prompt(80, 20), waiting, count=4, random_share=0.0)
    assert len(images_before & {image for pair in after for image in pair[:2]}) <= 2


@pytest.mark.parametrize("seed", range(4))  # either of the two is random
def test_a_batch_is_what_asking_one_by_one_gives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "REFERENCE_PAIRS", 10_000)
    embeddings = images(20)
    answered = click_all(embeddings, ["one"] * 20, 8, embeddings[3])
    share = {"random_share": 0.5, "seed": seed}
    first, second = select_pairs(embeddings, ["one"] * 20, answered, 2, **share)
    waiting = [*answered, (first.left, first.right, None)]
    (alone,) = select_pairs(embeddings, ["one"] * 20, waiting, **share)
    assert alone.random is second.random is not first.random
    if not second.random:  # all pairs are candidates, so that chance has no say
        assert {alone.left, alone.right} == {second.left, second.right}


def test_the_choice_depends_on_the_arguments_alone() -> None:
    embeddings, prompts = images(60), by_prompt(60, 3)
    answered = click_all(embeddings, prompts, 5, embeddings[0])
    pairs = select_pairs(embeddings, prompts, answered, 4)
    assert pairs == select_pairs(torch.as_tensor(embeddings), tuple(prompts), tuple(answered), 4)
    assert pairs != select_pairs(embeddings, prompts, answered, 4, seed=1)


def test_answers_without_weight_and_skipped_ones_do_not_teach() -> None:
    embeddings = images(30)
    asked = differences(embeddings, [(4, 5), (6, 7)])
    one = model(embeddings, [(0, 1, 1.0), (2, 3, 0.0)], [1.0, 0.0]).predict(asked)
    torch.testing.assert_close(one, model(embeddings, [(0, 1, 1.0)]).predict(asked))  # mean, variance, covariance
    margin, *_ = model(embeddings, [(0, 1, None)]).predict(asked)
    assert not margin.any()


def test_thousand_clicks_are_as_quick_as_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "READ_PAIRS", 20)
    embeddings, rng = images(30), np.random.default_rng(0)
    answered = [(*rng.choice(30, 2, replace=False), 1.0) for _ in range(50)]
    assert len(model(embeddings, answered).rows) == 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embeddings": images(6)[0]}, "shape"),
        ({"embeddings": np.arange(12).reshape(6, 2)}, "int64"),
        ({"embeddings": np.where(np.eye(6, 8) > 0, np.nan, 1.0)}, "image 0"),
        ({"prompts": ["a"] * 5}, "each of the 6 images, but has 5"),
        ({"prompts": list("abcdef")}, "no two of the 6 images"),
        ({"embeddings": np.zeros((0, 8)), "prompts": []}, "no two of the 0 images"),
        ({"answered": [(0, 6, 1.0)]}, "numbers below 6, but pair 0 is of 0 and 6"),
        ({"answered": [(-1, 2, 1.0)]}, "-1 and 2"),
        ({"answered": [(0, 1, 1.0), (2, 2, 1.0)]}, "pair 1 is of 2 alone"),
        ({"answered": [(0, 3, 1.0)], "prompts": ["a"] * 3 + ["b"] * 3}, "0 and 3"),
        ({"answered": [(0, 1, 1.5)]}, "that of pair 0 is 1.5"),
        ({"answered": [(0, 1, float("nan"))]}, "nan"),
        ({"answered": [(0, 1, 1.0)], "weight": [-1.0]}, "at least 0"),
        ({"answered": [(0, 1, 1.0)], "weight": [1.0, 1.0]}, "1 finite numbers"),
        ({"count": 0}, "count"),
        ({"seed": -1}, "seed"),
        ({"random_share": 1.5}, "random_share"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    arguments = {"embeddings": images(6), "prompts": ["a"] * 6} | changed
    with pytest.raises(ValueError, match=message):
        select_pairs(**arguments)


def test_one_prompt_is_put_into_a_list() -> None:
    with pytest.raises(TypeError, match="put it into a list"):
        select_pairs(images(6), "a cat")
