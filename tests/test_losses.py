"""The Bradley-Terry loss: numbers worked out by hand, and PickScore's published criterion."""

import math

import pytest
import torch

from bt_hf import bradley_terry_loss
from bt_hf.losses import agreement, retrieval_kl


def test_hand_derived_numbers() -> None:
    """With a margin of ln 3 the chosen wins with probability 3 / (3 + 1):

    p = 1:    -ln(3/4)                       = ln(4/3)
    p = 0:    -ln(1/4)                       = ln 4
    p = 0.5:  -(ln(3/4) + ln(1/4)) / 2       = ln 4 - ln(3) / 2
    p = 0.75: -(3/4 ln(3/4) + 1/4 ln(1/4))   = ln 4 - 3/4 ln 3, the entropy: the least that p = 0.75 allows
    """
    margin = torch.full((4,), math.log(3), dtype=torch.double)
    preference = torch.tensor([1.0, 0.0, 0.5, 0.75])
    expected = [
        math.log(4 / 3),
        math.log(4),
        math.log(4) - math.log(3) / 2,
        math.log(4) - 0.75 * math.log(3),
    ]
    torch.testing.assert_close(bradley_terry_loss(margin, preference), torch.tensor(expected, dtype=torch.double))


def test_label_smoothing_by_hand() -> None:
    """A tenth of the labels flipped: p = 1 becomes 0.9, p = 0 becomes 0.1, and a tie stays one."""
    margin = torch.full((3,), math.log(3), dtype=torch.double)
    expected = [
        0.9 * math.log(4 / 3) + 0.1 * math.log(4),
        0.1 * math.log(4 / 3) + 0.9 * math.log(4),
        math.log(4) - math.log(3) / 2,
    ]
    loss = bradley_terry_loss(margin, torch.tensor([1.0, 0.0, 0.5]), label_smoothing=0.1)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.double))


def test_gradient_is_probability_minus_preference() -> None:
    margin = torch.tensor([-2.0, 0.0, 0.5, 7.0], dtype=torch.double, requires_grad=True)
    preference = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.double)
    bradley_terry_loss(margin, preference).sum().backward()
    expected = [1 / (1 + math.exp(-m)) - p for m, p in zip(margin.tolist(), preference.tolist(), strict=True)]
    torch.testing.assert_close(margin.grad, torch.tensor(expected, dtype=torch.double))


def test_large_margins_stay_finite() -> None:
    """-ln sigmoid(1000) is 0 to machine precision and -ln sigmoid(-1000) is 1000, where exp(1000) overflows."""
    loss = bradley_terry_loss(torch.tensor([1000.0, -1000.0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(loss, torch.tensor([0.0, 1000.0]))


def test_per_example_and_broadcast() -> None:
    margin = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    loss = bradley_terry_loss(margin, torch.tensor([1.0, 0.0]))  # one preference for each column
    assert loss.shape == (2, 2)
    torch.testing.assert_close(loss[1], bradley_terry_loss(margin[1], torch.tensor([1.0, 0.0])))


def test_dtype_of_margin_is_kept() -> None:
    assert bradley_terry_loss(torch.zeros(2, dtype=torch.double), torch.ones(2)).dtype == torch.double


@pytest.mark.parametrize("value", [-0.1, 0.51, 1.0])
def test_label_smoothing_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=rf"`label_smoothing` should be in \[0, 0.5\], but got {value}"):
        bradley_terry_loss(torch.zeros(1), label_smoothing=value)


def pickscore(
    text: torch.Tensor,
    image_0: torch.Tensor,
    image_1: torch.Tensor,
    scale: torch.Tensor,
    label_0: torch.Tensor,
    label_1: torch.Tensor,
    examples: torch.Tensor,
) -> torch.Tensor:
    """PickScore's criterion without negatives from the batch, as github.com/yuvalkirstain/PickScore states it in
    trainer/criterions/clip_criterion.py: KL from the softmax over a prompt's two images to its labels, each example
    weighted by one over the number of examples of its prompt. Written here as that divergence, term by term.
    """
    unit = [features / features.norm(dim=-1, keepdim=True) for features in (text, image_0, image_1)]
    logits = torch.stack([(scale * unit[0] * image).sum(-1) for image in unit[1:]], dim=-1)  # (B, 2)
    probability = logits.exp() / logits.exp().sum(-1, keepdim=True)
    labels = torch.stack([label_0, label_1], dim=-1)
    # x ln x is 0 at 0. Only ties, of entropy ln 2, have an entropy at all.
    entropy = -torch.where(labels > 0, labels * labels.clamp(min=1e-300).log(), torch.zeros_like(labels)).sum(-1)
    loss = -(labels * probability.log()).sum(-1) - entropy
    weight = 1 / examples
    return (weight / weight.sum() * loss).sum()


def test_pickscore_parity() -> None:
    """Its loss is ours up to a constant, ln 2 for each tie, and its gradients are ours."""
    generator = torch.Generator().manual_seed(1)
    embeddings = [
        torch.randn(9, 5, generator=generator, dtype=torch.double).requires_grad_() for _ in ("text", "0", "1")
    ]
    scale = torch.tensor(20.0, dtype=torch.double)
    label_0 = torch.tensor([1, 0, 0.5, 1, 1, 0.5, 0, 0, 1], dtype=torch.double)
    examples = torch.tensor([1, 2, 2, 3, 3, 3, 1, 7, 1], dtype=torch.double)

    text, chosen, rejected = (torch.nn.functional.normalize(features, dim=-1) for features in embeddings)
    margin = scale * (text * (chosen - rejected)).sum(-1)
    weight = (1 / examples) / (1 / examples).sum()
    ours = (weight * bradley_terry_loss(margin, label_0)).sum()
    theirs = pickscore(*embeddings, scale, label_0, 1 - label_0, examples)

    tie = weight[label_0 == 0.5].sum() * math.log(2)
    assert tie > 0.1  # there is something to subtract
    assert abs(ours.item() - tie.item() - theirs.item()) < 1e-6
    for own, their in zip(torch.autograd.grad(ours, embeddings), torch.autograd.grad(theirs, embeddings), strict=True):
        assert own.abs().max() > 1e-2
        torch.testing.assert_close(own, their, atol=1e-6, rtol=1e-6)


def test_retrieval_kl_by_hand() -> None:
    """Base (1/2, 1/2) and adapted (3/4, 1/4): KL = ln(1/2 : 3/4)/2 + ln(1/2 : 1/4)/2 = ln(4/3)/2."""
    reward, reference = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[5.0, 5.0]])
    torch.testing.assert_close(retrieval_kl(reward, reference), torch.tensor([math.log(4 / 3) / 2]))


def test_retrieval_kl_is_zero_for_shifted_rewards_only() -> None:
    reference = torch.randn(3, 6)
    torch.testing.assert_close(retrieval_kl(reference + 4, reference), torch.zeros(3), atol=1e-6, rtol=0)
    assert (retrieval_kl(reference.flip(1), reference) > 0.01).all()


def test_agreement_counts_a_margin_of_zero_half_whatever_the_preference() -> None:
    margin = torch.tensor([2.0, -2.0, 0.0, 2.0, -2.0, 0.0])
    preference = torch.tensor([1.0, 0.8, 0.7, 0.0, 0.2, 0.3])
    assert agreement(margin, preference).tolist() == [1.0, 0.0, 0.5, 0.0, 1.0, 0.5]
    assert agreement(margin.double(), preference).dtype == torch.double
