"""The constant shift: the same optimum as another optimiser finds on another implementation, and written exactly."""

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from torch.nn.functional import normalize

from bt_hf.reward import encoders, taste
from bt_hf.reward.lora import add_adapter
from bt_hf.reward.taste import fit_shift, text_lora, vocabulary_texts, write_shift
from bt_hf.training.lora_options import LoraOptions
from tiny_models import build


def problem(pairs: int = 14, width: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    text, chosen, rejected = (
        normalize(torch.randn(pairs, width, generator=generator, dtype=torch.double), dim=-1) for _ in range(3)
    )
    preference = torch.rand(pairs, generator=generator).round(decimals=1)
    weight = 0.2 + torch.rand(pairs, generator=generator)
    return {"text": text, "chosen": chosen, "rejected": rejected, "preference": preference, "weight": weight}


def best_shift(
    data: dict[str, torch.Tensor], scale: float, prior: float, alignment: float, smoothing: float, bank: int
) -> np.ndarray:
    """The objective of `fit_shift`'s docstring in numpy, minimised without derivatives of ours."""
    text, chosen, rejected, preference, weight = (value.numpy().astype(float) for value in data.values())
    preference = preference * (1 - smoothing) + (1 - preference) * smoothing
    spread = scale * np.sqrt(weight @ ((chosen - rejected) ** 2).sum(1) / weight.sum())

    def objective(delta: np.ndarray) -> float:
        shifted = text + delta
        shifted /= np.linalg.norm(shifted, axis=1, keepdims=True)
        win = expit(scale * ((chosen - rejected) * shifted).sum(1))
        loss = -(preference * np.log(win) + (1 - preference) * np.log(1 - win))
        for images in (chosen[:bank], rejected[:bank]):
            base, adapted = (log_softmax(scale * x @ images.T, axis=1) for x in (text, shifted))
            loss = loss + alignment / 2 * (np.exp(base) * (base - adapted)).sum(1)
        return weight @ loss + prior / 2 * ((spread * delta) ** 2).sum()

    return minimize(objective, np.zeros(text.shape[1]), method="BFGS", options={"gtol": 1e-7}).x


@pytest.mark.parametrize(
    ("prior", "alignment", "smoothing", "bank"),
    [(0.1, 0.0, 0.0, 256), (0.1, 1.0, 0.0, 256), (1.0, 0.5, 0.1, 5)],
)
def test_fit_against_another_optimiser(prior: float, alignment: float, smoothing: float, bank: int) -> None:
    data = problem()
    options = {"prior_weight": prior, "kl_weight": alignment, "label_smoothing": smoothing, "bank_size": bank}
    shift = fit_shift(**data, scale=8.0, **options)
    expected = best_shift(data, 8.0, prior, alignment, smoothing, bank)
    assert np.linalg.norm(expected) > 0.05
    np.testing.assert_allclose(shift.numpy(), expected, atol=1e-4)


def test_only_ties_that_the_base_calls_ties_too_give_no_shift() -> None:
    """Each text lies half way between its two images, so the base prefers neither."""
    data = problem()
    data |= {"preference": torch.full((14,), 0.5), "text": normalize(data["chosen"] + data["rejected"], dim=-1)}
    shift = fit_shift(**data, scale=8.0, prior_weight=0.1, kl_weight=1.0)
    torch.testing.assert_close(shift, torch.zeros_like(shift), atol=1e-9, rtol=0)
    data["preference"] = torch.full((14,), 0.6)
    assert fit_shift(**data, scale=8.0, prior_weight=0.1, kl_weight=1.0).norm() > 1e-3


def test_stronger_prior_is_more_cautious() -> None:
    sizes = [
        fit_shift(**problem(), scale=8.0, prior_weight=prior, kl_weight=0.0).norm().item()
        for prior in (0.01, 0.1, 1, 10, 100)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 10 * sizes[-1]


def test_weight_is_as_good_as_a_copy() -> None:
    """Twice the weight in every pair of the first half, or each of them twice."""
    data = problem()
    first = torch.arange(14) < 7
    weighted = data | {"weight": torch.where(first, 2.0, 1.0)}
    copied = {name: torch.cat([value, value[first]]) for name, value in data.items()}
    copied["weight"] = torch.ones(21)
    shifts = [fit_shift(**d, scale=8.0, prior_weight=0.1, kl_weight=0.0) for d in (weighted, copied)]
    torch.testing.assert_close(*shifts, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("alpha", [8, 32])
@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "metaclip_2", "altclip"])
def test_written_shift_is_constant_on_unseen_texts(family: str, alpha: int) -> None:
    """The embedding before normalisation moves by (its mean length) * delta, whatever the text is."""
    base, processor = build(family)
    give_bias(base)
    model = add_adapter(base, None, LoraOptions(lora_alpha=alpha))
    layer = text_lora(model)
    delta = torch.randn(layer.lora_B["default"].weight.shape[0]).double()
    features, unshifted = projection(model, layer, processor, vocabulary_texts(processor.tokenizer))
    error = write_shift(model, layer, delta, features)
    assert error < 0.1

    texts = ["a photo of the old house", "green lamp and blue boat", "the small bird"]
    unseen, after = projection(model, layer, processor, texts)
    shift = (after - layer.get_base_layer()(unseen)) / unshifted.norm(dim=1).mean()
    expected = delta.float()
    assert (normalize(shift, dim=-1) @ normalize(expected, dim=0)).min() > 0.999
    torch.testing.assert_close(shift.norm(dim=1) / expected.norm(), torch.ones(3), atol=0.15, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, target_modules=["text_projection"]),
        LoraConfig(init_lora_weights="pissa", target_modules=["text_projection"]),
        AdaLoraConfig(total_step=10, target_modules=["text_projection"]),
        LoraConfig(target_modules=["visual_projection"]),
        IA3Config(target_modules=["text_projection"], feedforward_modules=[]),
    ],
    ids=["dora", "pissa", "adalora", "other layer", "ia3"],
)
def test_only_a_plain_lora_that_is_still_zero_is_written(config: PeftConfig) -> None:
    assert text_lora(add_adapter(build()[0], config)) is None


def give_bias(base: torch.nn.Module) -> None:
    """Trained layer norms have biases; without one, their output lies on a hyperplane through the origin."""
    for module in base.text_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias)


@torch.no_grad()
def projection(model, layer, processor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of the last layer of the text tower, each (N, width)."""
    seen = []
    with layer.register_forward_hook(lambda module, args, output: seen.extend([args[0], output])):
        encoders.embed_texts(model, encoders.tokenize(processor, texts))
    return seen[0], seen[1]


def test_nothing_is_written_where_no_shift_can_be_expressed() -> None:
    base, processor = build()
    model = add_adapter(base, None)
    layer = text_lora(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = torch.randn(40, 16)
    error = write_shift(model, layer, torch.ones(12).double(), torch.cat([rows, -rows]))
    assert error > taste.TOLERANCE
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["clip", "siglip", "altclip", "chinese_clip"])
def test_vocabulary_gives_many_different_texts(family: str) -> None:
    tokenizer = build(family)[1].tokenizer
    texts = vocabulary_texts(tokenizer, count=10)
    assert len(set(texts)) == len(texts) == 10
    assert not {token for text in texts for token in tokenizer.tokenize(text)} & set(tokenizer.all_special_tokens)
