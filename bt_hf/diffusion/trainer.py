"""Train a preference LoRA for a diffusers pipeline."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm
from transformers import EvalPrediction, TrainerCallback, set_seed

from bt_hf.diffusion import losses
from bt_hf.diffusion.cache import CachedPairs, cache_pairs
from bt_hf.diffusion.callbacks import CollapseGuard, OverfittingGuard, WinnerErrorGuard
from bt_hf.diffusion.card import write_lora_card
from bt_hf.diffusion.collator import UNPAIRED, DiffusionCollator
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.denoising import BETA, EVAL, TRAIN, Denoising, Question
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.family import save_lora
from bt_hf.diffusion.loading import add_adapter, count_truncated, load_pipeline, training_size
from bt_hf.diffusion.validation import Validation
from bt_hf.metrics import preference_metrics
from bt_hf.pairs import check_unpaired
from bt_hf.trainer import PreferenceTrainer, check_datasets, refuse_to_overwrite

logger = logging.getLogger(__name__)
Pairs: TypeAlias = Dataset | IterableDataset | CachedPairs

MAPO_BETA = 0.1  # of MaPO's own script; there it weighs two losses, and no spread of errors says how


class PreferenceLoRATrainer(PreferenceTrainer):
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
        peft_config: Any `LoraConfig`; default: the family's layers with `args.lora_rank`.
        compute_metrics: Further metrics of `EvalPrediction(predictions=(margins, winner_errors, loser_errors,
            winner_errors_base, loser_errors_base), label_ids=(preference, weight))`, each (N,).
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.

    Attributes:
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
        model: Any,
        args: PreferenceLoRAConfig | None = None,
        train_dataset: Pairs | None = None,
        eval_dataset: Pairs | dict[str, Pairs] | None = None,
        peft_config: LoraConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = args or PreferenceLoRAConfig("preference-lora")
        refuse_to_overwrite(args.output_dir, args.overwrite_output_dir or bool(args.resume_from_checkpoint))
        self._check_data(args, train_dataset, eval_dataset)
        # A margin and its labels, as the evaluation loop gathers them.
        args.label_names = ["preference", "weight"]
        # The Trainer sets the seed too, but only after the adapter has drawn its first weights.
        set_seed(args.seed)
        self.pipeline, self.family, self.base_name = load_pipeline(model)
        self.size = training_size(self.pipeline, self.family, args.resolution)
        schedule = self.family.schedule(self.pipeline, self.size)
        self.denoising = Denoising(self.family, schedule, self.size, args)
        collator = DiffusionCollator(self.size, smallest=self.pipeline.vae_scale_factor)
        self.encoder = PairEncoder(self.family, self.pipeline, collator, args.sample_latents, args.device)
        denoiser = add_adapter(self.pipeline, self.family, peft_config, args, self.base_name)
        prompts = list(train_dataset["prompt"]) if isinstance(train_dataset, Dataset) else []
        count_truncated(self.pipeline, prompts)
        train_dataset, eval_dataset = self._cache(args, train_dataset, eval_dataset)
        self.validation = Validation(self.pipeline, self.encoder, args)
        if all(data is None or isinstance(data, CachedPairs) for data in _each(train_dataset, eval_dataset)):
            self.encoder.release(keep_vae=self.validation.wanted)
        self.beta: float | None = None if args.beta == "auto" else float(args.beta)  # type: ignore[arg-type]
        self._user_metrics = compute_metrics
        super().__init__(
            model=denoiser,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.divided and args.validation_prompts:
            raise ValueError(
                "`validation_prompts` can't be drawn while FSDP or DeepSpeed divides the weights: leave them out, and "
                "draw with the saved folder."
            )
        self.add_callback(_Begin(self))
        self.guards = [WinnerErrorGuard(), OverfittingGuard(), CollapseGuard()] if args.guards else []
        for guard in self.guards:
            self.add_callback(guard)

    @staticmethod
    def _check_data(args: PreferenceLoRAConfig, train: Any, evaluation: Any) -> None:
        unpaired = isinstance(train, Dataset | IterableDataset) and set(UNPAIRED) <= set(train.column_names or ())
        if unpaired != (args.loss_type == "kto") and train is not None and not isinstance(train, CachedPairs):
            raise ValueError(
                "`loss_type='kto'` takes unpaired rows (prompt, completion, label): make them with "
                "`trl.unpair_preference_dataset`, or choose a loss for pairs."
                if not unpaired
                else f"`train_dataset` has unpaired rows, but `loss_type={args.loss_type!r}` compares two images: "
                "pass `loss_type='kto'`, or pairs (prompt, chosen, rejected)."
            )
        if unpaired:
            check_unpaired(train)
        check_datasets(None if unpaired else train, evaluation)

    def _cache(self, args: PreferenceLoRAConfig, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """Replace map-style datasets by ones that are encoded once."""

        def encode(pairs: Any, name: str) -> Any:
            if not (args.cache_latents and isinstance(pairs, Dataset)):
                return pairs
            return cache_pairs(pairs, self.encoder, args.cache_dir, f"Encoding {name}")

        if isinstance(evaluation, dict):
            return encode(train, "training pairs"), {name: encode(pairs, name) for name, pairs in evaluation.items()}
        return encode(train, "training pairs"), encode(evaluation, "held-out pairs")

    # --- Training and evaluation, with what goes before and after ---

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, between two drawings of the validation prompts."""
        if self.beta is None or self.args.noise_draws:
            self.place_whole()
        self._resolve_beta()
        if self.args.noise_draws and self._needs_reference and isinstance(self.train_dataset, CachedPairs):
            epochs = self.args.num_train_epochs
            if self.args.max_steps > 0:
                rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                epochs = self.args.max_steps * rows / len(self.train_dataset)
            # An epoch takes one draw of each pair, so draws beyond the last epoch are never seen.
            draws = min(self.args.noise_draws, math.ceil(epochs) + 1)
            self._cache_reference(self.train_dataset, draws, TRAIN, "Errors of the base")
        with self.base_model(), self.compute_loss_context_manager():
            self.log_validation(self.validation.draw_before())
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.log_validation(self._draw_after())
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on fixed draws of noise and timestep; while training, validation prompts are drawn too.

        Returns:
            Metrics with `metric_key_prefix`: `accuracy` (of the implicit reward, with its interval), `loss`,
            `winner_error_base`, `winner_error_change` and `loser_error_change` (mean denoising error of the base, and
            against it; a positive change is worse), and those of `metrics.preference_metrics`.
        """
        self._resolve_beta()
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(pairs, CachedPairs) and pairs.reference is None:
            self._cache_reference(pairs, self.args.eval_draws, EVAL, "Errors of the base on held-out pairs")
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.state.global_step and not isinstance(pairs, dict) and self.is_in_train:
            self.log_validation(self._draw_after())
        return metrics

    def _draw_after(self) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        with self.compute_loss_context_manager():
            model.eval()
            drawn = self.validation.draw_after(self.state.global_step)
        model.train(training)
        return drawn

    def log_validation(self, drawn: dict[str, float]) -> None:
        """Log what the validation images say, and show them to the trackers. `drawn` is empty if there are none."""
        if drawn:
            self.log(drawn)
            self.validation.show(self.callback_handler.callbacks, self.state.global_step)

    @property
    def _needs_reference(self) -> bool:
        return self.args.loss_type not in losses.REFERENCE_FREE

    @torch.no_grad()
    def _resolve_beta(self) -> None:
        """Set beta from up to 64 training pairs, if it is "auto"."""
        if self.beta is not None:
            return
        if self.args.loss_type == "mapo":
            self.beta = MAPO_BETA
            return
        pairs = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        pairs = next(iter(pairs.values())) if isinstance(pairs, dict) else pairs
        chosen, rejected = [], []
        for batch in self._batches(pairs, limit=64):
            for draw in range(4):
                errors = self._reference_errors(self.denoising.ask(batch, draw, BETA))
                # Of unpaired rows, each against the next.
                first, second = errors.chunk(2) if "preference" in batch else (errors, errors.roll(1))
                chosen.append(first.cpu())
                rejected.append(second.cpu())
        self.beta = losses.auto_beta(torch.cat(chosen), torch.cat(rejected))
        logger.info("beta = %.4g, from the spread of the base's error differences.", self.beta)

    def _batches(self, pairs: Any, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Batches of rows in their own order, on the device and encoded; the same on every process."""
        collate = getattr(pairs, "collate", self.data_collator)
        rows = iter(pairs) if isinstance(pairs, IterableDataset) else (pairs[i] for i in range(len(pairs)))
        size = self.args.per_device_eval_batch_size
        seen = 0
        while limit is None or seen < limit:
            chunk = [row for _, row in zip(range(size), rows, strict=False)]
            if not chunk:
                return
            seen += len(chunk)
            yield self._encoded(self._prepare_inputs(collate(chunk)))

    @torch.no_grad()
    def _cache_reference(self, pairs: CachedPairs, draws: int, stream: int, description: str) -> None:
        """Compute the base's errors for every row and draw, shared out over the processes."""
        found = []
        total = -(-len(pairs) // self.args.per_device_eval_batch_size)
        silent = self.args.disable_tqdm or not self.is_world_process_zero()
        bar = tqdm(self._batches(pairs), description, total, disable=silent, leave=False)
        for index, batch in enumerate(bar):
            count = len(batch["row"])
            errors = torch.zeros(count, draws, len(batch["latents"]) // count, device=self.args.device)
            # Divided weights are gathered for each forward, in which all processes have to take part.
            if self.divided or index % self.accelerator.num_processes == self.accelerator.process_index:
                for draw in range(draws):
                    values = self._reference_errors(self.denoising.ask(batch, draw, stream))
                    errors[:, draw] = values.view(-1, count).T
            found.append((errors if self.divided else self.accelerator.reduce(errors, "sum")).cpu())
        pairs.reference = torch.cat(found)

    # --- One step ---

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """The untouched base, within a context that restores the adapter.

        What `eval()` and `disable_adapter()` do, without searching the whole model, which at every step takes longer
        than the rest.
        """
        adapters, dropouts = self._switched
        training = [module.training for module in dropouts]
        try:
            for module in dropouts:
                module.eval()
            for layer in adapters:
                layer.enable_adapters(False)
            yield self.model_wrapped
        finally:
            for layer in adapters:
                layer.enable_adapters(True)
            for module, mode in zip(dropouts, training, strict=True):
                module.train(mode)

    @cached_property
    def _switched(self) -> tuple[list[BaseTunerLayer], list[nn.Module]]:
        """The layers that differ between base and adapter, and those that differ between training and use."""
        modules = list(self.model.modules())
        adapters = [module for module in modules if isinstance(module, BaseTunerLayer)]
        return adapters, [module for module in modules if isinstance(module, _DropoutNd)]

    def _encoded(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with latents and conditions: from the cache, or encoded now."""
        return dict(batch) if "latents" in batch else self.encoder.encode(batch)

    def _errors(self, model: nn.Module, asked: Question) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Denoising.errors`, in the precision of the training."""
        with self.compute_loss_context_manager():
            return self.denoising.errors(model, asked)

    def _reference_errors(self, asked: Question) -> torch.Tensor:
        with torch.no_grad(), self.base_model() as base:
            return self._errors(base, asked)[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Preference loss of a batch; in evaluation, the mean over fixed draws. See `PreferenceLoRAConfig`."""
        batch = self._encoded(inputs)
        if not model.training:
            loss, outputs = self._evaluate_batch(model, batch)
            return (loss, outputs) if return_outputs else loss
        passes = self.position.passes
        draw = passes % self.args.noise_draws if self.args.noise_draws else passes
        asked = self.denoising.ask(batch, draw, TRAIN)
        errors, predicted = self._errors(model, asked)
        reference = None
        if self._needs_reference:
            known = batch.get("reference")  # (B, draws, sides)
            reference = self._reference_errors(asked) if known is None else known[:, draw].T.flatten()
        values = self._losses(errors, reference, batch, predicted, asked.target)
        if not torch.isfinite(values).all():
            self._stop_at(values, inputs)
        self._record(errors, reference, batch)
        loss = self.reduce(values, batch["weight"], num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _losses(
        self,
        errors: torch.Tensor,
        reference: torch.Tensor | None,
        batch: Mapping[str, Any],
        predicted: torch.Tensor | None = None,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each row (B,)."""
        assert self.beta is not None
        if self.args.loss_type == "kto":
            assert reference is not None
            # Of all processes' images at once: the mean of clamped means would be another number.
            everywhere = self.accelerator.gather(torch.stack([errors.detach(), reference], dim=1))  # (N, 2)
            baseline = losses.kto_baseline(everywhere[:, 0], everywhere[:, 1], self.beta)
            if "label" in batch:
                return losses.kto(errors, reference, batch["label"], baseline, self.beta)
            # Held-out pairs: each image by itself, liked as much as the preference says.
            liked = torch.cat([batch["preference"], 1 - batch["preference"]])
            return losses.kto(errors, reference, liked, baseline, self.beta).view(2, -1).mean(0)
        preference = batch["preference"]
        pair = self._pair_errors(errors, reference)
        if self.args.safeguard and predicted is not None and target is not None:
            (chosen, rejected), (chosen_target, rejected_target) = predicted.chunk(2), target.chunk(2)
            scale = losses.safeguard_scale(
                chosen, rejected, chosen_target, rejected_target, self.args.safeguard_margin, preference
            )
            self.record(safeguard_scale=scale)
            pair = losses.with_safeguard(pair, scale, preference)
        return losses.LOSSES[self.args.loss_type](pair, preference, self.beta, self.args.label_smoothing)

    @staticmethod
    def _pair_errors(errors: torch.Tensor, reference: torch.Tensor | None) -> losses.Errors:
        chosen, rejected = errors.chunk(2)
        if reference is None:
            return losses.Errors(chosen, rejected)
        base_chosen, base_rejected = reference.chunk(2)
        return losses.Errors(chosen, rejected, base_chosen, base_rejected)

    def _record(self, errors: torch.Tensor, reference: torch.Tensor | None, batch: Mapping[str, Any]) -> None:
        """What the log says of a training batch."""
        if "label" in batch:
            if reference is not None:
                liked = batch["label"] > 0.5
                self._record_errors(errors[liked], errors[~liked], reference[liked], reference[~liked])
            return
        preference = batch["preference"]
        margin = losses.denoising_margin(self._pair_errors(errors, reference), self.beta or 1.0)
        decided = preference != 0.5
        hits = ((margin > 0) == (preference > 0.5)).float()
        # A LoRA that does nothing yet, as at the first step, guesses.
        hits = torch.where(margin == 0, torch.full_like(hits, 0.5), hits)
        self.record(accuracy=hits[decided], margin=margin)
        if reference is not None:
            (first, second), (base_first, base_second) = errors.chunk(2), reference.chunk(2)
            found = _by_preference(first, second, preference) + _by_preference(base_first, base_second, preference)
            self._record_errors(*(values[decided] for values in found))

    def _record_errors(
        self, winner: torch.Tensor, loser: torch.Tensor, base_winner: torch.Tensor, base_loser: torch.Tensor
    ) -> None:
        self.record(
            winner_error_base=base_winner,
            winner_error_change=winner - base_winner,
            loser_error_change=loser - base_loser,
        )

    @torch.no_grad()
    def _evaluate_batch(
        self, model: nn.Module, batch: Mapping[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean over `eval_draws` draws, which depend on the rows alone: the figures don't jump."""
        known = batch.get("reference")
        rows = len(batch["row"])
        loss, margins, found, base = [], [], [], []
        for draw in range(self.args.eval_draws):
            asked = self.denoising.ask(batch, draw, EVAL)
            errors, _ = self._errors(model, asked)
            reference = self._reference_errors(asked) if known is None else known[:, draw].T.flatten()
            loss.append(self._losses(errors, reference, batch))
            found.append(errors.view(-1, rows))  # (sides, B)
            base.append(reference.view(-1, rows))
            if "preference" in batch:
                margins.append(losses.denoising_margin(self._pair_errors(errors, reference), self.beta or 1.0))
        mean = self.reduce(torch.stack(loss).mean(0), batch["weight"], None)
        if not margins:
            return mean, {"loss": mean}
        errors, reference = torch.stack(found).mean(0), torch.stack(base).mean(0)
        winner, loser = _by_preference(errors[0], errors[1], batch["preference"])
        base_winner, base_loser = _by_preference(reference[0], reference[1], batch["preference"])
        values = {"winner": winner, "loser": loser, "base_winner": base_winner, "base_loser": base_loser}
        return mean, {"loss": mean, "margins": torch.stack(margins).mean(0), **values}

    def _stop_at(self, values: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        index = int((~torch.isfinite(values)).nonzero()[0])
        # The newest may have been written with the weights that gave this loss.
        weights = sorted(Path(self.args.output_dir).glob("checkpoint-*/adapter_model.safetensors"), key=_age)
        good = next((path.parent for path in weights if _is_finite(path)), None)
        kept = f"The last good checkpoint is {good}." if good else "There is no good checkpoint yet."
        raise FloatingPointError(
            f"the loss became {values[index].item()} at step {self.state.global_step + 1}, at the pair with the "
            f"prompt {inputs['prompt'][index]!r}. {kept} Lower `learning_rate` or `beta`, use bf16 instead of fp16, "
            "or look at that pair's images."
        )

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        margins, winner, loser, base_winner, base_loser = (
            np.asarray(values, dtype=float) for values in prediction.predictions
        )
        preference, weight = (np.asarray(values, dtype=float) for values in prediction.label_ids)
        metrics = preference_metrics(margins, preference, weight)
        metrics |= {
            name: float(np.average(values, weights=weight))
            for name, values in (
                ("winner_error_base", base_winner),
                ("winner_error_change", winner - base_winner),
                ("loser_error_change", loser - base_loser),
            )
        }
        self.last_evaluation = {"margins": margins, "preference": preference}
        return metrics | (self._user_metrics(prediction) if self._user_metrics else {})

    # --- The folder ---

    # PEFT would look for the config of a language model, to see whether its vocabulary has grown.
    save_options = {"save_embedding_layers": False}

    @property
    def warnings_seen(self) -> list[str]:
        """What the guards have said, for the card."""
        return [sentence for guard in self.guards for sentence in guard.said]

    def save_beside_adapter(self, folder: Path) -> None:
        save_lora(self.family, type(self.pipeline), self.accelerator.unwrap_model(self.model), folder)
        self.validation.save(folder)

    def write_card(self, folder: Path) -> None:
        write_lora_card(folder, self)


class _Begin(TrainerCallback):
    """Logs beta."""

    def __init__(self, trainer: PreferenceLoRATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log({"beta": self.trainer.beta or 0.0})


def _by_preference(
    chosen: torch.Tensor, rejected: torch.Tensor, preference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the winners and of the losers; with a soft label below one half the rejected image won."""
    won = preference >= 0.5
    return torch.where(won, chosen, rejected), torch.where(won, rejected, chosen)


def _age(path: Path) -> int:
    return -path.stat().st_mtime_ns


def _is_finite(path: Path) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in load_file(path).values())


def _each(*data: Any) -> Iterator[Any]:
    for item in data:
        yield from item.values() if isinstance(item, dict) else [item]
