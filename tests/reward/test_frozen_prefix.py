"""The cache of frozen features: it changes how often things are computed, and nothing else."""

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from PIL import Image
from torch import nn

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.reward.cache import FeatureCache, MemoryPairs
from tiny_adapters import PLACEMENTS, adapted
from tiny_models import CONTEXT, FAMILIES, SIGLIP2_MASKED, build, picture, red_pairs


def gradients(model: PeftModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings of a batch, and the gradient of some function of them for each trained parameter."""
    model.zero_grad()
    inputs = {name: value for name, value in inputs.items() if name not in ("preference", "weight")}
    output = model(**inputs)
    probe = torch.linspace(-1, 1, output.text_embeds.shape[1])
    ((output.text_embeds @ probe).exp().sum() + (output.image_embeds @ probe).exp().sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found | {"text_embeds": output.text_embeds.detach(), "image_embeds": output.image_embeds.detach()}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", [*FAMILIES, pytest.param(SIGLIP2_MASKED, id="siglip2-masked")])
def test_same_embeddings_and_gradients(family: object, placement: str) -> None:
    model, collator = adapted(family, placement)
    pairs = red_pairs(7)
    cache = FeatureCache(model, collator, batch_size=3)  # prompts of a batch here share none there
    assert sum(prefix is not None for prefix in (cache.text_prefix, cache.image_prefix)) == PLACEMENTS[placement][1]
    cached = cache.add(pairs)
    for rows in ([0, 5], [6, 1, 4], [2]):
        expected = gradients(model, collator([pairs[row] for row in rows]))
        with cache.recall(cache.collate([cached[row] for row in rows])) as inputs:
            found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        assert any(value.abs().max() > 1e-3 for name, value in expected.items() if "lora" in name)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_whole_again_after_use(placement: str) -> None:
    model, collator = adapted("clip", placement)
    before = dict(model.named_modules())
    cache = FeatureCache(model, collator)
    batch = cache.collate(list(cache.add(red_pairs(2))))
    with pytest.raises(RuntimeError, match="interrupted"), cache.recall(batch):
        raise RuntimeError("interrupted")
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_ends_at_the_same_adapter(family: str, tmp_path: Path) -> None:
    ends, losses = [], []
    for cached in (True, False):
        model, processor = build(family)
        trainer = BradleyTerryTrainer(
            model,
            BradleyTerryConfig(
                str(tmp_path / str(cached)),
                cache_features=cached,
                num_train_epochs=2,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=red_pairs(10, weight=[0.5 + i / 10 for i in range(10)]),
            processing_class=processor,
        )
        assert (trainer.cache is not None) == cached
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        ends.append({name: value for name, value in trainer.model.named_parameters() if value.requires_grad})
    assert len(losses[0]) == 6
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-5, rtol=1e-5)


class Counter:
    """Counts what a tower sees, with a hook on the real one."""

    def __init__(self, module: nn.Module) -> None:
        self.seen = 0
        module.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self.seen += len(args[0] if args else next(iter(kwargs.values())))


def test_repeated_images_and_prompts_are_computed_once() -> None:
    model, collator = adapted()
    base = model.get_base_model()
    images, texts = Counter(base.vision_model.embeddings), Counter(base.text_model.embeddings)
    pairs = red_pairs(5)
    cache = FeatureCache(model, collator, batch_size=3)
    cache.add(concatenate_datasets([pairs, pairs, pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})]))
    assert (images.seen, texts.seen, cache.computed) == (10, 5, 15)
    cache.add(pairs)  # another dataset of the same drawings: nothing new
    assert (images.seen, texts.seen) == (10, 5)


def test_images_are_told_apart_by_shape_too() -> None:
    """The same bytes as 20 x 10 and as 10 x 20 are two images."""
    wide = picture((200, 30, 90), size=(20, 10))
    tall = Image.frombytes("RGB", (10, 20), wide.tobytes())
    pairs = Dataset.from_dict({"prompt": ["a"], "chosen": [wide], "rejected": [tall]}, red_pairs(1).features)
    model, collator = adapted()
    cache = FeatureCache(model, collator)
    cached = cache.add(pairs)
    assert cached[0]["images"][0] != cached[0]["images"][1]


@pytest.mark.parametrize("placement", ["projections", "top text layer", "top vision layer"])
def test_memory_bound(placement: str, caplog: pytest.LogCaptureFixture) -> None:
    model, collator = adapted("clip", placement)
    pairs = red_pairs(12)
    cache = FeatureCache(model, collator, batch_size=4)
    assert cache.add(pairs) is not None
    held = [*cache._images.values(), *cache._texts.values()]
    assert cache.bytes == sum(value.nbytes for features in held for value in features.values())
    assert FeatureCache(model, collator, max_bytes=1.2 * cache.bytes, batch_size=4).add(pairs) is not None
    small = FeatureCache(model, collator, max_bytes=cache.bytes / 2, batch_size=4)
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        assert small.add(pairs) is None
    assert small.computed < cache.computed / 2  # said early, not after hours
    assert "more than `cache_max_gb`: going on without a cache" in caplog.text


def test_repeated_images_need_their_room_once() -> None:
    model, collator = adapted()
    pairs = red_pairs(6)
    once = FeatureCache(model, collator, batch_size=12)
    once.add(pairs)
    again = FeatureCache(model, collator, max_bytes=1.2 * once.bytes, batch_size=100)
    assert again.add(concatenate_datasets([pairs] * 5)) is not None


def test_trainer_without_room_trains_without_a_cache(tmp_path: Path) -> None:
    model, processor = build()
    args = BradleyTerryConfig(str(tmp_path), cache_max_gb=1e-9, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = BradleyTerryTrainer(model, args, train_dataset=red_pairs(4), processing_class=processor)
    assert trainer.cache is None
    assert not isinstance(trainer.train_dataset, MemoryPairs)


def test_batches_are_padded_to_their_own_longest() -> None:
    model, collator = adapted("clip", "top text layer")
    pairs = red_pairs(5)
    cache = FeatureCache(model, collator)
    cached = cache.add(pairs)
    for rows in ([0], [1, 0], [4, 2, 0]):
        expected = collator([pairs[row] for row in rows])
        found = cache.collate([cached[row] for row in rows])
        for name in ("input_ids", "attention_mask", "preference", "weight"):
            assert torch.equal(found[name], expected[name])
        assert found["text_hidden"].shape[:2] == expected["input_ids"].shape
    assert found["input_ids"].shape[1] < CONTEXT
