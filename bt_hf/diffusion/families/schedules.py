"""Noise schedules of training: one interface, two schedules, both read from the scheduler of a pipeline."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class NoiseSchedule(Protocol):
    """Noise that a denoiser was trained with."""

    def times(self, u: torch.Tensor) -> torch.Tensor:
        """Map quantiles `u` (N,), uniform in [0, 1), to times (N,) as `Family.predict` takes them."""

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return noisy latents and the target of the prediction, float32; all (N, C, h, w)."""

    def noise_factors(self, times: torch.Tensor) -> torch.Tensor:
        """Return factors (N,) that turn a difference of predictions at `times` (N,) into one of the noise in them."""

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return the latents that a prediction for noisy latents means, without noise; all (N, C, h, w)."""

    def min_snr_weights(self, times: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return Min-SNR-gamma weights (N,) of the squared errors at `times` (N,). https://arxiv.org/abs/2303.09556

        min(snr, gamma) times the factor that turns the error of this prediction into the error of the clean latents.
        """


@dataclass(frozen=True, eq=False)
class DDPMSchedule:
    """Variance-preserving noise at whole timesteps: noisy = sqrt(a) latents + sqrt(1 - a) noise, snr = a / (1 - a).

    Attributes:
        alphas_cumprod: (T,) float32, the `a` of each timestep.
        prediction_type: Target of the denoiser: "epsilon" (the noise), "v_prediction" or "sample" (the latents).
    """

    alphas_cumprod: torch.Tensor = field(repr=False)
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        supported = ("epsilon", "v_prediction", "sample")
        if self.prediction_type not in supported:
            raise ValueError(
                f"The scheduler's `prediction_type` should be one of {', '.join(supported)}, but it is "
                f"{self.prediction_type!r}: correct `scheduler_config.json`, or take a pipeline of a supported type."
            )

    def times(self, u: torch.Tensor) -> torch.Tensor:
        steps = len(self.alphas_cumprod)
        return (u * steps).long().clamp(max=steps - 1)  # (N,)

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latents, noise = latents.float(), noise.float()
        a = self._a(times).view(-1, *[1] * (latents.ndim - 1))  # (N, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        if self.prediction_type == "v_prediction":
            return noisy, a.sqrt() * noise - (1 - a).sqrt() * latents
        return noisy, noise if self.prediction_type == "epsilon" else latents

    def noise_factors(self, times: torch.Tensor) -> torch.Tensor:
        a = self._a(times)
        if self.prediction_type == "epsilon":
            return torch.ones_like(a)
        return a.sqrt() if self.prediction_type == "v_prediction" else (a / (1 - a)).sqrt()

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        a = self._a(times).view(-1, *[1] * (noisy.ndim - 1))
        if self.prediction_type == "epsilon":
            return (noisy - (1 - a).sqrt() * predicted) / a.sqrt()
        return a.sqrt() * noisy - (1 - a).sqrt() * predicted if self.prediction_type == "v_prediction" else predicted

    def min_snr_weights(self, times: torch.Tensor, gamma: float) -> torch.Tensor:
        a = self._a(times)  # (N,)
        # Written so that snr = 0 (zero-terminal schedules) and snr = infinity give their limits instead of 0/0.
        if self.prediction_type == "epsilon":
            return (gamma * (1 - a) / a).clamp(max=1)  # min(snr, gamma) / snr
        if self.prediction_type == "v_prediction":
            return torch.minimum(a, gamma * (1 - a))  # min(snr, gamma) / (snr + 1)
        return (a / (1 - a)).clamp(max=gamma)

    def _a(self, times: torch.Tensor) -> torch.Tensor:
        # Schedulers that draw have times between whole ones, too.
        return self.alphas_cumprod.to(times.device)[times.round().long() if times.is_floating_point() else times]


@dataclass(frozen=True)
class FlowSchedule:
    """Straight lines from latents to noise: noisy = (1 - sigma) latents + sigma noise, target = noise - latents.

    Sigma is sampled as Stable Diffusion 3 was trained (https://arxiv.org/abs/2403.03206, section 3.1 and appendix
    B.1): its logit is standard normal, then it moves towards noise by `shift`, more so the larger the image. Time is
    sigma * `train_timesteps`.

    Attributes:
        shift: sigma becomes shift sigma / (1 + (shift - 1) sigma); 1 leaves it as it is.
        train_timesteps: The time of pure noise.
    """

    shift: float = 1.0
    train_timesteps: int = 1000

    def times(self, u: torch.Tensor) -> torch.Tensor:
        u = u.float()
        # The quantile of 0 is minus infinity: a latent without noise, about which nothing is to be learned.
        tiny = torch.finfo(u.dtype).eps
        sigma = torch.sigmoid(torch.special.ndtri(u.clamp(tiny, 1 - tiny)))
        return self.shift * sigma / (1 + (self.shift - 1) * sigma) * self.train_timesteps  # (N,)

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        latents, noise = latents.float(), noise.float()
        sigma = self._sigma(times).view(-1, *[1] * (latents.ndim - 1))  # (N, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise - latents

    def noise_factors(self, times: torch.Tensor) -> torch.Tensor:
        return 1 - self._sigma(times)

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return noisy - self._sigma(times).view(-1, *[1] * (noisy.ndim - 1)) * predicted

    def min_snr_weights(self, times: torch.Tensor, gamma: float) -> torch.Tensor:
        sigma = self._sigma(times)
        # The velocity's error times sigma is the error of the latents, and snr = ((1 - sigma) / sigma)^2:
        # min(snr, gamma) sigma^2, without the division.
        return torch.minimum((1 - sigma) ** 2, gamma * sigma**2)  # (N,)

    def _sigma(self, times: torch.Tensor) -> torch.Tensor:
        return times.float() / self.train_timesteps


def find_schedule(scheduler: Any, tokens: int) -> NoiseSchedule:
    """Return the schedule that a model was trained with, from the config of the scheduler that its pipeline has.

    Args:
        scheduler: A scheduler of diffusers.
        tokens: Image tokens that the denoiser sees at the size of training: dynamic shifting depends on them.

    Raises:
        TypeError: The scheduler has neither betas nor flow sigmas.
        ValueError: Its prediction type is not supported.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    # DPM-Solver and kin also sample flow models (Sana), and then say so.
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return FlowSchedule(_shift(config, tokens), config["num_train_timesteps"])
    if "beta_schedule" not in config:
        raise TypeError(
            f"{name} is not supported: expected a scheduler with betas (DDPM, DDIM, PNDM, Euler, DPM-Solver, ...) or "
            "a FlowMatch scheduler. Give the pipeline the one that its model was trained with, for example "
            "`pipeline.scheduler = DDPMScheduler.from_config(...)`."
        )
    from diffusers import DDPMScheduler  # an optional dependency

    # Not `from_config`: it takes DDPM's defaults for whatever the other class was given by default.
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type")
    values = {name: config[name] for name in (*names, "rescale_betas_zero_snr") if name in config}
    ddpm = DDPMScheduler(**values)
    return DDPMSchedule(ddpm.alphas_cumprod, ddpm.config.prediction_type)


def _shift(config: Any, tokens: int) -> float:
    """Return the shift of a flow: fixed, or growing with the number of image tokens."""
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or config.get("flow_shift") or 1.0
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    # e^mu / (e^mu + 1 / sigma - 1) is the same formula as the fixed shift's, with shift = e^mu; "linear" leaves out e.
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
