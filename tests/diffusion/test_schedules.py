"""Noise schedules against what their papers and the schedulers of diffusers say, computed by hand."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from scipy import stats

from bt_hf.diffusion.families.schedules import DDPMSchedule, FlowSchedule, NoiseSchedule, find_schedule

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def latents_and_noise(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 4, 2, 3), torch.randn(count, 4, 2, 3)


# --- DDPM ---


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddpm_corrupts_as_the_scheduler_does(prediction_type: str, zero_snr: bool) -> None:
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    schedule = find_schedule(scheduler, tokens=64)
    assert schedule.prediction_type == prediction_type
    latents, noise = latents_and_noise()
    times = torch.tensor([0, 500, 999])
    noisy, target = schedule.corrupt(latents, noise, times)
    a = scheduler.alphas_cumprod[times].view(3, 1, 1, 1)
    assert (float(a[-1]) == 0) == zero_snr
    expected = {"epsilon": noise, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * latents, "sample": latents}
    torch.testing.assert_close(noisy, a**0.5 * latents + (1 - a) ** 0.5 * noise)
    torch.testing.assert_close(target, expected[prediction_type])
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, times))
    if prediction_type == "v_prediction":
        torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, times))


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**BETAS, skip_prk_steps=True),
        DDIMScheduler(**BETAS, clip_sample=False),
        EulerDiscreteScheduler(**BETAS),
        DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
        UniPCMultistepScheduler(**BETAS),
        LCMScheduler(),  # these betas are its defaults, and not those of DDPM
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_any_sampler_of_a_ddpm_gives_the_same_noise(scheduler) -> None:
    schedule = find_schedule(scheduler, tokens=64)
    torch.testing.assert_close(schedule.alphas_cumprod, DDPMScheduler(**BETAS).alphas_cumprod)


def test_ddpm_times_are_whole_and_even() -> None:
    schedule = DDPMSchedule(torch.linspace(0.99, 0.01, 10))
    times = schedule.times(torch.tensor([0.0, 0.0999, 0.1, 0.55, 0.99999994]))
    assert times.tolist() == [0, 0, 1, 5, 9]
    assert times.dtype == torch.int64
    # In half precision a number below 1 may round to it.
    assert schedule.times(torch.tensor([1.0])).tolist() == [9]


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        # snr = a / (1 - a): 0, 1/4, 4, 99 and infinity; gamma = 5
        ("epsilon", [1.0, 1.0, 1.0, 5 / 99, 0.0]),
        ("v_prediction", [0.0, 0.25 / 1.25, 4 / 5, 5 / 100, 0.0]),
        ("sample", [0.0, 0.25, 4.0, 5.0, 5.0]),
    ],
)
def test_min_snr_of_ddpm(prediction_type: str, expected: list[float]) -> None:
    schedule = DDPMSchedule(torch.tensor([0.0, 0.2, 0.8, 0.99, 1.0]), prediction_type)
    weights = schedule.min_snr_weights(torch.arange(5), gamma=5.0)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=1e-6)


# --- Flow ---


def test_flow_corrupts_along_straight_lines() -> None:
    latents, noise = latents_and_noise()
    noisy, target = FlowSchedule().corrupt(latents, noise, torch.tensor([0.0, 250.0, 1000.0]))
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    torch.testing.assert_close(noisy[2], noise[2])
    torch.testing.assert_close(target, noise - latents)


def test_flow_corrupts_as_the_scheduler_does() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = latents_and_noise()
    times = scheduler.timesteps[[10, 400, 900]]
    noisy, _ = find_schedule(scheduler, tokens=64).corrupt(latents, noise, times)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, times, noise))


def test_sigma_is_logit_normal() -> None:
    """Even numbers in, quantiles of the logit-normal distribution out."""
    u = (torch.arange(2000) + 0.5) / 2000
    sigma = FlowSchedule().times(u) / 1000
    assert stats.kstest(sigma.double().logit().numpy(), stats.norm.cdf).statistic < 1e-3


def test_flow_times_at_the_ends_are_finite() -> None:
    times = FlowSchedule(shift=3.0).times(torch.tensor([0.0, 0.5, 1.0]))
    assert 0 < times[0] < 50
    assert times[1].item() == pytest.approx(750.0)  # 3/2 / (1 + 2/2)
    assert 950 < times[2] < 1000


def test_static_shift_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma = torch.sigmoid(torch.special.ndtri(torch.tensor([0.1, 0.5, 0.9])))
    expected = 3 * sigma / (1 + 2 * sigma) * 1000
    torch.testing.assert_close(find_schedule(scheduler, 64).times(torch.tensor([0.1, 0.5, 0.9])), expected)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)])
def test_dynamic_shift_is_the_schedulers(kind: str, tokens: int, mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=kind)
    u = torch.tensor([0.1, 0.5, 0.9])
    sigma = torch.sigmoid(torch.special.ndtri(u))
    expected = scheduler.time_shift(mu, 1.0, sigma) * 1000
    torch.testing.assert_close(find_schedule(scheduler, tokens).times(u), expected)


def test_flow_sampled_by_a_solver() -> None:
    """Sana samples with DPM-Solver, whose config says that it is a flow, and how it is shifted."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="scaled_linear"
    )
    assert find_schedule(scheduler, tokens=64) == FlowSchedule(shift=3.0)


def test_min_snr_of_flow() -> None:
    """min(snr, gamma) sigma^2 with snr = ((1 - sigma) / sigma)^2, gamma = 5.

    sigma 0: snr is infinite, so gamma sigma^2 = 0; sigma 0.2: snr 16, 5 * 0.04 = 0.2; sigma 0.5: snr 1, 1 * 0.25;
    sigma 1: snr 0, so 0.
    """
    weights = FlowSchedule().min_snr_weights(torch.tensor([0.0, 200.0, 500.0, 1000.0]), gamma=5.0)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.2, 0.25, 0.0]))


# --- Both ---


@pytest.mark.parametrize(
    "schedule",
    [DDPMSchedule(torch.linspace(0.99, 0.01, 10)), FlowSchedule()],
    ids=["ddpm", "flow"],
)
def test_half_precision_is_corrupted_in_float32(schedule: NoiseSchedule) -> None:
    latents, noise = latents_and_noise()
    times = schedule.times(torch.rand(3))
    noisy, target = schedule.corrupt(latents.bfloat16(), noise.bfloat16(), times)
    assert noisy.dtype == target.dtype == torch.float32
    expected, _ = schedule.corrupt(latents.bfloat16().float(), noise.bfloat16().float(), times)
    assert torch.equal(noisy, expected)


def test_min_snr_weighs_the_error_of_the_clean_latents() -> None:
    """Every prediction type gives min(snr, gamma) times the squared error of the latents."""
    a, gamma = 0.3, 0.2
    snr = a / (1 - a)
    latents, noise = latents_and_noise(1)
    off = 0.1 * torch.randn_like(latents)
    times = torch.tensor([0])
    expected = min(snr, gamma) * off.square().mean().item()
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = DDPMSchedule(torch.tensor([a]), kind)
        noisy, target = schedule.corrupt(latents, noise, times)
        # A model that predicts latents + off, rather than the latents, for the same noisy latents.
        _, wrong = schedule.corrupt(latents + off, (noisy - math.sqrt(a) * (latents + off)) / math.sqrt(1 - a), times)
        error = (wrong - target).square().mean()
        assert (schedule.min_snr_weights(times, gamma) * error).item() == pytest.approx(expected, rel=1e-4)
    flow, sigma = FlowSchedule(), 0.6
    times = torch.tensor([1000 * sigma])
    noisy, target = flow.corrupt(latents, noise, times)
    _, wrong = flow.corrupt(latents + off, (noisy - (1 - sigma) * (latents + off)) / sigma, times)
    expected = min(((1 - sigma) / sigma) ** 2, gamma) * off.square().mean().item()
    error = (wrong - target).square().mean()
    assert (flow.min_snr_weights(times, gamma) * error).item() == pytest.approx(expected, rel=1e-4)


def test_unknown_prediction_type_is_named() -> None:
    scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample, but it is 'flow_prediction'"):
        find_schedule(scheduler, tokens=64)


def test_scheduler_of_another_kind_is_named() -> None:
    with pytest.raises(TypeError, match="EDMEulerScheduler is not supported: expected a scheduler with betas"):
        find_schedule(EDMEulerScheduler(), tokens=64)


# --- Both ---


@pytest.mark.parametrize(
    "schedule",
    [
        *(
            find_schedule(DDPMScheduler(**BETAS, prediction_type=kind), tokens=64)
            for kind in ("epsilon", "v_prediction", "sample")
        ),
        FlowSchedule(),
    ],
    ids=["epsilon", "v_prediction", "sample", "flow"],
)
def test_noise_factors_turn_changes_of_predictions_into_changes_of_noise(schedule: NoiseSchedule) -> None:
    """Two noises that one noisy latent may hold, and the predictions that go with them."""
    times = torch.tensor([20, 500, 900])
    latents, noise = latents_and_noise()
    other = noise + 0.1 * torch.randn_like(noise)
    noisy, target = schedule.corrupt(latents, noise, times)
    kept, _ = schedule.corrupt(torch.ones_like(latents), torch.zeros_like(noise), times)
    added, _ = schedule.corrupt(torch.zeros_like(latents), torch.ones_like(noise), times)
    _, other_target = schedule.corrupt((noisy - added * other) / kept, other, times)
    factors = schedule.noise_factors(times.float()).view(-1, 1, 1, 1)
    torch.testing.assert_close(factors * (target - other_target).abs(), (noise - other).abs(), atol=1e-4, rtol=1e-3)
