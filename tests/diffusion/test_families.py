"""Every family against the unmodified pipeline of diffusers that it stands for."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from bt_hf.diffusion.families.base import Family, encode_latents, find_family, unwrap
from tiny_pipelines import PIPELINES, SIZE, build, draw, make_flux, make_sd, make_sd3, save

all_pipelines = pytest.mark.parametrize("name", PIPELINES)
NAMES = {
    "sd": "stable-diffusion",
    "sd2": "stable-diffusion",
    "sdxl": "stable-diffusion-xl",
    "sd3": "stable-diffusion-3",
    "flux": "flux",
    "flux2": "flux2",
    "flux2_dev": "flux2",
    "sana": "sana",
    "qwen": "qwen-image",
    "z_image": "z-image",
    "wan": "wan",
    "wan22": "wan",
}
PROMPTS = ["a red apple", "a drawing of the old boat and the small bird"]


def random_lora(family: Family, denoiser: nn.Module, **kwargs: Any) -> PeftModel:
    """A LoRA with weights of its own on the default layers, whose alpha is not its rank."""
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False} | kwargs
    config = LoraConfig(target_modules=family.target_modules, **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(denoiser, config)


def inputs_of(family: Family) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Latents, times and conditions for two prompts."""
    mean, _ = family.encode_images(torch.rand(2, 3, *SIZE) * 2 - 1)
    times = family.schedule(SIZE).times(torch.tensor([0.3, 0.8]))
    return torch.randn_like(mean), times, family.encode_prompts(PROMPTS)


@all_pipelines
def test_find_family(name: str) -> None:
    assert find_family(build(name)).name == NAMES[name]


@all_pipelines
def test_tiny_pipelines_depend_on_seed_and_prompt(name: str) -> None:
    image = draw(build(name))
    assert image.shape == (3, *SIZE)
    assert torch.equal(image, draw(build(name)))
    assert not torch.allclose(image, draw(build(name, seed=1)), atol=0.05)
    # To a tiny tokenizer the chat of Qwen-Image is twenty times as long as the prompt. Wan's text counts for little.
    assert not torch.allclose(
        image, draw(build(name), "the old boat"), atol=0.001 if name in ("qwen", "wan", "wan22") else 0.02
    )


@all_pipelines
def test_tiny_pipelines_save_and_load(name: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(save(tmp_path, name))
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded), draw(build(name)))
    assert find_family(loaded).name == NAMES[name]


@all_pipelines
def test_encoded_prompts_draw_the_same_image(name: str) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    values = family.encode_prompts(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        one = family.call_arguments({key: value[index : index + 1] for key, value in values.items()})
        torch.testing.assert_close(draw(pipeline, None, **one), draw(pipeline, prompt), atol=1e-5, rtol=0)


@all_pipelines
def test_prompts_of_any_length_have_one_shape(name: str) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    together = family.encode_prompts(["", *PROMPTS])
    for index, prompt in enumerate(["", *PROMPTS]):
        for key, value in family.encode_prompts([prompt]).items():
            assert value.shape[0] == 1
            assert not value.requires_grad
            torch.testing.assert_close(value[0], together[key][index], atol=1e-5, rtol=1e-4)


@all_pipelines
def test_longest_prompt_is_read_to_its_end(name: str) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    tokenizer, limit = family.longest_prompt()
    added = len(tokenizer("")["input_ids"])

    def matters(words: int) -> bool:
        """True if the last of so many words does."""
        one, other = (" ".join(["a"] * (words - 1) + [last]) for last in ("boat", "bird"))
        assert len(tokenizer(one)["input_ids"]) == words + added
        values = family.encode_prompts([one, other])
        return any(not torch.equal(*value) for value in values.values())

    words = limit - added
    assert matters(words)
    # Around a prompt, FLUX.2, Qwen-Image and Z-Image write a chat, which goes on after it and is cut off first.
    assert not matters(words + (30 if name.startswith(("flux2", "qwen", "z_image")) else 1))


@all_pipelines
def test_encoded_images_are_what_the_pipeline_decodes(name: str) -> None:
    """The pipeline draws from given latents of no steps: it unscales and decodes them as the VAE would."""
    pipeline = build(name)
    family = find_family(pipeline)
    pixels = torch.rand(2, 3, *SIZE) * 2 - 1
    mean, std = family.encode_images(pixels)
    assert mean.shape == std.shape
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    config = pipeline.vae.config
    if name.startswith("flux2"):  # patches of latents, each channel with a mean and a standard deviation
        norm = pipeline.vae.bn
        scale = (norm.running_var + config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        shift = norm.running_mean.view(1, -1, 1, 1)
        raw, spread = (pipeline._unpatchify_latents(value) for value in (mean * scale + shift, std * scale))
    elif name in ("qwen", "wan", "wan22"):  # an image is a video of one frame
        scale, shift = (torch.tensor(one).view(1, -1, 1, 1) for one in (config.latents_std, config.latents_mean))
        raw, spread = (value.unsqueeze(2) for value in (mean * scale + shift, std * scale))
        pixels = pixels.unsqueeze(2)
    else:
        raw = mean / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        spread = std / config.scaling_factor
    with torch.no_grad():
        if name == "sana":  # its VAE has no distribution
            assert not std.any()
            latents = pipeline.vae.encode(pixels).latent
        else:
            distribution = pipeline.vae.encode(pixels).latent_dist
            torch.testing.assert_close(spread, distribution.std)
            latents = distribution.mode()
        expected = pipeline.vae.decode(latents).sample
        torch.testing.assert_close(pipeline.vae.decode(raw).sample, expected)


@all_pipelines
def test_latents_fit_the_schedule(name: str) -> None:
    """Latents have the shape that the denoiser takes, from noising to prediction."""
    pipeline = build(name)
    family = find_family(pipeline)
    schedule = family.schedule(SIZE)
    mean, std = family.encode_images(torch.rand(2, 3, *SIZE) * 2 - 1)
    times = schedule.times(torch.tensor([0.2, 0.7]))
    noisy, target = schedule.corrupt(mean + std * torch.randn_like(std), torch.randn_like(mean), times)
    denoiser = getattr(pipeline, family.denoiser)
    with torch.no_grad():
        prediction = family.predict(denoiser, noisy, times, family.encode_prompts(PROMPTS), SIZE)
    assert prediction.shape == target.shape == mean.shape
    assert prediction.dtype == torch.float32
    assert prediction.isfinite().all()


@all_pipelines
@pytest.mark.parametrize("size", [SIZE, (32, 64)], ids=["square", "wide"])
def test_predict_is_what_the_pipeline_asks_its_denoiser(name: str, size: tuple[int, int]) -> None:
    """Record one step of the unmodified pipeline, and give its latents and time to `predict`."""
    pipeline = build(name)
    family = find_family(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    calls: list[tuple[tuple, dict, torch.Tensor]] = []
    hook = denoiser.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    draw(pipeline, PROMPTS, height=size[0], width=size[1], num_inference_steps=1)
    hook.remove()
    args, kwargs, expected = calls[0]
    sample = args[0] if args else kwargs["hidden_states"]
    time = args[1] if len(args) > 1 else kwargs["timestep"]
    if name == "z_image":  # lists of images with one frame; time and velocity run from noise to image
        sample, expected = (torch.stack(list(value)).squeeze(2) for value in (sample, expected))
        time, expected = 1000 - time * 1000, -expected
    elif name == "qwen":
        sample, expected = (
            pipeline._unpack_latents(one, *size, vae_scale_factor=4)[:, :, 0] for one in (sample, expected)
        )
        time = time * 1000
    elif name in ("wan", "wan22"):  # one frame; a time for each token of Wan 2.2
        sample, expected, time = sample.squeeze(2), expected.squeeze(2), time.flatten()[0]
    elif name == "flux":
        latent = (size[0] // 4, size[1] // 4)
        sample = pipeline._unpack_latents(sample, *latent, vae_scale_factor=1)
        expected = pipeline._unpack_latents(expected, *latent, vae_scale_factor=1)
        time = time * 1000
    elif name.startswith("flux2"):  # (N, h w, C): a row of patches
        patches = (2, -1, size[0] // 8, size[1] // 8)
        sample, expected = (value.transpose(1, 2).reshape(patches) for value in (sample, expected))
        time = time * 1000
    conditions = family.encode_prompts(PROMPTS)
    with torch.no_grad():
        prediction = family.predict(denoiser, sample, time.expand(2), conditions, size)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)


@all_pipelines
def test_predict_through_wrappers(name: str) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    noisy, times, conditions = inputs_of(family)
    denoiser = getattr(pipeline, family.denoiser)
    with torch.no_grad():
        plain = family.predict(denoiser, noisy, times, conditions, SIZE)
        model = random_lora(family, denoiser)
        adapted = family.predict(nn.DataParallel(model), noisy, times, conditions, SIZE)
        with model.disable_adapter():
            torch.testing.assert_close(family.predict(model, noisy, times, conditions, SIZE), plain)
    assert unwrap(nn.DataParallel(model)) is denoiser
    assert (adapted - plain).abs().mean() > 0.01 * plain.abs().mean()


@all_pipelines
def test_gradients_reach_every_lora_weight(name: str) -> None:
    """And in bfloat16, with the LoRA in float32, as the trainer holds it."""
    pipeline = build(name).to(torch.bfloat16)
    family = find_family(pipeline)
    noisy, times, conditions = inputs_of(family)
    model = random_lora(family, getattr(pipeline, family.denoiser))
    prediction = family.predict(model, noisy, times, conditions, SIZE)
    assert prediction.dtype == torch.float32
    prediction.square().mean().backward()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert not [key for key, value in trained.items() if value.grad is None]  # DDP would wait for them
    idle = {key.split(".lora_")[0] for key, value in trained.items() if not value.grad.any()}
    # The last block of SD3 asks what text tokens attend to, and throws the answer away.
    assert idle <= {"base_model.model.transformer_blocks.1.attn.add_q_proj"}
    assert not idle or name == "sd3"


@all_pipelines
def test_saved_lora_loads_both_ways(name: str, tmp_path: Path) -> None:
    """`load_lora_weights` and `PeftModel.from_pretrained` give what was trained, with ranks and alphas by layer."""
    trained, loaded, other = build(name), build(name), build(name)
    family = find_family(trained)
    noisy, times, conditions = inputs_of(family)
    before = draw(loaded)
    patterns = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 1, "to_k": 4}}
    model = random_lora(family, getattr(trained, family.denoiser), **patterns)
    family.save_lora(model, tmp_path)
    model.save_pretrained(tmp_path)

    loaded.load_lora_weights(tmp_path)
    peft = PeftModel.from_pretrained(getattr(other, family.denoiser), tmp_path)
    with torch.no_grad():
        expected = family.predict(model, noisy, times, conditions, SIZE)
        for denoiser in (getattr(loaded, family.denoiser), peft):
            prediction = family.predict(denoiser, noisy, times, conditions, SIZE)
            torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(draw(loaded), before, atol=0.02)


@all_pipelines
def test_saved_lora_says_nothing_of_local_paths(name: str, tmp_path: Path) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    model = random_lora(family, getattr(pipeline, family.denoiser))
    model.peft_config["default"].base_model_name_or_path = "/home/someone/models/base"
    family.save_lora(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert b"someone" not in (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()


@all_pipelines
def test_every_default_target_is_there(name: str) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    model = get_peft_model(denoiser, LoraConfig(target_modules=family.target_modules))
    names = [key for key, _ in model.named_modules() if key.endswith(".lora_A")]
    adapted = {key.removeprefix("base_model.model.").removesuffix(".lora_A") for key in names}
    if isinstance(family.target_modules, str):  # a pattern; FLUX.2's blocks have no other layers
        layers = {key for key, layer in build(name).transformer.named_modules() if isinstance(layer, nn.Linear)}
        assert {key for key in layers if "transformer_blocks." in key} == adapted
        return
    for target in family.target_modules:
        assert any(key.endswith("." + target) for key in adapted), target


# --- Sizes ---


@all_pipelines
def test_sizes(name: str) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    assert family.multiple == {"sana": 32, "wan": 16, "wan22": 16}.get(name, 8)
    # FLUX and Qwen-Image have no size in their configs: the pipeline's own default, 128 latents. Z-Image says 1024.
    side = {"flux": 512, "flux2": 512, "flux2_dev": 512, "qwen": 512, "z_image": 1024}.get(name, SIZE[0])
    assert family.default_size == ((480, 832) if family.name == "wan" else (side, side))


def test_default_size_of_a_wide_unet() -> None:
    pipeline = build(lambda: make_sd(sample_size=[8, 12]))
    assert find_family(pipeline).default_size == (32, 48)


# --- Clips ---

clips = pytest.mark.parametrize("name", ["wan", "wan22"])


@clips
@pytest.mark.parametrize("frames", [5, 9])
def test_encoded_clips_are_what_the_pipeline_decodes(name: str, frames: int) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    pixels = torch.rand(2, 3, frames, *SIZE) * 2 - 1
    mean, std = family.encode_images(pixels)
    latent, side = (frames - 1) // 4 + 1, 32 // pipeline.vae_scale_factor_spatial
    assert mean.shape == std.shape == (2, 4 * latent, side, side)
    raw = mean.unflatten(1, (4, latent)) * torch.tensor(pipeline.vae.config.latents_std).view(1, 4, 1, 1, 1)
    raw = raw + torch.tensor(pipeline.vae.config.latents_mean).view(1, 4, 1, 1, 1)
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae.decode(one).sample for one in raw.split(1)])
        found = [pipeline.vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)]
        expected = torch.cat([pipeline.vae.decode(one).sample for one in found])
    assert decoded.shape[2] == frames
    torch.testing.assert_close(decoded, expected)


@clips
def test_predict_of_a_clip_is_what_the_pipeline_asks_its_denoiser(name: str) -> None:
    pipeline = build(name)
    family = find_family(pipeline)
    calls: list[tuple[dict, torch.Tensor]] = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    draw(pipeline, PROMPTS, num_frames=5, num_inference_steps=1)
    hook.remove()
    kwargs, expected = calls[0]
    with torch.no_grad():
        prediction = family.predict(
            pipeline.transformer,
            kwargs["hidden_states"].flatten(1, 2),
            kwargs["timestep"].flatten()[:1].expand(2),
            family.encode_prompts(PROMPTS),
            SIZE,
        )
    torch.testing.assert_close(prediction.unflatten(1, (4, 2)), expected, atol=1e-5, rtol=1e-5)


@clips
@pytest.mark.parametrize(("frames", "near"), [(2, 1), (4, 5), (82, 81)])
def test_clips_of_a_length_that_the_vae_reads(name: str, frames: int, near: int) -> None:
    family = find_family(build(name))
    family.train_on_clips(5)
    assert family.call_options["num_frames"] == 5
    with pytest.raises(ValueError, match=rf"1, 5, 9, \.\.\. .* but got {frames}: take {near}, "):
        family.train_on_clips(frames)


def test_clips_are_for_pipelines_of_videos() -> None:
    find_family(build("sd")).train_on_clips(1)
    with pytest.raises(ValueError, match="`num_frames=5` is for a pipeline that draws videos"):
        find_family(build("sd")).train_on_clips(5)


# --- Particular models ---


def test_wan_keeps_some_layers_in_float32(tmp_path: Path) -> None:
    """As `from_pretrained` leaves them; the others get their inputs in bfloat16, as the pipeline gives them."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(save(tmp_path, "wan"), dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    assert {value.dtype for value in pipeline.transformer.parameters()} == {torch.float32, torch.bfloat16}
    family = find_family(pipeline)
    calls: list[tuple[dict, torch.Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    draw(pipeline, PROMPTS, num_inference_steps=1)
    kwargs, expected = calls[0]
    times = kwargs["timestep"].expand(2)
    with torch.no_grad():
        found = family.predict(
            pipeline.transformer, kwargs["hidden_states"].squeeze(2), times, family.encode_prompts(PROMPTS), SIZE
        )
    assert torch.equal(found, expected.squeeze(2).float())


def test_sd3_without_t5() -> None:
    """T5 is often left out to save memory: the pipeline puts zeros in its place, and so do the prompts."""

    def without_t5() -> Any:
        pipeline = make_sd3()
        pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
        return pipeline

    pipeline = build(without_t5)
    values = find_family(pipeline).encode_prompts(PROMPTS[:1])
    torch.testing.assert_close(draw(pipeline, None, **values), draw(pipeline, PROMPTS[0]))


def test_flux_without_guidance_embedding() -> None:
    """Models that were trained out of FLUX.1-schnell's distillation take no guidance."""
    pipeline = build(lambda: make_flux(guidance_embeds=False))
    family = find_family(pipeline)
    noisy, times, conditions = inputs_of(family)
    with torch.no_grad():
        assert family.predict(pipeline.transformer, noisy, times, conditions, SIZE).isfinite().all()


def test_flux2_latents_are_those_that_its_pipeline_edits() -> None:
    pipeline = build("flux2")
    pixels = torch.rand(2, 3, *SIZE) * 2 - 1
    mean, _ = find_family(pipeline).encode_images(pixels)
    assert mean.shape == (2, 16, 4, 4)
    torch.testing.assert_close(mean, pipeline._encode_vae_image(pixels, None))


@pytest.mark.parametrize("side", [512, 1024, 1536])
def test_flux2_trains_with_the_shift_of_many_steps(side: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    pipeline = build("flux2")
    size = (side // 2, side // 2)  # the tiny VAE has half the stride
    expected = math.exp(compute_empirical_mu((side // 16) ** 2, num_steps=200))
    assert find_family(pipeline).schedule(size).shift == pytest.approx(expected, rel=1e-3)


def test_sdxl_with_standardised_latents() -> None:
    """Playground v2.5 gives mean and standard deviation of each channel; the pipeline undoes both."""
    pipeline = build("sdxl")
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 2.0, 1.0])
    pixels = torch.rand(1, 3, *SIZE) * 2 - 1
    mean, std = find_family(pipeline).encode_images(pixels)
    distribution = pipeline.vae.encode(pixels).latent_dist
    stds = torch.tensor([0.5, 1.5, 2.0, 1.0]).view(1, 4, 1, 1)
    means = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(mean * stds / 0.2 + means, distribution.mean)
    torch.testing.assert_close(std * stds / 0.2, distribution.std)


def test_vae_that_overflows_in_half_precision_is_run_in_float32() -> None:
    pipeline = build("sdxl")
    pixels = torch.rand(1, 3, *SIZE) * 2 - 1
    expected, _ = encode_latents(pipeline.vae, pixels)
    half = pipeline.vae.to(torch.float16)
    mean, _ = encode_latents(half, pixels)
    assert half.dtype == torch.float16
    # Its weights were rounded, its arithmetic is exact.
    torch.testing.assert_close(mean, encode_latents(half.float(), pixels)[0])
    torch.testing.assert_close(mean, expected, atol=0.02, rtol=0.02)


def test_vae_without_a_distribution() -> None:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    pixels = torch.rand(1, 3, *SIZE) * 2 - 1
    mean, std = encode_latents(vae, pixels)
    torch.testing.assert_close(mean, vae.encode(pixels).latents)
    assert not std.any()
