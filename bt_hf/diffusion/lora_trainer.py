"""Base of the trainers of a pipeline's LoRA: from pairs, and guided by a reward."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.trainer_utils import TrainOutput

from bt_hf.diffusion import loading
from bt_hf.diffusion.callbacks import Guard
from bt_hf.diffusion.encoder import PairEncoder
from bt_hf.diffusion.families.base import Family, Size
from bt_hf.diffusion.interfaces import save_for_interfaces
from bt_hf.diffusion.validation_images import Validation
from bt_hf.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)


class LoRATrainer(PreferenceTrainer):
    """Trainer of a pipeline's denoiser with a LoRA: validation images, guards, and the folder that it writes.

    Subclasses set the attributes before or just after `super().__init__`, and say by `_prepare_training` what has to
    be known before the first step.

    Attributes:
        family: Family around the pipeline.
        pipeline: Draws with the LoRA.
        base_name: Hub id or path of the base, if it is known.
        size: Height and width of the images.
        encoder: Encodes with the pipeline's own models.
        validation: Images of the validation prompts.
        guards: Callbacks that warn.
    """

    family: Family
    pipeline: Any
    base_name: str | None
    size: Size
    encoder: PairEncoder
    validation: Validation
    guards: list[Guard]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer.train` does, between two drawings of the validation prompts."""
        loading.set_memory_format(self.family, self.model, self.args.channels_last and not self.sharded)
        try:
            self._prepare_training()
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            loading.leave_as_loaded(self.family, self.accelerator.unwrap_model(self.model))
        restored = self.args.load_best_model_at_end or any(guard.stopped for guard in self.guards)
        try:
            self._draw_validation(again=restored)
        except Exception as error:  # the weights are not saved yet
            logger.warning("The validation prompts were not drawn after training: %s", error)
        return output

    def _prepare_training(self) -> None:
        """Do what comes before the first step; nothing by default."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for guard in self.guards:
            guard.load(resume_from_checkpoint)

    def _draw_validation(self, again: bool = False) -> None:
        """Draw the validation prompts with the LoRA and log them; where this step has been drawn, only `again`."""
        model = self.accelerator.unwrap_model(self.model)
        self._log_validation(self.validation.draw_after(model, self.state.global_step, again))

    def _log_validation(self, drawn: dict[str, float]) -> None:
        """Log the metrics of validation images, and show the images to the trackers; nothing if `drawn` is empty."""
        if drawn:
            self.log(drawn)
            self.validation.show(self.callback_handler.callbacks, self.state.global_step)

    mode_dependent_modules = _DropoutNd

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """As `PreferenceTrainer.base_model`, through what accelerate has wrapped and compiled."""
        with super().base_model():
            yield self.model_wrapped

    # --- The folder ---

    # PEFT would look for the config of a language model, to see whether its vocabulary has grown.
    save_options = {"save_embedding_layers": False}

    @property
    def warnings_seen(self) -> list[str]:
        """Warnings of the guards, for the card."""
        return [sentence for guard in self.guards for sentence in guard.said]

    def save_beside_adapter(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        self.family.save_lora(model, folder)
        save_for_interfaces(self.family, model, folder, Path(self.args.output_dir).resolve().name, self.base_name)

    def save_beside_checkpoint(self, folder: Path) -> None:
        for guard in self.guards:
            guard.save(folder)

    def draw_pictures(self, folder: Path) -> None:
        self.validation.save(folder)
