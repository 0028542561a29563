"""Train a preference LoRA for a diffusers pipeline."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm
from transformers import EvalPrediction, TrainerCallback

from bt_hf.data.checks import check_unpaired
from bt_hf.diffusion import losses
from bt_hf.diffusion.cache import LatentPairs, cache_pairs
from bt_hf.diffusion.callbacks import CollapseGuard, Guard, OverfittingGuard, WinnerErrorGuard
from bt_hf.diffusion.card import lora_facts, write_lora_card
from bt_hf.diffusion.collator import UNPAIRED, DiffusionCollator
from bt_hf.diffusion.config import PreferenceLoRAConfig
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.errors import BETA, EVAL, TRAIN, Denoising, Question
from bt_hf.diffusion.families.base import save_lora
from bt_hf.diffusion.loading import add_adapter, count_truncated, load_pipeline, training_size
from bt_hf.diffusion.pair_loss import Objective, by_preference
from bt_hf.diffusion.validation_images import Validation
from bt_hf.metrics import preference_metrics
from bt_hf.training.saving import prepare_run
from bt_hf.training.trainer import Metrics, PreferenceTrainer, check_datasets

logger = logging.getLogger(__name__)
Pairs: TypeAlias = Dataset | IterableDataset | LatentPairs

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
        peft_config: Any `LoraConfig`; default: a LoRA on the family's layers, see `LoraOptions`.
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
        compute_metrics: Metrics | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = args or PreferenceLoRAConfig("preference-lora")
        prepare_run(args)
        self._check_data(args, train_dataset, eval_dataset)
        self.pipeline, self.family, self.base_name = load_pipeline(model)
        self.size = training_size(self.pipeline, self.family, args.resolution)
        schedule = self.family.schedule(self.pipeline, self.size)
        self.denoising = Denoising(self.family, schedule, self.size, args)
        collator = DiffusionCollator(self.size, smallest=self.pipeline.vae_scale_factor)
        self.encoder = PairEncoder(self.family, self.pipeline, collator, args.sample_latents, args.device)
        denoiser = add_adapter(self.pipeline, self.family, peft_config, args, self.base_name)
        known = [data["prompt"] for data in _each(train_dataset, eval_dataset) if isinstance(data, Dataset)]
        count_truncated(self.pipeline, self.family, [*chain(*known), *(args.validation_prompts or [])])
        train_dataset, eval_dataset = self._cache(args, train_dataset, eval_dataset)
        self.validation = Validation(self.pipeline, self.encoder, args)
        if all(data is None or isinstance(data, LatentPairs) for data in _each(train_dataset, eval_dataset)):
            self.encoder.release(keep_vae=self.validation.wanted)
        # (N, draws, sides) at the fixed draws of a stream, of each dataset.
        self._errors_of_base: WeakKeyDictionary[LatentPairs, dict[int, torch.Tensor]] = WeakKeyDictionary()
        published = None if args.loss_type == "mapo" else self.family.beta  # MaPO has a beta of its own
        self.beta: float | None = {"auto": None, "family": published}.get(args.beta, args.beta)  # type: ignore
        self.objective = Objective(args, lambda values: self.accelerator.gather(values), self.track)
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
        if self.sharded and args.validation_prompts:
            raise ValueError(
                "`validation_prompts` can't be drawn while FSDP or DeepSpeed divides the weights: leave them out, and "
                "draw with the saved folder."
            )
        self.add_callback(_Begin(self))
        self.guards: list[Guard] = [WinnerErrorGuard(), OverfittingGuard(), CollapseGuard()] if args.guards else []
        for guard in self.guards:
            self.add_callback(guard)
        if self.guards and eval_dataset is not None and args.eval_strategy == "no":
            logger.warning(
                "The held-out pairs are not looked at while training, so nothing stops at overfitting: pass "
                "`eval_strategy='steps'` for that."
            )

    @staticmethod
    def _check_data(args: PreferenceLoRAConfig, train: Any, evaluation: Any) -> None:
        unpaired = isinstance(train, Dataset | IterableDataset) and set(UNPAIRED) <= set(train.column_names or ())
        if unpaired != (args.loss_type == "kto") and train is not None and not isinstance(train, LatentPairs):
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
            self.place_unsharded()
        self._resolve_beta()
        if self.objective.needs_reference and isinstance(self.train_dataset, LatentPairs) and self._draws_come_again():
            self._known_errors(self.train_dataset, TRAIN, "Errors of the base")
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        restored = self.args.load_best_model_at_end or any(guard.stopped for guard in self.guards)
        self.log_validation(self._draw_after(again=restored))
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for guard in self.guards:
            guard.load(resume_from_checkpoint)

    def _draws_come_again(self) -> bool:
        """Whether a pair meets one of its fixed draws a second time, so that it pays to keep the base's errors."""
        if not self.args.noise_draws:
            return False
        batches, accumulated = len(self.get_train_dataloader()), self.args.gradient_accumulation_steps
        passes = self.args.num_train_epochs
        if self.args.max_steps > 0:
            passes = self.args.max_steps / max(-(-batches // accumulated), 1)
        return self.args.noise_draws < passes

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on fixed draws of noise and timestep; while training, validation prompts are drawn too.

        Returns:
            Metrics with `metric_key_prefix`: `accuracy` (of the implicit reward, with its interval), `loss`,
            `winner_error_base`, `winner_error_change` and `loser_error_change` (mean denoising error of the base, and
            against it; a positive change is worse), and those of `metrics.preference_metrics`.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.state.global_step and self.is_in_train:
            self.log_validation(self._draw_after())
        return metrics

    def draw_before(self) -> None:
        """Draw the validation prompts with the untouched base, unless that has been done."""
        with self.base_model():
            self.log_validation(self.validation.draw_before())

    def _draw_after(self, again: bool = False) -> dict[str, float]:
        """Draw the validation prompts; if this step has been drawn, only `again`."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        drawn = self.validation.draw_after(self.state.global_step, again)
        model.train(training)
        return drawn

    def log_validation(self, drawn: dict[str, float]) -> None:
        """Log what the validation images say, and show them to the trackers. `drawn` is empty if there are none."""
        if drawn:
            self.log(drawn)
            self.validation.show(self.callback_handler.callbacks, self.state.global_step)

    @torch.no_grad()
    def _resolve_beta(self, without: Any = None) -> None:
        """Set beta from up to 64 training pairs, if it is "auto"; `without` any, from these pairs."""
        if self.beta is not None:
            return
        if self.args.loss_type == "mapo":
            self.beta = MAPO_BETA
            return
        pairs = self.train_dataset if self.train_dataset is not None else without
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

    @property
    def _beta(self) -> float:
        assert self.beta is not None  # `train` and whatever evaluates begin with `_resolve_beta`
        return self.beta

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

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        stream = TRAIN if description == "Training" else EVAL
        encoded = isinstance(dataset, LatentPairs)
        if self.encoder.released and not encoded:
            raise ValueError(
                "these pairs aren't encoded, and the text encoders have left memory: pass the pairs to the "
                "constructor, as `eval_dataset` (one of several, if you like), or set `cache_latents=False`."
            )
        if stream == EVAL:
            self._resolve_beta(dataset)
        if encoded:
            if stream == EVAL:
                self._known_errors(dataset, EVAL, "Errors of the base on held-out pairs")
            dataset = dataset.with_reference(self._errors_of_base.get(dataset, {}).get(stream))
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    @torch.no_grad()
    def _known_errors(self, pairs: LatentPairs, stream: int, description: str) -> None:
        """Compute the base's errors for every row and draw, shared out over the processes, unless they are known."""
        known = self._errors_of_base.setdefault(pairs, {})
        if stream in known:
            return
        draws = self.args.eval_draws if stream == EVAL else self.args.noise_draws
        found = []
        total = -(-len(pairs) // self.args.per_device_eval_batch_size)
        silent = self.args.disable_tqdm or not self.is_world_process_zero()
        bar = tqdm(self._batches(pairs), description, total, disable=silent, leave=False)
        for index, batch in enumerate(bar):
            count = len(batch["row"])
            errors = torch.zeros(count, draws, len(batch["latents"]) // count, device=self.args.device)
            # Divided weights are gathered for each forward, in which all processes have to take part.
            if self.sharded or index % self.accelerator.num_processes == self.accelerator.process_index:
                for draw in range(draws):
                    values = self._reference_errors(self.denoising.ask(batch, draw, stream))
                    errors[:, draw] = values.view(-1, count).T
            found.append((errors if self.sharded else self.accelerator.reduce(errors, "sum")).cpu())
        known[stream] = torch.cat(found)

    # --- One step ---

    mode_dependent_modules = _DropoutNd

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """As `PreferenceTrainer.base_model`, through what accelerate has wrapped and compiled."""
        with super().base_model():
            yield self.model_wrapped

    def _encoded(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with latents and conditions: from the cache, or encoded now."""
        return dict(batch) if "latents" in batch else self.encoder.encode(batch)

    def _errors(self, model: nn.Module, asked: Question) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Denoising.errors`, in the precision of the training, also before accelerate has wrapped the model."""
        with self.accelerator.autocast():
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
        passes = self.position.epochs_completed
        draw = passes % self.args.noise_draws if self.args.noise_draws else passes
        asked = self.denoising.ask(batch, draw, TRAIN)
        errors, predicted = self._errors(model, asked)
        reference = None
        if self.objective.needs_reference:
            known = batch.get("reference")  # (B, draws, sides)
            reference = self._reference_errors(asked) if known is None else known[:, draw].T.flatten()
        values = self.objective.losses(errors, reference, batch, self._beta, predicted, asked.target)
        if not torch.isfinite(values).all():
            self._stop_at(values, inputs)
        self.objective.log(errors, reference, batch, self._beta)
        loss = self.weighted_mean(values, batch["weight"], num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def _evaluate_batch(
        self, model: nn.Module, batch: Mapping[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean over `eval_draws` draws, which depend on the rows alone: the figures don't jump."""
        known = batch.get("reference")
        loss, margins, found, base = [], [], [], []
        for draw in range(self.args.eval_draws):
            asked = self.denoising.ask(batch, draw, EVAL)
            errors, _ = self._errors(model, asked)
            reference = self._reference_errors(asked) if known is None else known[:, draw].T.flatten()
            loss.append(self.objective.losses(errors, reference, batch, self._beta))
            found.append(errors)
            base.append(reference)
            if "preference" in batch:
                margins.append(self.objective.margins(errors, reference, self._beta))
        mean = self.weighted_mean(torch.stack(loss).mean(0), batch["weight"], None)
        if not margins:
            return mean, {"loss": mean}
        winner, loser = by_preference(torch.stack(found).mean(0), batch["preference"])
        base_winner, base_loser = by_preference(torch.stack(base).mean(0), batch["preference"])
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

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        margins, winner, loser, base_winner, base_loser = (
            np.asarray(values, dtype=float) for values in prediction.predictions
        )
        preference, weight = (np.asarray(values, dtype=float) for values in prediction.label_ids)
        metrics = preference_metrics(margins, preference, weight)
        weight = np.where(preference == 0.5, 0, weight)  # a tie has no winner
        if weight.any():
            metrics |= {
                name: float(np.average(values, weights=weight))
                for name, values in (
                    ("winner_error_base", base_winner),
                    ("winner_error_change", winner - base_winner),
                    ("loser_error_change", loser - base_loser),
                )
            }
        self.last_evaluation = {"margins": margins, "preference": preference}
        return metrics

    # --- The folder ---

    # PEFT would look for the config of a language model, to see whether its vocabulary has grown.
    save_options = {"save_embedding_layers": False}

    @property
    def warnings_seen(self) -> list[str]:
        """What the guards have said, for the card."""
        return [sentence for guard in self.guards for sentence in guard.said]

    def save_beside_adapter(self, folder: Path) -> None:
        save_lora(self.family, type(self.pipeline), self.accelerator.unwrap_model(self.model), folder)

    def draw_pictures(self, folder: Path) -> None:
        self.validation.save(folder)

    def write_card(self, folder: Path) -> None:
        facts = lora_facts(
            self,
            self.args,
            base=self.base_name,
            family=self.family,
            pipeline=type(self.pipeline),
            size=self.size,
            beta=self.beta,
            warnings=self.warnings_seen,
        )
        write_lora_card(folder, facts)


class _Begin(TrainerCallback):
    """Logs beta and draws the first images, once the trackers are there and the model has its precision."""

    def __init__(self, trainer: PreferenceLoRATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log({"beta": self.trainer.beta or 0.0})
        self.trainer.draw_before()


def _age(path: Path) -> int:
    return -path.stat().st_mtime_ns


def _is_finite(path: Path) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in load_file(path).values())


def _each(*data: Any) -> Iterator[Any]:
    for item in data:
        yield from item.values() if isinstance(item, dict) else [item]
