"""What the trainers of rewards and of preference LoRAs share."""

import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import Trainer

from bt_hf.pairs import check_columns, overlapping_rows

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"


class PreferenceTrainer(Trainer):
    """A `Trainer` for pairs: weighted loss, running means in the log, a folder that is never half written.

    Subclasses give each pair's loss to `reduce`, and call `record` with what should be logged.
    """

    # `reduce` divides by the weights of the whole accumulated batch, on all processes.
    loss_is_scaled_for_ga = True
    data_collator: Any
    save_options: Mapping[str, Any] = MappingProxyType({})  # of the model's `save_pretrained`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What `record` has seen since the last log: sums and counts.
        self._running: dict[str, list[torch.Tensor]] = defaultdict(list)
        super().__init__(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Collect the batches of one step, and the sum of their weights over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        total = sum(batch["weight"].sum() for batch in batches).to(device)
        return batches, self.accelerator.gather(total).sum()

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        # Rows of a cache know how to become a batch, and plain rows need another collator; the Trainer knows one.
        collate = getattr(dataset, "collate", None)
        if collate is None:
            return super()._get_dataloader(dataset, *args, **kwargs)
        own: Any = self.data_collator
        self.data_collator = collate
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = own

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """The untouched base, within a context that restores the adapter."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        try:
            with model.eval().disable_adapter():
                yield model
        finally:
            model.train(training)

    def reduce(
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

    def record(self, **values: torch.Tensor) -> None:
        """Add per-pair values (B,) to the means of the next log. No synchronisation with the device."""
        for name, value in values.items():
            self._running[name].append(value.detach().float().flatten())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the means of what was recorded in training since the last time."""
        if "loss" in logs:
            for name in sorted(self._running):
                values = torch.cat(self._running[name])
                sums = torch.stack([values.sum(), torch.tensor(float(len(values)), device=values.device)])
                total, count = self.accelerator.gather(sums[None]).sum(0).tolist()
                if count:  # an accuracy of ties alone has no pairs
                    logs[name] = total / count
            self._running.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the folder contract: to a temporary folder first, then each file is moved into place."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Beside its destination: a move within one file system replaces a file in one step.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            self.model.save_pretrained(scratch, state_dict=state_dict, safe_serialization=True, **self.save_options)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(scratch)
            self.save_beside_adapter(Path(scratch))
            self.write_card(Path(scratch))
            move_files(Path(scratch), folder)

    def save_beside_adapter(self, folder: Path) -> None:
        """Write what else belongs into the folder; nothing by default."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card, where `Trainer.push_to_hub` would put a draft over it."""
        if self.is_world_process_zero():
            self.write_card(Path(self.args.output_dir))

    def write_card(self, folder: Path) -> None:
        """Write `README.md` into `folder`. Subclasses fill it with what was measured."""
        raise NotImplementedError


def check_datasets(train: Any, evaluation: Any) -> None:
    """Check the columns of plain datasets, and warn of evaluation pairs that are trained on.

    Args:
        train: Pairs, a stream, or a dataset of another kind, which is not checked.
        evaluation: The same, or a dict of several.

    Raises:
        PreferenceDataError: A dataset is not in the row contract, or has no rows.
    """
    sets = [train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    for pairs in sets:
        if isinstance(pairs, Dataset | IterableDataset):
            check_columns(pairs)
    for pairs in sets[1:]:
        if isinstance(train, Dataset) and isinstance(pairs, Dataset) and (overlap := overlapping_rows(train, pairs)):
            logger.warning(
                "%d of %d evaluation pairs are also in the training set: their accuracy says nothing about new pairs.",
                overlap,
                len(pairs),
            )


def move_files(source: Path, destination: Path) -> None:
    """Move each file of `source` into `destination`; the weights go last, so that a cut leaves a loadable folder."""
    files = sorted(source.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
    for file in files:
        if file.is_dir():
            shutil.copytree(file, destination / file.name, dirs_exist_ok=True)
        else:
            file.replace(destination / file.name)


def refuse_to_overwrite(output_dir: str, allowed: bool) -> None:
    """Raise a `FileExistsError` if `output_dir` already holds an adapter and writing over it is not allowed."""
    if not allowed and (Path(output_dir) / ADAPTER_FILE).is_file():
        raise FileExistsError(
            f"{output_dir!r} already holds an adapter: choose another `output_dir`, pass `overwrite_output_dir=True` "
            "to replace it, or pass it as `model` to train on from it."
        )
