"""Destroy the process group at interpreter exit."""

import atexit
import gc
import sys
import weakref
from typing import Any

from torch import distributed

_trainers: weakref.WeakSet[Any] = weakref.WeakSet()


def destroy_group_at_exit(trainer: Any) -> None:
    """End the process group and its threads, which a model of `trainer` may keep alive, when Python ends.

    A thread of gloo that drops a tensor while Python ends aborts the process, and the launcher then stops the others
    (https://github.com/pytorch/pytorch/pull/179291). `destroy_process_group` alone ends no thread as long as a model
    is wrapped for the group. Where FSDP shards weights, torch keeps the group to the end in any case.

    Args:
        trainer: A `Trainer`, which is not kept alive by this.
    """
    _trainers.add(trainer)
    atexit.unregister(_destroy_group)
    atexit.register(_destroy_group)


def _destroy_group() -> None:
    if hasattr(sys, "last_type"):  # an error ends this process: the others may never answer, so wait for nobody
        return
    for trainer in _trainers:
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()
    # Before the group: its own end waits for its threads without the interpreter's lock, for which they may wait.
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()
