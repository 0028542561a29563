"""The fit of a taste against scikit-learn, refits without the pairs left out, and people whose taste is known."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize, softplus

from bt_hf.reward import posterior
from bt_hf.reward.laplace import leave_out, newton
from bt_hf.reward.posterior import fit_taste


def embeddings(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, dtype=torch.double), dim=-1)


def pad(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(images, (0, 1))


def clicks(rows: int, width: int = 16, slope: float = 8.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Clicks of a person who likes what lies along the first axis; nearer pairs are clicked less surely.

    Texts lie far from images, as those of real dual encoders do: their own margins are some hundredths of the scale.
    """
    one, other = embeddings(rows, width, 10 * seed + 1), embeddings(rows, width, 10 * seed + 2)
    chance = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).double()
    first = (chance < torch.sigmoid(slope * (one - other)[:, 0]))[:, None]
    return {
        "text": normalize(
            0.1 * embeddings(rows, width + 1, 10 * seed + 3) + torch.eye(width + 1).double()[-1], dim=-1
        ),
        "chosen": pad(torch.where(first, one, other)),
        "rejected": pad(torch.where(first, other, one)),
        "preference": torch.ones(rows).double(),
        "weight": torch.ones(rows).double(),
    }


def one_setting(monkeypatch: pytest.MonkeyPatch, strength: float, prompt_share: float = 0.0) -> None:
    monkeypatch.setattr(posterior, "STRENGTHS", (strength, strength))
    monkeypatch.setattr(posterior, "PROMPT_SHARES", (prompt_share,))


# --- Against independent truth ---


@pytest.mark.parametrize("strength", [0.5, 3.0, 20.0])
def test_direction_is_that_of_logistic_regression(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    one_setting(monkeypatch, strength)
    data = clicks(30)
    difference = (data["chosen"] - data["rejected"]).numpy()
    taste = fit_taste(**data, scale=20.0)
    penalty = strength**2 / (difference**2).sum(1).mean()
    # Both orders of a pair count half each: scikit-learn wants two classes.
    expected = LogisticRegression(C=penalty / 2, fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected.fit(np.concatenate([difference, -difference]), np.repeat([1, 0], 30))
    found = normalize(taste.direction, dim=0).numpy()
    np.testing.assert_allclose(found, expected.coef_[0] / np.linalg.norm(expected.coef_[0]), atol=1e-4)


def test_the_tightest_prior_is_the_mean_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    one_setting(monkeypatch, 1e-3)
    data = clicks(12)
    mean = (data["chosen"] - data["rejected"]).mean(0)
    taste = fit_taste(**data, scale=20.0)
    torch.testing.assert_close(normalize(taste.direction, dim=0), normalize(mean, dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("copies", [1, 3])
def test_left_out_margins_against_refits(copies: int) -> None:
    """Pairs of one prompt are left out together; each refit is an exact one."""
    data = clicks(14, seed=1)
    rows = torch.arange(14).repeat_interleave(copies)
    difference = (data["chosen"] - data["rejected"])[rows]
    difference = difference + 0.05 * embeddings(len(rows), 17, 5)
    weight = 0.5 + embeddings(len(rows), 1, 6).abs()[:, 0] / 2
    kernel = 4 * difference @ difference.T
    preference = torch.full_like(weight, 0.9)
    dual, margin = newton(kernel[None], preference, weight)
    torch.testing.assert_close(dual[0], weight * (preference - torch.sigmoid(margin[0])), atol=1e-6, rtol=0)
    found = leave_out(kernel[None], dual, margin, weight, rows)[0]
    for cluster in range(14):
        rest, left = rows != cluster, rows == cluster
        refitted, _ = newton(kernel[rest][:, rest][None], preference[rest], weight[rest])
        expected = kernel[left][:, rest] @ refitted[0]
        torch.testing.assert_close(found[left], expected, atol=0.12, rtol=0.12)


def test_swapped_pairs_and_weights() -> None:
    """A pair the other way round is one minus its preference, and a weight of 2 two copies of it."""
    data = clicks(10)
    data["preference"] = torch.tensor([1.0, 0.9, 0.5, 1.0, 0.2, 1.0, 1.0, 0.7, 1.0, 0.0]).double()
    taste = fit_taste(**data, scale=20.0)
    swapped = data | {"chosen": data["rejected"], "rejected": data["chosen"], "preference": 1 - data["preference"]}
    copied = {name: torch.cat([value, value[:4]]) for name, value in data.items()}
    weighted = data | {"weight": torch.where(torch.arange(10) < 4, 2.0, 1.0).double()}
    torch.testing.assert_close(fit_taste(**swapped, scale=20.0).direction, taste.direction)
    one, other = (fit_taste(**value, scale=20.0) for value in (copied, weighted))
    torch.testing.assert_close(one.direction, other.direction, rtol=1e-5, atol=1e-7)
    assert one.caption == pytest.approx(other.caption)
    empty = {name: torch.cat([value, value[:4]]) for name, value in data.items()}
    empty["weight"] = torch.cat([data["weight"], torch.zeros(4)])
    torch.testing.assert_close(fit_taste(**empty, scale=20.0).direction, taste.direction)


# --- What it is for ---


@pytest.mark.parametrize("slope", [2.0, 8.0, 25.0])
@pytest.mark.parametrize("scale", [10.0, 20.0, 100.0, 112.0])
def test_strength_is_that_of_the_person(slope: float, scale: float) -> None:
    """Log-loss on new clicks is near that of the true margins, at any logit scale; the base's own are far off."""
    taste = fit_taste(**clicks(250, slope=slope), scale=scale)
    new = clicks(4000, slope=slope, seed=9)
    difference = new["chosen"] - new["rejected"]
    base = scale * (new["text"] * difference).sum(1)
    found = softplus(-taste.margins(new["text"], difference, base)).mean()
    best = softplus(-slope * difference[:, 0]).mean()
    assert best < found < best + 0.05


@pytest.mark.parametrize(("slope", "tolerance"), [(1.0, 0.09), (3.0, 0.07), (10.0, 0.05)])
def test_chances_mean_what_they_say(slope: float, tolerance: float) -> None:
    """New pairs called sure to p are ordered rightly in p of the cases, also where little can be learnt."""
    sure, right = [], []
    for seed in range(8):
        taste = fit_taste(**clicks(64, slope=slope, seed=seed), scale=20.0)
        new = clicks(500, slope=slope, seed=100 + seed)
        difference = new["chosen"] - new["rejected"]
        margin = taste.margins(new["text"], difference, 20 * (new["text"] * difference).sum(1))
        sure.append(torch.sigmoid(margin.abs()))
        right.append((margin > 0).double())
    sure, right = torch.cat(sure), torch.cat(right)
    bins = sure.argsort().chunk(10)
    error = torch.stack([(sure[rows].mean() - right[rows].mean()).abs() for rows in bins]).mean()
    assert error < tolerance


@pytest.mark.parametrize("slope", [1.0, 25.0])
def test_one_prompt_for_all_pairs(slope: float) -> None:
    """Pairs vouch for each other where no other prompt can: the fit is as good as with a prompt for each pair."""
    data, new = clicks(100, slope=slope), clicks(2000, slope=slope, seed=9)
    difference, losses = new["chosen"] - new["rejected"], []
    for one in (False, True):
        if one:
            data["text"], new["text"] = (data["text"][:1].expand(len(rows["text"]), -1) for rows in (data, new))
        taste = fit_taste(**data, scale=20.0)
        base = 20.0 * (new["text"] * difference).sum(1)
        losses.append(softplus(-taste.margins(new["text"], difference, base)).mean())
    assert losses[1] < losses[0] + 0.01


@pytest.mark.parametrize("swapped", [False, True])
def test_copies_of_one_prompt_do_not_vouch_for_each_other(swapped: bool) -> None:
    data = clicks(4)
    data["text"] = data["text"][:1].expand(4, -1)
    copied = {name: value.repeat(8, *[1] * (value.dim() - 1)) for name, value in data.items()}
    if swapped:
        other = torch.arange(32)[:, None] % 8 >= 4
        chosen, rejected = copied["chosen"], copied["rejected"]
        copied |= {"chosen": torch.where(other, rejected, chosen), "rejected": torch.where(other, chosen, rejected)}
        copied["preference"] = (~other[:, 0]).double()
    once, often = (fit_taste(**value, scale=20.0).direction.norm() for value in (data, copied))
    assert often < 3 * once


def test_copies_do_not_vouch_for_each_other() -> None:
    data = clicks(4)
    copied = {name: value.repeat(8, *[1] * (value.dim() - 1)) for name, value in data.items()}
    once, often = (fit_taste(**value, scale=20.0).direction.norm() for value in (data, copied))
    assert often < 3 * once


def test_wrong_clicks_leave_the_direction() -> None:
    """With three clicks in ten wrong, it keeps to the mean difference, which no click can dominate."""
    agreement = []
    for seed in range(8):
        data = clicks(40, slope=60.0, seed=seed)
        wrong = (torch.arange(40) % 10 < 3)[:, None]
        chosen, rejected = data["chosen"], data["rejected"]
        data |= {"chosen": torch.where(wrong, rejected, chosen), "rejected": torch.where(wrong, chosen, rejected)}
        direction = fit_taste(**data, scale=20.0).direction
        agreement.append(float(normalize(direction, dim=0)[0]))
    assert np.mean(agreement) > 0.4  # chance is 0 +- 0.25


def test_taste_that_depends_on_the_prompt() -> None:
    """Likes the first axis for one kind of prompt, and dislikes it for the other."""

    def person(seed: int) -> dict[str, torch.Tensor]:
        data = clicks(120, slope=1000.0, seed=seed)
        kind = torch.where(torch.arange(120) % 2 == 0, 1.0, -1.0).double()
        text = data["text"].clone()
        text[:, 1] += 0.5 * kind
        swap = (kind < 0)[:, None]
        chosen, rejected = data["chosen"], data["rejected"]
        chosen, rejected = torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected)
        return data | {"text": normalize(text, dim=-1), "chosen": chosen, "rejected": rejected}

    taste, new = fit_taste(**person(1), scale=20.0), person(2)
    difference = new["chosen"] - new["rejected"]
    margins = taste.margins(new["text"], difference, torch.zeros(120).double())
    assert (margins > 0).double().mean() > 0.85
    assert abs((difference @ taste.direction > 0).double().mean() - 0.5) < 0.25


def test_features_below_the_projection_help() -> None:
    """Learn a taste that is lost in the output of the projection, but not in its inputs."""
    generator = torch.Generator().manual_seed(0)
    accuracy = []
    for known in (False, True):
        data, new = clicks(64), clicks(500, seed=3)
        features = (
            torch.randn(2, 64, 6, generator=generator).double(),
            torch.randn(2, 500, 6, generator=generator).double(),
        )
        for rows, (one, other) in ((data, features[0]), (new, features[1])):
            first = (one[:, 0] > other[:, 0])[:, None]
            rows["features"] = torch.where(first, one, other), torch.where(first, other, one)
            rows["chosen"], rows["rejected"] = embeddings(len(one), 17, 7), embeddings(len(one), 17, 8)
        inputs = data.pop("features")
        taste = fit_taste(**data, scale=20.0, features=inputs if known else None)
        difference = new["chosen"] - new["rejected"]
        base = torch.zeros(500).double()
        margins = taste.margins(new["text"], difference, base, new["features"][0] - new["features"][1])
        accuracy.append((margins > 0).double().mean().item())
    assert accuracy[0] < 0.6 < 0.85 < accuracy[1]


def test_features_that_say_nothing_cost_few_clicks_little() -> None:
    """With eight clicks, random features below the projection take less than a hundredth of the accuracy."""
    accuracy = []
    for seed in range(30):
        data, new = clicks(8, slope=60.0, seed=seed), clicks(1000, slope=1000.0, seed=500 + seed)
        generator = torch.Generator().manual_seed(seed)
        chosen, rejected = torch.randn(2, 8, 8, generator=generator).double()
        others = torch.randn(2, 1000, 8, generator=generator).double()
        for features in (None, (chosen, rejected)):
            taste = fit_taste(**data, scale=20.0, features=features)
            difference, base = new["chosen"] - new["rejected"], torch.zeros(1000).double()
            margins = taste.margins(new["text"], difference, base, others[0] - others[1])
            accuracy.append((margins > 0).double().mean().item())
    without, known = np.array(accuracy).reshape(-1, 2).mean(0)
    assert without > 0.65
    assert known > without - 0.01


def test_thousands_of_pairs_are_fitted_to_a_part() -> None:
    data = clicks(1500, slope=30.0)
    direction = normalize(fit_taste(**data, scale=20.0).direction, dim=0)
    assert direction[0] > 0.98


# --- Few or empty clicks ---


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_click_or_two(rows: int) -> None:
    data = clicks(rows)
    taste = fit_taste(**data, scale=20.0)
    assert ((data["chosen"] - data["rejected"]) @ taste.direction > 0).all()
    assert taste.direction.isfinite().all()
    assert taste.by_prompt.isfinite().all()
    margins = taste.margins(data["text"], data["chosen"] - data["rejected"], torch.zeros(rows).double())
    assert 0.3 < margins.mean() < 6  # neither nothing nor certainty


@pytest.mark.parametrize("name", ["weight", "preference", "same images"])
def test_clicks_that_say_nothing(name: str) -> None:
    data = clicks(6)
    if name == "weight":
        data["weight"] *= 0
    elif name == "preference":
        data["preference"] = torch.full((6,), 0.5).double()
    else:
        data["rejected"] = data["chosen"]
    taste = fit_taste(**data, scale=20.0)
    assert not taste.direction.any()
    assert not taste.by_prompt.any()
    assert taste.caption == 1.0


def test_one_prompt_has_no_taste_by_prompt() -> None:
    data = clicks(8)
    data["text"] = data["text"][:1].expand(8, -1)
    taste = fit_taste(**data, scale=20.0)
    assert taste.direction.any()
    assert not taste.by_prompt.any()
