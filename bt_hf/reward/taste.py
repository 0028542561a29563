"""Write a linear taste into a LoRA of the two projections, where training begins.

`posterior.fit_taste` finds what a person likes as weights of normalised embeddings. A LoRA can hold nearly all of it:

- A constant added to every text embedding is a direction that they like. Behind a layer norm, one rank of a LoRA can
  add it without a bias (`lora.constant_direction`).
- What depends on the prompt is a linear map of the text embedding; the further ranks hold its largest parts.
- What only the inputs of the image projection show is one rank there, along the same direction.
- The model divides by the length of the text embedding. A component along which images hardly differ brings it to the
  length that the fitted strength asks for; a second rank of the image projection takes the rest of that component out
  of the images, so that it changes no comparison.

Plain gradient steps go on from there. A LoRA that begins at zero needs hundreds of them to get as far, and disturbs
more on its way: Adam moves all coordinates alike, whether the pairs say something about them or not.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from bt_hf.losses import bradley_terry_loss, retrieval_kl
from bt_hf.reward.config import BradleyTerryConfig
from bt_hf.reward.encoders import logit_scale
from bt_hf.reward.lora import OUTPUT_LAYERS, OutputLayers, constant_direction
from bt_hf.reward.posterior import Taste, fit_taste

# Largest relative variation from text to text at which a shift still counts as constant.
TOLERANCE = 0.2
# Largest factor by which images are stretched along the direction of a taste, where the logit scale is too small.
MAX_STRETCH = 30.0


@dataclass
class EmbeddedPairs:
    """Training pairs as the base embeds them, in float64 on the CPU.

    Attributes:
        text, chosen, rejected: (N, D) normalised embeddings.
        preference, weight: (N,).
        inputs: (2N, H) inputs of the image projection, chosen images first, divided by the length of its output;
            `None` if its output is not yet the image embedding.
    """

    text: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    preference: torch.Tensor
    weight: torch.Tensor
    inputs: torch.Tensor | None = None

    @property
    def features(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Features of the chosen and of the rejected images, each (N, H)."""
        if self.inputs is None:
            return None
        chosen, rejected = self.inputs.chunk(2)
        return chosen, rejected

    def margins(self, taste: Taste, scale: float) -> torch.Tensor:
        """Return the margins (N,) that `taste` asks for."""
        difference = self.chosen - self.rejected
        features = None if self.features is None else self.features[0] - self.features[1]
        return taste.margins(self.text, difference, scale * (self.text * difference).sum(1), features)


@dataclass
class Update:
    """Change of both towers' embeddings, for texts and images of length 1 before it.

    Attributes:
        shift: (D,) added to each text embedding.
        left, right: (D, K) and (K, D); each text embedding t gets left @ right @ t on top.
        along: (D,) direction in which images are moved; unit length.
        stretch: Factor minus one of an image's component along it.
        by_feature: (H,) weights of the inputs of the image projection, which move images along it; or `None`.
        removed: (D,) unit vector whose component is taken out of images, at right angles to `along`; or `None`.
    """

    shift: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    along: torch.Tensor
    stretch: float = 0.0
    by_feature: torch.Tensor | None = None
    removed: torch.Tensor | None = None

    def texts(self, text: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Return adapted embeddings of normalised `text` (N, D), with the update scaled by `scale`."""
        return F.normalize(text + scale * (self.shift + text @ self.right.T @ self.left.T), dim=-1)

    def images(self, images: torch.Tensor, inputs: torch.Tensor | None, scale: float = 1.0) -> torch.Tensor:
        """Return adapted embeddings of normalised `images` (N, D)."""
        moved = self.stretch * (images @ self.along)
        if self.by_feature is not None and inputs is not None:
            moved = moved + inputs @ self.by_feature
        change = moved[:, None] * self.along
        if self.removed is not None:
            change = change - (images @ self.removed)[:, None] * self.removed
        return F.normalize(images + scale * change, dim=-1)

    def margins(self, pairs: EmbeddedPairs, logit_scale: float, scale: float = 1.0) -> torch.Tensor:
        """Return the adapted model's margins (N,)."""
        images = self.images(torch.cat([pairs.chosen, pairs.rejected]), pairs.inputs, scale)
        chosen, rejected = images.chunk(2)
        return logit_scale * (self.texts(pairs.text, scale) * (chosen - rejected)).sum(1)


@torch.no_grad()
def begin_at_taste(
    model: PeftModel,
    text_layer: LoraLayer,
    image_layer: LoraLayer | None,
    pairs: EmbeddedPairs,
    words: torch.Tensor,
    features: torch.Tensor,
    args: BradleyTerryConfig,
) -> float:
    """Fit a taste to embedded pairs, and write it into the LoRAs of both projections.

    Args:
        model: The adapted dual encoder.
        text_layer, image_layer: LoRAs as `plain_lora` gives them.
        pairs: The pairs.
        words: (K, D) normalised embeddings of many texts.
        features: (K, H) inputs of the text projection for these texts.
        args: Options of the training.

    Returns:
        The error of `write_update`.
    """
    layers = output_layers(model)
    assert layers is not None  # it has the text layer's name
    scale, adapter, words = logit_scale(model).item(), model.active_adapter, words.double()
    fitted = fit_taste(
        pairs.text,
        pairs.chosen,
        pairs.rejected,
        pairs.preference,
        pairs.weight,
        scale,
        features=pairs.features,
        prior_weight=args.prior_weight,
        label_smoothing=args.label_smoothing,
    )
    image_rank = image_layer.r[adapter] if image_layer is not None else 0
    shared = shared_direction(model, layers, pairs)
    update = plan_update(fitted, pairs, words, scale, shared, text_layer.r[adapter], image_rank)
    part = best_scale(update, pairs, words, scale, args.kl_weight, args.label_smoothing, args.kl_bank_size)
    return write_update(model, text_layer, image_layer, update, features, part)


def plan_update(
    taste: Taste,
    pairs: EmbeddedPairs,
    words: torch.Tensor,
    logit_scale: float,
    shared: torch.Tensor,
    rank: int,
    image_rank: int,
) -> Update:
    """Find the update whose margins are those of `taste`.

    Args:
        taste: The taste.
        pairs: Pairs on which the strength is compared.
        words: (K, D) normalised embeddings of many texts.
        logit_scale: exp(logit_scale) of the base.
        shared: (D,) unit vector along which images hardly differ, see `shared_direction`.
        rank: Ranks of the text LoRA. One is for the shift, the others for what depends on the prompt.
        image_rank: Ranks of the image LoRA, 0 without one.

    Returns:
        The update. Where the logit scale bounds margins below those of `taste`, and images can't be stretched, its
        margins are the largest possible.
    """
    if not taste.direction.any() and not taste.by_prompt.any():  # the pairs said nothing
        nothing = torch.zeros_like(taste.direction)
        return Update(nothing, nothing[:, None][:, :0], nothing[None][:0], nothing)
    caption = taste.caption * logit_scale
    left, sizes, right = torch.linalg.svd(taste.by_prompt)
    kept = min(rank - 1, int((sizes > 1e-6 * sizes[0].clamp(min=1e-12)).sum()))
    left, right = left[:, :kept] * sizes[:kept] / caption, right[:kept]
    wanted = caption * words + taste.direction + caption * (words @ right.T @ left.T)  # (K, D), in logits
    along = F.normalize(wanted.mean(0), dim=0)
    shared = F.normalize(shared - (shared @ along) * along, dim=0)
    pull = (wanted @ along).mean()
    by_feature = None if taste.by_feature is None or not image_rank else taste.by_feature / pull
    removed = shared if image_rank > 1 and pairs.inputs is not None else None
    update = Update(taste.direction / caption, left, right, along, by_feature=by_feature, removed=removed)
    target = pairs.margins(taste, logit_scale)
    against = float(pairs.weight @ target.square())
    if not against:
        return update
    length, stretch = logit_scale, 1.0
    for _ in range(30):
        across = (wanted @ shared).mean()
        rest = length**2 - wanted.square().sum(1).mean()
        filler = float((across.square() + rest).sqrt() - across) if rest > 0 else 0.0
        update.shift = (taste.direction + filler * shared) / caption
        slope = float((update.margins(pairs, logit_scale) * target) @ pairs.weight / against)
        if abs(slope - 1) < 0.01:
            break
        if filler > 0 or slope > 1:
            length *= slope
        elif image_rank and pairs.inputs is not None and stretch < MAX_STRETCH:
            stretch = min(stretch / max(slope, 0.1), MAX_STRETCH)
            update.stretch = stretch - 1
            update.by_feature = None if by_feature is None else stretch * by_feature
        else:
            break
    return update


def best_scale(
    update: Update,
    pairs: EmbeddedPairs,
    words: torch.Tensor,
    logit_scale: float,
    kl_weight: float,
    label_smoothing: float,
    bank_size: int,
) -> float:
    """Return the scale of the update, in [0, 1], with the least mean loss + kl_weight * KL(base || adapted)."""
    if not kl_weight:
        return 1.0
    inputs = (None, None) if pairs.features is None else pairs.features
    banks = [(pairs.chosen, inputs[0]), (pairs.rejected, inputs[1])]
    banks = [(images[:bank_size], None if x is None else x[:bank_size]) for images, x in banks]

    def objective(scale: float) -> float:
        text = update.texts(pairs.text, scale)
        loss = bradley_terry_loss(update.margins(pairs, logit_scale, scale), pairs.preference, label_smoothing)
        groups = [(update.images(images, x, scale), images) for images, x in banks] + [(words, words)]
        for adapted, base in groups:
            divergence = retrieval_kl(logit_scale * text @ adapted.T, logit_scale * pairs.text @ base.T)
            loss = loss + kl_weight / len(groups) * divergence
        return float(pairs.weight @ loss)

    return min((step / 40 for step in range(41)), key=objective)


def plain_lora(model: nn.Module, name: str) -> LoraLayer | None:
    """Return the LoRA on the layer `name` of the base, if it is a plain one that still changes nothing."""
    if not isinstance(model, PeftModel):
        return None
    # PEFT keeps the name and puts its layer around the original one.
    layer = dict(model.get_base_model().named_modules()).get(name)
    if not isinstance(layer, LoraLayer) or model.active_adapter not in layer.lora_B:
        return None
    up = layer.lora_B[model.active_adapter]
    # AdaLoRA holds bare parameters, DoRA rescales what is written, and PiSSA and its kin begin with an update.
    plain = isinstance(up, nn.Linear) and not layer.use_dora[model.active_adapter] and not up.weight.any()
    return layer if plain else None


def output_layers(model: nn.Module) -> OutputLayers | None:
    """Return the names of the last linear layers of both towers; `None` for an unknown family."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(base.named_modules())
    return next((layers for layers in OUTPUT_LAYERS if layers.text in modules), None)


@torch.no_grad()
def image_covariance(model: PeftModel, layers: OutputLayers) -> torch.Tensor | None:
    """Return W W^T (D, D) of the weights that write image embeddings, which tells how these vary for no data."""
    modules = dict(model.get_base_model().named_modules())
    weights = [modules[name].weight.double().cpu() for name in layers.writers if name in modules]
    return torch.stack([weight @ weight.T for weight in weights]).sum(0) if weights else None


@torch.no_grad()
def shared_direction(model: PeftModel, layers: OutputLayers, pairs: EmbeddedPairs) -> torch.Tensor:
    """Return a unit vector (D,) along which image embeddings hardly differ.

    Few images say little about that, but the weights that write the embedding do: the vector is the least eigenvector
    of their W W^T and of the covariance of the pairs' images, in proportion to the images that stand for either.
    """
    images, weight = torch.cat([pairs.chosen, pairs.rejected]), pairs.weight.repeat(2)
    images = images - weight @ images / weight.sum().clamp(min=1e-12)
    seen = images.T @ (weight[:, None] * images)
    expected = image_covariance(model, layers)
    if expected is not None:
        # As if as many images had been seen as there are dimensions.
        typical = seen.trace().clamp(min=1e-12) / weight.sum().clamp(min=1e-12)
        seen = seen + len(seen) * typical / expected.trace() * expected
    return torch.linalg.eigh(seen).eigenvectors[:, 0]


@torch.no_grad()
def write_update(
    model: PeftModel,
    text_layer: LoraLayer,
    image_layer: LoraLayer | None,
    update: Update,
    features: torch.Tensor,
    scale: float = 1.0,
) -> float:
    """Write an update into plain LoRAs of the text projection and, where there is one, of the image projection.

    Args:
        model: The adapted dual encoder; its active adapter is written.
        text_layer, image_layer: LoRAs as `plain_lora` gives them; they should still change nothing.
        update: The update, in units of the embeddings' lengths.
        features: (N, H) inputs of the text projection, from many different texts.
        scale: Scale of the update.

    Returns:
        How far the shift is from constant: the root mean square of (a·x - 1) over `features`. Nothing is written if
        that is over `TOLERANCE`.
    """
    adapter = model.active_adapter
    direction = constant_direction(features)
    error = (features.double() @ direction - 1).square().mean().sqrt().item()
    if error > TOLERANCE:
        return error
    projection = text_layer.get_base_layer()
    output = projection(features.to(projection.weight)).double().cpu()
    length = output.norm(dim=1).mean()
    down, up = text_layer.lora_A[adapter].weight, text_layer.lora_B[adapter].weight
    factor = scale / text_layer.scaling[adapter]
    shift = update.shift
    if projection.bias is not None:
        shift = shift + update.left @ (update.right @ projection.bias.double().cpu()) / length
    # The length of the embedding goes into A: a step of AdamW on B is then a step of its size on the unit sphere.
    down[0] = (direction * length).to(down)
    up[:, 0] = (factor * shift).to(up)
    kept = update.left.shape[1]
    down[1 : 1 + kept] = (update.right @ projection.weight.double().cpu()).to(down)
    up[:, 1 : 1 + kept] = (factor * update.left).to(up)
    if image_layer is None:
        return error
    down, up = image_layer.lora_A[adapter].weight, image_layer.lora_B[adapter].weight
    projection = image_layer.get_base_layer().weight.double().cpu()
    changes = []
    if update.by_feature is not None or update.stretch:
        weights = update.stretch * update.along @ projection
        changes.append((update.along, weights if update.by_feature is None else weights + update.by_feature))
    if update.removed is not None:
        changes.append((update.removed, -update.removed @ projection))
    # The fit drops inputs that prove to say nothing, and weights of zero have no direction.
    changes = [(direction, weights) for direction, weights in changes if weights.any()]
    for rank, (direction, weights) in enumerate(changes):
        size = weights.norm()
        down[rank] = (weights / size).to(down)
        up[:, rank] = (scale / image_layer.scaling[adapter] * size * direction).to(up)
    return error


def vocabulary_texts(tokenizer: PreTrainedTokenizerBase, count: int = 512) -> list[str]:
    """Pick `count` words from the tokenizer's vocabulary, evenly spread over it: many different texts for no data."""
    special = set(tokenizer.all_special_ids)  # computed anew at each look
    ids = [index for index in range(len(tokenizer)) if index not in special]
    step = max(1, len(ids) // (4 * count))
    words = dict.fromkeys(tokenizer.decode([index]).strip() for index in ids[::step])
    texts = [word for word in words if len(word) > 2 and word.isalpha()] or [word for word in words if word]
    return texts[:: max(1, len(texts) // count)][:count]
