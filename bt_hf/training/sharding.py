"""Sharded training (FSDP, DeepSpeed): prepare models and gather full adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def wrap_by_layer(model: nn.Module, plugin: Any) -> None:
    """Let FSDP gather one layer at a time: every kind in the model's `_no_split_modules` that the model has.

    accelerate takes all that the class names, and fails where this model of the class lacks one.

    Args:
        model: About to be sharded.
        plugin: accelerate's `FullyShardedDataParallelPlugin`. Changed, unless it names layers already.

    Raises:
        ValueError: Its `state_dict_type` would leave the folder without weights.
    """
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            "`fsdp_state_dict_type` should be FULL_STATE_DICT in the config of accelerate: with "
            f"{plugin.state_dict_type.name} no adapter would be saved."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        wanted = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(wanted)) or None


def make_shardable(encoder: Any) -> None:
    """Prepare a dual encoder, without its adapter, for sharding.

    Its scalars are frozen. FSDP can't shard them, and ZeRO-3 would leave nothing to read between two forwards; as
    buffers they stay whole.
    """
    for name in ("logit_scale", "logit_bias"):
        scalar = getattr(encoder, name, None)
        if isinstance(scalar, nn.Parameter):
            delattr(encoder, name)
            encoder.register_buffer(name, scalar.detach())
    # accelerate asks for the embeddings of a language model, of which a dual encoder has two.
    encoder.get_input_embeddings = encoder.get_output_embeddings = lambda: None


@contextmanager
def gathered_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None) -> Iterator[Any]:
    """Let `model.state_dict()` return, within this context, the one gathered from all processes, if there is one."""
    if state_dict is not None:
        vars(model)["state_dict"] = lambda *args, **kwargs: state_dict
    try:
        yield model
    finally:
        vars(model).pop("state_dict", None)
