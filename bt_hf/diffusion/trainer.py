"""Train a preference LoRA for a diffusers pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import PredictionOutput

from bt_hf.diffusion import loading
from bt_hf.diffusion.against_base import against_base
from bt_hf.diffusion.beta import fixed_beta
from bt_hf.diffusion.cache import Evaluated, LatentPairs, Pairs, cache_datasets, each_dataset
from bt_hf.diffusion.callbacks import BeginCallback, make_guards
from bt_hf.diffusion.card import lora_facts, write_lora_card
from bt_hf.diffusion.collator import Batch, DiffusionCollator
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.errors import EVAL, TRAIN, Denoising, NoisyBatch
from bt_hf.diffusion.lora_trainer import LoRATrainer
from bt_hf.diffusion.pair_loss import PairLoss, by_preference, error_changes
from bt_hf.diffusion.quantization import check_unsharded
from bt_hf.diffusion.rate import MarginRate
from bt_hf.diffusion.reference import Reference, samples_come_again
from bt_hf.diffusion.summary import Summary, summarise
from bt_hf.diffusion.validation_images import Validation
from bt_hf.hub.facts import digest_rows
from bt_hf.metrics import preference_metrics
from bt_hf.training.arguments import check_arguments
from bt_hf.training.finite import check_losses
from bt_hf.training.saving import prepare_run
from bt_hf.training.trainer import Metrics


class PreferenceLoRATrainer(LoRATrainer):
    """Train a LoRA, so that a diffusers pipeline draws what one person prefers.

    The denoiser's own errors are the reward: an image is preferred if the LoRA lowered its denoising error more than
    the other one's, against the base (Diffusion-DPO, https://arxiv.org/abs/2311.12908; see `PreferenceLoRAConfig`).

    Args:
        model: Hub id or folder of a pipeline, a loaded `DiffusionPipeline`, or the id or folder of a published
            preference LoRA, from which training goes on. A loaded pipeline is trained in place, so it draws with the
            LoRA afterwards.
        args: Options; default `PreferenceLoRAConfig("preference-lora")`.
        train_dataset: Pairs in the row contract, as `load_preference_pairs` gives them, or with `loss_type="kto"`
            unpaired rows. A `Dataset`, or a stream, which is encoded at every step.
        eval_dataset: Held-out pairs, or a dict of several.
        peft_config: Any `LoraConfig`; default: the family's layers with the options `lora_*`.
        compute_metrics: Further metrics of `EvalPrediction(predictions=(margins, winner_errors, loser_errors,
            winner_errors_base, loser_errors_base), label_ids=(preference, weight))`, each (N,).
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.

    Attributes:
        family: Family around the pipeline.
        pipeline: Draws with the LoRA.
        beta: The beta in use, once training or evaluation has begun.

    Raises:
        FileExistsError: `args.output_dir` already holds an adapter.
        FloatingPointError: A loss is not finite; names the pair.
        PreferenceDataError: A dataset is not in the row contract, or has no rows.
        TypeError: The pipeline has no denoiser that is supported.
        ValueError: The options contradict each other, the resolution does not fit, or an image is too small.

    Example:
        ```python
        from bt_hf import PreferenceLoRAConfig, PreferenceLoRATrainer, load_preference_pairs

        pairs = load_preference_pairs("my-clicks/")  # prompt, chosen, rejected
        args = PreferenceLoRAConfig("my-taste-lora", validation_prompts=["a red apple"])
        trainer = PreferenceLoRATrainer("stable-diffusion-v1-5/stable-diffusion-v1-5", args, train_dataset=pairs)
        trainer.train()
        trainer.save_model()  # DiffusionPipeline.load_lora_weights("my-taste-lora") draws with it
        ```
    """

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        args: PreferenceLoRAConfig | None = None,
        train_dataset: Pairs | None = None,
        eval_dataset: Evaluated | None = None,
        peft_config: LoraConfig | None = None,
        compute_metrics: Metrics | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = PreferenceLoRAConfig("preference-lora") if args is None else args
        check_arguments(args, PreferenceLoRAConfig)
        loading.check_rows(args.loss_type, train_dataset, eval_dataset)
        prepare_run(args)
        self.data_digest = digest_rows(train_dataset)
        self.family, self.base_name = loading.load_family(model, args.dtype, args.quantization_config)
        self.pipeline = self.family.pipeline
        self.family.train_on_clips(args.num_frames)
        self.size = loading.training_size(self.family, args.resolution)
        self.denoising = Denoising(self.family, self.size, args)
        collator = DiffusionCollator(self.size, self.family.stride, args.num_frames)
        self.encoder = PairEncoder(self.family, collator, args.sample_latents, args.device)
        denoiser = loading.add_adapter(self.family, peft_config, args, self.base_name)
        loading.warn_of_long_prompts(self.family, each_dataset(train_dataset, eval_dataset), args.validation_prompts)
        if args.cache_latents:
            train_dataset, eval_dataset = cache_datasets(train_dataset, eval_dataset, self.encoder, args.cache_dir)
        self.validation = Validation(self.encoder, args)
        if all(isinstance(pairs, LatentPairs) for pairs in each_dataset(train_dataset, eval_dataset)):
            self.encoder.release(keep_vae=self.validation.wanted)
        self.beta = fixed_beta(args.beta, args.loss_type, self.family.beta)
        self.pair_loss = PairLoss(args, lambda values: self.accelerator.gather(values), self.track)
        super().__init__(
            model=denoiser,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.validation.check_sharding(self.sharded)
        check_unsharded(self.family.module, self.sharded)
        self.reference = Reference(
            self.denoising,
            self.base_model,
            lambda pairs, limit: map(self._encoded, self.read_batches(pairs, limit)),
            self.accelerator,
            args,
            sharded=self.sharded,
        )
        self.add_callback(BeginCallback(self._begin))
        self.add_callback(against_base(self))
        self.summary = Summary(summarise)
        self.add_callback(self.summary)
        self.guards = make_guards(args, eval_dataset) if args.guards else []
        own_schedule = optimizers == (None, None) and not self.is_deepspeed_enabled
        self.rate = MarginRate(self.accelerator.gather) if args.adapt_rate and own_schedule else None
        self.guards += [self.rate] if self.rate is not None else []
        for guard in self.guards:
            self.add_callback(guard)

    # --- Training and evaluation, with what goes before and after ---

    def _prepare_training(self) -> None:
        """Set beta, and compute the base's errors where training meets noise samples again."""
        samples = self.args.num_noise_samples
        if self.beta is None or samples:
            self.place_unsharded()
        self._set_beta(self.train_dataset)
        if not (samples and self.pair_loss.needs_reference and isinstance(self.train_dataset, LatentPairs)):
            return
        if samples_come_again(samples, len(self.get_train_dataloader()), self.args):
            self.reference.precompute(self.train_dataset, TRAIN, samples, "Errors of the base")

    def _begin(self) -> None:
        """Log beta and draw the validation prompts with the base."""
        self.log({"beta": self._beta})
        with self.base_model():
            self._log_validation(self.validation.draw_before())

    def evaluate(
        self,
        eval_dataset: Evaluated | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate at fixed noise samples; while training, draw the validation prompts too.

        Returns:
            Metrics whose names begin with `metric_key_prefix`, among them `accuracy` (of the implicit reward, with its
            interval), `loss`, `winner_error_base`, `winner_error_change` and `loser_error_change` (mean denoising
            error of the base, and against it; a positive change is worse), and those of `metrics.preference_metrics`.
        """
        self._prepare_evaluation(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.state.global_step and self.is_in_train:
            self._draw_validation()
        return metrics

    def predict(
        self, test_dataset: Pairs, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict as `evaluate` does, and return what `compute_metrics` is given."""
        self._prepare_evaluation(test_dataset)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _prepare_evaluation(self, pairs: Evaluated | str | None) -> None:
        """Set beta, and compute the base's errors on pairs that are about to be evaluated.

        Args:
            pairs: A dataset, or the name of one of several. A dict of several is left alone: each has its turn.
        """
        pairs = self.eval_dataset[pairs] if isinstance(pairs, str) else pairs
        if pairs is None or isinstance(pairs, dict):
            return
        if not isinstance(pairs, LatentPairs):
            self.encoder.check_available()
        self._set_beta(pairs if self.train_dataset is None else self.train_dataset)
        if isinstance(pairs, LatentPairs):
            samples = self.args.num_eval_noise_samples
            self.reference.precompute(pairs, EVAL, samples, "Errors of the base on held-out pairs")

    def _set_beta(self, pairs: Pairs) -> None:
        """Set beta from the first of these pairs, unless it is known."""
        if self.beta is None:
            # In the format of training: its rounding goes into beta, and so into every loss.
            loading.set_memory_format(self.family, self.model, self.args.channels_last and not self.sharded)
            self.beta = self.reference.auto_beta(pairs)

    @property
    def _beta(self) -> float:
        assert self.beta is not None  # `train` and whatever evaluates begin with `_set_beta`
        return self.beta

    def _get_dataloader(
        self, dataset: Pairs, description: str, *args: Any, **kwargs: Any
    ) -> torch.utils.data.DataLoader:
        """Return batches as the Trainer does, with the base's errors where they are known."""
        if isinstance(dataset, LatentPairs):
            purpose = TRAIN if description == "Training" else EVAL
            dataset = dataset.with_reference(self.reference.known(dataset, purpose))
        else:
            self.encoder.check_available()
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    # --- One step ---

    def _encoded(self, batch: Batch) -> Batch:
        """Return the batch with latents and conditions: from the cache, or encoded now."""
        return batch if "latents" in batch else self.encoder.encode(batch)

    def _errors(self, model: nn.Module, noisy: NoisyBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Denoising.errors`, in the precision of the training, also before accelerate has wrapped the model."""
        with self.accelerator.autocast():
            return self.denoising.errors(model, noisy)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Preference loss of a batch; in evaluation, the mean over fixed noise samples. See `PreferenceLoRAConfig`."""
        batch = self._encoded(inputs)
        if not model.training:
            loss, outputs = self._evaluate_batch(model, batch)
            return (loss, outputs) if return_outputs else loss
        samples = self.args.num_noise_samples
        sample = self.position.epochs_completed % samples if samples else self.position.epochs_completed
        noisy = self.denoising.add_noise(batch, sample, TRAIN)
        errors, predicted = self._errors(model, noisy)
        reference = self.reference.errors(noisy, batch, sample) if self.pair_loss.needs_reference else None
        values = self.pair_loss.losses(errors, reference, batch, self._beta, predicted, noisy.target)
        check_losses(values, inputs["prompt"].__getitem__, self.state.global_step + 1, self.args.output_dir)
        self.pair_loss.log(errors, reference, batch, self._beta)
        if self.rate is not None:
            margins = self.pair_loss.margins(errors, reference, self._beta)
            self.rate.observe(margins, batch["preference"], batch["weight"])
        loss = self.weighted_mean(values, batch["weight"], num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def _evaluate_batch(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Average over noise samples that depend on the rows alone, so that the figures don't jump."""
        loss, margins, found, base = [], [], [], []
        for sample in range(self.args.num_eval_noise_samples):
            noisy = self.denoising.add_noise(batch, sample, EVAL)
            errors, _ = self._errors(model, noisy)
            reference = self.reference.errors(noisy, batch, sample)
            loss.append(self.pair_loss.losses(errors, reference, batch, self._beta))
            found.append(errors)
            base.append(reference)
            if "preference" in batch:
                margins.append(self.pair_loss.margins(errors, reference, self._beta))
        mean = self.weighted_mean(torch.stack(loss).mean(0), batch["weight"], None)
        if not margins:
            return mean, {"loss": mean}
        winner, loser = by_preference(torch.stack(found).mean(0), batch["preference"])
        base_winner, base_loser = by_preference(torch.stack(base).mean(0), batch["preference"])
        values = {"winner": winner, "loser": loser, "base_winner": base_winner, "base_loser": base_loser}
        return mean, {"loss": mean, "margins": torch.stack(margins).mean(0), **values}

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        margins, winner, loser, base_winner, base_loser = (
            np.asarray(values, dtype=float) for values in prediction.predictions
        )
        preference, weight = (np.asarray(values, dtype=float) for values in prediction.label_ids)
        metrics = preference_metrics(margins, preference, weight)
        metrics |= error_changes(winner, loser, base_winner, base_loser, np.where(preference == 0.5, 0, weight))
        self.last_evaluation = {"margins": margins, "preference": preference}
        return metrics

    # --- The folder ---

    def write_card(self, folder: Path) -> None:
        facts = lora_facts(
            self,
            self.args,
            base=self.base_name,
            family=self.family,
            size=self.size,
            beta=self.beta,
            warnings=self.warnings_seen,
        )
        write_lora_card(folder, facts)
