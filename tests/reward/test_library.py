"""Libraries: searched by caption and ordered by taste, against embeddings whose neighbours are known."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import normalize

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, ImageLibrary, PreferenceScorer
from bt_hf.reward.library import INDEXED_FROM
from tiny_models import build, picture, red_pairs, save

QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}


def library_of(images: torch.Tensor) -> ImageLibrary:
    images = normalize(images, dim=-1)
    return ImageLibrary([f"{i}.png" for i in range(len(images))], images, images, "some model")


def test_taste_orders_what_the_caption_finds() -> None:
    """Twelve images: four of what is asked for, in two looks, and eight of other things in the liked look."""
    wanted, other, look = torch.eye(6)[:3]
    asked = [wanted + side * 0.5 * look for side in (-1, 1, -1, 1)]
    others = [other + 0.5 * look + 0.01 * i * torch.eye(6)[3] for i in range(8)]
    found = library_of(torch.stack(asked + others)).search(wanted, look, 20.0, top_k=4)
    assert {image.index for image in found} == {0, 1, 2, 3}
    assert {image.index for image in found[:2]} == {1, 3}
    assert found[0].name == f"{found[0].index}.png"
    assert found[0].taste > 0 > found[-1].taste


def test_without_a_taste_it_is_the_bases_order() -> None:
    torch.manual_seed(0)
    library, text = library_of(torch.randn(200, 16)), normalize(torch.randn(16), dim=-1)
    found = library.search(text, torch.zeros(16), 30.0, top_k=7)
    assert [image.index for image in found] == (library.base @ text).topk(7).indices.tolist()
    torch.testing.assert_close(
        torch.tensor([image.caption for image in found]), 30 * (library.base @ text).topk(7).values
    )


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
def test_any_number_is_asked_for(top_k: int) -> None:
    library = library_of(torch.randn(3, 8))
    scorer = PreferenceScorer(*build())
    library.model = scorer.digest()
    width = scorer.embed_texts("a").shape[1]
    library.base = library.adapted = normalize(torch.randn(3, width), dim=-1)
    assert len(scorer.search("a red apple", library, top_k)) == min(top_k, 3)


def test_saved_and_loaded(tmp_path: Path) -> None:
    scorer = PreferenceScorer.from_pretrained(save(tmp_path / "base"))
    images = [picture((40 * i, 90, 90), seed=i) for i in range(5)]
    library = scorer.index(images, names=list("abcde"))
    library.save(tmp_path / "library")
    loaded = ImageLibrary.load(tmp_path / "library")
    assert torch.equal(loaded.base, library.base)
    assert scorer.search("a red apple", loaded, 3) == scorer.search("a red apple", library, 3)
    with pytest.raises(ValueError, match="was embedded by another model"):
        PreferenceScorer(*build(seed=5)).search("a red apple", loaded)
    with pytest.raises(ValueError, match="does not hold a library"):
        ImageLibrary.load(tmp_path / "base")
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="a dataset of another kind"):
        ImageLibrary.load(tmp_path / "other")
    with pytest.raises(ValueError, match="`names` should name each of 5 images"):
        scorer.index(images, names=["a"])
    empty = scorer.index([])
    assert scorer.search("a red apple", empty) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> BradleyTerryTrainer:
    model, processor = build(seed=3)
    args = BradleyTerryConfig(str(tmp_path_factory.mktemp("out")), max_steps=1, learning_rate=0.0, **QUIET)
    trainer = BradleyTerryTrainer(model, args, train_dataset=red_pairs(24), processing_class=processor)
    trainer.train()
    return trainer


def test_taste_without_a_caption(trained: BradleyTerryTrainer) -> None:
    """Differences are those of the rewards of a prompt, but for the caption's part."""
    scorer = PreferenceScorer(trained.model, trained.processing_class)
    pairs = red_pairs(12, seed=7)
    prompts, chosen, rejected = (pairs[name][:] for name in ("prompt", "chosen", "rejected"))
    liked = scorer.taste(chosen) - scorer.taste(rejected)
    rewards = scorer.score(prompts, chosen) - scorer.score(prompts, rejected)
    assert torch.corrcoef(torch.stack([liked, rewards]))[0, 1] > 0.8
    with pytest.raises(TypeError, match="has no adapter"):
        PreferenceScorer(*build()).taste([picture((1, 2, 3))])


def test_reward_is_the_score_and_has_the_gradient_of_its_pixels(trained: BradleyTerryTrainer) -> None:
    scorer = PreferenceScorer(trained.model, trained.processing_class)
    images = red_pairs(3)["chosen"][:]
    pixels = scorer.processor.image_processor(images, return_tensors="pt")["pixel_values"].requires_grad_()
    rewards = scorer.reward(pixels, "a red apple")
    torch.testing.assert_close(rewards.detach(), scorer.score("a red apple", images), atol=1e-4, rtol=1e-5)
    rewards.sum().backward()
    direction = torch.randn_like(pixels)
    with torch.no_grad():
        step = 1e-2 * direction
        above, below = (scorer.reward(moved, "a red apple").sum() for moved in (pixels + step, pixels - step))
        slope = (above - below) / 2e-2
    torch.testing.assert_close((pixels.grad * direction).sum(), slope, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="2 prompts and 3 images"):
        scorer.reward(pixels, ["a", "b"])


def test_a_large_library_is_searched_in_one_product() -> None:
    """A hundred thousand images; the time is printed, and only its order of size is held."""
    library = library_of(torch.randn(100_000, 64))
    text = normalize(torch.randn(64), dim=-1)
    started = time.perf_counter()
    assert len(library.search(text, torch.randn(64), 100.0, top_k=10)) == 10
    print(f"{time.perf_counter() - started:.3f} s")


def test_faiss_finds_the_same_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A large library is searched by FAISS where it is installed, and a folder saved so is loaded without it."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    generator = torch.Generator().manual_seed(0)
    texts = normalize(torch.randn(5, 32, generator=generator), dim=-1)
    with_faiss = library_of(torch.randn(INDEXED_FROM, 32, generator=generator))
    found = [with_faiss.search(text, texts[0], 30.0, top_k=7) for text in texts]
    assert with_faiss._index.ntotal == INDEXED_FROM
    with_faiss.save(tmp_path / "library")
    monkeypatch.setitem(sys.modules, "faiss", None)  # an import of it fails
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    without = ImageLibrary.load(tmp_path / "library")
    assert [without.search(text, texts[0], 30.0, top_k=7) for text in texts] == found
    assert without._index is None


def test_a_small_library_needs_no_index() -> None:
    library = library_of(torch.randn(INDEXED_FROM - 1, 4))
    assert len(library.search(library.base[5], torch.zeros(4), 30.0, top_k=1)) == 1
    assert library._index is None


def test_a_search_embeds_its_prompt_alone(trained: BradleyTerryTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabulary and weights are read once, and again when the adapter is scaled or trained on."""
    scorer = PreferenceScorer(trained.model, trained.processing_class)
    library = scorer.index([picture((40 * i, 90, 90), seed=i) for i in range(5)])
    first = scorer.search("a red apple", library, 3)
    embedded: list[str] = []
    embed = scorer._embed_texts
    monkeypatch.setattr(scorer, "_embed_texts", lambda prompts: embedded.extend(prompts) or embed(prompts))
    assert scorer.search("a red apple", library, 3) == first
    assert embedded == ["a red apple"] * 2  # with and without the adapter
    scorer.set_scale(0.5)
    with pytest.raises(ValueError, match="embedded by another model"):
        scorer.search("a red apple", library, 3)
    scorer.set_scale(1.0)
    assert scorer.search("a red apple", library, 3) == first
    weight = next(value for name, value in trained.model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        weight.add_(0.1)
        with pytest.raises(ValueError, match="embedded by another model"):
            scorer.search("a red apple", library, 3)
        weight.sub_(0.1)
