"""What the trainers of rewards and of preference LoRAs share."""

import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from bt_hf.data.checks import check_columns, overlapping_rows
from bt_hf.data.formats import PreferenceDataError
from bt_hf.hub import push as hub_push
from bt_hf.hub.card_sections import add_metadata
from bt_hf.hub.contract import ADAPTER_CONFIG, CARD, contract_files
from bt_hf.training.dataloaders import Position, share_out, share_out_evenly, without_weight
from bt_hf.training.sharding import divide_by_layers, whole
from bt_hf.training.shutdown import part_at_exit

logger = logging.getLogger(__name__)

# Of the Trainer's arguments of a card, what is a field of its metadata; our own card answers the others.
_CARD_FIELDS = {"language": "language", "license": "license", "tags": "tags", "dataset_tags": "datasets"}
_CARD_ARGUMENTS = {*_CARD_FIELDS, "dataset", "dataset_args", "finetuned_from", "model_name", "tasks"}


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
        self._filler: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(Position())
        if self.args.world_size > 1:
            part_at_exit(self)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Collect the batches of one step, and the sum of their weights over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, IterableDataset):
            batches = self._in_step(batches, num_batches)
        elif self.args.world_size > 1:
            first = self.position.steps * self.args.gradient_accumulation_steps
            batches = [self._without_repeats(batch, first + index) for index, batch in enumerate(batches)]
        if not batches:
            return batches, None
        total = sum(batch["weight"].sum() for batch in batches).to(device)
        return batches, self.accelerator.gather(total).sum()

    def _without_repeats(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        """The batch of this index in a pass; rows with which accelerate filled up the pass's end have no weight."""
        rows = len(batch["weight"])
        before = rows * (index * self.args.world_size + self.args.process_index)
        left = max(len(self.train_dataset) - before, 0)
        return batch if left >= rows else without_weight(batch, left)

    def _in_step(self, batches: list[Any], num_batches: int) -> list[Any]:
        """What remains of a stream's pass, filled up so that all processes take the same steps, of as many batches."""
        if batches:
            self._filler = batches[-1]
        counts = self._everywhere(len(batches))
        if min(counts) == num_batches:
            return batches
        if not any(counts):
            self.control.should_epoch_stop = True  # else the Trainer would ask on, up to `max_steps`
            return []
        if self._filler is None:  # resumed at the end of this process's rows
            self._filler = next(iter(self.get_train_dataloader()), None)
        without = sum(self._everywhere(int(self._filler is None)))
        if without or self._filler is None:
            raise PreferenceDataError(
                f"the stream has no rows for {without} of {self.args.world_size} processes: start fewer of them, or "
                "spread its rows over more files"
            )
        return batches + [without_weight(self._filler)] * (num_batches - len(batches))

    def _everywhere(self, number: int) -> list[int]:
        """The number of each process, on each process."""
        if self.args.world_size == 1:  # spares waiting for the device
            return [number]
        return self.accelerator.gather(torch.tensor([number], device=self.args.device)).tolist()

    @property
    def position(self) -> Position:
        """How far the training is in its rows."""
        return next(found for found in self.callback_handler.callbacks if isinstance(found, Position))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        passes, batches = super()._init_training_state(*args, **kwargs)
        saved = self.state.stateful_callbacks.get(Position.__name__)
        steps = batches // self.args.gradient_accumulation_steps
        if isinstance(self.train_dataset, IterableDataset) and saved is not None and self.state.global_step:
            passes, steps = saved["args"]["passes"], saved["args"]["steps"]
            if self.args.ignore_data_skip:
                steps = 0
            if steps:  # older checkpoints don't say with which numbers
                Position.check_batches(saved["attributes"].get("batches", {}), self.args)
            batches = steps * self.args.gradient_accumulation_steps
        self.position.go_on_from(passes, steps)
        return passes, batches

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Batches of the training rows; of a stream, those that are this process's."""
        if isinstance(self.train_dataset, IterableDataset) and self.args.world_size > 1:
            return share_out(self.train_dataset, self.args, self._train_batch_size, self.data_collator)
        return super().get_train_dataloader()

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, **kwargs: Any
    ) -> torch.utils.data.DataLoader:
        if isinstance(dataset, IterableDataset) and self.args.world_size > 1:
            return share_out_evenly(dataset, self.args, batch_size, self.data_collator)
        # Rows of a cache know how to become a batch, and plain rows need another collator; the Trainer knows one.
        collate = getattr(dataset, "collate", None)
        if collate is None:
            return super()._get_dataloader(dataset, description, batch_size, **kwargs)
        own: Any = self.data_collator
        self.data_collator = collate
        try:
            return super()._get_dataloader(dataset, description, batch_size, **kwargs)
        finally:
            self.data_collator = own

    @property
    def divided(self) -> bool:
        """Whether training divides the weights among the processes (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _prepare_input(self, data: Any) -> Any:
        # Without the Trainer's cast to the precision of DeepSpeed, which would round labels, and comes too early for
        # what looks at the base before DeepSpeed has cast the model.
        return send_to_device(data, self.args.device)

    def place_whole(self) -> None:
        """Put the model on the device for what looks at the base before it is divided; it has to fit there once."""
        if self.divided and next(self.model.parameters()).device != self.args.device:
            self.model.to(self.args.device)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.divided:
            # Neither of them divides weights in another order, such as channels last.
            self.model.to(memory_format=torch.contiguous_format)
        if self.is_fsdp_enabled:
            divide_by_layers(self.model, self.accelerator.state.fsdp_plugin)
        return super()._prepare_for_training(*args, **kwargs)

    # What of a model may differ between training and use; a subclass may know it better.
    modal: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """The untouched base, within a context that restores the adapter.

        What `eval()` and `disable_adapter()` do, without searching the whole model at every step.
        """
        adapters, modal = self._switched
        training = [module.training for module in modal]
        try:
            for module in modal:
                module.training = False
            for layer in adapters:
                layer.enable_adapters(False)
            yield self.accelerator.unwrap_model(self.model)
        finally:
            for layer in adapters:
                layer.enable_adapters(True)
            for module, mode in zip(modal, training, strict=True):
                module.training = mode

    @cached_property
    def _switched(self) -> tuple[list[BaseTunerLayer | AuxiliaryTrainingWrapper], list[nn.Module]]:
        """The layers that differ between base and adapter, and what differs between training and use."""
        modules = list(self.model.modules())
        adapters = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        return adapters, [module for module in modules if isinstance(module, self.modal)]

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

    def record(self, counts: torch.Tensor, **values: torch.Tensor) -> None:
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
        """Log as the Trainer does, with the means of what was recorded in training since the last time."""
        if "loss" in logs:
            for name in sorted(self._running):
                sums = torch.stack(self._running[name]).sum(0)
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
            with whole(self.accelerator.unwrap_model(self.model), state_dict) as model:
                model.save_pretrained(scratch, safe_serialization=True, **self.save_options)
                self.save_beside_adapter(Path(scratch))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(scratch)
            if (folder / CARD).is_file():  # of which only the generated parts are renewed; PEFT has drafted another
                shutil.copy(folder / CARD, scratch)
            for picture in folder.glob("*.png"):  # the card shows what it finds beside it
                if not (Path(scratch) / picture.name).exists():
                    shutil.copy(picture, scratch)
            self.write_card(Path(scratch))
            move_files(Path(scratch), folder)

    def save_beside_adapter(self, folder: Path) -> None:
        """Write what else belongs into the folder; nothing by default."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card where the Trainer would draft one; takes `license`, `language`, `tags` and `dataset_tags`."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            self.write_card(folder)
            fields = {field: kwargs[name] for name, field in _CARD_FIELDS.items() if kwargs.get(name)}
            if fields:
                card = (folder / CARD).read_text(encoding="utf-8")
                (folder / CARD).write_text(add_metadata(card, fields), encoding="utf-8")

    def write_card(self, folder: Path) -> None:
        """Write `README.md` into `folder`. Subclasses fill it with what was measured."""
        raise NotImplementedError

    # --- The Hub ---

    # Hub id of the base, for a run whose base is a local folder.
    hub_base_model: str | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find out who publishes, so that a wrong token shows before the training; the first commit makes the repo."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            self.hub_model_id = hub_push.full_name(name, token or self.args.hub_token)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save, and publish what a trainer writes for others in one commit; see `push_adapter`.

        Args:
            commit_message: Title of the commit.
            blocking: Whether to wait for it.
            token: Default `args.hub_token`, else the one that is logged in.
            revision: Branch; default `args.hub_revision`, else "main".
            private: Default `args.hub_private_repo`; a new repo is private unless it is `False`.
            kwargs: Further arguments of `push_adapter`, and of the card: `license`, `language`, `tags`,
                `dataset_tags`.

        Returns:
            The commit, or a future of it if `blocking=False`; `None` on processes that do not publish.

        Raises:
            OSError: The Hub can't be reached or refuses; see `push_adapter`. The folder is saved all the same.
            ValueError: A check failed.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{name: kwargs.pop(name) for name in _CARD_ARGUMENTS & set(kwargs)})
        self._finish_current_push()
        job = self._pusher.submit(
            hub_push.push_adapter,
            self.args.output_dir,
            self.hub_model_id,
            self.args.hub_private_repo if private is None else private,
            revision or self.args.hub_revision,
            token or self.args.hub_token,
            **{"base_model": self.hub_base_model, "commit_message": commit_message, **kwargs},
        )
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's adapter while the training goes on, as `args.hub_strategy` says.

        "all_checkpoints" keeps each adapter in a folder of the repo too. "checkpoint" is as "every_save": the state
        of the optimizer, which its folder would hold, is a pickle and stays on this machine.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Read now: the folder may be gone before they are sent.
        files = {name: path.read_bytes() for name, path in contract_files(checkpoint_folder).items()}
        also_in = Path(checkpoint_folder).name if self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS else None
        job = self._pusher.submit(self._publish_checkpoint, checkpoint_folder, self.state.global_step, files, also_in)
        running: list[Any] = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress([*running, job])

    def _publish_checkpoint(self, source: str, step: int, files: Mapping[str, bytes], also_in: str | None) -> None:
        try:
            hub_push.publish(
                files,
                source,
                self.hub_model_id,
                self.args.hub_private_repo,
                self.args.hub_revision,
                self.args.hub_token,
                self.hub_base_model,
                commit_message=f"Training in progress, step {step}",
                also_in=also_in,
            )
        except (OSError, ValueError) as error:  # a training of hours does not end for want of a network
            logger.warning("The checkpoint of step %d was not published: %s", step, error)

    @cached_property
    def _pusher(self) -> ThreadPoolExecutor:
        # One thread: commits stay in order.
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")


def check_datasets(train: Any, evaluation: Any) -> None:
    """Check plain datasets (see `check_columns`), and warn of evaluation pairs that are trained on.

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
    if not allowed and (Path(output_dir) / ADAPTER_CONFIG).is_file():
        raise FileExistsError(
            f"{output_dir!r} already holds an adapter: choose another `output_dir`, pass `overwrite_output_dir=True` "
            "to replace it, or pass it as `model` to train on from it."
        )
