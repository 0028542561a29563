"""Differentiable preprocessing against the processors themselves."""

import numpy as np
import pytest
import torch
from PIL import Image

from bt_hf import PreferenceScorer
from bt_hf.reward.preprocess import preprocess
from tiny_models import ALL_FAMILIES, build

LEVEL = 1 / 255


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("family", [name for name in ALL_FAMILIES if name != "siglip2"])
@pytest.mark.parametrize("shape", [(40, 32), (32, 45), (16, 16), (10, 23)], ids=str)
def test_as_the_processor_up_to_its_rounding(family: str, shape: tuple[int, int]) -> None:
    """The processor rounds to whole levels, up to twice: after rows, and after columns."""
    _, processor = build(family)
    images = noise(*shape)
    given = processor.image_processor([Image.fromarray(image) for image in images], return_tensors="pt")
    found = preprocess(processor.image_processor, as_tensor(images))
    expected = given["pixel_values"]
    std = found.new_tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    assert found.shape == expected.shape
    assert ((found - expected) * std).abs().max() < 1.5 * LEVEL
    assert ((found - expected) * std).abs().mean() < 0.35 * LEVEL


def test_crop_larger_than_the_image_is_padded_as_the_processor_pads() -> None:
    _, processor = build("clip")
    images = processor.image_processor
    images.do_resize, images.crop_size = False, {"height": 21, "width": 13}
    given = images([Image.fromarray(image) for image in noise(16, 16)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(images, as_tensor(noise(16, 16))), given, atol=1e-5, rtol=1e-5)


def test_gradient_against_finite_differences() -> None:
    _, processor = build("clip")
    torch.manual_seed(0)
    images = (0.4 + 0.2 * torch.rand(1, 3, 21, 19)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: preprocess(processor.image_processor, value), images)


def test_a_scorer_called_with_images_gives_its_scores() -> None:
    scorer = PreferenceScorer(*build("clip"))
    images = noise(16, 16)  # nothing to resize, so nothing is rounded
    prompts = ["a red apple", "a boat"]
    leaf = as_tensor(images).requires_grad_()
    rewards = scorer(leaf, prompts)
    torch.testing.assert_close(rewards.detach(), scorer.score(prompts, images), atol=1e-4, rtol=1e-4)
    rewards.sum().backward()
    assert leaf.grad.abs().flatten(1).sum(1).min() > 0
    with pytest.raises(ValueError, match="3 prompts and 2 images"):
        scorer(leaf, ["a", "b", "c"])


def test_what_cannot_be_differentiated_is_named() -> None:
    _, siglip2 = build("siglip2")
    with pytest.raises(TypeError, match="patches of any shape"):
        preprocess(siglip2.image_processor, as_tensor(noise(8, 8)))
    _, clip = build("clip")
    clip.image_processor.resample = Image.Resampling.LANCZOS
    with pytest.raises(TypeError, match="lanczos"):
        preprocess(clip.image_processor, as_tensor(noise(8, 8)))
    for images in (torch.rand(3, 8, 8), torch.rand(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
            preprocess(clip.image_processor, images)
