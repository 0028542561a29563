"""`RewardLoRATrainer` against loops by hand, finite differences, unmodified clients, and itself after a cut."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from huggingface_hub import ModelCard
from peft import PeftModel

from bt_hf import PreferenceScorer, RewardLoRAConfig, RewardLoRATrainer
from bt_hf.data.formats import PreferenceDataError
from bt_hf.diffusion.errors import seeded_generator
from bt_hf.diffusion.families.base import find_family
from bt_hf.diffusion.guided.rewards import RewardScale
from bt_hf.diffusion.guided.sampling import Sampler, Unfinished
from bt_hf.hub.contract import CONTRACT_FILES
from hub_server import TOKEN, Hub
from tiny_models import build as build_reward
from tiny_pipelines import PIPELINES, SIZE, build, draw, save
from tiny_trainers import QUIET, adapter, logged

pytest_plugins = ["hub_fixtures"]
PROMPTS = ["a red apple", "a boat", "a house", "a bird"]
LAST = {"gradient_steps": 1, "renoisings": 2}  # DRaFT-LV
all_pipelines = pytest.mark.parametrize("name", [name for name in PIPELINES if not name.startswith("wan")])


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def make(
    tmp_path: Path, pipeline: Any = "sd", reward: Any = redness, prompts: Any = PROMPTS, **options: Any
) -> RewardLoRATrainer:
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
    drawing = {"num_inference_steps": 4, "reward_samples": 8, "cache_dir": str(tmp_path / "prompts")}
    if options.get("guards", True):
        drawing["max_anchor"] = 10.0  # at so large a rate
    args = RewardLoRAConfig(str(tmp_path / "out"), **{**QUIET, **defaults, **drawing, **options})
    return RewardLoRATrainer(build(pipeline) if pipeline in list(PIPELINES) else pipeline, args, reward, prompts)


def with_scheduler(scheduler: type) -> DiffusionPipeline:
    pipeline = build("sd")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline


def randomise(trainer: RewardLoRATrainer) -> None:
    """A LoRA that does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


# --- Drawing ---


def finished(pipeline: DiffusionPipeline, left: int, guidance: float | None = None) -> torch.Tensor:
    """Draw two prompts, the last steps by the sampler."""
    family = find_family(pipeline)
    conditions, negative = family.encode_prompts(PROMPTS[:2]), family.encode_negative([""])
    sampler = Sampler(family, negative, SIZE, steps=4, guidance=guidance, channels_last=False)
    start = sampler.start(conditions, seeds(2), left)
    assert len(start.times) == left
    with torch.no_grad():
        latents = sampler.finish(start, lambda *given: sampler.predict(family.module, *given, conditions))
        return sampler.decode(latents)


def expected(pipeline: DiffusionPipeline, **options: Any) -> torch.Tensor:
    """Draw the same by an unmodified pipeline at its own guidance."""
    known = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 4, "output_type": "pt"}
    extra = {"SanaPipeline": {"use_resolution_binning": False}, "QwenImagePipeline": {"negative_prompt": " "}}
    options = known | extra.get(type(pipeline).__name__, {}) | options
    return pipeline(prompt=list(PROMPTS[:2]), generator=seeds(2), **options).images


@all_pipelines
@pytest.mark.parametrize("left", [1, 3])
def test_last_steps_are_those_of_the_pipeline(name: str, left: int) -> None:
    pipeline = build(name)
    torch.testing.assert_close(finished(pipeline, left), expected(pipeline), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "qwen", "z_image"])
def test_without_guidance_one_prediction_is_enough(name: str) -> None:
    pipeline = build(name)
    option = find_family(pipeline).guidance_option
    off = 0.0 if name == "z_image" else 1.0
    torch.testing.assert_close(finished(pipeline, 2, off), expected(pipeline, **{option: off}), atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with NumPy 2
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_schedulers_with_memory_noise_and_halves_of_steps(scheduler: type) -> None:
    pipeline = with_scheduler(scheduler)
    torch.testing.assert_close(finished(pipeline, 3), expected(pipeline), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_renoised_latents_are_those_of_the_schedule(name: str) -> None:
    pipeline = with_scheduler(DDIMScheduler) if name == "sd" else build(name)
    family = find_family(pipeline)
    sampler = Sampler(family, family.encode_negative([""]), SIZE, 4, None, channels_last=False)
    start = sampler.start(family.encode_prompts(PROMPTS[:2]), seeds(2), left=1)
    latents = torch.randn_like(start.latents)
    noises = [torch.randn_like(latents) for _ in range(3)]
    found = sampler.renoised(start, latents, noises)
    time = start.times[0]
    if name == "sd":
        kept = pipeline.scheduler.alphas_cumprod[time].sqrt()
        noise = (1 - pipeline.scheduler.alphas_cumprod[time]).sqrt()
    else:
        noise = time / 1000
        kept = 1 - noise
    torch.testing.assert_close(found.latents, torch.cat([kept * latents + noise * one for one in noises]))
    assert len(found.generators) == 6


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl", "sd3", "flux", "flux2", "qwen", "sana", "z_image"])
def test_jump_gives_what_the_prediction_means(name: str) -> None:
    """A denoiser that knows image and noise: wherever the drawing stops, the jump leads to that image."""
    pipeline = build(name)
    family = find_family(pipeline)
    sampler = Sampler(family, family.encode_negative([""]), SIZE, 4, None, channels_last=False)
    start = sampler.start(family.encode_prompts(PROMPTS[:2]), seeds(2), left=2)
    schedule = family.schedule(SIZE)
    latents, noise = torch.randn(2, 2, *sampler.noise_shape(start))
    noisy, target = schedule.corrupt(latents, noise, start.times[0].expand(2))
    known = replace(start, latents=family.pack(noisy))
    found = sampler.jump(known, lambda *_: family.pack(target), schedule)
    torch.testing.assert_close(family.unpack(found, SIZE), latents, atol=1e-4, rtol=1e-3)


# --- The loss ---


def loss_and_gradients(trainer: RewardLoRATrainer) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._rows(range(4)))
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }


def test_loss_and_gradient_are_those_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    """Unmodified scheduler and VAE, guidance 3: the last step with a gradient, the anchor from the untouched UNet."""
    options = {"gradient_steps": 1, "anchor_weight": 20.0, "guidance_scale": 3.0, "channels_last": False}
    trainer = make(tmp_path, with_scheduler(DDIMScheduler), **options)
    trainer.scale = RewardScale(mean=0.1, spread=0.02)
    randomise(trainer)
    loss, found = loss_and_gradients(trainer)

    fresh = with_scheduler(DDIMScheduler)
    embeds, _ = fresh.encode_prompt(PROMPTS, "cpu", 1, False)
    negative, _ = fresh.encode_prompt([""], "cpu", 1, False)
    both = torch.cat([negative.expand_as(embeds), embeds])
    scheduler = fresh.scheduler
    scheduler.set_timesteps(4)

    def predict(unet: Any, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        without, prediction = unet(torch.cat([latents, latents]), time, both).sample.chunk(2)
        return without + 3 * (prediction - without)

    shape = (4, SIZE[0] // 4, SIZE[1] // 4)
    latents = torch.stack(
        [torch.randn(shape, generator=seeded_generator(trainer.args.seed, row, 0, 0)) for row in range(4)]
    )
    with torch.no_grad():
        for time in scheduler.timesteps[:-1]:
            latents = scheduler.step(predict(trainer.model, latents, time), time, latents).prev_sample
        base = predict(fresh.unet, latents, scheduler.timesteps[-1])
    trainer.model.zero_grad()
    predicted = predict(trainer.model, latents, scheduler.timesteps[-1])
    latents = scheduler.step(predicted, scheduler.timesteps[-1], latents).prev_sample
    images = (fresh.vae.decode(latents / fresh.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    anchor = 0.5 * (predicted - base).square().mean((1, 2, 3))
    gain = (redness(images, PROMPTS) - 0.1) / 0.02
    assert (gain < 3).all()
    by_hand = (-gain + 20 * anchor).mean()
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item(), rel=1e-4)
    assert anchor.min() > 1e-5
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            scale = weight.grad.abs().max().item()
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-2, atol=1e-3 * scale)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("options", [{"gradient_steps": 1}, {}, LAST, {"jump_steps": 3}], ids=str)
def test_gradient_against_finite_differences(
    name: str, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along the gradient, from the same unfinished drawings: the steps before have no gradient.

    Nor has the base, whose predictions move with the input of the second step: there without an anchor.
    """
    weight = 5.0 if options else 0.0
    trainer = make(tmp_path, name, anchor_weight=weight, reward_clip=None, **options)
    randomise(trainer)
    trainer.scale = RewardScale(0.0, 0.05)
    start = trainer._start(trainer._rows(range(4)), 0, 0, trainer.args.jump_steps)
    if trainer.args.renoisings > 1:
        start = trainer._renoised(trainer.model, start, trainer._rows(range(4)), 0)
        monkeypatch.setattr(trainer, "_renoised", lambda *_: again())

    def again() -> Unfinished:  # with the same noise for a scheduler that adds some
        return replace(start, generators=seeds(len(start.generators)))

    monkeypatch.setattr(trainer, "_start", lambda *_: again())
    _, gradients = loss_and_gradients(trainer)
    slope = sum(value.square().sum() for value in gradients.values()).sqrt().item()
    weights = dict(trainer.model.named_parameters())

    def moved(by: float) -> float:
        with torch.no_grad():
            for key, value in gradients.items():
                weights[key].add_(value / slope, alpha=by)
            loss = trainer.compute_loss(trainer.model, trainer._rows(range(4))).item()
            for key, value in gradients.items():
                weights[key].sub_(value / slope, alpha=by)
        return loss

    step = 5e-3
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=0.03)


def test_a_reward_beyond_the_limit_counts_for_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path, reward_clip=2.0, anchor_weight=0.0)
    randomise(trainer)
    trainer.scale = RewardScale(-10.0, 1.0)
    loss, gradients = loss_and_gradients(trainer)
    assert loss == pytest.approx(-2.0)
    assert not any(value.any() for value in gradients.values())


def test_scale_of_rewards() -> None:
    """Half the mean squared difference of two independent draws is their variance."""
    torch.manual_seed(0)
    levels = 100 * torch.randn(4000, 1)  # differences between prompts do not count
    scale = RewardScale.of(levels + 3 * torch.randn(4000, 2))
    assert scale.spread == pytest.approx(3, rel=0.05)
    assert scale.gain(torch.tensor([scale.mean + 6])).item() == pytest.approx(6 / scale.spread, rel=1e-4)


# --- Training ---


@all_pipelines
def test_reward_rises_and_unmodified_clients_draw_the_same(name: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, name, max_steps=12, anchor_weight=0.1)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > rewards[0] + trainer.scale.spread
    assert trainer.summary.said.startswith("Reward ")
    trainer.save_model()
    folder = tmp_path / "out"

    plain = build(name)
    before = draw(plain)
    plain.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    after = draw(plain)
    assert (after - before).abs().max() > 0.01
    untouched = build(name)
    PeftModel.from_pretrained(untouched.components[trainer.family.denoiser], folder)
    torch.testing.assert_close(draw(untouched), after, atol=1e-5, rtol=1e-4)
    card = (folder / "README.md").read_text()
    for words in ("`redness`", "arxiv.org/abs/2309.17400", "4 prompts", "please the reward and", "load_lora_weights"):
        assert words in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("options", [LAST, {"gradient_steps": 3}, {"jump_steps": 3}], ids=str)
def test_every_way_of_drawing_trains(options: dict, tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=10, anchor_weight=0.1, **options)
    trainer.train()
    assert logged(trainer, "reward")[-1] > trainer.scale.mean + trainer.scale.spread


def test_gradient_checkpointing_changes_nothing_else(tmp_path: Path) -> None:
    found = []
    for option in (False, True):
        trainer = make(tmp_path / str(option), gradient_checkpointing=option)
        trainer.train()
        assert not trainer.pipeline.vae.is_gradient_checkpointing
        found.append([value for _, value in sorted(trainer.model.state_dict().items())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_large_anchor_keeps_near_the_base(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1e4):
        trainer = make(tmp_path / str(weight), max_steps=10, anchor_weight=weight)
        trainer.train()
        found[weight] = logged(trainer, "anchor")
    assert found[0.0][0] == found[1e4][0] == 0  # a fresh LoRA is the base
    assert found[1e4][-1] < 0.05 * found[0.0][-1]


def test_a_scorer_guides_and_its_own_weights_get_no_gradient(tmp_path: Path) -> None:
    scorer = PreferenceScorer(*build_reward("clip"))
    trainer = make(tmp_path, reward=scorer, max_steps=15, anchor_weight=0.1)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > trainer.scale.mean + trainer.scale.spread
    assert all(weight.grad is None for weight in scorer.model.parameters())
    assert "`PreferenceScorer`" in str(trainer.save_model()) + (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("options", [{}, {"jump_steps": 3}, LAST | {"max_anchor": 5.0}], ids=str)
def test_resuming_gives_the_same_adapter_to_the_bit(name: str, options: dict, tmp_path: Path) -> None:
    def run(folder: Path, resume: bool) -> RewardLoRATrainer:
        saving = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": resume or None}
        trainer = make(folder, name, max_steps=4, per_device_train_batch_size=2, **saving, **options)
        trainer.train()
        trainer.save_model()
        return trainer

    whole = run(tmp_path, False)
    expected = adapter(tmp_path / "out")
    torch.testing.assert_close(expected, adapter(tmp_path / "out" / "checkpoint-4"), rtol=0, atol=0)
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "elsewhere")
    resumed = run(tmp_path, True)
    assert resumed.scale == whole.scale
    assert resumed.anchor_guard._sum == whole.anchor_guard._sum
    found = adapter(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_drawings_depend_on_seed_row_and_epoch_alone(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    alone = trainer._start(trainer._rows([2]), 0, 1).latents
    torch.testing.assert_close(trainer._start(trainer._rows([0, 2]), 0, 1).latents[1:], alone, atol=1e-3, rtol=1e-3)
    assert (trainer._start(trainer._rows([2]), 0, 2).latents - alone).abs().max() > 0.1


def test_guard_stops_where_the_distance_runs_off(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=20, anchor_weight=0.0, max_anchor=1e-3)
    trainer.train()
    assert trainer.state.global_step < 20
    assert trainer.guards[0].stopped
    trainer.save_model()
    assert "where a reward is often hacked: stopped" in (tmp_path / "out" / "README.md").read_text()
    unguarded = make(tmp_path / "b", max_steps=20, anchor_weight=0.0, guards=False)
    unguarded.train()
    assert unguarded.state.global_step == 20


def test_validation_prompts_are_drawn_before_and_after(tmp_path: Path) -> None:
    trainer = make(tmp_path, validation_prompts=["a red apple"], validation_images=2, validation_inference_steps=2)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "before_after.png").is_file()
    assert logged(trainer, "validation_distance")


def test_prompts_of_a_dataset_and_extra_columns(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": PROMPTS, "weight": [0.0] * 4, "note": ["x"] * 4})
    first, second = make(tmp_path, prompts=rows), make(tmp_path)
    assert first.data_digest == second.data_digest
    first.train()
    assert first.state.global_step == 3


def test_a_published_folder_is_complete(hub: Hub, online: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "sd")
    hub.put("me/tiny-sd", Path(folder))
    trainer = make(tmp_path, "me/tiny-sd", hub_model_id="me/guided", hub_token=TOKEN)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("me/guided")
    assert set(files) <= CONTRACT_FILES | {"out_comfyui.safetensors"}
    assert {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "out_comfyui.safetensors"} <= set(files)
    data = ModelCard(files["README.md"].decode()).data
    assert data.base_model == "me/tiny-sd"
    assert "draft" in data.tags


# --- Bad input ---


class Blocked(DDIMScheduler):
    """A scheduler as some users write one."""

    @torch.no_grad()
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


def scaled(by: float) -> Callable[..., torch.Tensor]:
    return lambda images, prompts: by * redness(images, prompts)


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        (scaled(float("nan")), FloatingPointError, "the reward is not finite for a drawing of 'a red apple'"),
        (lambda images, prompts: images.mean(), ValueError, r"should return a tensor \(4,\).*the shape \(\)"),
        (lambda images, prompts: redness(images, prompts)[:, None], ValueError, r"the shape \(4, 1\)"),
        (lambda images, prompts: [1.0] * 4, ValueError, "but returned list"),
        (lambda images, prompts: redness(images.detach(), prompts), ValueError, "has no gradient: compute it from"),
        (scaled(0.0), ValueError, "is the same, .*, for different drawings"),
    ],
)
def test_rewards_that_cannot_guide(reward: Any, error: type, words: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, reward=reward)
    with pytest.raises(error, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_reward_that_ignores_the_images(tmp_path: Path) -> None:
    own = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="does not depend on the images"):
        make(tmp_path, reward=lambda images, prompts: 2 * own).train()


def test_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="WanPipeline draws videos, and a reward judges images"):
        make(tmp_path, build("wan"))


def test_a_scheduler_that_cannot_be_differentiated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Blocked can't be differentiated"):
        make(tmp_path, with_scheduler(Blocked)).train()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompts": []}, PreferenceDataError, "has no prompts"),
        ({"prompts": "a red apple"}, TypeError, "put it into a list"),
        ({"prompts": None}, TypeError, "list of prompts"),
        ({"prompts": ["a boat", " "]}, PreferenceDataError, "row 1 of `train_dataset`: expected a prompt"),
        ({"prompts": ["a boat", 3]}, PreferenceDataError, "row 1 of `train_dataset`"),
        ({"prompts": Dataset.from_dict({"text": ["a"]})}, PreferenceDataError, "column prompt, found text"),
        ({"reward": None}, TypeError, "should be a `PreferenceScorer`, or a function"),
        ({"reward": "my-taste"}, TypeError, "PreferenceScorer.from_pretrained"),
        ({"gradient_steps": 4}, ValueError, "`gradient_steps=4` should be below"),
        ({"gradient_steps": 2, "renoisings": 2}, ValueError, "`renoisings=2` has no effect"),
        ({"jump_steps": 2, "renoisings": 2}, ValueError, "`renoisings=2` has no effect"),
        ({"jump_steps": 2, "gradient_steps": 2}, ValueError, "`gradient_steps=2` has no effect"),
        ({"renoisings": 2}, ValueError, "`renoisings=2` has no effect"),
        ({"jump_steps": 9}, ValueError, "`jump_steps=9` should be below"),
        ({"reward_samples": 1}, ValueError, "`reward_samples` should be at least 2"),
        ({"label_smoothing": 0.1}, ValueError, "`label_smoothing=0.1` has no effect"),
        ({"guards": False, "max_anchor": 2.0}, ValueError, "`max_anchor=2.0` has no effect"),
        ({"anchor_weight": -1.0}, ValueError, "anchor_weight"),
        ({"reward_clip": 0.0}, ValueError, "reward_clip"),
        ({"eval_strategy": "steps", "eval_steps": 1}, ValueError, "eval"),
    ],
    ids=str,
)
def test_bad_options_and_prompts(change: dict, error: type, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        make(tmp_path, **change)


def test_a_long_prompt_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(tmp_path, prompts=["a boat", "a red apple" + " and a dog" * 100])
    assert "1 of 2 prompts are longer than the pipeline's context" in caplog.text
