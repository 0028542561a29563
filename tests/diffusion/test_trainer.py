"""`PreferenceLoRATrainer` against the paper's formula, an unmodified client, and itself after a cut."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import CLIPConfig, TrainerCallback, TrainerControl, TrainerState
from trl import unpair_preference_dataset

from bt_hf import PreferenceLoRATrainer
from bt_hf.data.formats import PreferenceDataError
from bt_hf.diffusion.callbacks import CollapseGuard, OverfittingGuard, WinnerErrorGuard
from bt_hf.diffusion.errors import sample_noise
from tiny_models import clip_images, red_pairs
from tiny_pipelines import PIPELINES, SIZE, build, draw, make_sd, save
from tiny_trainers import adapter, logged, make

# --- The loss ---


@pytest.mark.parametrize("rpo_alpha", [0.0, 0.3])
def test_loss_and_gradient_are_those_of_the_paper(rpo_alpha: float, tmp_path: Path) -> None:
    """Diffusion-DPO, equation 14, written out from the scheduler's and the VAE's own numbers; and the term of RPO."""
    beta = 700.0
    pairs = red_pairs(3)
    trainer = make(tmp_path, pairs=pairs, beta=beta, rpo_alpha=rpo_alpha, channels_last=False)
    with torch.no_grad():  # a LoRA that does something
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    cached = trainer.train_dataset
    batch = cached.collate([cached[index] for index in range(3)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    found = {name: weight.grad.clone() for name, weight in weights.items()}
    trainer.model.zero_grad()

    fresh = build("sd")  # untouched: encodes, is the reference, and knows the noise schedule
    terms = []
    alphas = fresh.scheduler.alphas_cumprod
    for index, row in enumerate(pairs):
        embeds = fresh.encode_prompt([row["prompt"]], "cpu", 1, False)[0]
        shape = tuple(batch["latents"].shape[1:])
        noise, quantile = sample_noise(trainer.args.seed, batch["row"][index : index + 1], 0, shape)
        step = (quantile * len(alphas)).long()
        alpha = alphas[step].view(1, 1, 1, 1)
        errors = []
        for side in ("chosen", "rejected"):
            image = np.array(row[side].resize(SIZE[::-1], Image.Resampling.LANCZOS))
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                latents = fresh.vae.encode(pixels).latent_dist.mode() * fresh.vae.config.scaling_factor
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            policy = trainer.model(noisy, step, embeds).sample
            with torch.no_grad():
                base = fresh.unet(noisy, step, embeds).sample
            errors.append((((noise - policy) ** 2).mean(), ((noise - base) ** 2).mean()))
        (win, win_base), (lose, lose_base) = errors
        preference = -torch.log(torch.sigmoid(-beta / 2 * ((win - win_base) - (lose - lose_base))))
        terms.append(preference + rpo_alpha * torch.log(win / win_base))
    expected = torch.stack(terms).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-2, atol=1e-3 * weight.grad.abs().max().item())


@pytest.mark.parametrize("loss_type", ["dpo", "ipo", "hinge", "bt", "mapo", "sft"])
@pytest.mark.parametrize("safeguard", [False, True])
def test_every_loss_trains(loss_type: str, safeguard: bool, tmp_path: Path) -> None:
    if safeguard and loss_type == "sft":
        with pytest.raises(ValueError, match="safeguard"):
            make(tmp_path, loss_type=loss_type, safeguard=True)
        return
    pairs = red_pairs(8, preference=[1.0, 0.5, 0.0, 0.7] * 2, weight=[1.0, 2.0, 0.5, 1.0] * 2)
    trainer = make(tmp_path, pairs=pairs, evaluation=red_pairs(4, seed=1), loss_type=loss_type, safeguard=safeguard)
    trainer.train()
    metrics = trainer.evaluate()
    assert all(np.isfinite(logged(trainer, "loss")))
    assert np.isfinite(metrics["eval_loss"])
    moved = [weight for name, weight in trainer.model.named_parameters() if "lora_B" in name]
    assert all(weight.abs().sum() > 0 for weight in moved)


def test_unpaired_rows_are_checked(tmp_path: Path) -> None:
    unpaired = (
        unpair_preference_dataset(red_pairs(2)).remove_columns("label").add_column("label", [1.0, 0.0, 7.0, 0.0])
    )
    with pytest.raises(PreferenceDataError, match="row 2 of the dataset: label out of range"):
        make(tmp_path, pairs=unpaired, evaluation=None, loss_type="kto")


def test_kto_trains_on_unpaired_rows(tmp_path: Path) -> None:
    unpaired = unpair_preference_dataset(red_pairs(8))
    trainer = make(tmp_path, pairs=unpaired, evaluation=red_pairs(4, seed=1), loss_type="kto", max_steps=4)
    trainer.train()
    assert all(np.isfinite(logged(trainer, "loss")))
    with pytest.raises(ValueError, match="unpair_preference_dataset"):
        make(tmp_path, loss_type="kto")
    with pytest.raises(ValueError, match="unpaired rows"):
        make(tmp_path, pairs=unpaired)


def test_kto_weighs_likes_and_dislikes(tmp_path: Path) -> None:
    """A fresh LoRA has no reward yet, so each image loses half its weight; as many are liked as disliked."""
    weights = {"desirable_weight": 3.0, "undesirable_weight": 0.5}
    options = {"loss_type": "kto", "beta": 100, "max_steps": 1, "per_device_train_batch_size": 16}
    trainer = make(tmp_path, pairs=unpair_preference_dataset(red_pairs(8)), **options, **weights)
    trainer.train()
    assert logged(trainer, "loss") == [pytest.approx((3.0 + 0.5) / 4)]


def test_a_tie_moves_nothing_at_first(tmp_path: Path) -> None:
    trainer = make(tmp_path, pairs=red_pairs(8, preference=[0.5] * 8), max_steps=1, weight_decay=0.0)
    trainer.train()
    assert logged(trainer, "grad_norm") == [0.0]


def test_sft_lowers_the_winners_error_and_dpo_the_difference(tmp_path: Path) -> None:
    pairs = red_pairs(8)
    for loss_type in ("sft", "dpo"):
        options = {"loss_type": loss_type, "learning_rate": 1e-3, "num_eval_noise_samples": 8, "max_steps": 20}
        trainer = make(tmp_path, pairs=pairs, evaluation=pairs, overwrite_output_dir=True, **options)
        trainer.train()
        metrics = trainer.evaluate()
        if loss_type == "sft":
            assert metrics["eval_winner_error_change"] < 0
        else:
            assert metrics["eval_winner_error_change"] < metrics["eval_loser_error_change"]
            assert metrics["eval_margin"] > 0


@pytest.mark.parametrize("family", PIPELINES)
def test_the_defaults_learn_in_every_family(family: str, tmp_path: Path) -> None:
    """No `learning_rate` is given, and the supervised term is on: the margin rises, and the loss falls.

    Not so the loss of random UNets, whose margins swing at the rate that they get in so few steps.
    """
    pairs = red_pairs(8)
    options = {"learning_rate": None, "warmup_steps": 2, "max_steps": 40, "num_eval_noise_samples": 2}
    trainer = make(tmp_path, family, pairs=pairs, evaluation=pairs, **options)
    assert trainer.args.rpo_alpha > 0
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_margin"] > 0
    if trainer.family.denoiser != "unet":
        assert after["eval_loss"] < before["eval_loss"]


def test_supervised_term_keeps_the_preferred_error_down(tmp_path: Path) -> None:
    """Also where the rejected image is the preferred one."""
    pairs = red_pairs(8, preference=[1.0, 0.0] * 4)
    changes = []
    for alpha in (0.0, 1.0):
        options = {"rpo_alpha": alpha, "learning_rate": 1e-3, "num_eval_noise_samples": 8, "max_steps": 20}
        trainer = make(tmp_path, pairs=pairs, evaluation=pairs, overwrite_output_dir=True, **options)
        trainer.train()
        changes.append(trainer.evaluate()["eval_winner_error_change"])
    assert changes[1] < min(changes[0], 0)


def test_auto_beta_follows_the_scale_of_errors(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.beta == pytest.approx(logged(trainer, "beta")[0])
    # Min-SNR weights make errors smaller, so beta must be larger.
    weighted = make(tmp_path, max_steps=1, snr_gamma=0.1, overwrite_output_dir=True)
    weighted.train()
    assert weighted.beta > trainer.beta


@pytest.mark.parametrize(("name", "beta"), [("sd", 2000), ("sdxl", 5000), ("sd3", 100), ("flux2", 100)])
def test_beta_as_published_for_the_family(name: str, beta: float, tmp_path: Path) -> None:
    """Numbers from the Diffusion-DPO paper and Flow-GRPO's code, whose formulas have the same 1/2."""
    trainer = make(tmp_path, name, beta="published", max_steps=1)
    trainer.train()
    assert logged(trainer, "beta") == [beta]


def test_beta_of_mapo_is_its_own(tmp_path: Path) -> None:
    for beta in ("auto", "published"):
        trainer = make(tmp_path / beta, beta=beta, loss_type="mapo", max_steps=1)
        trainer.train()
        assert trainer.beta == 0.1


# --- The folder ---


@pytest.mark.parametrize("family", PIPELINES)
def test_train_save_and_load_with_unmodified_clients(family: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, family, max_steps=2)
    config = trainer.model.peft_config["default"]
    peft = LoraConfig(r=4, lora_alpha=10, target_modules=config.target_modules)  # alpha different from rank
    folder = tmp_path / "with-alpha"
    trainer = make(folder, family, max_steps=2, peft=peft, learning_rate=5e-2)
    trainer.train()
    trainer.save_model()
    saved = folder / "out"
    assert {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md"} <= {
        path.name for path in saved.iterdir()
    }

    untouched, plain = build(family), build(family)
    before = draw(untouched, "a red apple")
    plain.load_lora_weights(saved)
    loaded = draw(plain, "a red apple")
    with_peft = build(family)
    name = trainer.family.denoiser
    denoiser = PeftModel.from_pretrained(getattr(with_peft, name), saved)
    setattr(with_peft, name, denoiser.get_base_model())
    assert (loaded - before).abs().max() > 1e-3
    torch.testing.assert_close(draw(with_peft, "a red apple"), loaded, atol=1e-4, rtol=0)
    # The trained pipeline has the same weights.
    trained = getattr(trainer.pipeline, name)
    weights = dict(trained.named_parameters())
    for key, value in getattr(with_peft, name).named_parameters():
        torch.testing.assert_close(weights[key], value)


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("options", [{}, {"num_noise_samples": 2}, {"sample_latents": True}], ids=str)
def test_resuming_gives_the_same_adapter_to_the_bit(family: str, options: dict, tmp_path: Path) -> None:
    whole = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 3, **options}
    trainer = make(tmp_path / "whole", family, **whole)
    trainer.train()
    trainer.save_model()
    expected = adapter(tmp_path / "whole" / "out")
    for step in (2, 3, 4):  # an epoch has 3 steps: before, at and behind its end
        again = make(tmp_path / "again", family, overwrite_output_dir=True, **whole)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / f"checkpoint-{step}"))
        again.save_model()
        found = adapter(tmp_path / "again" / "out")
        assert all(torch.equal(found[name], value) for name, value in expected.items()), f"from step {step}"


def test_training_goes_on_from_a_published_lora(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "sd")
    trainer = make(tmp_path, base)
    trainer.train()
    trainer.save_model()
    more = make(tmp_path / "more", str(tmp_path / "out"))
    start = {name: value.clone() for name, value in more.model.named_parameters() if "lora_" in name}
    saved = adapter(tmp_path / "out")
    assert start
    for name, value in start.items():
        torch.testing.assert_close(value, saved[name.replace(".default", "")])
    more.train()
    assert any(not torch.equal(value, start[name]) for name, value in more.model.named_parameters() if name in start)


def test_an_adapter_is_not_overwritten(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.save_model()
    with pytest.raises(FileExistsError, match="overwrite_output_dir"):
        make(tmp_path)


# --- Evaluation and validation ---


def test_evaluation_does_not_jump(tmp_path: Path) -> None:
    trainer = make(tmp_path, evaluation=red_pairs(5, seed=1))
    first = trainer.evaluate()
    assert first["eval_winner_error_change"] == pytest.approx(0, abs=1e-6)  # a fresh LoRA changes nothing
    trainer.train()
    metrics = [trainer.evaluate() for _ in range(2)]
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_winner_error_change"):
        assert metrics[0][name] == metrics[1][name]
    assert metrics[0]["eval_accuracy_low"] <= metrics[0]["eval_accuracy"] <= metrics[0]["eval_accuracy_high"]


@pytest.mark.parametrize("name", PIPELINES)
def test_validation_images_are_the_pipelines_own(name: str, tmp_path: Path) -> None:
    """Also what it guides away from, which an unmodified pipeline encodes itself of a plain prompt."""
    prompts = ["a red apple", "dog"]
    options = {"validation_prompts": prompts, "validation_images": 2, "validation_inference_steps": 2}
    trainer = make(tmp_path, name, **options, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    own = {"num_inference_steps": 2, "height": SIZE[0], "width": SIZE[1]}
    if name == "sana":
        own["use_resolution_binning"] = False  # else it draws at another size
    if name == "qwen":
        own["negative_prompt"] = [" "] * 2  # as its card says; without one it draws without guidance
    if name.startswith("wan"):
        own |= {"num_frames": 1, "output_type": "pil"}
    for index, prompt in enumerate(prompts):
        seeds = [torch.Generator().manual_seed(42 + 2 * index + image) for image in range(2)]
        output = build(name)(prompt=[prompt] * 2, generator=seeds, **own)
        expected = [clip[0] for clip in output.frames] if name.startswith("wan") else output.images
        for image, drawn in zip(expected, trainer.validation.before[index], strict=True):
            assert np.abs(np.asarray(image, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1
    assert any(
        np.asarray(a).tobytes() != np.asarray(b).tobytes()
        for a, b in zip(trainer.validation.before[0], trainer.validation.after[0], strict=True)
    )
    assert (tmp_path / "out" / "before_after.png").is_file()
    assert "validation_distance" in {key for entry in trainer.state.log_history for key in entry}


def test_validation_images_drawn_one_at_a_time_are_the_same(tmp_path: Path) -> None:
    options = {"validation_prompts": ["a red apple", "dog"], "validation_images": 3, "validation_inference_steps": 2}
    sizes: list[int] = []
    drawn = []
    for size in (None, 2, 1):
        trainer = make(tmp_path / str(size), **options, validation_batch_size=size, validation_guidance_scale=3)
        hook = trainer.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        drawn.append(trainer.validation._draw())
        hook.remove()
    assert sizes == [3, 3, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1]
    for other in drawn[1:]:
        for one, two in zip(sum(drawn[0], []), sum(other, []), strict=True):
            assert np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int)).max() <= 1


def test_a_base_in_half_the_memory_trains_a_lora_in_float32(tmp_path: Path) -> None:
    name = save(tmp_path / "base", "z_image")
    trainer = make(tmp_path, name, dtype="bfloat16", max_steps=2)
    trainer.train()
    trainer.save_model()
    base = {value.dtype for value in trainer.model.parameters() if not value.requires_grad}
    assert base == {torch.bfloat16}
    assert {value.dtype for value in trainer.model.parameters() if value.requires_grad} == {torch.float32}
    assert {value.dtype for value in adapter(tmp_path / "out").values()} == {torch.float32}
    with pytest.raises(ValueError, match="`dtype='float16'` is for a pipeline given by its name"):
        make(tmp_path / "loaded", dtype="float16")
    with pytest.raises(ValueError, match="`dtype` should be one of float32, bfloat16, float16, but got 'int8'"):
        make(tmp_path / "other", dtype="int8")


def with_safety_checker(**kwargs) -> DiffusionPipeline:
    """A real one, that finds something in every image and so turns it black."""
    pipeline = make_sd(**kwargs)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-2.0)
    pipeline.register_modules(safety_checker=checker, feature_extractor=clip_images())
    return pipeline


@pytest.mark.parametrize("loaded", [True, False])
def test_safety_checker_does_not_look_at_validation_images(loaded: bool, tmp_path: Path) -> None:
    options = {"validation_prompts": ["a red apple"], "validation_images": 1, "validation_inference_steps": 2}
    pipeline = build(with_safety_checker)
    pipeline.save_pretrained(tmp_path / "base")
    trainer = make(tmp_path, pipeline if loaded else str(tmp_path / "base"), max_steps=1, **options)
    trainer.train()
    assert np.asarray(trainer.validation.before[0][0]).any()
    assert trainer.pipeline.safety_checker is None  # nothing holds it in memory
    if loaded:  # the caller's own is as it was
        assert pipeline.safety_checker is not None
        assert pipeline.config.safety_checker[1] == "StableDiffusionSafetyChecker"
        assert not draw(pipeline).any()


def feed(guard, step: int, model=None, **metrics: float) -> bool:
    """Give a guard figures, as the Trainer would; returns whether it stops."""
    state, control = TrainerState(), TrainerControl()
    state.global_step = step
    guard.on_evaluate(None, state, control, metrics=metrics, model=model)
    return control.should_training_stop


def test_winner_guard_speaks_when_the_error_rises(caplog: pytest.LogCaptureFixture) -> None:
    guard = WinnerErrorGuard()
    feed(guard, 1, eval_winner_error_change=0.001, eval_winner_error_base=0.1)
    assert guard.said == []
    with caplog.at_level(logging.WARNING):
        feed(guard, 2, eval_winner_error_change=0.01, eval_winner_error_base=0.1)
        feed(guard, 3, eval_winner_error_change=0.011, eval_winner_error_base=0.1)  # no new news
    assert len(guard.said) == 1
    assert "10.0% above" in guard.said[0]
    assert "10.0% above" in caplog.text


def test_winner_guard_looks_at_training_where_nothing_is_held_out(tmp_path: Path) -> None:
    """A rate so high that the denoiser breaks: the base is better at every image then."""
    trainer = make(tmp_path / "alone", learning_rate=1.0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "winner_error_change" in entry]
    worst = max(entry["winner_error_change"] / entry["winner_error_base"] for entry in logs)
    assert worst > 0.02
    assert "preferred training images is" in trainer.guards[0].said[0]
    trainer = make(tmp_path / "held-out", evaluation=red_pairs(4), learning_rate=1.0, eval_strategy="steps")
    trainer.train()
    assert trainer.guards[0].said
    assert all("preferred held-out images" in sentence for sentence in trainer.guards[0].said)


def test_overfitting_guard_stops_and_goes_back_to_the_best(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    guard = OverfittingGuard()
    weights = [weight for name, weight in trainer.model.named_parameters() if "lora_B" in name]

    def step(number: int, accuracy: float, training: float) -> bool:
        with torch.no_grad():
            for weight in weights:
                weight.fill_(float(number))
        guard.on_log(None, None, None, logs={"accuracy": training})
        return feed(guard, number, trainer.model, eval_accuracy=accuracy)

    assert not step(1, 0.6, 0.8)
    assert not step(2, 0.8, 0.99)
    assert not step(3, 0.7, 0.99)
    assert not step(4, 0.79, 0.99)  # no fall to speak of: the count begins anew
    assert not step(5, 0.7, 0.99)
    assert step(6, 0.7, 0.99)
    guard.on_train_end(None, None, None, model=trainer.model)
    assert all((weight == 2.0).all() for weight in weights)
    assert "back to the adapter of step 2" in guard.said[0]


def scripted(trainer: PreferenceLoRATrainer, accuracies: list[float]) -> PreferenceLoRATrainer:
    """The trainer, whose guard against overfitting is told of these held-out accuracies, at steps 1, 2, ..."""
    guard = next(guard for guard in trainer.guards if isinstance(guard, OverfittingGuard))
    look = guard.on_evaluate

    def on_evaluate(args, state, control, **kwargs):
        guard.on_log(args, state, control, logs={"accuracy": 1.0})
        look(args, state, control, **{**kwargs, "metrics": {"eval_accuracy": accuracies[state.global_step - 1]}})

    guard.on_evaluate = on_evaluate
    return trainer


def test_a_stopped_run_is_resumed_and_drawn_as_it_was_saved(tmp_path: Path) -> None:
    options = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"validation_prompts": ["a red apple"], "validation_images": 1, "validation_inference_steps": 2}
    options |= {"evaluation": red_pairs(4, seed=1), "learning_rate": 0.1}
    accuracies = [0.9, 0.5, 0.5, 0.5, 0.5]
    whole = scripted(make(tmp_path / "whole", **options), accuracies)
    whole.train()
    whole.save_model()
    assert whole.state.global_step == 3
    saved = adapter(tmp_path / "whole" / "out")
    best = adapter(tmp_path / "whole" / "out" / "checkpoint-1")
    assert all(torch.equal(saved[name], value) for name, value in best.items())

    resumed = scripted(make(tmp_path / "resumed", **options), accuracies)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    resumed.save_model()
    assert resumed.state.global_step == 3
    assert resumed.warnings_seen[-1] == whole.warnings_seen[-1]
    assert all(torch.equal(saved[name], value) for name, value in adapter(tmp_path / "resumed" / "out").items())

    # The picture beside the adapter is what it draws.
    pipeline = build("sd")
    pipeline.load_lora_weights(tmp_path / "whole" / "out")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(42)
    own = pipeline("a red apple", num_inference_steps=2, height=SIZE[0], width=SIZE[1], generator=generator).images[0]
    drawn = whole.validation.after[0][0]
    assert np.abs(np.asarray(own, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1


def test_held_out_pairs_that_nobody_looks_at_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, evaluation=red_pairs(4, seed=1), eval_strategy="steps")
    make(tmp_path, evaluation=red_pairs(4, seed=1), guards=False)
    assert "overfitting" not in caplog.text
    make(tmp_path, evaluation=red_pairs(4, seed=1))
    assert "nothing stops at overfitting: pass `eval_strategy='steps'`" in caplog.text


def test_collapse_guard_compares_with_before() -> None:
    guard, state = CollapseGuard(), TrainerState()
    guard.on_log(None, state, None, logs={"validation_distance": 0.2, "validation_distance_base": 0.3})
    assert guard.said == []
    guard.on_log(None, state, None, logs={"validation_distance": 0.06, "validation_distance_base": 0.3})
    assert "20% of" in guard.said[0]


# --- Bad input ---


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`resolution` should be a multiple of 8 .* got 30: take 32"):
        make(tmp_path, resolution=30)
    for options, word in (
        ({"beta": -1}, "beta"),
        ({"beta": "strong"}, "beta"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"num_noise_samples": 0}, "num_noise_samples"),
        ({"undesirable_weight": -1}, "undesirable_weight"),
        ({"safeguard_mu": 2.0}, "safeguard_mu"),
        ({"rpo_alpha": -0.1}, "rpo_alpha"),
        ({"rpo_alpha": 0.1, "loss_type": "sft"}, "rpo_alpha"),
        ({"rpo_alpha": 0.1, "loss_type": "mapo"}, "rpo_alpha"),
        ({"rpo_alpha": 0.1, "loss_type": "kto"}, "rpo_alpha"),
    ):
        with pytest.raises(ValueError, match=f"`{word}`"):
            make(tmp_path, **options)
    assert make(tmp_path, beta="250").args.beta == 250  # as the command line gives it
    with pytest.raises(TypeError, match="DiffusionPipeline"):
        make(tmp_path, torch.nn.Linear(2, 2))


def test_a_long_prompt_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts to train on, held-out ones and those to draw."""
    pairs, long = red_pairs(4), "a red apple" + " and a dog" * 100
    pairs = pairs.map(lambda row, index: {"prompt": long} if index == 1 else row, with_indices=True)
    with caplog.at_level(logging.WARNING):
        make(tmp_path, "sd3", pairs, {"one": pairs, "two": red_pairs(3)}, validation_prompts=["a boat", long])
    assert "3 of 13 prompts are longer than the pipeline's context of 256 tokens" in caplog.text


@pytest.mark.parametrize("save_steps", [1, 3])
def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved(tmp_path: Path, save_steps: int) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == save_steps + 1:
                weight = next(value for name, value in model.named_parameters() if "lora_B" in name)
                weight.data.fill_(float("nan"))

    trainer = make(tmp_path, max_steps=6, save_strategy="steps", save_steps=save_steps)
    trainer.add_callback(Poison())
    # Found when the weights are to be saved, or at the next loss: nothing with a NaN is ever written.
    found = {1: "the weights are not saved: .*lora_B.* is not finite", 3: "nan at step 5, at the pair"}[save_steps]
    with pytest.raises(FloatingPointError, match=rf"{found}.* is .*checkpoint-{save_steps}\.") as error:
        trainer.train()
    if save_steps == 3:
        assert any(f"the prompt {row['prompt']!r}" in str(error.value) for row in trainer.train_dataset.rows)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"checkpoint-{save_steps}"]
    good = adapter(tmp_path / "out" / f"checkpoint-{save_steps}")
    assert all(torch.isfinite(value).all() for value in good.values())


def test_card_tells_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, evaluation=red_pairs(5, seed=1))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "8 pairs" in card
    assert "load_lora_weights" in card
    assert str(tmp_path) not in card
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
