"""Taste direction: fit the best constant shift of the text embedding, where training begins.

With few pairs, most of what can be learnt is one direction: the person prefers images that lie *there*. Adding a
constant `delta` to every text embedding is the smallest change that says so. Finding it is a small smooth problem in
D unknowns, solved in well under a second, and it fits into the LoRA of the text projection (`lora.constant_direction`
tells how), so plain gradient steps go on from it. A LoRA that begins at zero needs hundreds of steps to get there and
disturbs more on its way: Adam moves all coordinates alike, whether the pairs say something about them or not.
"""

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.losses import bradley_terry_loss, retrieval_kl
from bt_hf.reward.lora import OUTPUT_LAYERS, constant_direction

# Largest relative variation from text to text at which a shift still counts as constant.
TOLERANCE = 0.2


def fit_shift(
    text: torch.Tensor,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    preference: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    *,
    prior_weight: float,
    kl_weight: float,
    label_smoothing: float = 0.0,
    bank_size: int = 256,
    words: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maximum a posteriori shift of normalised text embeddings, by L-BFGS on the trainer's own objective.

    Minimises sum_i w_i [bradley_terry_loss(margin_i, p_i) + kl_weight * KL_i] + prior_weight / 2 * |z|^2,
    with reward scale * cos(text_i + delta, image) and z = scale * rms(|chosen - rejected|) * delta (weighted rms): the
    prior counts in units of margin, so it means the same for every model.

    Args:
        text, chosen, rejected: (N, D) normalised base embeddings.
        preference, weight: (N,).
        scale: exp(logit_scale).
        prior_weight, kl_weight, label_smoothing, bank_size: See `BradleyTerryConfig`.
        words: (K, D) normalised embeddings of many words. They stand for images of what the pairs do not show: a
            shift that would move some of them up and others down confuses a taste with a topic.

    Returns:
        (D,) float64 shift. Zeros if the pairs say nothing new (all ties, and the base also prefers neither image).
    """
    text, chosen, rejected = text.double(), chosen.double(), rejected.double()
    preference, weight = preference.double(), weight.double()
    squares = (chosen - rejected).pow(2).sum(1)
    spread = scale * ((weight * squares).sum() / weight.sum().clamp(min=1e-12)).sqrt().clamp(min=1e-6)
    banks = [chosen[:bank_size], rejected[:bank_size]] + ([] if words is None else [words.double()])
    references = [scale * text @ bank.T for bank in banks]
    z = torch.zeros(text.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        shifted = F.normalize(text + z / spread, dim=-1)
        margin = scale * (shifted * (chosen - rejected)).sum(1)
        loss = bradley_terry_loss(margin, preference, label_smoothing)
        if kl_weight:
            for bank, reference in zip(banks, references, strict=True):
                loss = loss + kl_weight / len(banks) * retrieval_kl(scale * shifted @ bank.T, reference)
        total = (weight * loss).sum() + prior_weight / 2 * z.square().sum()
        total.backward()
        return total

    optimizer.step(objective)
    return z.detach() / spread


def text_lora(model: nn.Module) -> LoraLayer | None:
    """Return the LoRA on the last linear layer of the text tower, if `model` has a plain one."""
    if not isinstance(model, PeftModel):
        return None
    base = model.get_base_model()
    name = text_output_name(base)
    # PEFT keeps the name and puts its layer around the original one.
    layer = base.get_submodule(name) if name else None
    if not isinstance(layer, LoraLayer) or model.active_adapter not in layer.lora_B:
        return None
    up = layer.lora_B[model.active_adapter]
    # AdaLoRA holds bare parameters, DoRA rescales what is written, and PiSSA and its kin begin with an update.
    plain = isinstance(up, nn.Linear) and not layer.use_dora[model.active_adapter] and not up.weight.any()
    return layer if plain else None


def text_output_name(base: nn.Module) -> str | None:
    """Return the name of the last linear layer of the text tower; `None` for an unknown family."""
    modules = dict(base.named_modules())
    return next((text for text, _ in OUTPUT_LAYERS if text in modules), None)


@torch.no_grad()
def write_shift(model: PeftModel, layer: LoraLayer, delta: torch.Tensor, features: torch.Tensor) -> float:
    """Make the first rank of `layer`'s LoRA add `delta`, in units of the text embedding's length, to its output.

    Args:
        model: The adapted dual encoder; its active adapter is written.
        layer: LoRA of the text projection, as `text_lora` gives it; its update should still be zero.
        delta: (D,) shift of normalised text embeddings.
        features: (N, H) inputs of the text projection, from many different texts.

    Returns:
        How far the shift is from constant: the root mean square of (a·x - 1) over `features`. Nothing is written if
        that is over `TOLERANCE`.
    """
    adapter = model.active_adapter
    direction = constant_direction(features)
    error = (features.double() @ direction - 1).square().mean().sqrt().item()
    if error > TOLERANCE:
        return error
    norm = layer.get_base_layer()(features.to(layer.get_base_layer().weight)).double().norm(dim=1).mean()
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    # The length of the embedding goes into A: a step of AdamW on B is then a step of its size on the unit sphere.
    down[0] = (direction * norm).to(down)
    up[:, 0] = (delta / layer.scaling[adapter]).to(up)
    return error


def vocabulary_texts(tokenizer: PreTrainedTokenizerBase, count: int = 512) -> list[str]:
    """Pick `count` words from the tokenizer's vocabulary, evenly spread over it: many different texts for no data."""
    special = set(tokenizer.all_special_ids)  # computed anew at each look
    ids = [index for index in range(len(tokenizer)) if index not in special]
    step = max(1, len(ids) // (4 * count))
    words = dict.fromkeys(tokenizer.decode([index]).strip() for index in ids[::step])
    texts = [word for word in words if len(word) > 2 and word.isalpha()] or [word for word in words if word]
    return texts[:: max(1, len(texts) // count)][:count]
