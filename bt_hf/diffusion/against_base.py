"""Compare a preference LoRA with its base, before and after a training."""

from collections.abc import Sized
from functools import partial
from typing import Any

import torch

from bt_hf.diffusion.collator import Batch
from bt_hf.diffusion.errors import TRAIN, NoisyBatch
from bt_hf.training.learnt import AgainstBase

# Share by which predictions change; at this one, drawings of the emoji pipeline differ by one grey level of 255.
LEAST_CHANGE = 0.02


def against_base(trainer: Any) -> AgainstBase:
    """Return the callback of a `PreferenceLoRATrainer`."""
    described = "predictions of noise differ from the base's by {:.2%}"
    return AgainstBase(partial(_base_figures, trainer), partial(_change, trainer), LEAST_CHANGE, described)


@torch.no_grad()
def _base_figures(trainer: Any) -> dict[str, float]:
    """Return the loss of the base on the first training rows."""
    if trainer.sharded or not isinstance(trainer.train_dataset, Sized):
        return {}
    batch, noisy = _first_batch(trainer)
    with trainer.base_model() as base:
        errors, _ = trainer._errors(base, noisy)
    losses = trainer.pair_loss.losses(errors, errors, batch, trainer.beta)
    return {"base_loss": trainer.weighted_mean(losses, batch["weight"], None).item()}


@torch.no_grad()
def _change(trainer: Any) -> float | None:
    """Return the root mean square change of predictions as a share of the base's; `None` if sharded or of a stream."""
    if trainer.sharded or not isinstance(trainer.train_dataset, Sized):  # reading a stream would move it on
        return None
    _, noisy = _first_batch(trainer)
    trainer.model.eval()
    _, predicted = trainer._errors(trainer.model_wrapped, noisy)
    with trainer.base_model() as base:
        _, before = trainer._errors(base, noisy)
    return ((predicted - before).square().mean() / before.square().mean()).sqrt().item()


def _first_batch(trainer: Any) -> tuple[Batch, NoisyBatch]:
    """Return up to 8 training rows, with noise."""
    batch = trainer._encoded(next(trainer.read_batches(trainer.train_dataset, 8)))
    return batch, trainer.denoising.add_noise(batch, 0, TRAIN)
