"""Resuming: find the checkpoint that is meant, and the position in the training rows that it holds."""

import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from bt_hf.data.atomic import SCRATCH, recover
from bt_hf.hub.contract import ADAPTER_WEIGHTS
from bt_hf.hub.peft_configs import shown
from bt_hf.hub.tensors import adapter_shapes

logger = logging.getLogger(__name__)

_WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": False, "": False}


def find_checkpoint(resume: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        resume: Folder of a checkpoint; `True`, or "true" on a command line, for the newest whole one in `output_dir`;
            `False`, "false" or `None` for none.
        output_dir: Folder of the run.

    Raises:
        FileNotFoundError: There is no such folder, or no whole checkpoint in `output_dir`.
        ValueError: The folder is not a whole checkpoint.
    """
    if isinstance(resume, str):
        resume = _WORDS.get(resume.lower(), resume)
    if resume is None or resume is False:
        return None
    if resume is not True:
        if not Path(resume).is_dir():
            raise FileNotFoundError(
                f"`resume_from_checkpoint` is {str(resume)!r}, but there is no such folder: pass a checkpoint, or "
                f"True for the newest one in {str(output_dir)!r}."
            )
        if problem := _problem(Path(resume)):
            raise ValueError(
                f"`resume_from_checkpoint` is {str(resume)!r}, which is not a whole checkpoint: {problem}."
            )
        return str(resume)
    recover(output_dir)
    newest = newest_checkpoint(output_dir, warn=True)
    if newest is None:
        raise FileNotFoundError(
            f"`resume_from_checkpoint` is True, but {str(output_dir)!r} holds no whole checkpoint: leave it out to "
            "begin anew, or name a checkpoint."
        )
    return newest


def newest_checkpoint(output_dir: str | Path, warn: bool = False) -> str | None:
    """Find the newest whole checkpoint of a run; None if there is none. Warn of newer ones that are not whole."""
    checkpoints = sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []
    for checkpoint in reversed(checkpoints):
        problem = _problem(Path(checkpoint))
        if problem is None:
            return str(checkpoint)
        if warn:
            logger.warning("%s is not a whole checkpoint (%s): going on from an older one.", checkpoint, problem)
    return None


def _problem(checkpoint: Path) -> str | None:
    """Describe a problem of a checkpoint; None if it is whole. The Trainer writes its state last."""
    for scratch in checkpoint.glob(f"{SCRATCH}*"):  # left by older versions: the Trainer would take it for an adapter
        shutil.rmtree(scratch, ignore_errors=True)
        if scratch.exists():
            return f"it holds {scratch.name}, of a save that was cut, which can't be removed"
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, "pt"):  # reads the header, and compares the length of the file with it
                pass
        for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            with zipfile.ZipFile(file):  # reads the list at its end
                pass
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    except zipfile.BadZipFile:
        return f"{file.name} was cut"
    except (OSError, ValueError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None if weights else "it has no weights"


def check_same_adapter(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check from the header of its file that a checkpoint holds the adapter that is trained, and nothing else.

    Args:
        checkpoint: Folder of the checkpoint.
        shapes: Shapes of the adapter's tensors, by the names under which PEFT saves them.

    Raises:
        ValueError: Its tensors have other names or shapes: they would be left out, or change the base.
    """
    found = adapter_shapes(checkpoint / ADAPTER_WEIGHTS, repr(str(checkpoint)))
    other = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
    if other:
        there, here = found.get(other[0], "none"), shapes.get(other[0], "none")
        raise ValueError(
            f"{str(checkpoint)!r} is not a checkpoint of this adapter: of {shown(other[0])} it has the shape "
            f"{there}, and the adapter {here} ({len(other)} tensors differ). Resume with the options of its "
            "training (`lora_r`, `lora_target_modules`, ...), or begin anew without `resume_from_checkpoint`."
        )


class Position(TrainerCallback, ExportableState):
    """Epochs completed, and steps taken in the present one.

    The Trainer's own epoch won't do: it takes `max_steps` for the length of a stream.

    Attributes:
        epochs_completed: Complete passes over the rows; each of them saw every row once.
        steps: Steps since then.
        batches: Values of the arguments that decide which rows of a stream these steps have seen.
    """

    BATCH_ARGUMENTS = ("world_size", "dataloader_num_workers", "train_batch_size", "gradient_accumulation_steps")

    def __init__(self, epochs_completed: int = 0, steps: int = 0) -> None:
        self.epochs_completed = epochs_completed
        self.steps = steps
        self.batches: dict[str, int] = {}
        self.start_from(epochs_completed, steps)

    def start_from(self, epochs_completed: int, steps: int) -> None:
        """Let the next epoch of the Trainer begin here."""
        self._next = (epochs_completed, steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs_completed, self.steps = self._next
        self.batches = {name: getattr(args, name) for name in self.BATCH_ARGUMENTS}
        self.start_from(self.epochs_completed + 1, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {
            "args": {"epochs_completed": self.epochs_completed, "steps": self.steps},
            "attributes": {"batches": self.batches},
        }

    @staticmethod
    def check_batches(saved: dict[str, int], args: TrainingArguments) -> None:
        """Raise a `ValueError` if steps that were counted with the `saved` values saw other rows than `args` give."""
        changes = [
            f"`{name}` was {number} and is {getattr(args, name)}"
            for name, number in saved.items()
            if getattr(args, name) != number
        ]
        if changes:
            raise ValueError(
                f"this checkpoint is in the middle of a pass over a stream, but {', '.join(changes)}: rows would be "
                "lost or seen twice. Resume with the same numbers, or begin the pass anew by `ignore_data_skip=True`."
            )
