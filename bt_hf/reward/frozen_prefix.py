"""Frozen prefix of a tower: the layers below the first trained one, computed once and recalled afterwards.

What lies below the first trained layer of a tower gives the same hidden states in every epoch. Later forwards skip
these layers; the model's own `forward` still runs, so DDP, PEFT and gradient checkpointing see nothing unusual.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


class _Recall(nn.Module):
    """Stand-in for the embeddings that returns the cached hidden states, whatever it is called with."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.hidden


class _RecallTower(_Recall):
    """Stand-in for a whole frozen tower."""

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        # Some models project `pooler_output`, others the first token of `last_hidden_state`.
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden[:, None], pooler_output=self.hidden)


class _Skip(nn.Module):
    """Stand-in for a frozen layer whose output is already in the hidden states."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


@dataclass
class FrozenPrefix:
    """Frozen beginning of one tower.

    Attributes:
        tower: Name of the tower, `text_model` or `vision_model`.
        embeddings: Name of its embeddings; empty if the whole tower is frozen.
        skipped: Names of the frozen modules between the embeddings and the first trained layer.
        last: Name of the last skipped layer.
    """

    tower: str
    embeddings: str = ""
    skipped: tuple[str, ...] = ()
    last: str = ""

    @classmethod
    def find(cls, base: nn.Module, tower: str) -> "FrozenPrefix | None":
        """Find the longest frozen prefix of a tower; `None` if its first layer is trained or its build unknown."""
        module = base.get_submodule(tower)
        if not _trained(module):
            return cls(tower)
        names = {name: child for name, child in module.named_modules() if name}
        stacks = [name for name, child in names.items() if isinstance(child, nn.ModuleList)]
        embeddings = min((name for name in names if name.split(".")[-1] == "embeddings"), key=len, default=None)
        if not stacks or embeddings is None:
            return None
        stack = max(stacks, key=lambda name: len(names[name]))
        norms = [name for name in names if name.split(".")[-1] in ("pre_layrnorm", "pre_layernorm")]
        if any(_trained(names[name]) for name in (embeddings, *norms)):
            return None
        frozen = 0
        while frozen < len(names[stack]) and not _trained(names[stack][frozen]):
            frozen += 1
        if frozen == 0:
            return None
        layers = [f"{tower}.{stack}.{index}" for index in range(len(names[stack]))]
        return cls(
            tower,
            f"{tower}.{embeddings}",
            (*(f"{tower}.{name}" for name in norms), *layers[:frozen]),
            layers[frozen - 1],
        )

    def compute(self, base: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute the hidden states behind the prefix: (N, tokens, width), or (N, width) of a whole frozen tower."""
        if not self.embeddings:
            output = base.get_submodule(self.tower)(**inputs)
            return output.pooler_output if output.pooler_output is not None else output.last_hidden_state[:, 0]
        seen: list[torch.Tensor] = []
        with base.get_submodule(self.last).register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        ):
            base.get_submodule(self.tower)(**inputs)
        return seen[0]

    @contextmanager
    def recall(self, base: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
        """Let `base`, within this context, begin the tower with `hidden` instead of computing it."""
        if not self.embeddings:
            stand_ins: dict[str, nn.Module] = {self.tower: _RecallTower(hidden)}
        else:
            stand_ins = {self.embeddings: _Recall(hidden), **{name: _Skip() for name in self.skipped}}
        originals = {name: base.get_submodule(name) for name in stand_ins}
        try:
            for name, module in stand_ins.items():
                # Stays below its stand-in, uncalled: DDP looks for its buffers.
                module.original = originals[name]
                base.set_submodule(name, module)
            yield
        finally:
            for name, module in originals.items():
                base.set_submodule(name, module)


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
