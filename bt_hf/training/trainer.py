"""Base of the trainers of rewards and of preference LoRAs."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import IterableDataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import EvalPrediction
from transformers.trainer_utils import TrainOutput

from bt_hf.data.cache import CachedPairs
from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.rows import as_stored
from bt_hf.training.adapters import check_names, saved_shapes
from bt_hf.training.dataloaders import eval_dataloader, train_dataloader, without_weight
from bt_hf.training.first_step import FirstStep
from bt_hf.training.precision import take_precision
from bt_hf.training.publishing import PublishingTrainer
from bt_hf.training.resume import Position, check_same_adapter, find_checkpoint
from bt_hf.training.sharding import wrap_by_layer
from bt_hf.training.shutdown import destroy_group_at_exit
from bt_hf.training.trainer_options import check_run

logger = logging.getLogger(__name__)
Metrics = Callable[[EvalPrediction], dict[str, float]]


class PreferenceTrainer(PublishingTrainer):
    """`Trainer` for preference pairs: weighted loss, running means in the log, each row counted once.

    Subclasses give each pair's loss to `weighted_mean`, and call `track` with what should be logged.

    Args:
        compute_metrics: Further metrics of the user, added to those of `preference_metrics`.
        kwargs: As in `Trainer`.
    """

    # `weighted_mean` divides by the weights of the whole accumulated batch, on all processes.
    loss_is_scaled_for_ga = True
    data_collator: Any
    # Modules whose `training` flag matters; a subclass may narrow them down.
    mode_dependent_modules: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module

    def __init__(self, *, compute_metrics: Metrics | None = None, **kwargs: Any) -> None:
        # Sums and counts of what `track` has seen since the last log.
        self._running: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._padding_batch: dict[str, Any] | None = None
        self._user_metrics = compute_metrics
        check_run(kwargs["args"], kwargs.get("eval_dataset"), kwargs.get("optimizers", (None,))[0])
        take_precision(kwargs["args"])
        super().__init__(compute_metrics=self._compute_metrics, **kwargs)
        self.label_names = ["preference", "weight"]  # gathered by the evaluation loop, beside the margins
        self.add_callback(Position())
        if not self.sharded:
            self.add_callback(FirstStep())
        if self.args.world_size > 1:
            destroy_group_at_exit(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does; a checkpoint that is named in the arguments counts too.

        Args:
            resume_from_checkpoint: See `find_checkpoint`; default `args.resume_from_checkpoint`.
            kwargs: As in `Trainer.train`.
        """
        checkpoint = self.checkpoint_of(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def checkpoint_of(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Return the checkpoint that `train` resumes from, `None` to begin anew."""
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        return find_checkpoint(resume_from_checkpoint, self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PeftModel) and not self.sharded:
            check_same_adapter(Path(resume_from_checkpoint), saved_shapes(self.model))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    # --- Batches ---

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Collect the batches of one step, and the sum of their weights over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, IterableDataset):
            batches = self._pad_to_equal_steps(batches, num_batches)
        elif self.args.world_size > 1:
            first = self.position.steps * self.args.gradient_accumulation_steps
            batches = [self._without_repeats(batch, first + index) for index, batch in enumerate(batches)]
        if not batches:
            return batches, None
        total = sum(batch["weight"].sum() for batch in batches).to(device)
        return batches, self.accelerator.gather(total).sum()

    def _without_repeats(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        """Take the weight from rows that accelerate repeats to fill an epoch, given a batch and its index in it."""
        rows = len(batch["weight"])
        before = rows * (index * self.args.world_size + self.args.process_index)
        left = max(len(self.train_dataset) - before, 0)
        return batch if left >= rows else without_weight(batch, left)

    def _pad_to_equal_steps(self, batches: list[Any], num_batches: int) -> list[Any]:
        """Pad the last step of a stream with batches without weight, so that all processes take the same steps."""
        if batches:
            self._padding_batch = batches[-1]
        counts = self._gather_counts(len(batches))
        if min(counts) == num_batches:
            return batches
        if not any(counts):
            self.control.should_epoch_stop = True  # else the Trainer would ask on, up to `max_steps`
            return []
        if self._padding_batch is None:  # resumed at the end of this process's rows
            self._padding_batch = next(iter(self.get_train_dataloader()), None)
        without = sum(self._gather_counts(int(self._padding_batch is None)))
        if without or self._padding_batch is None:
            raise PreferenceDataError(
                f"the stream has no rows for {without} of {self.args.world_size} processes: start fewer of them, or "
                "spread its rows over more files"
            )
        return batches + [without_weight(self._padding_batch)] * (num_batches - len(batches))

    def _gather_counts(self, count: int) -> list[int]:
        """Return the count of each process, on each process."""
        if self.args.world_size == 1:  # spares waiting for the device
            return [count]
        return self.accelerator.gather(torch.tensor([count], device=self.args.device)).tolist()

    @property
    def position(self) -> Position:
        """Position of the training in its rows."""
        return next(found for found in self.callback_handler.callbacks if isinstance(found, Position))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        saved = self.state.stateful_callbacks.get(Position.__name__)
        steps = batches // self.args.gradient_accumulation_steps
        if isinstance(self.train_dataset, IterableDataset) and saved is not None and self.state.global_step:
            epochs, steps = saved["args"]["epochs_completed"], saved["args"]["steps"]
            if self.args.ignore_data_skip:
                steps = 0
            if steps:  # older checkpoints don't say with which arguments
                Position.check_batches(saved["attributes"].get("batches", {}), self.args)
            batches = steps * self.args.gradient_accumulation_steps
        self.position.start_from(epochs, steps)
        return epochs, batches

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return batches of the training rows; of a stream, those of this process."""
        if isinstance(self.train_dataset, IterableDataset) and self.args.world_size > 1:
            return train_dataloader(
                self._stored(self.train_dataset), self.args, self._train_batch_size, self.data_collator
            )
        return super().get_train_dataloader()

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, **kwargs: Any
    ) -> torch.utils.data.DataLoader:
        dataset = self._stored(dataset)
        if isinstance(dataset, IterableDataset) and self.args.world_size > 1:
            return eval_dataloader(dataset, self.args, batch_size, self.data_collator)
        # The Trainer knows one collator, but cached and plain rows need different ones.
        own = self.data_collator
        self.data_collator = self._collator_of(dataset)
        try:
            return super()._get_dataloader(dataset, description, batch_size, **kwargs)
        finally:
            self.data_collator = own

    def _stored(self, dataset: Any) -> Any:
        """Leave opening images to the library's collators, which name the row of a bad one."""
        return as_stored(dataset) if getattr(self.data_collator, "opens_images", False) else dataset

    def _collator_of(self, dataset: Any) -> Any:
        return dataset.collate if isinstance(dataset, CachedPairs) else self.data_collator

    def read_batches(self, dataset: Any, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield batches of up to `limit` rows in their own order, on the device; the same on every process."""
        collate, rows = self._collator_of(dataset), iter(self._stored(dataset))
        size, left = self.args.per_device_eval_batch_size, limit
        while chunk := list(islice(rows, size if left is None else min(size, left))):
            left = None if left is None else left - len(chunk)
            yield self._prepare_inputs(collate(chunk))

    def _prepare_input(self, data: Any) -> Any:
        # Without the Trainer's cast to the precision of DeepSpeed, which would round labels, and comes too early for
        # what looks at the base before DeepSpeed has cast the model.
        return send_to_device(data, self.args.device)

    # --- Sharding ---

    @property
    def sharded(self) -> bool:
        """True if training shards the weights among the processes (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def place_unsharded(self) -> None:
        """Move the model to the device before it is sharded, for what looks at the base; it has to fit there once."""
        if self.sharded and next(self.model.parameters()).device != self.args.device:
            self.model.to(self.args.device)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.sharded:
            # Neither of them shards weights in another order, such as channels last.
            self.model.to(memory_format=torch.contiguous_format)
        if self.is_fsdp_enabled:
            wrap_by_layer(self.model, self.accelerator.state.fsdp_plugin)
        return super()._prepare_for_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the folder, once the names of the weights are found to be the base's."""
        if self.args.should_save and not self.sharded:
            check_names(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict)

    # --- The base ---

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """Yield the untouched base, within a context that restores the adapter.

        As `eval()` and `disable_adapter()` do, without searching the whole model at every step.
        """
        adapters, modules = self._switched
        training = [module.training for module in modules]
        try:
            for module in modules:
                module.training = False
            for layer in adapters:
                layer.enable_adapters(False)
            yield self.accelerator.unwrap_model(self.model)
        finally:
            for layer in adapters:
                layer.enable_adapters(True)
            for module, mode in zip(modules, training, strict=True):
                module.training = mode

    @cached_property
    def _switched(self) -> tuple[list[BaseTunerLayer | AuxiliaryTrainingWrapper], list[nn.Module]]:
        """Layers that differ between base and adapter, and modules that differ between training and use."""
        modules = list(self.model.modules())
        adapters = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        return adapters, [module for module in modules if isinstance(module, self.mode_dependent_modules)]

    def compute_loss_context_manager(self) -> Any:
        """As the Trainer's, with batch norms of the frozen base in evaluation mode, so that its statistics stay."""
        for module in self._frozen_norms:
            module.training = False
        return super().compute_loss_context_manager()

    @cached_property
    def _frozen_norms(self) -> list[nn.Module]:
        norms = [module for module in self.model.modules() if isinstance(module, _NormBase)]
        return [module for module in norms if not any(value.requires_grad for value in module.parameters())]

    # --- Loss, log and metrics ---

    def weighted_mean(
        self, losses: torch.Tensor, weight: torch.Tensor, total_weight: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Weighted mean of per-pair losses (B,).

        Args:
            losses: (B,).
            weight: (B,).
            total_weight: Sum of the weights over accumulated batches and processes; `None` for this batch alone.
        """
        if total_weight is None:
            return (weight * losses).sum() / weight.sum().clamp(min=1e-12)
        # DDP averages gradients over the processes, where a weighted mean over all of them needs the sum.
        return (
            (weight * losses).sum() * self.accelerator.num_processes / torch.as_tensor(total_weight).clamp(min=1e-12)
        )

    def track(self, counts: torch.Tensor, **values: torch.Tensor) -> None:
        """Add values of rows, each (B,), to the means of the next log. No synchronisation with the device.

        Args:
            counts: (B,) weights, or a mask: rows of 0 are left out; the others count alike.
            values: By the name in the log, which has to be the same on all processes.
        """
        counts = counts > 0
        for name, value in values.items():
            kept = value.detach().float().where(counts, 0.0)
            self._running[name].append(torch.stack([kept.sum(), counts.sum()]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the means of what was tracked in training since the last time."""
        if "loss" in logs:
            for name in sorted(self._running):
                sums = torch.stack(self._running[name]).sum(0)
                total, count = self.accelerator.gather(sums[None]).sum(0).tolist()
                if count:  # an accuracy of ties alone has no pairs
                    logs[name] = total / count
            self._running.clear()
        super().log(logs, start_time)

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = self.evaluation_metrics(prediction)
        return metrics | (self._user_metrics(prediction) if self._user_metrics else {})

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of an evaluation, before those of the user are added."""
        raise NotImplementedError
