"""Default LoRA layers of each family of dual encoders."""

import re
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from bt_hf.training.adapters import put_on
from bt_hf.training.lora_options import LoraOptions


@dataclass(frozen=True)
class OutputLayers:
    """Last linear layers of the two towers of a family, by name.

    Attributes:
        text, image: The layers. A small change there moves the embedding directly; everything below stays frozen and
            is computed once (see `reward/cache.py`).
        writers: Layers whose outputs add up to the image embedding.
    """

    text: str
    image: str
    writers: tuple[str, ...]


OUTPUT_LAYERS = (
    # CLIP, MetaCLIP 2, AltCLIP, Chinese-CLIP, VisionTextDualEncoder
    OutputLayers("text_projection", "visual_projection", ("visual_projection",)),
    # SigLIP and SigLIP 2, whose vision tower ends in an attention-pooling head
    OutputLayers(
        "text_model.head",
        "vision_model.head.mlp.fc2",
        ("vision_model.head.attention.out_proj", "vision_model.head.mlp.fc2"),
    ),
)


def default_target_modules(model: nn.Module) -> str:
    """Return a pattern of the last linear layer of both towers of a dual encoder.

    Raises:
        ValueError: The family is unknown; name the layers in `lora_target_modules` or in a `peft_config`.
    """
    modules = dict(model.named_modules())
    for layers in OUTPUT_LAYERS:
        names = (layers.text, layers.image)
        if all(isinstance(modules.get(name), nn.Linear) for name in names):
            return rf"^({'|'.join(re.escape(name) for name in names)})$"
    raise ValueError(
        f"There is no LoRA default for {type(model).__name__}: pass `peft_config=LoraConfig(target_modules=[...])` or "
        "`lora_target_modules=[...]`."
    )


def add_adapter(
    model: nn.Module, peft_config: PeftConfig | None = None, options: LoraOptions | None = None
) -> PeftModel:
    """Wrap a dual encoder with a fresh adapter; `logit_scale` and all base weights are frozen.

    Args:
        model: The dual encoder.
        peft_config: The adapter; default: a LoRA as `options` describe it.
        options: Rank, alpha, dropout and layers of that LoRA; default `LoraOptions()`.

    Raises:
        ValueError: There are no default layers for this family, or switching the adapter off would not give the base
            back (see `training.adapters.put_on`).
    """
    if peft_config is None:
        options = options or LoraOptions()
        peft_config = options.lora_config(options.lora_target_modules or default_target_modules(model))
    return put_on(model, peft_config)


def constant_direction(features: torch.Tensor, ridge: float = 1e-4) -> torch.Tensor:
    """Solve a·x = 1 for all rows x of `features`, as nearly as possible.

    A bias written as a linear map. What a layer norm puts out lies on a hyperplane that does not pass through the
    origin (sum of (x - beta) / gamma = 0), so behind one such a vector exists, and LoRA can shift its output by a
    constant without a bias parameter.

    Args:
        features: (N, H), inputs of a linear layer.
        ridge: Ridge penalty relative to the mean squared feature.

    Returns:
        (H,) float64.
    """
    x = features.double()
    penalty = ridge * x.pow(2).mean() * len(x)
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.sum(0))
