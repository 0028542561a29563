"""Frozen features in files: the same batches and adapters as from memory, found again only where they are right."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from peft import LoraConfig
from torch import nn

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.reward.cache import FeatureCache, FilePairs, MemoryPairs, store_pairs
from bt_hf.reward.collator import PreferenceCollator
from tiny_adapters import PLACEMENTS, adapted
from tiny_models import FAMILIES, SIGLIP2_MASKED, build, red_pairs


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", [*FAMILIES, pytest.param(SIGLIP2_MASKED, id="siglip2-masked")])
def test_batches_are_those_of_the_memory(family: object, placement: str, tmp_path: Path) -> None:
    model, collator = adapted(family, placement)
    pairs = red_pairs(7, preference=[1.0, 0.5, 0.25, 1.0, 1.0, 0.0, 1.0])
    cache = FeatureCache(model, collator)
    held = cache.add(pairs)
    stored = store_pairs(FeatureCache(model, collator), pairs, str(tmp_path), "test")
    for rows in ([0, 5], [6, 1, 4], [2]):
        expected = held.collate([held[row] for row in rows])
        for found in (
            stored.collate(stored.__getitems__(rows)),
            stored.collate([stored[row] for row in rows]),
            stored.select(rows).collate(list(stored.select(rows))),
        ):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def train(
    folder: Path, model: nn.Module, processor: object, pairs: Dataset | None = None, **options: object
) -> BradleyTerryTrainer:
    args = BradleyTerryConfig(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = BradleyTerryTrainer(
        model,
        args,
        train_dataset=red_pairs(10) if pairs is None else pairs,
        eval_dataset=red_pairs(6, seed=1) if pairs is None else pairs,
        processing_class=processor,
        peft_config=LoraConfig(r=2, target_modules=r".*layers\.2\..*(q_proj|v_proj)"),
    )
    trainer.train()
    return trainer


def test_training_ends_at_the_same_adapter_and_later_runs_find_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(tmp_path / "plain", *build("clip"))
    # No memory is taken, so its bound does not matter.
    options = {"cache_dir": str(tmp_path / "cache")}
    stored = train(tmp_path / "stored", *build("clip"), **options)
    assert isinstance(stored.train_dataset, FilePairs)
    assert isinstance(stored.eval_dataset, FilePairs)
    assert stored.cache.bytes == 0

    def refuse(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(FeatureCache, "encode_images", refuse)
    monkeypatch.setattr(FeatureCache, "encode_prompts", refuse)
    again = train(tmp_path / "again", *build("clip"), **options)
    trained = {name: value for name, value in plain.model.named_parameters() if value.requires_grad}
    assert max(value.abs().max() for name, value in trained.items() if "lora_B" in name) > 1e-3
    for other in (stored, again):
        for name, value in other.model.named_parameters():
            if value.requires_grad:
                torch.testing.assert_close(value, trained[name], atol=1e-5, rtol=1e-5)
        assert other.evaluate()["eval_accuracy"] == plain.evaluate()["eval_accuracy"]


def test_files_are_named_by_what_the_features_depend_on() -> None:
    model, collator = adapted("clip", "top vision layer")
    before = FeatureCache(model, collator).fingerprint()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "vision_model.encoder.layers.2." in name or "projection" in name:
                parameter.add_(1.0)  # above the frozen prefix
    assert FeatureCache(model, collator).fingerprint() == before
    others = [FeatureCache(*adapted("clip", "top text layer")).fingerprint()]
    with torch.no_grad():
        next(iter(model.get_base_model().vision_model.embeddings.parameters())).add_(1.0)
    others.append(FeatureCache(model, collator).fingerprint())
    model, collator = adapted("clip", "top vision layer")
    collator(list(red_pairs(2)))  # leaves its mark in the tokenizer
    assert FeatureCache(model, collator).fingerprint() == before
    collator.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    others.append(FeatureCache(model, collator).fingerprint())
    collator.processor.tokenizer.model_max_length = 5
    others.append(FeatureCache(model, collator).fingerprint())
    model.get_base_model().vision_model.config.layer_norm_eps = 0.1
    others.append(FeatureCache(model, collator).fingerprint())
    assert len({before, *others}) == 6


def test_a_half_precision_model_reads_its_own_precision(tmp_path: Path) -> None:
    model, processor = build("clip")
    cache = FeatureCache(model.to(torch.bfloat16).requires_grad_(False), PreferenceCollator(processor))
    batch = store_pairs(cache, red_pairs(2), str(tmp_path), "test")
    hidden = batch.collate(list(batch))
    assert {value.dtype for name, value in hidden.items() if "hidden" in name} == {torch.bfloat16}


def test_a_bad_image_is_named(tmp_path: Path) -> None:
    good = red_pairs(3).cast_column("rejected", Image(decode=False))
    rows = [dict(row) for row in good]
    rows[1]["rejected"] = {"bytes": b"no image", "path": None}
    pairs = Dataset.from_list(rows).cast_column("rejected", Image(decode=False))
    with pytest.raises(ValueError, match=r"`rejected` of row 1: unreadable image: 8 bytes"):
        store_pairs(FeatureCache(*adapted()), pairs, str(tmp_path), "test")


def features(cache: FeatureCache, pairs: Dataset, folder: Path, kept: str) -> MemoryPairs | FilePairs:
    """Features of pairs in memory, or in files."""
    return cache.add(pairs) if kept == "memory" else store_pairs(cache, pairs, str(folder), "test")


@pytest.mark.parametrize("kept", ["memory", "files"])
@pytest.mark.parametrize("placement", ["projections", "top text layer", "top vision layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_gives_the_same_numbers(family: str, placement: str, kept: str, tmp_path: Path) -> None:
    """Compare both sides, cached and uncached, and prompts beside different others."""
    numbers = []
    for side in ("left", "right"):
        model, collator = adapted(family, placement)
        collator.processor.tokenizer.padding_side = side
        pairs = red_pairs(5)
        cached = features(FeatureCache(model, collator, batch_size=2), pairs, tmp_path / side, kept)
        for rows in ([0, 4, 2], [3], [1, 0]):
            expected = collator([pairs[row] for row in rows])
            batch = cached.collate([cached[row] for row in rows])
            with torch.no_grad(), cached.cache.recall(batch) as inputs:
                found = embed(model, inputs)
            uncached = embed(model, expected)
            for one, other in zip(found, uncached, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            numbers.append((side, found[0]))
    if not family.startswith("siglip"):  # its towers fill the context, on the side that they were trained on
        for (_, left), (_, right) in zip(numbers[:3], numbers[3:], strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def embed(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(**{name: value for name, value in inputs.items() if name not in ("preference", "weight")})
    return output.text_embeds, output.image_embeds


@pytest.mark.parametrize("kept", ["memory", "files"])
def test_prompts_of_the_same_tokens_are_computed_once(kept: str, tmp_path: Path) -> None:
    """CLIP reads small letters, single spaces, and no more than its context."""
    model, collator = adapted()
    seen: list[int] = []
    embeddings = model.get_base_model().text_model.embeddings
    embeddings.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    prompts = ["A red apple", "a  red apple ", "a RED apple", "a boat", "bird " * 30, "bird " * 40]
    pairs = red_pairs(6).remove_columns("prompt").add_column("prompt", prompts)
    cached = features(FeatureCache(model, collator), pairs, tmp_path, kept)
    assert sum(seen) == 3 + (kept == "files")  # the first once more to learn its shape
    found = embed_cached(model, cached)
    expected = embed(model, collator(list(pairs)))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def embed_cached(model: nn.Module, cached: MemoryPairs | FilePairs) -> torch.Tensor:
    with cached.cache.recall(cached.collate(list(cached))) as inputs:
        return embed(model, inputs)[0]


@pytest.mark.parametrize("change", ["weight", "buffer", "dtype", "tokenizer", "images"])
def test_whatever_can_differ_names_other_files(change: str) -> None:
    model, collator = adapted()
    before = FeatureCache(model, collator).fingerprint()
    assert FeatureCache(*adapted()).fingerprint() == before
    base = model.get_base_model()
    if change == "weight":
        base.text_model.get_input_embeddings().weight.data[57, 3] += 1e-4  # one number of one word
    elif change == "buffer":
        base.vision_model.embeddings.position_ids[0, -1] = 0
    elif change == "dtype":
        base.to(torch.bfloat16)
    elif change == "tokenizer":
        collator.processor.tokenizer.add_tokens("appletree")
    else:
        collator.processor.image_processor.image_mean = [0.5, 0.5, 0.25]
    assert FeatureCache(model, collator).fingerprint() != before


@pytest.mark.parametrize("name", ["numpy", "torch", "arrow", "pandas"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_format_changes_nothing(name: str, cached: bool, tmp_path: Path) -> None:
    def run(pairs: Dataset) -> list[float]:
        trainer = train(tmp_path, *build(), pairs, cache_features=cached, logging_steps=1)
        assert (trainer.cache is not None) == cached
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*losses, trainer.evaluate()["eval_margin"], trainer.evaluate(pairs)["eval_margin"]]

    pairs = red_pairs(6, preference=[1.0, 0.8, 0.5, 1.0, 0.6, 1.0])
    assert run(pairs.with_format(name)) == run(pairs)


def test_a_transform_is_applied_at_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn: list[int] = []

    def augment(batch: dict[str, list]) -> dict[str, list]:
        drawn.append(len(batch["prompt"]))
        return batch

    model, processor = build()
    args = BradleyTerryConfig(
        str(tmp_path), num_train_epochs=3, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    pairs = red_pairs(4).with_transform(augment)
    trainer = BradleyTerryTrainer(model, args, train_dataset=pairs, processing_class=processor)
    assert trainer.cache is None
    assert "has a transform (`with_transform`)" in caplog.text
    drawn.clear()
    trainer.train()
    assert sum(drawn) >= 3 * 4
    cache = FeatureCache(*adapted())
    assert cache.add(pairs) is None
