"""Frozen features in files: the same batches and adapters as from memory, found again only where they are right."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from peft import LoraConfig
from torch import nn

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer
from bt_hf.reward.cache import FeatureCache, FilePairs, store_pairs
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


def train(folder: Path, model: nn.Module, processor: object, **options: object) -> BradleyTerryTrainer:
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
        train_dataset=red_pairs(10),
        eval_dataset=red_pairs(6, seed=1),
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
    options = {"cache_dir": str(tmp_path / "cache"), "cache_max_gb": 1e-9}
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
