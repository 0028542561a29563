"""Stop at numbers that are not finite: losses that are to be learnt from, weights that are to be saved."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def check_losses(values: torch.Tensor, prompt_of: Callable[[int], str], step: int, output_dir: str | Path) -> None:
    """Raise a `FloatingPointError`, with the prompt and the checkpoint to go back to, if a loss is not finite.

    Args:
        values: (B,) losses.
        prompt_of: Gives the prompt of a row.
        step: Number of the optimizer step.
        output_dir: Folder with the checkpoints.
    """
    if torch.isfinite(values).all():
        return
    index = int((~torch.isfinite(values)).nonzero()[0])
    raise FloatingPointError(
        f"the loss became {values[index].item()} at step {step}, at the pair with the prompt {prompt_of(index)!r}. "
        f"{_way_back(output_dir)} Lower `learning_rate` or the weights of the loss, use bf16 instead of fp16, or look "
        "at that pair's images and weight."
    )


def check_weights(weights: Mapping[str, torch.Tensor], output_dir: str | Path) -> None:
    """Raise a `FloatingPointError` if weights that are about to be saved are not finite.

    Args:
        weights: Tensors by name.
        output_dir: Folder with the checkpoints.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FloatingPointError(
                f"the weights are not saved: {name} is not finite any more. {_way_back(output_dir)} Lower "
                "`learning_rate`, or use bf16 instead of fp16."
            )


def _way_back(output_dir: str | Path) -> str:
    """Name the newest checkpoint with finite weights; the newest of all may hold those that gave a bad loss."""
    folders = Path(output_dir).glob("checkpoint-*")
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime_ns, reverse=True):
        weights = [load_file(file) for file in folder.glob("*.safetensors")]
        if weights and all(bool(torch.isfinite(value).all()) for file in weights for value in file.values()):
            return f"The last good checkpoint is {folder}."
    return "There is not yet a good checkpoint."
