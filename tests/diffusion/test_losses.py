"""Losses of denoising errors: numbers worked out by hand, gradients written out, and the safeguard's promise."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bt_hf.diffusion.beta import MAPO_BETA, SPREAD, auto_beta, fixed_beta
from bt_hf.diffusion.kto import kto, kto_baseline
from bt_hf.diffusion.losses import (
    LOSSES,
    REFERENCE_FREE,
    Errors,
    denoising_margin,
    dpo,
    hinge,
    ipo,
    mapo,
    preferred_change,
    sft,
)
from bt_hf.diffusion.safeguard import safeguard_scale, scale_gradient, with_safeguard

every_loss = pytest.mark.parametrize("name", sorted(LOSSES))
PREFERENCES = torch.tensor([1.0, 0.0, 0.5, 0.75], dtype=torch.double)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def errors_with_margin(margin: float, beta: float = 4.0, count: int = 4) -> Errors:
    """The adapter made the chosen image better by 2 margin / beta and left the rejected one as it was."""
    reference = torch.full((count,), 0.7, dtype=torch.double)
    return Errors(reference - 2 * margin / beta, reference + 0.1, reference, reference + 0.1)


def random_errors(seed: int = 0, count: int = 6) -> Errors:
    generator = torch.Generator().manual_seed(seed)
    return Errors(*torch.rand(4, count, generator=generator, dtype=torch.double))


def exchanged(errors: Errors) -> Errors:
    return Errors(errors.rejected, errors.chosen, errors.reference_rejected, errors.reference_chosen)


# --- The margin ---


def test_margin_by_hand() -> None:
    """beta = 4: -4/2 [(0.3 - 0.5) - (0.9 - 0.6)] = -2 (-0.2 - 0.3) = 1, and without reference -2 (0.3 - 0.9) = 1.2."""
    errors = Errors(double(0.3), double(0.9), double(0.5), double(0.6))
    torch.testing.assert_close(denoising_margin(errors, 4.0), double(1.0))
    without = replace(errors, reference_chosen=None, reference_rejected=None)
    torch.testing.assert_close(denoising_margin(without, 4.0), double(1.2))


def test_one_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="got only those of the chosen ones"):
        Errors(double(0.3), double(0.9), reference_chosen=double(0.5))


# --- Losses of pairs, each by hand at a margin of ln 3 or so ---


def test_dpo_by_hand() -> None:
    """A margin of ln 3 is a probability of 3/4; see test_losses.py for the numbers."""
    loss = dpo(errors_with_margin(math.log(3)), PREFERENCES, 4.0)
    expected = double(math.log(4 / 3), math.log(4), math.log(4) - math.log(3) / 2, math.log(4) - 0.75 * math.log(3))
    torch.testing.assert_close(loss, expected)


def test_ipo_by_hand() -> None:
    """A margin of 2: (2 - 1/2)^2 = 2.25 if chosen wins, (2 + 1/2)^2 = 6.25 if not, and the mixtures of both.

    In the paper's units, beta = 4: h = 2/4, target 1/(2 4), (1/2 - 1/8)^2 = 9/64 = 2.25 / 4^2.
    """
    loss = ipo(errors_with_margin(2.0), PREFERENCES, 4.0)
    torch.testing.assert_close(loss, double(2.25, 6.25, 4.25, 3.25))
    torch.testing.assert_close(loss[0] / 4.0**2, torch.tensor(9 / 64, dtype=torch.double))


def test_ipo_is_least_where_the_soft_label_says() -> None:
    """p (m - 1/2)^2 + (1 - p) (m + 1/2)^2 has the slope 2 m + 1 - 2 p, so p = 0.75 wants a margin of 1/4."""
    chosen = double(0.7 - 2 * 0.25 / 5000).requires_grad_()
    errors = Errors(chosen, double(0.8), double(0.7), double(0.8))
    ipo(errors, 0.75, 5000.0).sum().backward()
    assert chosen.grad is not None
    assert abs(chosen.grad.item()) < 1e-6  # beside 1875 for p = 1


def test_hinge_by_hand() -> None:
    """A margin of 1/4 lacks 3/4 to 1 and is 5/4 too much if the other wins; beyond 1 there is nothing to learn."""
    torch.testing.assert_close(hinge(errors_with_margin(0.25), PREFERENCES, 4.0), double(0.75, 1.25, 1.0, 0.875))
    torch.testing.assert_close(hinge(errors_with_margin(1.5), PREFERENCES, 4.0), double(0.0, 2.5, 1.25, 0.625))


def test_bt_by_hand_leaves_the_reference_out() -> None:
    """beta = 4, errors 0.3 and 0.3 + ln(3)/2: the margin is ln 3, whatever the reference says."""
    errors = Errors(double(0.3), double(0.3 + math.log(3) / 2), double(0.1), double(9.0))
    torch.testing.assert_close(LOSSES["bt"](errors, 1.0, 4.0, 0.0), double(math.log(4 / 3)))


def test_sft_by_hand() -> None:
    errors = Errors(torch.full_like(PREFERENCES, 0.2), torch.full_like(PREFERENCES, 0.6))
    torch.testing.assert_close(sft(errors, PREFERENCES), double(0.2, 0.6, 0.4, 0.3))


def test_mapo_by_hand() -> None:
    """With x = ln 2 a score is ln 2 / (2 - 1), with x = ln 4 it is ln 4 / (4 - 1) = 2/3 ln 2, and x = error / 2.

    So the log odds are 1000 ln(2) / 3 = 231.05 for the pair and -231.05 for the pair exchanged, of which
    -log sigmoid is 0 and 231.05 to machine precision.
    """
    errors = Errors(double(2 * math.log(2)), double(2 * math.log(4)))
    torch.testing.assert_close(mapo(errors, 1.0, 0.1), errors.chosen)
    torch.testing.assert_close(mapo(errors, 0.0, 0.1), errors.rejected + 0.1 * 1000 * math.log(2) / 3)
    same = Errors(errors.chosen, errors.chosen)
    torch.testing.assert_close(mapo(same, 1.0, 0.1), errors.chosen + 0.1 * math.log(2))


def test_mapo_is_stable() -> None:
    """The score is 1 at 0 with slope -1/2 in x, and vanishes with its slope where exp(x) would overflow."""
    chosen = torch.tensor([0.0, 1e-6, 0.0199, 0.0201, 500.0, 1e4], requires_grad=True)
    loss = mapo(Errors(chosen, torch.full_like(chosen, 0.3)), 1.0, 0.1)
    loss.sum().backward()
    assert chosen.grad is not None
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()
    # No step where the series hands over to the formula.
    torch.testing.assert_close(chosen.grad[2], chosen.grad[3], rtol=0.1, atol=0)
    zero = torch.zeros(1, dtype=torch.double, requires_grad=True)
    mapo(Errors(zero, double(0.0)), 1.0, 0.1).sum().backward()
    # 1 for the error itself; half of beta, times T = 1000, times the slope -1/2 in x, times 1/2 for x = error / 2.
    torch.testing.assert_close(zero.grad, double(1 + 0.1 * 0.5 * 1000 * 0.25))


@every_loss
def test_exchanged_images_and_labels_give_the_same_loss(name: str) -> None:
    errors, preference = random_errors(), double(1.0, 0.0, 0.5, 0.8, 0.3, 0.51)
    loss = LOSSES[name](errors, preference, 3.0, 0.1)
    torch.testing.assert_close(loss, LOSSES[name](exchanged(errors), 1 - preference, 3.0, 0.1))
    assert loss.shape == (6,)
    assert loss.isfinite().all()


@every_loss
def test_label_smoothing_is_a_mixture_of_labels(name: str) -> None:
    errors = random_errors(1)
    torch.testing.assert_close(LOSSES[name](errors, 1.0, 3.0, 0.2), LOSSES[name](errors, 0.8, 3.0, 0.0))
    with pytest.raises(ValueError, match=r"should be in \[0, 0.5\], but got 0.7"):
        LOSSES[name](errors, 1.0, 3.0, 0.7)


@every_loss
def test_reference_is_asked_for_or_not_needed(name: str) -> None:
    errors = random_errors(2)
    without = Errors(errors.chosen, errors.rejected)
    if name in REFERENCE_FREE:
        torch.testing.assert_close(LOSSES[name](without, 0.7, 3.0, 0.0), LOSSES[name](errors, 0.7, 3.0, 0.0))
    else:
        with pytest.raises(ValueError, match=f"The loss '{name}' needs the errors of the reference"):
            LOSSES[name](without, 0.7, 3.0, 0.0)


@every_loss
def test_a_pair_does_not_depend_on_its_batch(name: str) -> None:
    errors, preference = random_errors(3), double(1.0, 0.0, 0.5, 0.8, 0.3, 0.9)
    first = Errors(*(getattr(errors, field)[:1] for field in errors.__dataclass_fields__))
    alone = LOSSES[name](first, preference[:1], 3.0, 0.0)
    torch.testing.assert_close(LOSSES[name](errors, preference, 3.0, 0.0)[:1], alone)


# --- The supervised term ---


def test_preferred_change_by_hand() -> None:
    """The chosen image's error is e times as large, that of the rejected one divided by e squared."""
    e = math.e
    errors = Errors(*(double(*4 * [value]) for value in (0.2 * e, 0.6 / e**2, 0.2, 0.6)))
    torch.testing.assert_close(preferred_change(errors, PREFERENCES), double(1.0, -2.0, 0.0, 0.5))
    # A fifth of the labels taken to be wrong: 0.8, 0.2, 0.5 and 0.65.
    torch.testing.assert_close(preferred_change(errors, PREFERENCES, 0.2), double(0.6, -1.2, 0.0, 0.3))
    without = replace(errors, reference_chosen=None, reference_rejected=None)
    chosen, rejected = math.log(0.2) + 1, math.log(0.6) - 2
    torch.testing.assert_close(preferred_change(without, PREFERENCES), double(chosen, rejected, 0.0, chosen / 2))


def test_preferred_change_is_a_likelihood() -> None:
    """Half of it is the change of the negative log-likelihood of a value, as torch's own loss has it."""
    target = torch.zeros(1, 64, dtype=torch.double)
    values = [torch.randn(1, 64, dtype=torch.double) * size for size in (0.7, 1.3)]
    errors = [value.square().mean(1) for value in values]
    likelihoods = [
        torch.nn.functional.gaussian_nll_loss(value, target, error[:, None].expand_as(value))
        for value, error in zip(values, errors, strict=True)
    ]
    other = double(1.0)
    change = preferred_change(Errors(errors[0], other, errors[1], other), 1.0)
    torch.testing.assert_close(change / 2, (likelihoods[0] - likelihoods[1])[None])


def test_preferred_change_does_not_depend_on_the_size_of_errors() -> None:
    """A network whose errors are all a thousand times as large is pulled no harder."""
    errors = random_errors()
    larger = Errors(*(1000 * getattr(errors, field) for field in errors.__dataclass_fields__))
    torch.testing.assert_close(preferred_change(larger, 0.9), preferred_change(errors, 0.9))


def test_exchanged_images_and_labels_have_the_same_preferred_change() -> None:
    errors, preference = random_errors(), double(1.0, 0.0, 0.5, 0.8, 0.3, 0.51)
    torch.testing.assert_close(
        preferred_change(errors, preference, 0.1), preferred_change(exchanged(errors), 1 - preference, 0.1)
    )


# --- Gradients ---


def predictions(seed: int = 0, count: int = 3) -> list[Tensor]:
    """Predictions and targets of the chosen, then of the rejected images: (B, 2, 3, 3) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 2, 3, 3, generator=generator, dtype=torch.double) for _ in range(4)]


def mean_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean(dim=(1, 2, 3))


def test_gradient_of_dpo_is_the_papers() -> None:
    """d loss / d prediction = -(p - sigmoid(margin)) d margin, and d margin = -beta/2 2/D (prediction - target) for
    the chosen image and its opposite for the rejected one, with D numbers in an image."""
    chosen, rejected, target_chosen, target_rejected = predictions()
    beta, preference = 1.7, double(1.0, 0.5, 0.2)
    reference = [mean_error(chosen, target_chosen) + 0.2, mean_error(rejected, target_rejected) - 0.1]
    chosen.requires_grad_()
    rejected.requires_grad_()
    errors = Errors(mean_error(chosen, target_chosen), mean_error(rejected, target_rejected), *reference)
    dpo(errors, preference, beta).sum().backward()

    # chosen is 0.2 better than the reference, and rejected 0.1 worse, so the margin is beta/2 0.3 everywhere.
    probability = 1 / (1 + math.exp(-beta / 2 * 0.3))
    factor = ((preference - probability) * beta / 18)[:, None, None, None]
    torch.testing.assert_close(chosen.grad, factor * (chosen - target_chosen).detach())
    torch.testing.assert_close(rejected.grad, -factor * (rejected - target_rejected).detach())


def test_ties_do_not_move_a_margin_of_0() -> None:
    chosen = double(0.4).requires_grad_()
    dpo(Errors(chosen, double(0.6), double(0.4), double(0.6)), 0.5, 5000.0).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == 0


def test_scale_gradient() -> None:
    value = double(1.0, 2.0, 3.0).requires_grad_()
    scaled = scale_gradient(value, double(0.0, 0.5, 1.0))
    assert scaled.tolist() == value.tolist()
    scaled.square().sum().backward()
    torch.testing.assert_close(value.grad, double(0.0, 2.0, 6.0))


# --- KTO ---


def test_kto_by_hand() -> None:
    """beta = 4: rewards -2 (-ln(3)/2 - 0) = ln 3 for all, and with the baseline 0 a sigmoid of 3/4: a liked image
    loses 1/4, a disliked one 3/4. With the baseline ln 3 both lose 1/2. The weights multiply."""
    reference = double(0.9, 0.9)
    errors, desirable = reference - math.log(3) / 2, double(1, 0)
    torch.testing.assert_close(kto(errors, reference, desirable, 0.0, 4.0), double(0.25, 0.75))
    baseline = torch.tensor(math.log(3))
    torch.testing.assert_close(kto(errors, reference, desirable, baseline, 4.0), double(0.5, 0.5))
    torch.testing.assert_close(kto(errors, reference, desirable, 0.0, 4.0, 2.0, 4.0), double(0.5, 3.0))


def test_kto_pulls_each_label_its_way() -> None:
    """Descending the loss lowers the error of a liked image (positive gradient) and raises that of a disliked one."""
    errors = double(0.5, 0.5).requires_grad_()
    kto(errors, double(0.5, 0.5), torch.tensor([1, 0]), 0.0, 4.0).sum().backward()
    torch.testing.assert_close(errors.grad, double(0.5, -0.5))  # beta/2 sigmoid' = 2 1/4


def test_kto_baseline() -> None:
    """Rewards of 1 and 3 at beta = 4: the mean is 2; of -1 and -3 it would be -2, so 0. No gradient flows back."""
    errors, reference = double(0.0, 0.0).requires_grad_(), double(0.5, 1.5)
    baseline = kto_baseline(errors, reference, 4.0)
    assert baseline.item() == 2
    assert not baseline.requires_grad
    assert kto_baseline(reference, double(0.0, 0.0), 4.0).item() == 0
    # An image that does not count might as well be missing.
    counts = torch.tensor([True, False])
    assert kto_baseline(errors, reference, 4.0, counts).item() == kto_baseline(errors[:1], reference[:1], 4.0).item()
    assert kto_baseline(errors, reference, 4.0, ~counts & counts).item() == 0


# --- The safeguard ---


def winner_change(
    chosen: Tensor, rejected: Tensor, target: list[Tensor], preference: float, mu: float | None
) -> tuple[Tensor, Tensor]:
    """Return the change of the preferred image's error in a small step down the loss, by the first order, (B,), and
    its own gradient's square norm.

    The model is one shift of the prediction that both images of a pair share, as they share weights: the step is taken
    in output space.
    """
    shift = torch.zeros_like(chosen, requires_grad=True)  # (B, ...)
    moved = [chosen + shift, rejected + shift]
    errors = Errors(mean_error(moved[0], target[0]), mean_error(moved[1], target[1]))
    errors = replace(errors, reference_chosen=errors.chosen.detach(), reference_rejected=errors.rejected.detach())
    if mu is not None:
        scale = safeguard_scale(*moved, *target, mu=mu, preference=preference)
        errors = with_safeguard(errors, scale, preference)
    (gradient,) = torch.autograd.grad(dpo(errors, preference, 2.0).sum(), shift, retain_graph=True)
    winner = errors.chosen if preference >= 0.5 else errors.rejected
    (of_winner,) = torch.autograd.grad(winner.sum(), shift)
    return -(gradient * of_winner).flatten(1).sum(1), of_winner.square().flatten(1).sum(1)


@pytest.mark.parametrize("preference", [1.0, 0.8, 0.3, 0.0])
@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0])
def test_safeguard_keeps_the_winner(preference: float, mu: float) -> None:
    """-mu |g_w|^2 at most, times the weight |p - 1/2| of the pair and beta/2 = 1 in the loss, for every pair."""
    violated = 0
    for seed in range(5):
        winner, loser, _, target = predictions(seed, count=8)
        # The winner's error is 1 everywhere, the loser's 2 on average: they share a direction.
        predicted, targets = [winner, loser + 2], [winner - 1, target]
        if preference < 0.5:  # then the rejected image is the preferred one
            predicted, targets = predicted[::-1], targets[::-1]
        change, norm = winner_change(*predicted, targets, preference, mu)
        assert (change <= -mu * abs(preference - 0.5) * norm + 1e-6).all()
        violated += int((winner_change(*predicted, targets, preference, None)[0] > 1e-6).sum())
    assert violated > 20  # out of 40: without the safeguard most winners become worse


def test_safeguard_by_hand() -> None:
    """g_w = (1, 0) and g_l = (4, 3): |g_w|^2 = 1 and <g_w, g_l> = 4, so 1/4. The error falls by 1 - 4 = -3 without
    the scale: it grows. Of (1, 0) and (-4, 3) nothing needs scaling, and with (1, 0) and (1/2, 3) it would be 2, so 1.
    If the rejected image is preferred, |g|^2 = 25: 25/4, so 1. A tie prefers none.
    """
    zero = torch.zeros(3, 2)
    chosen, rejected = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[4.0, 3.0], [-4.0, 3.0], [0.5, 3.0]])
    assert safeguard_scale(chosen, rejected, zero, zero).tolist() == [0.25, 1.0, 1.0]
    assert safeguard_scale(chosen, rejected, zero, zero, mu=0.5).tolist() == [0.125, 1.0, 1.0]
    assert safeguard_scale(chosen, rejected, zero, zero, preference=0.0).tolist() == [1.0, 1.0, 1.0]
    assert safeguard_scale(rejected, chosen, zero, zero, preference=torch.zeros(3)).tolist() == [0.25, 1.0, 1.0]
    assert safeguard_scale(chosen, rejected, zero, zero, preference=0.5).tolist() == [1.0, 1.0, 1.0]
    assert safeguard_scale(zero, rejected, zero, zero).tolist() == [1.0, 1.0, 1.0]


def test_safeguard_is_detached_and_checked() -> None:
    chosen, rejected, *target = predictions()
    assert not safeguard_scale(chosen.requires_grad_(), rejected, *target).requires_grad
    with pytest.raises(ValueError, match=r"`mu` should be in \[0, 1\], but got 1.5"):
        safeguard_scale(chosen, rejected, *target, mu=1.5)


def test_with_safeguard_scales_the_less_preferred_image_only() -> None:
    chosen, rejected = double(0.2, 0.2).requires_grad_(), double(0.5, 0.5).requires_grad_()
    errors = with_safeguard(Errors(chosen, rejected), double(0.25, 0.25), double(1.0, 0.0))
    assert errors.chosen.tolist() == [0.2, 0.2]
    (errors.chosen + errors.rejected).sum().backward()
    torch.testing.assert_close(chosen.grad, double(1.0, 0.25))
    torch.testing.assert_close(rejected.grad, double(0.25, 1.0))


# --- Beta ---


def test_fixed_beta() -> None:
    assert fixed_beta(3.0, "dpo", published=2000.0) == 3.0
    assert fixed_beta("published", "dpo", published=2000.0) == 2000.0
    assert fixed_beta("auto", "dpo", published=2000.0) is None
    assert fixed_beta(3.0, "mapo", published=2000.0) == 3.0
    assert fixed_beta("published", "mapo", published=2000.0) == fixed_beta("auto", "mapo", 2000.0) == MAPO_BETA


def test_auto_beta_by_hand() -> None:
    """Differences -0.1 and 0.1 have the standard deviation sqrt(0.02): beta/2 times it is the spread."""
    beta = auto_beta(double(0.4, 0.6), double(0.5, 0.5))
    assert beta * math.sqrt(0.02) / 2 == pytest.approx(SPREAD)
    assert auto_beta(double(0.4, 0.6), double(0.5, 0.5), spread=1.0) == pytest.approx(beta / SPREAD)


def test_auto_beta_undoes_the_scale_of_errors() -> None:
    errors = random_errors(4)
    chosen, rejected = errors.reference_chosen, errors.reference_rejected
    assert chosen is not None
    assert rejected is not None
    beta = auto_beta(chosen.view(2, 3), rejected.view(2, 3))
    assert auto_beta(40 * chosen, 40 * rejected) == pytest.approx(beta / 40)
    scaled = Errors(*(40 * value for value in (errors.chosen, errors.rejected, chosen, rejected)))
    torch.testing.assert_close(denoising_margin(scaled, beta / 40), denoising_margin(errors, beta))


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([0.5], [0.4], "at least 2 pairs of errors, but got 1"),
        ([0.5, 0.6], [0.4, 0.5], "vary and are finite"),
        ([0.5, math.nan], [0.4, 0.5], "their standard deviation is nan"),
        ([0.5, 0.6], [0.4], r"the shapes \(2,\) and \(1,\)"),
    ],
)
def test_auto_beta_bad_inputs(chosen: list[float], rejected: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auto_beta(torch.tensor(chosen), torch.tensor(rejected))
