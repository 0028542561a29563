"""Train a LoRA for a diffusers pipeline, guided by the gradient of a reward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from bt_hf.diffusion import loading
from bt_hf.diffusion.callbacks import BeginCallback, CollapseGuard
from bt_hf.diffusion.collator import Batch, DiffusionCollator
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.errors import seeded_generator
from bt_hf.diffusion.guided.callbacks import AnchorGuard, summarise
from bt_hf.diffusion.guided.card import guided_facts, write_guided_card
from bt_hf.diffusion.guided.config import RewardLoRAConfig
from bt_hf.diffusion.guided.prompts import Prompts, cache_prompts, list_prompts
from bt_hf.diffusion.guided.rewards import Reward, RewardScale, check_reward, values_and_gradients
from bt_hf.diffusion.guided.sampling import Sampler, Unfinished
from bt_hf.diffusion.lora_trainer import LoRATrainer
from bt_hf.diffusion.summary import Summary
from bt_hf.diffusion.validation_images import Validation
from bt_hf.hub.facts import digest_rows
from bt_hf.training.arguments import check_arguments
from bt_hf.training.saving import prepare_run

# Purposes of random numbers, so that none repeats those of another: see `seeded_generator`.
_DRAW, _BASE, _RENOISE, _JUMP = range(4)


class RewardLoRATrainer(LoRATrainer):
    """Train a LoRA, so that a diffusers pipeline draws what a reward likes, without any images drawn beforehand.

    At each step the pipeline draws the prompts, and the gradient of the reward flows through the VAE and the last
    denoising steps into the LoRA: DRaFT (https://arxiv.org/abs/2309.17400), whose kin is ReFL of ImageReward
    (https://arxiv.org/abs/2304.05977). See `RewardLoRAConfig` for the loss and what holds it to the base.

    Args:
        model: Hub id or folder of a pipeline, a loaded `DiffusionPipeline`, or the id or folder of a published
            preference LoRA, from which training goes on. A loaded pipeline is trained in place, so it draws with the
            LoRA afterwards.
        args: Options; default `RewardLoRAConfig("reward-lora")`.
        reward: A `PreferenceScorer`, or any function of images (B, 3, H, W) float32 in [0, 1] and B prompts that
            returns rewards (B,) with gradients.
        train_dataset: Prompts to draw: a list of texts, or a `Dataset` with the column `prompt`.
        peft_config: Any `LoraConfig`; default: the family's layers with the options `lora_*`.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.

    Attributes:
        family: Family around the pipeline.
        pipeline: Draws with the LoRA.
        scale: Mean and spread of the base's rewards, once training has begun.

    Raises:
        FileExistsError: `args.output_dir` already holds an adapter.
        FloatingPointError: A reward is not finite; names the prompt.
        PreferenceDataError: There are no prompts, or one of them is not a text.
        TypeError: The reward can't be called, or the pipeline or its scheduler is not supported.
        ValueError: The options contradict each other, or the pipeline, its scheduler or the reward can't be
            differentiated.

    Example:
        ```python
        from bt_hf import PreferenceScorer, RewardLoRAConfig, RewardLoRATrainer

        scorer = PreferenceScorer.from_pretrained("my-taste")
        prompts = ["a red apple", "a house by the sea", "an old boat"]
        trainer = RewardLoRATrainer(
            "stable-diffusion-v1-5/stable-diffusion-v1-5", RewardLoRAConfig("my-guided-lora"), scorer, prompts
        )
        trainer.train()
        trainer.save_model()  # DiffusionPipeline.load_lora_weights("my-guided-lora") draws with it
        ```
    """

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        args: RewardLoRAConfig | None = None,
        reward: Reward | None = None,
        train_dataset: Prompts | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = RewardLoRAConfig("reward-lora") if args is None else args
        check_arguments(args, RewardLoRAConfig)
        self.reward = check_reward(reward)
        prompts = list_prompts(train_dataset)
        prepare_run(args)
        self.data_digest = digest_rows(prompts)
        self.family, self.base_name = loading.load_family(model, args.dtype, args.quantization_config)
        self.pipeline = self.family.pipeline
        if self.family.task != "text-to-image":
            raise ValueError(
                f"{type(self.pipeline).__name__} draws videos, and a reward judges images: train on pairs of clips or "
                "of single frames with `PreferenceLoRATrainer` instead."
            )
        self.size = loading.training_size(self.family, args.resolution)
        self.schedule = self.family.schedule(self.size)
        self.encoder = PairEncoder(self.family, DiffusionCollator(self.size), False, args.device)
        denoiser = loading.add_adapter(self.family, peft_config, args, self.base_name)
        loading.warn_of_long_prompts(self.family, [prompts], args.validation_prompts)
        rows = cache_prompts(prompts, self.encoder, args.cache_dir)
        self.validation = Validation(self.encoder, args)
        self.sampler = Sampler(
            self.family,
            self.family.encode_negative([""]),
            self.size,
            steps=args.num_inference_steps,
            guidance=args.guidance_scale,
            channels_last=args.channels_last,
        )
        self.encoder.release(keep_vae=True)
        super().__init__(
            model=denoiser,
            args=args,
            data_collator=self.encoder.collator,
            train_dataset=rows,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.sharded:
            raise ValueError(
                "`RewardLoRATrainer` draws with the whole denoiser on each device, which FSDP and DeepSpeed divide: "
                "start it without them, and lower memory by `dtype='bfloat16'` and `gradient_checkpointing=True`."
            )
        self.scale: RewardScale | None = None
        self.add_callback(BeginCallback(self._begin))
        self.summary = Summary(summarise)
        self.add_callback(self.summary)
        self.anchor_guard = AnchorGuard(args.max_anchor or float("inf"), self.accelerator.gather)
        self.guards = [self.anchor_guard, CollapseGuard()] if args.guards else []
        for guard in self.guards:
            self.add_callback(guard)

    # --- Before the first step ---

    def _prepare_training(self) -> None:
        """Take a step that changes nothing, to see that there is a gradient, and memory for it."""
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
            if self.pipeline.vae._supports_gradient_checkpointing:
                self.pipeline.vae.enable_gradient_checkpointing()
        batch = self._rows(range(min(self.args.per_device_train_batch_size, len(self.train_dataset))))
        try:
            start = self._start(batch, _BASE, 0)
            latents, _ = self._anchored(self.model, start, batch)
            if not latents.requires_grad:
                raise ValueError(
                    f"{type(start.scheduler).__name__} can't be differentiated: its steps give latents without a "
                    "gradient. Give the pipeline another scheduler, such as "
                    "`pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)`."
                )
            images = self.sampler.decode(latents)
            if not images.requires_grad:
                raise ValueError(f"{type(self.pipeline.vae).__name__} can't be differentiated: take another VAE.")
            _, gradients = values_and_gradients(self.reward, images, batch["prompt"])
            (images * gradients).sum().backward()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"too little memory for a step: {' '.join(str(error).split())[:200]} Lower "
                "`per_device_train_batch_size`, `gradient_steps`, `renoisings` or `resolution`, or set "
                "`gradient_checkpointing=True`, `bf16=True` or `dtype='bfloat16'`."
            ) from error
        self.model.zero_grad()

    def _begin(self) -> None:
        """Measure the base's rewards, unless a checkpoint holds them, and draw the validation prompts."""
        if self.scale is None:
            with self.base_model():
                self.scale = self._measure()
        self.log({"reward_base": self.scale.mean, "reward_spread": self.scale.spread})
        with self.base_model():
            self._log_validation(self.validation.draw_before())

    def _measure(self) -> RewardScale:
        """Return the scale of rewards of drawings by the denoiser as it is switched."""
        count, rows = -(-self.args.reward_samples // 2), len(self.train_dataset)
        rewards = []
        for first in range(0, count, self.args.per_device_train_batch_size):
            some = range(first, min(first + self.args.per_device_train_batch_size, count))
            batch = self._rows([index % rows for index in some])
            batch["row"] = torch.tensor(list(some))
            rewards.append(torch.stack([self._rewards_of(batch, sample) for sample in (0, 1)], dim=1))
        return RewardScale.of(broadcast(torch.cat(rewards)))

    def _rewards_of(self, batch: Batch, sample: int) -> torch.Tensor:
        """Return rewards (B,) of drawings by the denoiser as it is switched."""
        with torch.no_grad():
            start = self._start(batch, _BASE, sample)
            latents = self.sampler.finish(start, lambda *given: self._predict(self.model, batch, *given))
            images = self.sampler.decode(latents)
        return values_and_gradients(self.reward, images, batch["prompt"])[0]

    def _rows(self, indices: Sequence[int]) -> Batch:
        """Return a batch of some training rows, on the device."""
        rows: Any = self.train_dataset
        return self._prepare_inputs(rows.collate(rows.__getitems__(list(indices))))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.scale = RewardScale.load(resume_from_checkpoint)

    def save_beside_checkpoint(self, folder: Path) -> None:
        super().save_beside_checkpoint(folder)
        if self.scale is not None:
            self.scale.save(folder)

    # --- One step ---

    def _start(self, batch: Batch, purpose: int, sample: int, left: int | None = None) -> Unfinished:
        """Draw all but the last steps, with noise that depends on the seed, the row and the sample alone."""
        left = left or self.args.gradient_steps or 1
        generators = [seeded_generator(self.args.seed, row, purpose, sample) for row in batch["row"].tolist()]
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                return self.sampler.start(_conditions(batch), generators, left)
        finally:
            model.train(training)

    def _predict(self, model: nn.Module, batch: Batch, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        conditions = {
            name: value.repeat(len(noisy) // len(value), *[1] * (value.ndim - 1))
            for name, value in _conditions(batch).items()
        }
        with self.accelerator.autocast():
            return self.sampler.predict(model, noisy, times, conditions)

    def _anchored(self, model: nn.Module, start: Unfinished, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the last steps; return the latents (N, ...), and the distances (N,) from the base, with gradients.

        The base's predictions have none, also where they move with the input of a second step.
        """
        distances = []

        def predict(noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), self.base_model() as base:
                expected = self._predict(base, batch, noisy.detach(), times)
            predicted = self._predict(model, batch, noisy, times)
            change = (predicted - expected).square().flatten(1).mean(1)
            distances.append(self.schedule.noise_factors(times).square() * change / 2)
            return predicted

        if self.args.jump_steps:
            latents = self.sampler.jump(start, predict, self.schedule)
        else:
            latents = self.sampler.finish(start, predict)
        return latents, torch.stack(distances).mean(0)

    def _renoised(self, model: nn.Module, start: Unfinished, batch: Batch, sample: int) -> Unfinished:
        """Finish the drawings without gradients, and noise them anew for the last step."""
        with torch.no_grad():
            latents = self.sampler.finish(start, lambda *given: self._predict(model, batch, *given))
        shape = self.sampler.noise_shape(start)
        noises = [
            torch.stack(
                [
                    torch.randn(shape, generator=seeded_generator(self.args.seed, row, _RENOISE, sample, number))
                    for row in batch["row"].tolist()
                ]
            )
            for number in range(self.args.renoisings)
        ]
        return self.sampler.renoised(start, latents, noises)

    def _steps_left(self) -> int | None:
        if not self.args.jump_steps:
            return None
        generator = seeded_generator(self.args.seed, _JUMP, self.state.global_step)
        return int(torch.randint(1, self.args.jump_steps + 1, (), generator=generator))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the drawings of a batch of prompts: see `RewardLoRAConfig`."""
        assert self.scale is not None  # `_begin` has measured it
        sample = self.position.epochs_completed
        start = self._start(inputs, _DRAW, sample, self._steps_left())
        if self.args.renoisings > 1:
            start = self._renoised(model, start, inputs, sample)
        latents, anchors = self._anchored(model, start, inputs)
        images = self.sampler.decode(latents)
        times = len(images) // len(inputs["prompt"])
        rewards, gradients = values_and_gradients(self.reward, images, inputs["prompt"] * times)
        gains = self.scale.gain(rewards)
        limit = self.args.reward_clip or float("inf")
        slopes = gradients / self.scale.spread * (gains < limit)[:, None, None, None]
        climbed = (images * slopes).flatten(1).sum(1)  # a linear function with the gradient of the gain
        losses = -(gains.clamp(max=limit) + climbed - climbed.detach()) + self.args.anchor_weight * anchors
        rows = {"reward": rewards, "anchor": anchors}
        losses, *rows_ = (value.view(times, -1).mean(0) for value in (losses, *rows.values()))
        self.track(inputs["weight"], **dict(zip(rows, rows_, strict=True)))
        if self.guards:
            self.anchor_guard.observe(anchors)
        loss = self.weighted_mean(losses, inputs["weight"], num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    # --- The folder ---

    def write_card(self, folder: Path) -> None:
        write_guided_card(folder, guided_facts(self, self.args, self.warnings_seen))


def _conditions(batch: Batch) -> dict[str, torch.Tensor]:
    return {name.removeprefix("condition_"): value for name, value in batch.items() if name.startswith("condition_")}
