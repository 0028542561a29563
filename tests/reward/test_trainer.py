"""`BradleyTerryTrainer` on tiny models of every family: what it learns, that options mean what they say, folders."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.special import expit
from torch import nn
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

from bt_hf import BradleyTerryConfig, BradleyTerryTrainer, PreferenceScorer
from bt_hf.data.formats import PreferenceDataError
from bt_hf.reward.collator import PreferenceCollator
from tiny_models import ALL_FAMILIES, CONTEXT, build, red_pairs, save

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
PLAIN = {"warm_start": False, "kl_weight": 0.0}


def make_trainer(
    output_dir: Path, train: Any = None, model: Any = None, family: str = "clip", **options: Any
) -> BradleyTerryTrainer:
    """A trainer of a tiny model; `options` of the trainer go to it and all others to the config."""
    of_trainer = ("eval_dataset", "peft_config", "compute_metrics", "callbacks", "data_collator", "optimizers")
    given = {name: options.pop(name) for name in of_trainer if name in options}
    base, processor = build(family)
    return BradleyTerryTrainer(
        base if model is None else model,
        BradleyTerryConfig(str(output_dir), **{**QUIET, **options}),
        train_dataset=red_pairs() if train is None else train,
        processing_class=processor,
        **given,
    )


def adapter(trainer: BradleyTerryTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance)


def logged(trainer: BradleyTerryTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- It learns ---


@pytest.mark.parametrize("warm_start", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_learns_what_the_base_does_not_know(family: str, warm_start: bool, tmp_path: Path) -> None:
    pairs = red_pairs(24)
    # Half of the pairs as the base would have it and half against it would be noise; against it on all is a taste.
    trainer = make_trainer(tmp_path, pairs, family=family, **PLAIN)
    margins = trainer.predict(pairs).predictions[0]
    flipped = [1.0 - float(margin > 0) for margin in margins]
    against = pairs.add_column("preference", flipped)
    trainer = make_trainer(
        tmp_path,
        against,
        family=family,
        warm_start=warm_start,
        learning_rate=2e-2,
        num_train_epochs=30,
        kl_weight=0.0,
    )
    before = trainer.evaluate(against)
    assert before["eval_accuracy"] == before["eval_base_accuracy"] == 0
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    after = trainer.evaluate(against)
    assert after["eval_accuracy"] > 0.7
    assert after["eval_log_loss"] < before["eval_log_loss"]
    assert after["eval_base_accuracy"] == 0
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("labels", [{"weight": [0.0] * 4}, {"preference": [0.5] * 4}], ids=["weightless", "ties"])
def test_pairs_that_say_nothing(labels: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, red_pairs(4, **labels), num_train_epochs=1, learning_rate=1e-9)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "The pairs say nothing, as all weights are 0 or all preferences 0.5" in caplog.text
    margins, base = trainer.predict(red_pairs(4)).predictions
    np.testing.assert_allclose(margins, base, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_click_or_two_are_learnt(rows: int, tmp_path: Path) -> None:
    pairs = red_pairs(rows)
    trainer = make_trainer(tmp_path, pairs)
    trainer.train()
    margins, _ = trainer.predict(pairs).predictions
    assert (margins > 0.3).all()
    assert (margins < 10).all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_strength_of_the_fit_at_any_logit_scale(family: str, tmp_path: Path) -> None:
    """Few clicks are as sure on a model that was trained to 10 as on one that was trained to 112."""
    typical = []
    pairs = red_pairs(16)
    for scale in (10.0, 112.0):
        model, processor = build(family)
        model.logit_scale.data.fill_(np.log(scale))
        args = BradleyTerryConfig(str(tmp_path), **QUIET, num_train_epochs=1, learning_rate=1e-9)
        trainer = BradleyTerryTrainer(model, args, train_dataset=pairs, processing_class=processor)
        trainer.train()
        margins, _ = trainer.predict(pairs).predictions
        assert (margins > 0).mean() > 0.8
        typical.append(np.abs(margins).mean())
    assert min(typical) > 0.5
    assert max(typical) < 30
    assert max(typical) < 2.5 * min(typical)


def test_redder_on_held_out_pairs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, red_pairs(32), num_train_epochs=20, learning_rate=1e-2)
    trainer.train()
    assert trainer.evaluate(red_pairs(32, seed=1))["eval_accuracy"] > 0.85


def test_warm_start_alone_fits(tmp_path: Path) -> None:
    """With a learning rate of nothing, what is there in the end is what training began with."""
    pairs = red_pairs(16, preference=[0.0] * 16)
    trainer = make_trainer(tmp_path, pairs, learning_rate=1e-12, num_train_epochs=1)
    before = trainer.evaluate(pairs)["eval_log_loss"]
    trainer.train()
    assert trainer.evaluate(pairs)["eval_log_loss"] < before - 0.2


def test_warm_start_ignores_dropout_of_the_base(tmp_path: Path) -> None:
    """A model built in code is in training mode until someone says otherwise."""
    starts = []
    for training in (True, False):
        model, processor = build("altclip")
        model.text_model.roberta.embeddings.dropout.p = 0.5
        trainer = BradleyTerryTrainer(
            model.train(training),
            BradleyTerryConfig(str(tmp_path), **{**QUIET, "learning_rate": 1e-12, "num_train_epochs": 1}),
            train_dataset=red_pairs(),
            processing_class=processor,
        )
        trainer.train()
        starts.append(adapter(trainer))
    assert_same(*starts)


# --- Labels and weights ---


def test_first_logged_loss_is_the_equation(tmp_path: Path) -> None:
    """Soft labels, ties, weights and smoothing at once, from embeddings that the model itself gives."""
    preference, weight = [1.0, 0.5, 0.3, 0.0, 0.9, 1.0], [1.0, 2.0, 0.5, 1.0, 0.0, 3.0]
    pairs = red_pairs(6, preference=preference, weight=weight)
    base, processor = build()
    inputs = PreferenceCollator(processor)(list(pairs))
    with torch.no_grad():
        output = base(**{name: value for name, value in inputs.items() if name not in ("preference", "weight")})
    logits = output.logits_per_text.numpy()  # (6, 12): the chosen ones first
    rows = np.arange(6)
    win = expit(logits[rows, rows] - logits[rows, 6 + rows])
    target = 0.9 * np.array(preference) + 0.1 * (1 - np.array(preference))
    loss = -(target * np.log(win) + (1 - target) * np.log(1 - win))
    expected = np.average(loss, weights=weight)

    trainer = make_trainer(tmp_path, pairs, label_smoothing=0.1, logging_steps=1, num_train_epochs=1, **PLAIN)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, abs=1e-5)
    # A row of weight 0 has no part in the other means, and the others count alike.
    chosen, rejected = logits[rows, rows], logits[rows, 6 + rows]
    counts = np.array(weight) > 0
    for name, values in {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected}.items():
        assert logged(trainer, name)[0] == pytest.approx(values[counts].mean(), abs=1e-4)
    right = (chosen > rejected) == (np.array(preference) > 0.5)
    assert logged(trainer, "accuracy")[0] == pytest.approx(right[counts & (np.array(preference) != 0.5)].mean())


@pytest.mark.parametrize("warm_start", [True, False], ids=["warm", "cold"])
def test_double_weight_is_a_copy(warm_start: bool, tmp_path: Path) -> None:
    pairs = red_pairs(6, preference=[1.0, 0.0, 0.0, 1.0, 0.2, 0.5])
    weighted = pairs.add_column("weight", [2.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    copied = concatenate_datasets([pairs, pairs.select([0, 1])])
    ends = []
    for train in (weighted, copied):
        trainer = make_trainer(
            tmp_path,
            train,
            warm_start=warm_start,
            kl_weight=0.0,
            learning_rate=1e-2,
            num_train_epochs=3,
            **({"prior_weight": 0.1} if warm_start else {}),
        )
        trainer.train()
        ends.append(adapter(trainer))
    assert_same(*ends, tolerance=1e-4)


def test_chosen_and_rejected_swapped_is_one_minus_preference(tmp_path: Path) -> None:
    pairs = red_pairs(6)
    swapped = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"}).add_column("preference", [0.0] * 6)
    ends = []
    for train in (pairs, swapped):
        trainer = make_trainer(tmp_path, train, learning_rate=1e-2, num_train_epochs=3)
        trainer.train()
        ends.append(adapter(trainer))
    assert_same(*ends, tolerance=1e-4)


def test_only_ties(tmp_path: Path) -> None:
    """Nothing to be right about: the margins shrink, and no accuracy is logged."""
    pairs = red_pairs(8, preference=[0.5] * 8)
    trainer = make_trainer(tmp_path, pairs, learning_rate=1e-2, num_train_epochs=5, logging_steps=1)
    base = np.abs(trainer.predict(pairs).predictions[1]).mean()
    trainer.train()
    assert np.abs(trainer.predict(pairs).predictions[0]).mean() < base
    assert not [value for value in logged(trainer, "accuracy") if not np.isnan(value)]
    assert len(logged(trainer, "margin")) == 5


# --- Batches ---


@pytest.mark.parametrize("rows", [8, 11])
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_accumulation_is_a_larger_batch(rows: int, cache: bool, tmp_path: Path) -> None:
    """Also with weights that differ between the two halves, and a last batch that is not full."""
    pairs = red_pairs(rows, weight=[0.1 + i % 5 for i in range(rows)], preference=[i % 3 / 2 for i in range(rows)])
    ends = []
    for batch, steps in ((4, 1), (2, 2)):
        trainer = make_trainer(
            tmp_path,
            pairs,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            cache_features=cache,
        )
        trainer.train()
        ends.append((adapter(trainer), logged(trainer, "loss")))
    assert_same(ends[0][0], ends[1][0])
    np.testing.assert_allclose(ends[0][1], ends[1][1], atol=1e-5)


@pytest.mark.parametrize("placement", [None, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])], ids=["top", "all"])
def test_gradient_checkpointing_changes_nothing(placement: LoraConfig | None, tmp_path: Path) -> None:
    ends = []
    for checkpointing in (True, False):
        trainer = make_trainer(
            tmp_path,
            gradient_checkpointing=checkpointing,
            peft_config=placement,
            num_train_epochs=2,
            learning_rate=1e-2,
        )
        trainer.train()
        ends.append(adapter(trainer))
    assert_same(*ends)


def test_bf16_stays_close_to_float32(tmp_path: Path) -> None:
    losses = []
    for bf16 in (True, False):
        trainer = make_trainer(tmp_path, bf16=bf16, num_train_epochs=3, logging_steps=1, learning_rate=1e-3)
        trainer.train()
        assert all(value.dtype == torch.float32 for value in adapter(trainer).values())
        losses.append(logged(trainer, "loss"))
    np.testing.assert_allclose(*losses, atol=0.05)
    assert losses[0] != losses[1]  # it was on


def test_bf16_of_the_launcher_needs_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_trainer(tmp_path).accelerator.mixed_precision == "bf16"


def test_deepspeed_casts_the_model_and_inputs_follow(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, cache_features=False)
    batch = trainer.data_collator(list(red_pairs(3, preference=[0.7, 1.0, 0.5])))
    expected, _ = trainer._embed(trainer.model, batch)
    trainer.is_deepspeed_enabled = True
    for dtype in (torch.float32, torch.bfloat16):  # before DeepSpeed has the model, and after
        inputs = trainer._prepare_inputs(batch)
        assert torch.equal(inputs["preference"], batch["preference"])
        found, _ = trainer._embed(trainer.model.to(dtype), inputs)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


def test_bf16_alignment_of_an_untouched_model_is_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True, warm_start=False, kl_weight=0.7, num_train_epochs=1, logging_steps=1)
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)


def test_same_seed_same_adapter(tmp_path: Path) -> None:
    ends = []
    for seed in (1, 1, 2):
        torch.rand(seed + len(ends))  # independent of what the program did before
        trainer = make_trainer(tmp_path, seed=seed, num_train_epochs=1)
        trainer.train()
        ends.append(adapter(trainer))
    assert_same(ends[0], ends[1], tolerance=0)
    assert not torch.equal(next(iter(ends[0].values())), next(iter(ends[2].values())))


# --- Stopping and going on ---


class Crash(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_killed_and_resumed_is_the_same_to_the_bit(step: int, cache: bool, tmp_path: Path) -> None:
    """Three steps an epoch, two epochs; with dropout, so that the random state matters too."""
    options = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "cache_features": cache,
        "peft_config": LoraConfig(r=4, lora_dropout=0.3, target_modules=["text_projection", "visual_projection"]),
    }
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    options |= {"save_strategy": "steps", "save_steps": 1}
    killed = make_trainer(tmp_path / "killed", callbacks=[Crash(step)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir())[-1] == f"checkpoint-{step}"
    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert_same(adapter(resumed), adapter(whole), tolerance=0)
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_full_finetuning_resumes_against_the_original_base(tmp_path: Path) -> None:
    options = {"full_finetuning": True, "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    options |= {"save_strategy": "steps", "save_steps": 1}
    killed = make_trainer(tmp_path / "killed", callbacks=[Crash(1)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter(resumed), adapter(whole), tolerance=0)


def test_early_stopping_and_best_model(tmp_path: Path) -> None:
    """Held-out pairs say the opposite of the training pairs, so the first evaluation is the best."""
    opposite = red_pairs(12, seed=1, preference=[0.0] * 12)
    trainer = make_trainer(
        tmp_path,
        eval_dataset=opposite,
        warm_start=False,
        learning_rate=1e-2,
        num_train_epochs=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="log_loss",
        greater_is_better=False,
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    evaluations = logged(trainer, "eval_log_loss")
    assert len(evaluations) == 3
    assert evaluations == sorted(evaluations)
    assert trainer.evaluate()["eval_log_loss"] == pytest.approx(evaluations[0], abs=1e-6)
    best = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    found = trainer.model.state_dict()
    assert all(torch.equal(value, found[name.replace(".weight", ".default.weight")]) for name, value in best.items())


def test_second_call_goes_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=1, learning_rate=1e-3)
    trainer.train()
    first = adapter(trainer)
    trainer.train()
    moved = max((value - first[name]).abs().max().item() for name, value in adapter(trainer).items())
    assert 0 < moved < 0.01  # one step of Adam, not a new start


def test_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    first = make_trainer(tmp_path / "first", model=base, num_train_epochs=2, learning_rate=1e-2)
    first.train()
    first.save_model()
    second = make_trainer(tmp_path / "second", model=str(tmp_path / "first"), num_train_epochs=1, learning_rate=1e-12)
    pairs = red_pairs()
    assert np.array_equal(first.predict(pairs).predictions[0], second.predict(pairs).predictions[0])
    assert np.array_equal(first.predict(pairs).predictions[1], second.predict(pairs).predictions[1])  # the base
    second.train()
    assert_same(adapter(first), adapter(second), tolerance=1e-6)


# --- Other adapters, other data ---

CONFIGS = {
    "loha": LoHaConfig(r=2, target_modules=["text_projection", "visual_projection"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["text_projection", "visual_projection"]),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=["text_projection", "visual_projection"]),
    "one tower": LoraConfig(r=2, target_modules=["visual_projection"]),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=12, target_modules=["text_projection"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_any_peft_config(name: str, tmp_path: Path) -> None:
    pairs = red_pairs(12)
    base = save(tmp_path / "base")
    trainer = make_trainer(
        tmp_path,
        pairs,
        model=base,
        peft_config=CONFIGS[name],
        learning_rate=2e-2,
        num_train_epochs=12,
        kl_weight=0.1,
    )
    before = trainer.evaluate(pairs)
    trainer.train()
    after = trainer.evaluate(pairs)
    assert after["eval_log_loss"] < before["eval_log_loss"]
    assert after["eval_base_log_loss"] == pytest.approx(before["eval_log_loss"], abs=1e-5)
    trainer.save_model(tmp_path / "saved")
    rewards = PreferenceScorer.from_pretrained(tmp_path / "saved", device="cpu").score(
        pairs["prompt"], pairs["chosen"]
    )
    expected = PreferenceScorer(trainer.model, build()[1]).score(pairs["prompt"], pairs["chosen"])
    torch.testing.assert_close(rewards, expected)


def test_adapted_model_can_be_passed(tmp_path: Path) -> None:
    model = get_peft_model(build()[0], LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, model=model, num_train_epochs=1)
    assert trainer.model is model
    trainer.train()


def test_full_finetuning(tmp_path: Path) -> None:
    pairs = red_pairs()
    trainer = make_trainer(tmp_path, pairs, full_finetuning=True, learning_rate=1e-3, num_train_epochs=5)
    scale = trainer.model.logit_scale.item()
    before = trainer.evaluate(pairs)
    trainer.train()
    after = trainer.evaluate(pairs)
    assert after["eval_log_loss"] < before["eval_log_loss"]
    assert after["eval_base_log_loss"] == pytest.approx(before["eval_log_loss"], abs=1e-6)
    assert trainer.model.logit_scale.item() == scale
    moved = [n for n, p in build()[0].named_parameters() if not torch.equal(p, trainer.model.get_parameter(n))]
    assert len(moved) > 50
    trainer.save_model(tmp_path / "saved")
    assert AutoModel.from_pretrained(tmp_path / "saved").logit_scale.item() == scale
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_streaming(tmp_path: Path) -> None:
    """Order aside, a stream trains as the dataset does, uncached."""
    pairs = red_pairs(8)
    ends = []
    for train in (pairs, pairs.to_iterable_dataset()):
        trainer = make_trainer(tmp_path, train, max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2)
        assert (trainer.cache is None) == (train is not pairs)
        trainer.train()
        ends.append(adapter(trainer))
    assert_same(*ends)


def test_own_collator_turns_the_cache_off(tmp_path: Path) -> None:
    collator = PreferenceCollator(build()[1])
    calls = []
    trainer = make_trainer(
        tmp_path,
        data_collator=lambda rows: calls.append(len(rows)) or collator(rows),
        num_train_epochs=1,
        per_device_train_batch_size=6,
        **PLAIN,
    )
    assert trainer.cache is None
    trainer.train()
    assert calls[:2] == [6, 6]


# --- Evaluation ---


def test_evaluation_against_a_direct_computation(tmp_path: Path) -> None:
    preference, weight = [1.0, 0.0, 0.5, 1.0, 0.8, 1.0, 0.0], [1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0]
    held_out = red_pairs(7, seed=2, preference=preference, weight=weight)
    trainer = make_trainer(
        tmp_path, eval_dataset=held_out, num_train_epochs=3, learning_rate=1e-2, per_device_eval_batch_size=3
    )
    trainer.train()
    metrics = trainer.evaluate()
    names = ["accuracy", "accuracy_low", "accuracy_high", "log_loss", "brier_score", "calibration_error"]
    assert {f"eval_{prefix}{name}" for prefix in ("", "base_") for name in names} <= metrics.keys()

    p, w = np.array(preference), np.array(weight)
    for prefix, model in (("", trainer.model), ("base_", build()[0])):
        scorer = PreferenceScorer(model, build()[1])
        rewards = [
            scorer.score(held_out["prompt"], held_out[side]).double().numpy() for side in ("chosen", "rejected")
        ]
        win = expit(rewards[0] - rewards[1])
        right = ((win > 0.5) == (p > 0.5))[p != 0.5]
        expected = {
            "accuracy": np.average(right, weights=w[p != 0.5]),
            "log_loss": np.average(-(p * np.log(win) + (1 - p) * np.log(1 - win)), weights=w),
            "brier_score": np.average((win - p) ** 2, weights=w),
        }
        for name, value in expected.items():
            assert metrics[f"eval_{prefix}{name}"] == pytest.approx(value, abs=1e-4)
        assert metrics[f"eval_{prefix}accuracy_low"] < expected["accuracy"] < metrics[f"eval_{prefix}accuracy_high"]


def test_several_evaluation_sets_and_own_metrics(tmp_path: Path) -> None:
    seen = []

    def own(prediction: Any) -> dict[str, float]:
        (margins, base_margins), (preference, weight) = prediction.predictions, prediction.label_ids
        seen.append(margins.shape)
        assert margins.shape == base_margins.shape == preference.shape == weight.shape
        return {"mean_margin": float(margins.mean())}

    sets = {"red": red_pairs(4, seed=1), "blue": red_pairs(5, seed=2)}
    trainer = make_trainer(tmp_path, eval_dataset=sets, compute_metrics=own)
    metrics = trainer.evaluate()
    assert {"eval_red_accuracy", "eval_blue_accuracy", "eval_red_mean_margin", "eval_blue_base_log_loss"} <= set(
        metrics
    )
    assert seen == [(4,), (5,)]


def test_custom_callbacks_see_logs(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        logs: list[dict] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    trainer = make_trainer(tmp_path, kl_weight=0.7, num_train_epochs=4, logging_steps=2, callbacks=[Watch()])
    trainer.train()
    first = Watch.logs[0]
    assert {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "kl"} <= first.keys()
    assert first["margin"] == pytest.approx(first["reward_chosen"] - first["reward_rejected"], abs=1e-4)
    assert 0 <= first["accuracy"] <= 1


# --- Folders ---


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_folder_contract(family: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", family)
    trainer = make_trainer(tmp_path / "out", model=base, family=family, num_train_epochs=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer_config.json"} <= files
    assert files & {"preprocessor_config.json", "processor_config.json"}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle"))]
    assert not [name for name in files if name.startswith(".")]
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "LORA"

    pairs = red_pairs(4, seed=3)
    scorer = PreferenceScorer.from_pretrained(tmp_path / "saved", device="cpu")
    rewards = scorer.score(pairs["prompt"], pairs["chosen"])
    client = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "saved").eval()
    inputs = PreferenceCollator(build(family)[1])(list(pairs))
    inputs = {name: value for name, value in inputs.items() if name not in ("preference", "weight")}
    inputs |= {name: value[:4] for name, value in inputs.items() if name.startswith(("pixel", "spatial"))}
    images = {name: value for name, value in inputs.items() if name.startswith(("pixel", "spatial"))}
    texts = {name: value for name, value in inputs.items() if name not in images}
    with torch.inference_mode():
        text = normalize(client.get_text_features(**texts).pooler_output, dim=-1)
        image = normalize(client.get_image_features(**images).pooler_output, dim=-1)
        assert torch.equal(rewards, client.logit_scale.exp().squeeze() * (text * image).sum(-1))
        output = client(**inputs)
    torch.testing.assert_close(rewards, output.logits_per_text.diagonal() - getattr(client, "logit_bias", 0.0))
    margins = trainer.predict(pairs).predictions[0]
    other = scorer.score(pairs["prompt"], pairs["rejected"])
    np.testing.assert_allclose(margins, (rewards - other).numpy(), atol=1e-5)


def test_saving_again_replaces_all_files(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", num_train_epochs=1, learning_rate=1e-2)
    trainer.save_model(tmp_path / "saved")
    old = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    written = {path: path.stat().st_ino for path in (tmp_path / "saved").iterdir()}
    for path in written:
        if path.name != "README.md":  # may hold its owner's words
            path.write_text("stale")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    new = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert all(not torch.equal(old[name], new[name]) for name in new if "lora_B" in name)
    trainer.save_model(tmp_path / "afresh")
    names = {path.name for path in (tmp_path / "afresh").iterdir()}
    assert {path.name for path in written} == names
    for path, inode in written.items():
        assert path.stat().st_ino != inode, f"{path.name} was written in place, or not at all"
        assert path.name == "README.md" or path.read_bytes() == (tmp_path / "afresh" / path.name).read_bytes()


# --- The KL term ---


def test_more_kl_keeps_more_of_the_base(tmp_path: Path) -> None:
    """KL between what base and adapted model retrieve from held-out images, measured here."""
    pairs, held_out = red_pairs(16), red_pairs(10, seed=5)

    def retrieval(model: nn.Module) -> torch.Tensor:
        scorer = PreferenceScorer(model, build()[1])
        return 14.3 * scorer.embed_texts(held_out["prompt"]) @ scorer.embed_images(held_out["chosen"]).T

    base = retrieval(build()[0]).log_softmax(-1)
    divergence = []
    for weight in (0.0, 1.0, 30.0):
        trainer = make_trainer(
            tmp_path,
            pairs.add_column("preference", [0.0] * 16),
            kl_weight=weight,
            learning_rate=5e-3,
            num_train_epochs=30,
        )
        trainer.train()
        adapted = retrieval(trainer.model).log_softmax(-1)
        divergence.append((base.exp() * (base - adapted)).sum(-1).mean().item())
    assert divergence[0] > 1.2 * divergence[1] > 1.44 * divergence[2] > 0


@pytest.mark.parametrize("whole", [[], ["text_projection"]], ids=["lora", "and a whole layer"])
def test_base_model_is_the_base_and_gives_the_adapter_back(whole: list[str], tmp_path: Path) -> None:
    targets = r"text_model.*(q_proj|v_proj)"
    config = LoraConfig(target_modules=targets, modules_to_save=whole, lora_dropout=0.5) if whole else None
    trainer = make_trainer(tmp_path, num_train_epochs=3, learning_rate=1e-2, peft_config=config, warm_start=not whole)
    trainer.train()
    trainer.model.train()
    inputs = PreferenceCollator(build()[1])(list(red_pairs(2)))
    inputs = {name: value for name, value in inputs.items() if name not in ("preference", "weight")}
    with torch.no_grad():
        trainer.model.eval()
        adapted = trainer.model(**inputs).text_embeds
        trainer.model.train()
        with trainer.base_model() as model:
            assert torch.equal(model(**inputs).text_embeds, build()[0](**inputs).text_embeds)
        with pytest.raises(RuntimeError, match="interrupted"), trainer.base_model():
            raise RuntimeError("interrupted")
        assert all(module.training for module in trainer.model.modules())
        assert torch.equal(trainer.model.eval()(**inputs).text_embeds, adapted)
    assert not torch.equal(adapted, build()[0](**inputs).text_embeds)


# --- Bad input ---


def test_output_dir_with_an_adapter_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path / "out").save_model()
    with pytest.raises(FileExistsError, match="already holds an adapter: choose another `output_dir`"):
        make_trainer(tmp_path / "out")
    make_trainer(tmp_path / "out", overwrite_output_dir=True)


def test_evaluating_on_training_pairs_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = red_pairs(6)
    mixed = concatenate_datasets([pairs.select([1, 2]), red_pairs(3, seed=1)])
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        make_trainer(tmp_path, pairs, eval_dataset=mixed)
    assert "2 of 5 evaluation pairs are also in the training set" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, pairs, eval_dataset=red_pairs(3, seed=1))
    assert not caplog.records


def test_long_prompts_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = red_pairs(5)
    long = " ".join(["a red boat"] * 10)
    texts = [long, "a", long + " b", "b", "c"]
    pairs = pairs.remove_columns("prompt").add_column("prompt", texts)
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        make_trainer(tmp_path, pairs, num_train_epochs=2).train()
    messages = [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]
    expected = f"2 of 5 prompts are longer than the model's context of {CONTEXT} tokens and are truncated"
    assert len(messages) == 1
    assert expected in messages[0]


TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
SINGLE_TOWERS: dict[str, Callable[[], nn.Module]] = {
    "BertModel": lambda: BertModel(BertConfig(vocab_size=9, **TINY)),
    "CLIPVisionModel": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=8, **TINY)),
}


@pytest.mark.parametrize("name", SINGLE_TOWERS)
def test_models_without_two_towers_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"{name} is not a dual encoder.*These work: CLIP, SigLIP"):
        make_trainer(tmp_path, model=SINGLE_TOWERS[name]())


def test_contradictions(tmp_path: Path) -> None:
    adapted = get_peft_model(build()[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`model` already has an adapter, so training goes on from it: leave out"):
        make_trainer(tmp_path, model=adapted, peft_config=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`model` already has an adapter"):
        make_trainer(tmp_path, model=adapted, full_finetuning=True)
    with pytest.raises(ValueError, match="`full_finetuning` and `peft_config` exclude each other"):
        make_trainer(tmp_path, full_finetuning=True, peft_config=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"`label_smoothing` should be in \[0, 0.5\], but got 0.6"):
        make_trainer(tmp_path, label_smoothing=0.6)
    with pytest.raises(ValueError, match="`kl_weight` should be a finite number of at least 0, but got -1"):
        make_trainer(tmp_path, kl_weight=-1)


def test_wrong_columns_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(PreferenceDataError, match="rejected"):
        make_trainer(tmp_path, red_pairs(3).remove_columns("rejected"))
    with pytest.raises(PreferenceDataError):
        make_trainer(tmp_path, red_pairs(3), eval_dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(PreferenceDataError, match="no rows|empty"):
        make_trainer(tmp_path, red_pairs(3).select([]))


def test_model_card_of_push_to_hub_is_ours(tmp_path: Path) -> None:
    # `Trainer.push_to_hub` calls this before it uploads the folder.
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(model_name="someone/taste", tags=["x"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "More information needed" not in card


def test_features_of_another_model_are_refused(tmp_path: Path) -> None:
    cached = make_trainer(tmp_path).train_dataset
    with pytest.raises(ValueError, match="another model object"):
        make_trainer(tmp_path, cached)


def test_features_from_above_the_trained_layers_are_refused(tmp_path: Path) -> None:
    # They were cached with both towers frozen; skipping the layers that this adapter trains would train nothing.
    first = make_trainer(tmp_path)
    base = first.model.unload()
    deeper = LoraConfig(r=2, target_modules=r"vision_model\.encoder\.layers\.0\..*q_proj")
    with pytest.raises(ValueError, match="other layers frozen"):
        make_trainer(tmp_path, first.train_dataset, model=base, peft_config=deeper)


# --- Towers with batch norms ---


def test_batch_norms_of_a_frozen_tower_stay_as_they_are(tmp_path: Path) -> None:
    """Uncached, the tower runs at every step."""
    trainer = make_trainer(tmp_path, red_pairs(8), family="dual_encoder", cache_features=False, num_train_epochs=3)
    before = {name: value.clone() for name, value in trainer.model.named_buffers()}
    assert any("running_mean" in name for name in before)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_buffers())


# --- Whatever is passed as model or as arguments ---


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_a_wrapped_model_trains_as_a_plain_one(wrap: Callable, full: bool, tmp_path: Path) -> None:
    ends = []
    for name, model in (("plain", build()[0]), ("wrapped", wrap(build()[0]))):
        trainer = make_trainer(tmp_path / name, model=model, max_steps=2, learning_rate=1e-3, full_finetuning=full)
        trainer.train()
        trainer.save_model()
        ends.append(
            {key: value for file in (tmp_path / name).glob("*.safetensors") for key, value in load_file(file).items()}
        )
    assert_same(*ends, tolerance=0)


def test_an_adapter_loaded_for_use_alone_is_trained(tmp_path: Path) -> None:
    get_peft_model(build()[0], LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(build()[0], tmp_path / "first")
    trainer = make_trainer(tmp_path / "second", model=model, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="named 'mine'"):
        make_trainer(tmp_path, model=PeftModel.from_pretrained(build()[0], tmp_path / "first", adapter_name="mine"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_full_finetuning_of_a_half_precision_model_moves(dtype: torch.dtype, tmp_path: Path) -> None:
    """By what a training of the same weights in float32 moves; in half precision most steps are rounded away."""
    options = {"full_finetuning": True, "max_steps": 3, "learning_rate": 1e-5}
    ends = []
    for index, model in enumerate((build()[0].to(dtype), build()[0].to(dtype).float())):
        trainer = make_trainer(tmp_path / str(index), model=model, **options)
        trainer.train()
        ends.append(adapter(trainer))
    assert_same(*ends, tolerance=0)
    start = build()[0].to(dtype).float()
    assert all(not torch.equal(value, start.get_parameter(name)) for name, value in ends[0].items() if value.ndim > 1)


def test_statistics_of_a_frozen_batch_norm_are_the_bases(tmp_path: Path) -> None:
    model = build()[0]
    model.vision_model.post_layernorm = nn.BatchNorm1d(model.config.vision_config.hidden_size)
    before = {name: value.clone() for name, value in model.named_buffers()}
    trainer = make_trainer(tmp_path, model=model, max_steps=2, cache_features=False)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_is_refused(name: str, tmp_path: Path) -> None:
    model = build()[0]
    config = LoraConfig(r=4, target_modules=["text_projection", "visual_projection"], init_lora_weights=name)
    with pytest.raises(ValueError, match=rf"`init_lora_weights='{name}'` rewrites \w+_projection.weight"):
        make_trainer(tmp_path, model=model, peft_config=config)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in build()[0].state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_dataset", red_pairs(2).to_dict(), r"`train_dataset` .* got dict: make a dataset of these columns"),
        ("eval_dataset", {"a": "pairs/"}, r"`eval_dataset\['a'\]` .* got str: load it by"),
        ("args", TrainingArguments("mine", report_to="none"), r"`BradleyTerryConfig\('mine', ...\)`"),
        ("args", "mine", "should be a `BradleyTerryConfig`, but got str"),
    ],
)
def test_arguments_of_another_kind_are_named(name: str, value: Any, message: str, tmp_path: Path) -> None:
    model, processor = build()
    args = BradleyTerryConfig(str(tmp_path), **QUIET)
    with pytest.raises(TypeError, match=message) as error:
        BradleyTerryTrainer(model, **{"args": args, "processing_class": processor, name: value})
    assert "\n" not in str(error.value)
