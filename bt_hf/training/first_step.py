"""Look at the first step that counts: does the adapter move, and does every layer of it have a gradient?"""

import logging
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_NAMED = 5  # layers in a message


class FirstStep(TrainerCallback):
    """Warn of trained weights that don't move in the first step, and of layers without a gradient.

    Steps that a gradient scaler skips, or whose learning rate is 0, say nothing, so the next one is looked at.
    """

    def __init__(self) -> None:
        self._before: dict[str, torch.Tensor] = {}
        self._still: list[str] | None = None
        self._done = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._done or not any(group["lr"] for group in kwargs["optimizer"].param_groups):
            return
        model = kwargs["model"]
        self._still = layers_without_gradient(model)
        self._before = {name: _sum(value) for name, value in model.named_parameters() if value.requires_grad}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._done or self._still is None or getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        self._done = True
        parameters = dict(kwargs["model"].named_parameters())
        if not any(bool(_sum(parameters[name]) != before) for name, before in self._before.items()):
            logger.warning(
                "Nothing moved in the first step: no trained weight has changed. Is the optimizer made for this "
                "model's weights, and do the pairs say more than ties?"
            )
        elif self._still:
            more = f" and {len(self._still) - _NAMED} more" if len(self._still) > _NAMED else ""
            logger.warning(
                "Layers without a gradient in the first step, which learn nothing: %s%s. Leave them out of "
                "`target_modules`, or see what keeps the model from using them.",
                ", ".join(self._still[:_NAMED]),
                more,
            )
        self._before = {}


def layers_without_gradient(model: nn.Module) -> list[str]:
    """Return the names of adapted layers that have trained weights, but a gradient at none of them."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        trained = [value for value in module.parameters() if value.requires_grad]
        if trained and all(value.grad is None or not value.grad.any() for value in trained):
            found.append(name.removeprefix("module.").removeprefix("base_model.model."))
    return found


def _sum(value: torch.Tensor) -> torch.Tensor:
    """Sum the bits of a tensor, so that any change shows at the price of one number."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(bits.get(value.element_size(), torch.uint8)).sum()
