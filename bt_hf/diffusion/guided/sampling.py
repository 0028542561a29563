"""Draw with a pipeline, the last steps with gradients."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bt_hf.diffusion.drawing import drawing_arguments, own_guidance
from bt_hf.diffusion.families.base import Conditions, Family, Size
from bt_hf.diffusion.families.schedules import NoiseSchedule

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # noisy latents, times (N,) -> prediction


@dataclass(frozen=True)
class Unfinished:
    """Drawings before their last steps.

    Attributes:
        latents: (N, ...) float32, as the pipeline's scheduler steps them.
        times: (K,) of the steps that are left.
        scheduler: A copy of the pipeline's, with what it remembers of the steps before.
        generators: N generators, for schedulers that add noise.
    """

    latents: torch.Tensor
    times: torch.Tensor
    scheduler: Any
    generators: list[torch.Generator]


class Sampler:
    """Draw with a pipeline, whose own call takes all steps but the last, which are taken here, with gradients.

    Args:
        family: Family around the pipeline.
        negative: Embeddings of the negative prompt, each (1, ...).
        size: Height and width of the images.
        steps: Denoising steps.
        guidance: Strength of guidance; `None` for the pipeline's own.
        channels_last: Memory format of what a UNet is given.

    Raises:
        ValueError: The pipeline can't be stopped on the way, or its VAE overflows in its dtype.
    """

    def __init__(
        self,
        family: Family,
        negative: Conditions,
        size: Size,
        steps: int,
        guidance: float | None,
        channels_last: bool,
    ) -> None:
        self.family = family
        self.negative = negative
        self.size = size
        self.steps = steps
        self.guidance = guidance
        self.scale = own_guidance(family) if guidance is None else guidance
        self.memory_format = (
            torch.channels_last if channels_last and family.denoiser == "unet" else torch.contiguous_format
        )
        pipeline = family.pipeline
        known = inspect.signature(pipeline.__call__).parameters
        if not hasattr(type(pipeline), "interrupt") or "callback_on_step_end" not in known:
            raise ValueError(
                f"{type(pipeline).__name__} can't be guided by a reward: its call has no `callback_on_step_end` that "
                "could stop it before the last steps. Draw pairs with `generate_preference_pairs` instead."
            )
        if pipeline.vae.dtype == torch.float16 and getattr(pipeline.vae.config, "force_upcast", False):
            raise ValueError("The pipeline's VAE overflows in float16: load the pipeline in bfloat16 or float32.")

    @torch.no_grad()
    def start(self, conditions: Conditions, generators: list[torch.Generator], left: int) -> Unfinished:
        """Draw all but the last steps, by the pipeline's own call.

        Args:
            conditions: Embeddings of N prompts, each (N, ...).
            generators: N generators, of the first noise and of whatever a scheduler adds.
            left: Number of the last steps.
        """
        pipeline, found = self.family.pipeline, []

        def stop(drawing: Any, index: int, time: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            times = drawing.scheduler.timesteps[index + 1 :]
            if len(times) == left:
                scheduler = copy.deepcopy(drawing.scheduler)
                found.append(Unfinished(values["latents"].float(), times, scheduler, generators))
                drawing._interrupt = True
            return {}

        negative = self._negative(len(generators))
        arguments = drawing_arguments(self.family, conditions, negative, self.size, self.steps, self.guidance)
        bars = getattr(pipeline, "_progress_bar_config", {})
        pipeline.set_progress_bar_config(disable=True)
        try:
            pipeline(**arguments, generator=generators, output_type="latent", callback_on_step_end=stop)
        finally:
            pipeline.set_progress_bar_config(**bars)
        return found[0]

    def finish(self, drawing: Unfinished, predict: Predict) -> torch.Tensor:
        """Take the last steps with `predict`, and return the latents (N, ...), packed."""
        scheduler, latents = copy.deepcopy(drawing.scheduler), drawing.latents
        known = inspect.signature(scheduler.step).parameters
        options = {"generator": drawing.generators} if "generator" in known else {}
        for time in drawing.times:
            noisy = self._unpacked(_scaled(scheduler, latents, time))
            predicted = predict(noisy, time.expand(len(latents)).to(latents.device))
            latents = scheduler.step(predicted, time, latents, return_dict=False, **options)[0]
        return latents

    def jump(self, drawing: Unfinished, predict: Predict, schedule: NoiseSchedule) -> torch.Tensor:
        """Return the latents (N, ...), packed, that the next prediction means, without the steps between (ReFL)."""
        time = drawing.times[0]
        noisy = self._unpacked(_scaled(copy.deepcopy(drawing.scheduler), drawing.latents, time))
        times = time.expand(len(noisy)).to(noisy.device)
        predicted = self.family.unpack(predict(noisy, times), self.size)
        return self.family.pack(schedule.clean(noisy, predicted, times))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode packed latents (N, ...) to images (N, 3, H, W) float32 in [0, 1], as the pipeline does."""
        decoded = self.family.decode_latents(self.family.unpack(latents, self.size))
        return (decoded / 2 + 0.5).clamp(0, 1)

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Predict with guidance; both predictions in one forward.

        Args:
            denoiser: See `Family.predict`.
            noisy: (N, C, h, w).
            times: (N,).
            conditions: Embeddings of the prompts, each (N, ...).

        Returns:
            (N, ...) float32, packed.
        """
        family, count = self.family, len(noisy)
        if not family.guides(self.scale):
            given = family.with_guidance(conditions, self.scale)
            return family.pack(family.predict(denoiser, noisy, times, given, self.size))
        negative = self._negative(count)
        both = {name: torch.cat([negative[name].to(value), value]) for name, value in conditions.items()}
        twice = torch.cat([noisy, noisy]).contiguous(memory_format=self.memory_format)
        predicted = family.pack(family.predict(denoiser, twice, times.repeat(2), both, self.size))
        without, prediction = predicted.chunk(2)
        return family.guide(prediction, without, self.scale)

    def renoised(self, drawing: Unfinished, latents: torch.Tensor, noises: Sequence[torch.Tensor]) -> Unfinished:
        """Return drawings before their last step, of finished `latents` (N, ...) with n noises, (n N, ...) (DRaFT-LV).

        Args:
            drawing: Before its last step.
            latents: The same after it.
            noises: n tensors (N, C, h, w).
        """
        scheduler, count = drawing.scheduler, len(noises)
        times = drawing.times[-1].expand(len(latents)).to(latents.device)
        noisy = [_add_noise(scheduler, latents, self.family.pack(noise.to(latents)), times) for noise in noises]
        generators = drawing.generators * count
        return Unfinished(torch.cat(noisy), drawing.times[-1:], _repeated(scheduler, count, len(latents)), generators)

    def noise_shape(self, drawing: Unfinished) -> tuple[int, ...]:
        """Return the shape (C, h, w) of the noise of one drawing."""
        return tuple(self.family.unpack(drawing.latents[:1], self.size).shape[1:])

    def _unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return self.family.unpack(latents, self.size).contiguous(memory_format=self.memory_format)

    def _negative(self, count: int) -> dict[str, torch.Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.negative.items()}


def _scaled(scheduler: Any, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return what the denoiser is given; some schedulers step latents on another scale."""
    return scheduler.scale_model_input(latents, time) if hasattr(scheduler, "scale_model_input") else latents


def _add_noise(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    if hasattr(scheduler, "scale_noise"):  # flow models
        return scheduler.scale_noise(latents, times, noise)
    return scheduler.add_noise(latents, noise, times)


def _repeated(scheduler: Any, times: int, count: int) -> Any:
    """Return a copy of a scheduler that remembers steps of `count` drawings, with each drawing `times` times over."""

    def repeat(value: Any) -> Any:
        if isinstance(value, list):
            return [repeat(item) for item in value]
        batch = isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == count
        return value.repeat(times, *[1] * (value.ndim - 1)) if batch else value

    found = copy.deepcopy(scheduler)
    for name, value in vars(found).items():
        setattr(found, name, repeat(value))
    return found
