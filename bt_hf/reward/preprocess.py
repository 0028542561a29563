"""Resize and normalise images as an image processor does, with gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Resampling
from torch.nn import functional as F

_MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


def preprocess(processor: Any, images: torch.Tensor) -> torch.Tensor:
    """Return images as an image processor gives them, with gradients.

    The same numbers up to the rounding to whole grey levels, which resizing by PIL ends with.

    Args:
        processor: Image processor of transformers that resizes, crops in the middle, and normalises.
        images: (N, 3, H, W) floats in [0, 1].

    Returns:
        (N, 3, h, w), of the same dtype.

    Raises:
        TypeError: The processor does more than that, or resizes by another filter than bilinear and bicubic.
        ValueError: Images are not (N, 3, H, W) floats.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images should be floats in [0, 1] of the shape (N, 3, H, W), but got {images.dtype} of "
            f"{tuple(images.shape)}."
        )
    config = processor.to_dict()
    does = {name for name, value in config.items() if name.startswith("do_") and value}
    kind = type(processor).__name__
    if does - _STEPS or list(processor.model_input_names) != ["pixel_values"]:
        more = ", ".join(sorted(does - _STEPS)) or "patches of any shape"
        raise TypeError(f"{kind} ({more}) can't be differentiated: take a reward with a processor like CLIP's.")
    if "do_resize" in does:
        if config["resample"] not in _MODES:
            filter = Resampling(config["resample"]).name.lower()
            raise TypeError(f"{kind} resizes by {filter}, which has no gradient here: set bicubic or bilinear.")
        height, width = _resized(images.shape[-2:], config["size"])
        # As PIL does: antialiased, first along rows and then along columns, each time cut to the range of colours.
        for size in ((images.shape[-2], width), (height, width)):
            images = F.interpolate(images, size, mode=_MODES[config["resample"]], antialias=True).clamp(0, 1)
    if "do_center_crop" in does:
        images = _cropped(images, config["crop_size"]["height"], config["crop_size"]["width"])
    images = images * 255 * (config["rescale_factor"] if "do_rescale" in does else 1)
    if "do_normalize" in does:
        mean, std = (images.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("image_mean", "image_std"))
        images = (images - mean) / std
    return images


def _resized(shape: torch.Size, size: Mapping[str, int]) -> tuple[int, int]:
    """Return height and width after resizing: the size itself, or with the given shorter side."""
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    height, width = shape
    shortest = size["shortest_edge"]
    if height <= width:
        return shortest, int(shortest * width / height)
    return int(shortest * height / width), shortest


def _cropped(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cut out the middle; what is missing is black."""
    missing = [max(height - images.shape[-2], 0), max(width - images.shape[-1], 0)]
    top, left = ((one + 1) // 2 for one in missing)
    images = F.pad(images, (left, missing[1] - left, top, missing[0] - top))
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
