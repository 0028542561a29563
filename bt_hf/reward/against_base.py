"""Compare a reward with its base, before and after a training."""

from collections.abc import Sized
from functools import partial
from typing import Any

import torch

from bt_hf.losses import bradley_terry_loss
from bt_hf.metrics import preference_metrics
from bt_hf.reward import encoders
from bt_hf.training.learnt import AgainstBase

LEAST_CHANGE = 0.1  # margins that differ by so much move a probability by 2.5 points at most


def against_base(trainer: Any) -> AgainstBase:
    """Return the callback of a `BradleyTerryTrainer`."""
    described = "margins of training pairs differ from the base's by {:.2g}"
    return AgainstBase(partial(_base_figures, trainer), partial(_change, trainer), LEAST_CHANGE, described)


def _base_figures(trainer: Any) -> dict[str, float]:
    """Return loss and accuracy of the base on training pairs, where they were embedded."""
    pairs = trainer.embedded_base
    if pairs is None:
        return {}
    preference, weight = pairs.preference, pairs.weight
    scale = encoders.logit_scale(trainer.model).item()
    margins = scale * (pairs.text * (pairs.chosen - pairs.rejected)).sum(-1)
    losses = bradley_terry_loss(margins, preference, trainer.args.label_smoothing)
    loss = (weight * losses).sum() / weight.sum().clamp(min=1e-12)
    return {"base_loss": loss.item(), "base_accuracy": preference_metrics(margins, preference, weight)["accuracy"]}


@torch.no_grad()
def _change(trainer: Any) -> float | None:
    """Return the root mean square change of up to 64 pairs' margins, `None` for sharded weights and streams."""
    if trainer.sharded or not isinstance(trainer.train_dataset, Sized):  # reading a stream would move it on
        return None
    changes = []
    trainer.model.eval()
    for batch in trainer.read_batches(trainer.train_dataset, 64):
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        changes.append(outputs["margins"] - outputs["base_margins"])
    return torch.cat(changes).square().mean().sqrt().item()
