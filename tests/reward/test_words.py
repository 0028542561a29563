"""Words of a taste, for people whose taste is a direction that one of the words names."""

import pytest
import torch
from torch.nn.functional import normalize

from bt_hf import PreferenceScorer
from bt_hf.reward.lora import add_adapter
from bt_hf.reward.taste import EmbeddedPairs
from bt_hf.reward.words import explain_pairs, explain_shift, known_looks, leans, split_shift
from tiny_models import build, red_pairs

NAMES = ["shaded", "flat", "red", "blue", "old", "new"]


def people(pairs: int = 60, width: int = 24) -> tuple[EmbeddedPairs, torch.Tensor]:
    """Words lie along axes, "flat" opposite to "shaded"; this person likes shaded images more than red ones."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(width).double()
    words = normalize(torch.stack([axes[0], -axes[0], *axes[1:5]]) + axes[-1], dim=-1)
    images = normalize(torch.randn(2 * pairs, width, generator=generator).double(), dim=-1)
    one, other = images.chunk(2)
    first = ((one - other) @ (axes[0] + 0.5 * axes[1]) > 0)[:, None]
    text = normalize(0.1 * torch.randn(pairs, width, generator=generator).double() + axes[-1], dim=-1)
    ones = torch.ones(pairs).double()
    return EmbeddedPairs(text, torch.where(first, one, other), torch.where(first, other, one), ones, ones), words


def test_liked_words_come_first_and_disliked_ones_last() -> None:
    pairs, words = people()
    found = explain_pairs(pairs, words, NAMES)
    assert [found[0].word, found[1].word, found[-1].word] == ["shaded", "red", "flat"]
    assert all(lean.stability >= 0.95 for lean in found)
    assert found[0].lean > 0 > found[-1].lean


def test_words_that_clicks_do_not_tell_are_left_out() -> None:
    """Random clicks lean to some word by chance, but not when they are drawn again."""
    pairs, words = people(30)
    swap = (torch.arange(30) % 2 == 0)[:, None]
    chosen, rejected = pairs.chosen, pairs.rejected
    pairs.chosen, pairs.rejected = torch.where(swap, chosen, rejected), torch.where(swap, rejected, chosen)
    assert len(explain_pairs(pairs, words, NAMES)) < len(NAMES)


def test_leans_are_correlations() -> None:
    images, words = torch.randn(50, 8).double(), torch.randn(5, 8).double()
    liked = torch.randn(50).double()
    found = leans(liked, images, words)
    fit = images @ (words - words.mean(0)).T
    expected = torch.stack([torch.corrcoef(torch.stack([liked, column]))[0, 1] for column in fit.T])
    torch.testing.assert_close(found, expected)


def test_shift_is_told_apart_from_the_captions_share() -> None:
    base = normalize(torch.randn(200, 16), dim=-1)
    shift = torch.randn(16)
    share, found = split_shift(0.3 * base + shift, base)
    assert share == pytest.approx(0.3, abs=1e-5)
    torch.testing.assert_close(found, shift.expand(200, -1), atol=1e-5, rtol=0)


def test_words_of_a_shift_by_the_covariance_of_images() -> None:
    """Ignore in what images hardly differ."""
    _, words = people()
    covariance = torch.diag(torch.tensor([1.0, 1.0, 1e-6] + [1.0] * 21).double())
    shift = torch.eye(24).double()[0] + 50 * torch.eye(24).double()[2]
    assert explain_shift(shift, words, NAMES, covariance)[0].word == "shaded"


def test_scorer_explains_its_adapter() -> None:
    base, processor = build(seed=3)
    model = add_adapter(base)
    torch.nn.init.normal_(model.get_submodule("base_model.model.text_projection.lora_B.default").weight)
    scorer = PreferenceScorer(model, processor)
    found = scorer.explain(["red", "green", "blue", "old", "new"], top_k=2)
    assert 1 <= len(found) <= 4
    assert [lean.lean for lean in found] == sorted((lean.lean for lean in found), reverse=True)
    with_clicks = scorer.explain(top_k=3, pairs=red_pairs(12))
    assert all(lean.stability >= 0.95 for lean in with_clicks)
    with pytest.raises(ValueError, match="`vocabulary` should hold at least one word"):
        scorer.explain([])
    with pytest.raises(TypeError, match="has no adapter"):
        PreferenceScorer(*build()).explain()


@pytest.mark.parametrize("family", ["clip", "altclip"])
def test_only_looks_that_the_vocabulary_holds_are_tried(family: str) -> None:
    """The tiny vocabularies hold a few of the words, and letters for all others."""
    found = set(known_looks(build(family)[1].tokenizer))
    assert {"photo", "red", "blue"} <= found <= {"photo", "red", "green", "blue"}
