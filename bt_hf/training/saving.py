"""Folder of a trainer: sets of files that are replaced all or nothing, and checkpoints that are whole or absent."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from bt_hf.data.atomic import SCRATCH, locked, place_folder, recover, replaced
from bt_hf.hub.card_sections import add_metadata
from bt_hf.hub.contract import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    INTERFACE_WEIGHTS,
    LORA_WEIGHTS,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
)
from bt_hf.training.config import PreferenceConfig
from bt_hf.training.finite import check_weights
from bt_hf.training.lock import check_no_training, remove_scratch, training_lock
from bt_hf.training.output import check_writable, readable_errors
from bt_hf.training.resume import find_checkpoint
from bt_hf.training.sharding import gathered_state_dict

logger = logging.getLogger(__name__)

# Without these nobody loads the weights; diffusers reads its own file alone.
_GATES = (MODEL_CONFIG, "model.safetensors.index.json", LORA_WEIGHTS, ADAPTER_CONFIG)

# Fields of a card's metadata among the Trainer's arguments of a card; our own card answers the others.
_CARD_FIELDS = {"language": "language", "license": "license", "tags": "tags", "dataset_tags": "datasets"}
CARD_ARGUMENTS = frozenset({*_CARD_FIELDS, "dataset", "dataset_args", "finetuned_from", "model_name", "tasks"})


def prepare_run(args: PreferenceConfig) -> None:
    """Refuse a folder that can't be written or holds an adapter, and seed the weights that a new adapter draws.

    The Trainer sets the seed too, but only after the adapter has its first weights.

    Raises:
        OSError: See `check_output_dir`.
    """
    check_output_dir(args)
    set_seed(args.seed)


def check_output_dir(args: PreferenceConfig) -> None:
    """Raise an error if `args.output_dir` is not a folder that this training may write into.

    Raises:
        BlockingIOError: Another training writes there.
        FileExistsError: It holds an adapter already. Writing over it is allowed by `overwrite_output_dir`, and where
            training goes on from a checkpoint that exists.
        OSError: It can't be written, or the disk is full.
    """
    if args.should_save:
        check_no_training(args.output_dir)
        check_writable(args.output_dir)
        recover(args.output_dir)
    resumes = find_checkpoint(args.resume_from_checkpoint, args.output_dir) is not None
    allowed = args.overwrite_output_dir or resumes
    if not allowed and (Path(args.output_dir) / ADAPTER_CONFIG).is_file():
        raise FileExistsError(
            f"{args.output_dir!r} already holds an adapter: choose another `output_dir`, pass "
            "`overwrite_output_dir=True` to replace it, or pass it as `model` to train on from it."
        )


class SavingTrainer(Trainer):
    """`Trainer` that writes the folder contract, never half of it, with a card of our own."""

    # Options of the model's `save_pretrained`.
    save_options: Mapping[str, Any] = MappingProxyType({})

    _checkpoint_scratch: str | None = None  # where a checkpoint is being written

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does, alone in `args.output_dir`, where what will be saved has room."""
        if not self.args.should_save:
            return super().train(*args, **kwargs)
        with training_lock(self.args.output_dir):
            check_writable(self.args.output_dir, self._bytes_to_save())
            return super().train(*args, **kwargs)

    def _bytes_to_save(self) -> int:
        """Estimate the size of a save: the weights, and in a checkpoint as much twice over for the optimizer."""
        weights = [value for value in self.model.parameters() if value.requires_grad]
        with_optimizer = self.args.save_strategy != "no" and not self.args.save_only_model
        return sum(value.numel() * value.element_size() for value in weights) * (3 if with_optimizer else 1)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the weights, and once they are in place whatever else the folder shows."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        with self._replaced(folder, _GATES, _is_weight) as scratch:
            with gathered_state_dict(self.accelerator.unwrap_model(self.model), state_dict) as model:
                trained = {name for name, value in model.named_parameters() if value.requires_grad}
                weights = {name: value for name, value in model.state_dict().items() if name in trained}
                check_weights(weights, self.args.output_dir)
                model.save_pretrained(scratch, safe_serialization=True, **self.save_options)
                self.save_beside_adapter(scratch)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(scratch)
            (scratch / CARD).unlink(missing_ok=True)  # PEFT's draft
        self._renew_card(folder, draw=True)

    @contextmanager
    def _replaced(self, folder: Path, *args: Any) -> Iterator[Path]:
        """Yield where to write files of `folder`: its scratch folder, or itself if it is a checkpoint not yet seen."""
        if self._checkpoint_scratch is not None:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            return
        with (
            readable_errors(f"'{folder}' was not written", self.args.output_dir, folder),
            replaced(folder, *args) as scratch,
        ):
            yield scratch

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_scratch or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint elsewhere, by all processes, and then let it appear as a whole."""
        run, main, step = Path(self._get_output_dir(trial)), self.args.should_save, self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        written = run / SCRATCH / name
        if main:
            run.mkdir(parents=True, exist_ok=True)
        with (
            readable_errors(f"the checkpoint of step {step} was not written", run),
            locked(run) if main else nullcontext(),
        ):
            if main:
                remove_scratch(run, held=True)
            self.accelerator.wait_for_everyone()
            try:
                self._checkpoint_scratch = str(written.parent)
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._checkpoint_scratch = None
                self._finish_checkpoint(run, written)
            except BaseException:
                if main:
                    remove_scratch(run, held=True)
                raise
        if main:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _finish_checkpoint(self, run: Path, written: Path) -> None:
        """Add to a checkpoint what the Trainer doesn't know, and move it into `run`."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == written.name or (run / best).is_dir():  # the Trainer took the name of the scratch folder
            self.state.best_model_checkpoint = str(run / best)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            self.save_beside_checkpoint(written)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            place_folder(written.name, run)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and written.is_dir():  # a node has a disk of its own
            place_folder(written.name, run)

    def save_beside_checkpoint(self, folder: Path) -> None:
        """Write further state of the training into the folder of a checkpoint; nothing by default."""

    def save_beside_adapter(self, folder: Path) -> None:
        """Write further weights into the folder; nothing by default."""

    def draw_pictures(self, folder: Path) -> None:
        """Draw the pictures of the card into the folder; nothing by default."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our card where the Trainer would draft one; takes `license`, `language`, `tags` and `dataset_tags`."""
        if self.is_world_process_zero():
            fields = {field: kwargs[name] for name, field in _CARD_FIELDS.items() if kwargs.get(name)}
            self._renew_card(Path(self.args.output_dir), fields)

    def _renew_card(self, folder: Path, fields: Mapping[str, Any] | None = None, draw: bool = False) -> None:
        """Write the card, with `fields` added to its metadata; an owner's words in the old one stay.

        Args:
            folder: Holds the adapter.
            fields: Fields of the card's metadata.
            draw: Draw the pictures too. If that fails, the card goes without.
        """
        with self._replaced(folder) as scratch:
            if draw:
                try:
                    self.draw_pictures(scratch)
                except Exception as error:  # the weights are safe, and a training goes on without pictures
                    logger.warning("The pictures of the card were not drawn: %s", error)
                    for half in scratch.glob("*.png"):
                        half.unlink()
            for file in (folder / CARD, *folder.glob("*.png")):  # the card is renewed, and shows what is beside it
                if file.is_file() and not (scratch / file.name).exists():
                    shutil.copy(file, scratch)
            self.write_card(scratch)
            if fields:
                card = (scratch / CARD).read_text(encoding="utf-8")
                (scratch / CARD).write_text(add_metadata(card, fields), encoding="utf-8")

    def write_card(self, folder: Path) -> None:
        """Write `README.md` into `folder`. Subclasses fill it with what was measured."""
        raise NotImplementedError


def _is_weight(name: str) -> bool:
    """True for files that belong to the weights of a save: those of another kind of model do not stay beside them."""
    forms = (MODEL_WEIGHTS, INTERFACE_WEIGHTS)
    return name in (*_GATES, ADAPTER_WEIGHTS) or any(form.fullmatch(name) for form in forms)
