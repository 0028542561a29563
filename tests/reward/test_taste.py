"""A taste in the LoRA of both projections: the model's own margins are those that were fitted."""

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig
from torch.nn import functional as F
from torch.nn.functional import log_softmax, normalize

from bt_hf.reward import encoders, taste
from bt_hf.reward.lora import add_adapter
from bt_hf.reward.posterior import Taste
from bt_hf.reward.taste import EmbeddedPairs, best_scale, plain_lora, plan_update, vocabulary_texts, write_update
from bt_hf.training.lora_options import LoraOptions
from tiny_models import ALL_FAMILIES, build, red_pairs


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def embedded(pairs: int = 40, width: int = 32, features: int | None = None) -> EmbeddedPairs:
    """Texts far from images, as in real dual encoders; the last coordinate of all images is the same."""
    images = F.pad(0.8 * normalize(gaussian(2 * pairs, width - 1, seed=1), dim=-1), (0, 1), value=0.6)
    text = 0.1 * gaussian(pairs, width, seed=2) / width**0.5
    text[:, -2] += 1
    chosen, rejected = images.chunk(2)
    inputs = None if features is None else gaussian(2 * pairs, features, seed=3) / features**0.5
    ones = torch.ones(pairs).double()
    return EmbeddedPairs(normalize(text, dim=-1), chosen, rejected, ones, ones, inputs)


def some_taste(strength: float, width: int = 32, features: int | None = None, by_prompt: bool = False) -> Taste:
    """Typical margins of `strength`."""
    direction = strength * normalize(gaussian(width, seed=5), dim=0) * width**0.5
    matrix = torch.zeros(width, width).double()
    if by_prompt:
        matrix = 0.3 * torch.outer(direction.roll(1), gaussian(width, seed=6)) / width**0.5
    feature = None if features is None else strength * normalize(gaussian(features, seed=7), dim=0)
    return Taste(direction, matrix, feature, caption=0.1)


def shared_of(width: int = 32) -> torch.Tensor:
    return torch.eye(width).double()[-1]


@pytest.mark.parametrize("features", [None, 24], ids=["output", "inputs, too"])
@pytest.mark.parametrize("by_prompt", [False, True], ids=["any prompt", "by prompt"])
@pytest.mark.parametrize("strength", [0.3, 3.0])
@pytest.mark.parametrize("scale", [10.0, 20.0, 100.0, 112.0])
def test_margins_are_those_of_the_taste(scale: float, strength: float, by_prompt: bool, features: int | None) -> None:
    """At any logit scale: too large ones are cooled, and at too small ones images are stretched."""
    pairs, wanted = embedded(features=features), some_taste(strength, 32, features, by_prompt)
    words = pairs.text
    image_rank = 0 if features is None else 8
    update = plan_update(wanted, pairs, words, scale, shared_of(), 8, image_rank)
    found, target = update.margins(pairs, scale), pairs.margins(wanted, scale)
    slope = float(found @ target / target.square().sum())
    bounded = features is None and float((wanted.direction + scale * 0.1 * words).norm(dim=1).mean()) > scale
    assert 0.98 < slope < 1.02 or (bounded and slope < 1)
    tolerance = 0.97 if strength > 1 and scale < 50 else 0.995
    assert torch.corrcoef(torch.stack([found, target]))[0, 1] > tolerance


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_what_fills_up_the_length_orders_no_new_images(scale: float) -> None:
    """Images vary a little along the direction that fills up the length; on unseen ones, the margins don't."""
    pairs, new = embedded(4, features=24), embedded(400, features=24)
    for rows, seed in ((pairs, 10), (new, 11)):
        for images in (rows.chosen, rows.rejected):
            images[:, -1] += 0.03 * gaussian(len(images), seed=seed + int(images is rows.chosen))
            images[:] = normalize(images, dim=-1)
    wanted = some_taste(0.5, 32, 24)
    update = plan_update(wanted, pairs, pairs.text, scale, shared_of(), 8, 8)
    found, target = update.margins(new, scale), new.margins(wanted, scale)
    assert torch.corrcoef(torch.stack([found, target]))[0, 1] > 0.99


def test_no_taste_is_no_update() -> None:
    zero = torch.zeros(32).double()
    nothing = Taste(zero, torch.zeros(32, 32).double(), None, caption=1.0)
    pairs = embedded(features=24)
    update = plan_update(nothing, pairs, pairs.text, 20.0, shared_of(), 8, 8)
    base = 20 * (pairs.text * (pairs.chosen - pairs.rejected)).sum(1)
    torch.testing.assert_close(update.margins(pairs, 20.0), base, atol=1e-9, rtol=0)


def test_without_further_ranks_the_taste_depends_on_no_prompt() -> None:
    pairs = embedded()
    update = plan_update(some_taste(1.0, by_prompt=True), pairs, pairs.text, 20.0, shared_of(), 1, 0)
    assert update.left.shape == (32, 0)
    assert update.right.shape == (0, 32)
    assert update.margins(pairs, 20.0).isfinite().all()


@pytest.mark.parametrize("alpha", [8, 32])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_written_update_is_what_the_model_does(family: str, alpha: int) -> None:
    """Embeddings of unseen texts and images, from the model's own forward, against the update's formula."""
    base, processor = build(family)
    give_bias(base)
    rows = red_pairs(12)
    pixels = encoders_inputs(processor, rows["chosen"])
    texts = ["a photo of the old house", "green lamp and blue boat", "the small bird"]
    tokens = encoders.tokenize(processor, texts)
    model = add_adapter(base, None, LoraOptions(lora_alpha=alpha))
    layers = taste.output_layers(model)
    text_layer, image_layer = plain_lora(model, layers.text), plain_lora(model, layers.image)
    with torch.no_grad():
        text, images = encoders.embed_texts(model, tokens), encoders.embed_images(model, pixels)
        passed: list[torch.Tensor] = []
        with image_layer.register_forward_hook(lambda module, args, output: passed.extend([args[0], output])):
            encoders.embed_images(model, pixels)
        entered, left = passed
        direct = left.shape == images.shape
        with text_layer.register_forward_pre_hook(lambda m, args: features.append(args[0])):
            features: list[torch.Tensor] = []
            encoders.embed_texts(model, encoders.tokenize(processor, vocabulary_texts(processor.tokenizer)))
    width = images.shape[1]
    inputs = (entered / left.norm(dim=-1, keepdim=True)).double() if direct else None
    update = taste.Update(
        shift=2 * gaussian(width) / width**0.5,
        left=gaussian(width, 2, seed=1) / width**0.5,
        right=gaussian(2, width, seed=2) / width**0.5,
        along=normalize(gaussian(width, seed=3), dim=0),
        stretch=1.5 if direct else 0.0,
        by_feature=gaussian(inputs.shape[1], seed=4) if direct else None,
        removed=normalize(gaussian(width, seed=8), dim=0) if direct else None,
    )
    error = write_update(model, text_layer, image_layer, update, features[0], scale=0.7)
    assert error < 0.1
    with torch.no_grad():
        adapted_text = encoders.embed_texts(model, tokens).double()
        adapted_images = encoders.embed_images(model, pixels).double()
    cosine = (adapted_text * update.texts(text.double(), 0.7)).sum(1)
    assert cosine.min() > 0.99  # lengths of texts differ, and the shift is constant to a few hundredths
    torch.testing.assert_close(adapted_images, update.images(images.double(), inputs, 0.7), atol=1e-5, rtol=0)


def encoders_inputs(processor, images: list) -> dict[str, torch.Tensor]:
    return dict(processor.image_processor(list(images), return_tensors="pt"))


def test_best_scale_is_the_least_of_loss_and_divergence() -> None:
    """Against the objective written out: half the loss's gain is given up where captions matter."""
    pairs = embedded()
    pairs.chosen, pairs.rejected = pairs.chosen.clone(), pairs.rejected
    wanted = some_taste(2.0)
    flip = (pairs.margins(wanted, 20.0) < 0)[:, None]
    pairs.chosen, pairs.rejected = (
        torch.where(flip, pairs.rejected, pairs.chosen),
        torch.where(flip, pairs.chosen, pairs.rejected),
    )
    update = plan_update(wanted, pairs, pairs.text, 20.0, shared_of(), 8, 0)

    def objective(scale: float, weight: float) -> float:
        text = update.texts(pairs.text, scale)
        margins = 20 * ((pairs.chosen - pairs.rejected) * text).sum(1)
        total = -torch.log(torch.sigmoid(margins))
        for bank in (pairs.chosen, pairs.rejected, pairs.text):
            base, adapted = (log_softmax(20 * rows @ bank.T, dim=1) for rows in (pairs.text, text))
            total = total + weight / 3 * (base.exp() * (base - adapted)).sum(1)
        return float(total.sum())

    scales = []
    for weight in (0.0, 0.3, 3.0, 100.0):
        scale = best_scale(update, pairs, pairs.text, 20.0, weight, 0.0, bank_size=256)
        scales.append(scale)
        if weight:
            assert objective(scale, weight) <= min(objective(step / 10, weight) for step in range(11)) + 1e-9
    assert scales[0] == 1
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] < scales[1]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, target_modules=["text_projection"]),
        AdaLoraConfig(total_step=10, target_modules=["text_projection"]),
        LoraConfig(target_modules=["visual_projection"]),
        IA3Config(target_modules=["text_projection"], feedforward_modules=[]),
    ],
    ids=["dora", "adalora", "other layer", "ia3"],
)
def test_only_a_plain_lora_that_is_still_zero_is_written(config: PeftConfig) -> None:
    assert plain_lora(add_adapter(build()[0], config), "text_projection") is None


def give_bias(base: torch.nn.Module) -> None:
    """Trained layer norms have biases; without one, their output lies on a hyperplane through the origin."""
    for module in base.text_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias)


def test_inputs_that_proved_to_say_nothing_leave_their_rank_alone() -> None:
    """Weights of zero have no direction: the rank keeps its random start, and the images stay as they are."""
    base, processor = build()
    give_bias(base)
    model = add_adapter(base)
    layers = taste.output_layers(model)
    text_layer, image_layer = plain_lora(model, layers.text), plain_lora(model, layers.image)
    width, features = image_layer.get_base_layer().weight.shape
    zero, along = torch.zeros(features).double(), torch.eye(width).double()[0]
    empty = torch.zeros(width, 0).double()
    update = taste.Update(0.1 * along, empty, empty.T, along, by_feature=zero)
    before = encoders.embed_images(model, encoders_inputs(processor, red_pairs(4)["chosen"]))
    assert (
        write_update(model, text_layer, image_layer, update, 1 + 0.01 * torch.randn(64, text_layer.in_features)) < 0.1
    )
    after = encoders.embed_images(model, encoders_inputs(processor, red_pairs(4)["chosen"]))
    torch.testing.assert_close(after, before)
    assert all(value.isfinite().all() for name, value in model.named_parameters() if "lora" in name)


def test_nothing_is_written_where_no_shift_can_be_expressed() -> None:
    base, _ = build()
    model = add_adapter(base, None)
    layer = plain_lora(model, "text_projection")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = torch.randn(40, 16)
    width = layer.lora_B["default"].weight.shape[0]
    empty = torch.zeros(width, 0).double()
    update = taste.Update(torch.ones(width).double(), empty, empty.T, torch.ones(width).double())
    error = write_update(model, layer, None, update, torch.cat([rows, -rows]))
    assert error > taste.TOLERANCE
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["clip", "siglip", "altclip", "chinese_clip"])
def test_vocabulary_gives_many_different_texts(family: str) -> None:
    tokenizer = build(family)[1].tokenizer
    texts = vocabulary_texts(tokenizer, count=10)
    assert len(set(texts)) == len(texts) == 10
    assert not {token for text in texts for token in tokenizer.tokenize(text)} & set(tokenizer.all_special_tokens)
