"""Folder of a trainer: written beside its destination and moved into place, with a card."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import Trainer, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bt_hf.hub.card_sections import add_metadata
from bt_hf.hub.contract import ADAPTER_CONFIG, CARD
from bt_hf.training.config import PreferenceConfig
from bt_hf.training.finite import check_weights
from bt_hf.training.resume import find_checkpoint
from bt_hf.training.sharding import gathered_state_dict

logger = logging.getLogger(__name__)

# Fields of a card's metadata among the Trainer's arguments of a card; our own card answers the others.
_CARD_FIELDS = {"language": "language", "license": "license", "tags": "tags", "dataset_tags": "datasets"}
CARD_ARGUMENTS = frozenset({*_CARD_FIELDS, "dataset", "dataset_args", "finetuned_from", "model_name", "tasks"})


def prepare_run(args: PreferenceConfig) -> None:
    """Refuse to overwrite an adapter, and seed the weights that a new adapter draws.

    The Trainer sets the seed too, but only after the adapter has its first weights.

    Raises:
        FileExistsError: See `refuse_to_overwrite`.
    """
    refuse_to_overwrite(args)
    set_seed(args.seed)


def refuse_to_overwrite(args: PreferenceConfig) -> None:
    """Raise a `FileExistsError` if `args.output_dir` already holds an adapter, unless writing over it is allowed.

    It is by `overwrite_output_dir`, and where training goes on from a checkpoint that exists.
    """
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the weights, and once they are in place whatever else the folder shows."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        with _written_beside(folder) as scratch:
            with gathered_state_dict(self.accelerator.unwrap_model(self.model), state_dict) as model:
                if not is_checkpoint:  # a training stops at its next loss, and names the checkpoint to go back to
                    trained = {name for name, value in model.named_parameters() if value.requires_grad}
                    weights = {name: value for name, value in model.state_dict().items() if name in trained}
                    check_weights(weights, self.args.output_dir)
                model.save_pretrained(scratch, safe_serialization=True, **self.save_options)
                self.save_beside_adapter(scratch)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(scratch)
            (scratch / CARD).unlink(missing_ok=True)  # PEFT's draft
        self._renew_card(folder, draw=True)

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
        with _written_beside(folder) as scratch:
            if draw:
                try:
                    self.draw_pictures(scratch)
                except Exception as error:  # the weights are safe, and a training goes on without pictures
                    logger.warning("The pictures of the card were not drawn: %s", error)
                    for half in scratch.iterdir():
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


@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder, whose files are moved into `folder` at the end unless an error ends it."""
    # On the same file system, where a move replaces a file in one step; but not inside a checkpoint, which would not
    # load with a folder in it that a kill has left.
    inside = folder.parent if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else folder
    with tempfile.TemporaryDirectory(dir=inside, prefix=".saving-") as scratch:
        yield Path(scratch)
        _move_files(Path(scratch), folder)


def _move_files(source: Path, destination: Path) -> None:
    """Move each file of `source` into `destination`; the weights go last, so that a cut leaves a loadable folder."""
    files = sorted(source.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
    for file in files:
        if file.is_dir():
            shutil.copytree(file, destination / file.name, dirs_exist_ok=True)
        else:
            file.replace(destination / file.name)
