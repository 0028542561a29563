"""Cross-validation: honest folds, the same predictions as separate trainings, and nothing left behind."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from peft import LNTuningConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from sklearn.linear_model import LogisticRegression
from transformers import TrainingArguments

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, cross_validate
from bt_hf.metrics import agreement, mcnemar_test, preference_metrics
from bt_hf.reward.cross_validation import assign_folds
from tiny_models import build, red_pairs, save

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}


def config(folder: Path, **options: object) -> BradleyTerryConfig:
    return BradleyTerryConfig(str(folder), **{**QUIET, "num_train_epochs": 3, "learning_rate": 1e-2, **options})


def repeated_prompts() -> Dataset:
    """14 pairs of 10 prompts: four prompts have two."""
    pairs = red_pairs(10)
    return concatenate_datasets([pairs, red_pairs(10, seed=1).select(range(4))])


def test_folds_hold_whole_prompts_and_are_balanced() -> None:
    prompts = ["a"] * 7 + ["b", "c", "d"] * 3 + list("efghijkl")
    folds = assign_folds(prompts, 4)
    assert len(folds) == len(prompts)
    for prompt in set(prompts):
        assert len({fold for fold, name in zip(folds, prompts, strict=True) if name == prompt}) == 1
    assert sorted(Counter(folds.tolist()).values()) == [5, 6, 6, 7]  # 24 rows, of which 7 must stay together


def test_distinct_prompts_differ_by_one_at_most() -> None:
    sizes = Counter(assign_folds([f"prompt {i}" for i in range(23)], 5).tolist())
    assert sorted(sizes.values()) == [4, 4, 5, 5, 5]


def test_seed_decides_the_folds() -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    assert np.array_equal(assign_folds(prompts, 4, seed=1), assign_folds(prompts, 4, seed=1))
    assert not np.array_equal(assign_folds(prompts, 4, seed=1), assign_folds(prompts, 4, seed=2))


def test_order_of_rows_does_not_matter() -> None:
    prompts = [f"prompt {i % 7}" for i in range(20)]
    assert np.array_equal(assign_folds(prompts, 3)[::-1], assign_folds(prompts[::-1], 3))


@pytest.mark.parametrize(("prompts", "folds"), [(["a"] * 9, 5), (["a", "b"], 1), ([], 5)])
def test_too_few_prompts(prompts: list[str], folds: int) -> None:
    with pytest.raises(ValueError, match=r"at least 2 folds, and 2 prompts or pairs that .* but got \d:"):
        assign_folds(prompts, folds)


def test_few_prompts_get_as_many_folds() -> None:
    assert sorted(assign_folds(["a", "b", "c"], 5).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_features": False}, {"full_finetuning": True, "learning_rate": 1e-3}],
    ids=["cached", "uncached", "full"],
)
def test_predictions_of_separately_trained_trainers(options: dict, tmp_path: Path) -> None:
    pairs = repeated_prompts()
    base, processor = build()
    result = cross_validate(
        base, pairs, config(tmp_path, **options), folds=3, processing_class=processor, progress=False
    )
    margins, base_margins = np.zeros(14), np.zeros(14)
    for fold in range(3):
        train, test = np.flatnonzero(result.folds != fold), np.flatnonzero(result.folds == fold)
        trainer = BradleyTerryTrainer(
            build()[0],
            config(tmp_path / str(fold), save_strategy="no", **options),
            train_dataset=pairs.select(train),
            processing_class=processor,
        )
        trainer.train()
        margins[test], base_margins[test] = trainer.predict(pairs.select(test)).predictions
    np.testing.assert_allclose(result.margins, margins, atol=1e-4)
    np.testing.assert_allclose(result.base_margins, base_margins, atol=1e-4)
    assert np.abs(result.margins - result.base_margins).max() > 0.1


def test_folds_share_what_the_base_says_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same in all of them: words for looks and of the vocabulary are embedded once each."""
    calls = []
    embed = BradleyTerryTrainer._embed_batches
    monkeypatch.setattr(
        BradleyTerryTrainer, "_embed_batches", lambda self, *args: calls.append(1) or embed(self, *args)
    )
    base, processor = build()
    cross_validate(base, red_pairs(6), config(tmp_path), folds=3, processing_class=processor, progress=False)
    assert len(calls) == 2


def test_result(tmp_path: Path) -> None:
    preference = [1.0, 0.0, 0.5, 1.0, 0.7, 1.0, 0.0, 1.0, 1.0, 1.0]
    pairs = red_pairs(10, preference=preference, weight=[1.0 + i % 2 for i in range(10)])
    base, processor = build()
    result = cross_validate(base, pairs, config(tmp_path), processing_class=processor, progress=False)
    np.testing.assert_allclose(result.preference, preference)
    expected = preference_metrics(result.margins, preference, pairs["weight"])
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert result.metrics["base_log_loss"] == pytest.approx(
        preference_metrics(result.base_margins, preference, pairs["weight"])["log_loss"]
    )
    # The tie is in no accuracy, and so in no test of accuracies.
    decided = np.array(preference) != 0.5
    right, base_right = (agreement(m, preference)[decided] for m in (result.margins, result.base_margins))
    weight = np.array(pairs["weight"])[decided]
    assert result.test == mcnemar_test(right, base_right, weight)
    assert result.difference[0] <= np.average(right - base_right, weights=weight) <= result.difference[1]
    # The sentence tells the figures of the table, weights and all.
    assert f"{result.metrics['accuracy']:.0%} against".replace("%", " %") in result.verdict
    assert result.verdict
    text = str(result)
    assert text.endswith(result.verdict)
    assert "5-fold cross-validation of 10 pairs" in text
    assert f"{result.metrics['accuracy']:.3f}" in text


def test_finds_a_taste(tmp_path: Path) -> None:
    """The base knows nothing about red; held-out pairs are predicted by models that never saw them."""
    base, processor = build(seed=3)
    result = cross_validate(
        base, red_pairs(40), config(tmp_path, num_train_epochs=10), processing_class=processor, progress=False
    )
    assert result.metrics["accuracy"] > 0.85
    assert result.metrics["accuracy"] > result.metrics["base_accuracy"]


def test_labels_without_a_pattern_are_not_predicted(tmp_path: Path) -> None:
    """Noise: whoever looks at the held-out pairs would score far above one half."""
    noise = (np.random.default_rng(0).permutation(60) % 2).astype(float).tolist()
    base, processor = build()
    result = cross_validate(
        base, red_pairs(60, preference=noise), config(tmp_path), processing_class=processor, progress=False
    )
    assert 0.25 < result.metrics["accuracy"] < 0.75


@pytest.mark.parametrize("options", [{}, {"cache_features": False}, {"full_finetuning": True}], ids=str)
def test_base_is_left_as_it_was(options: dict, tmp_path: Path) -> None:
    base, processor = build()
    cross_validate(
        base, red_pairs(6), config(tmp_path / "out", **options), folds=2, processing_class=processor, progress=False
    )
    fresh = build()[0]
    assert [name for name, _ in base.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert not [module for module in base.modules() if isinstance(module, LoraLayer)]
    assert not hasattr(base, "peft_config")
    assert base.training == fresh.training
    for (name, value), (other, expected) in zip(base.named_parameters(), fresh.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(value, expected)
        assert value.requires_grad == expected.requires_grad
    assert not (tmp_path / "out").exists()


def test_options_are_left_as_they_were(tmp_path: Path) -> None:
    base, processor = build()
    args = config(tmp_path / "out")
    before = args.to_dict()
    cross_validate(base, red_pairs(6), args, folds=2, processing_class=processor, progress=False)
    assert args.to_dict() == before


def test_from_a_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    result = cross_validate(folder, red_pairs(6), config(tmp_path / "out"), folds=2, progress=False)
    base, processor = build()
    other = cross_validate(
        base, red_pairs(6), config(tmp_path / "out"), folds=2, processing_class=processor, progress=False
    )
    np.testing.assert_allclose(result.margins, other.margins, atol=1e-5)


def test_adapted_model_is_refused(tmp_path: Path) -> None:
    base, processor = build()
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="needs a base model, but got one with an adapter"):
        cross_validate(adapted, red_pairs(6), config(tmp_path), processing_class=processor)


def test_copies_are_no_evidence(tmp_path: Path) -> None:
    """Four pairs, eight times over, prove what four pairs prove, and share a fold with their copies."""
    pairs = concatenate_datasets([red_pairs(4)] * 8)
    base, processor = build(seed=3)
    result = cross_validate(base, pairs, config(tmp_path), processing_class=processor, progress=False)
    assert result.test.n_better + result.test.n_worse <= 4
    assert result.test.p_value >= 0.125
    assert "32 pairs of 4 prompts" in result.verdict
    assert result.metrics["accuracy_high"] - result.metrics["accuracy_low"] > 0.3
    assert result.contradictions == (0, 4)
    assert "contradict" not in result.verdict


def test_pairs_of_one_prompt_are_folded_by_pair(tmp_path: Path) -> None:
    """A folder without captions: no pair is predicted by a model that saw it, either way round."""
    pairs = red_pairs(20)
    pairs = pairs.remove_columns("prompt").add_column("prompt", ["a photo"] * 20)
    copies = pairs.select([0, 1, 2, 3])
    swapped = pairs.select([4, 5]).rename_columns({"chosen": "rejected", "rejected": "chosen"})
    swapped = swapped.add_column("preference", [0.0, 0.0])
    rows = concatenate_datasets([pairs, copies]).add_column("preference", [1.0] * 24)
    rows = concatenate_datasets([rows, swapped.select_columns(rows.column_names)])
    base, processor = build(seed=3)
    result = cross_validate(base, rows, config(tmp_path), folds=3, processing_class=processor, progress=False)
    assert not result.by_prompt
    assert (result.folds[20:] == result.folds[:6]).all()
    assert len(set(result.folds.tolist())) == 3
    assert result.metrics["accuracy"] > 0.8
    assert result.test.n_better + result.test.n_worse <= 20  # copies prove nothing
    assert "26 pairs of 20 different pairs" in result.verdict
    assert "more pairs like those clicked, not about other prompts" in result.verdict
    assert "folds split by pair" in str(result)


def test_the_verdict_says_that_it_is_about_new_prompts(tmp_path: Path) -> None:
    base, processor = build()
    result = cross_validate(base, red_pairs(4), config(tmp_path), folds=2, processing_class=processor, progress=False)
    assert result.by_prompt
    assert result.verdict.endswith("This is about new prompts.")
    assert "folds split by prompt" in str(result)


def test_copies_of_one_pair_cannot_be_folded(tmp_path: Path) -> None:
    base, processor = build()
    with pytest.raises(ValueError, match="but got 1: collect more"):
        cross_validate(base, concatenate_datasets([red_pairs(1)] * 5), config(tmp_path), processing_class=processor)


def test_spellings_of_a_prompt_share_a_fold(tmp_path: Path) -> None:
    pairs = red_pairs(6)
    prompts = [f"  {prompt.upper()} " if index % 2 else prompt for index, prompt in enumerate(pairs["prompt"])]
    both = concatenate_datasets([pairs, pairs.remove_columns("prompt").add_column("prompt", prompts)])
    base, processor = build()
    result = cross_validate(base, both, config(tmp_path), folds=3, processing_class=processor, progress=False)
    assert (result.folds[:6] == result.folds[6:]).all()
    assert (result.prompts[:6] == result.prompts[6:]).all()


def test_contradicting_clicks_are_told(tmp_path: Path) -> None:
    pairs = red_pairs(6)
    swapped = pairs.select([0, 1]).rename_columns({"chosen": "rejected", "rejected": "chosen"})
    rows = concatenate_datasets([pairs, swapped.select_columns(pairs.column_names), pairs.select([2])])
    base, processor = build()
    result = cross_validate(base, rows, config(tmp_path), processing_class=processor, progress=False)
    assert result.contradictions == (2, 3)
    assert result.verdict.endswith("Your clicks contradict each other on 2 of 3 repeated pairs.")


def test_the_probe_stands_beside_base_and_adapter(tmp_path: Path) -> None:
    """Its margins are those of scikit-learn's logistic regression on each fold's training pairs."""
    pairs = red_pairs(20)
    base, processor = build(seed=3)
    result = cross_validate(base, pairs, config(tmp_path), processing_class=processor, progress=False)
    model = build(seed=3)[0].eval()
    inputs = [processor.image_processor(list(pairs[name]), return_tensors="pt") for name in ("chosen", "rejected")]
    with torch.no_grad():
        chosen, rejected = (
            torch.nn.functional.normalize(model.get_image_features(**images).pooler_output, dim=-1)
            for images in inputs
        )
    difference = (chosen - rejected).double().numpy()
    for fold in range(5):
        rest = difference[result.folds != fold]
        probe = LogisticRegression(fit_intercept=False, C=0.5, tol=1e-8, max_iter=1000)  # each pair twice
        probe.fit(np.concatenate([rest, -rest]), np.repeat([1, 0], len(rest)))
        expected = difference[result.folds == fold] @ probe.coef_[0]
        np.testing.assert_allclose(result.probe_margins[result.folds == fold], expected, atol=1e-4)
    assert f"probe       {result.metrics['probe_accuracy']:9.3f}" in str(result)


@pytest.mark.parametrize(
    "options",
    [
        {"eval_on_start": True},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "accuracy"},
        {"push_to_hub": True},
        {"resume_from_checkpoint": "true"},
    ],
    ids=str,
)
def test_options_of_a_training_with_held_out_pairs(options: dict[str, object], tmp_path: Path) -> None:
    base, processor = build()
    args = config(tmp_path, **options)
    result = cross_validate(base, red_pairs(6), args, folds=2, processing_class=processor, progress=False)
    assert len(result.margins) == 6


# --- Folds that see each other ---

LOSING = {
    "whole modules": LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["visual_projection", "text_projection"]
    ),
    "tokens": LoraConfig(
        r=4, target_modules=["visual_projection"], trainable_token_indices={"token_embedding": list(range(20))}
    ),
    "norms": LNTuningConfig(target_modules=["layer_norm1", "final_layer_norm"]),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT of its own kind
@pytest.mark.parametrize("name", LOSING)
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_every_fold_starts_from_the_same_bits(name: str, cache: bool, tmp_path: Path) -> None:
    """Each fold predicts as a training by itself does, and the base is the true one in all of them."""
    pairs, (model, processor) = red_pairs(12), build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = config(tmp_path, learning_rate=5e-2, cache_features=cache, warm_start=False)
    result = cross_validate(model, pairs, args, 3, processor, peft_config=LOSING[name], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for fold in range(3):
        held_out = np.flatnonzero(result.folds == fold)
        trainer = BradleyTerryTrainer(
            build()[0],
            config(tmp_path / str(fold), learning_rate=5e-2, cache_features=cache, warm_start=False),
            train_dataset=pairs.select(np.flatnonzero(result.folds != fold)),
            processing_class=processor,
            peft_config=LOSING[name],
        )
        trainer.train()
        margins, base = trainer.predict(pairs.select(held_out)).predictions
        np.testing.assert_allclose(result.margins[held_out], margins, atol=1e-4)
        np.testing.assert_allclose(result.base_margins[held_out], base, atol=1e-5)
    untrained = BradleyTerryTrainer(build()[0], config(tmp_path / "base"), processing_class=processor)
    np.testing.assert_allclose(result.base_margins, untrained.predict(pairs).predictions[0], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": red_pairs(4).to_iterable_dataset()}, "got a stream, which has no length: load it whole"),
        ({"dataset": red_pairs(4).to_dict()}, r"`dataset` .* got dict: make a dataset of these columns"),
        ({"dataset": DatasetDict(train=red_pairs(4))}, "`dataset` .* got DatasetDict: pick a split: train"),
        ({"dataset": "pairs/"}, "`dataset` .* got str: load it by"),
        ({"args": TrainingArguments("out", report_to="none")}, "should be a `BradleyTerryConfig`, .*TrainingArg"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments: dict, message: str) -> None:
    model, processor = build()
    with pytest.raises(TypeError, match=message) as error:
        cross_validate(model, **{"dataset": red_pairs(4), "processing_class": processor, **arguments})
    assert "\n" not in str(error.value)


def test_a_compiled_model_is_cross_validated(tmp_path: Path) -> None:
    pairs, (model, processor) = red_pairs(8), build()
    plain = cross_validate(model, pairs, config(tmp_path), 2, processor, progress=False)
    compiled = torch.compile(build()[0], backend="eager")
    result = cross_validate(compiled, pairs, config(tmp_path), 2, processor, progress=False)
    np.testing.assert_array_equal(result.margins, plain.margins)
