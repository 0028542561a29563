"""Use a reward: score, compare, rank and classify images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.processing_utils import ProcessorMixin

from bt_hf.data.images import to_rgb
from bt_hf.reward import encoders
from bt_hf.reward.collator import count_truncated


class PreferenceScorer:
    """Rewards of images for prompts: r(t, I) = s cos(text(t), image(I)).

    Args:
        model: A loaded dual encoder or `PeftModel`.
        processor: Its processor.
        batch_size: Prompts or images in a batch, where a method is not told otherwise.

    Raises:
        TypeError: `model` is not a dual encoder.

    Example:
        ```python
        from bt_hf import PreferenceScorer

        scorer = PreferenceScorer.from_pretrained("my-taste")
        scorer.compare("a red apple", "first.png", "second.png")  # P(first is preferred), e.g. 0.83
        ```
    """

    def __init__(self, model: nn.Module, processor: ProcessorMixin, batch_size: int = 32) -> None:
        encoders.check_dual_encoder(model)
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.scale = encoders.logit_scale(model)

    @classmethod
    def from_pretrained(
        cls,
        adapter_or_model: str | Path | nn.Module,
        base_model: str | nn.Module | None = None,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        processor: ProcessorMixin | None = None,
    ) -> "PreferenceScorer":
        """Load a scorer.

        Args:
            adapter_or_model: Hub id or folder of an adapter or of a plain dual encoder (CLIP, PickScore, ...), or a
                loaded model.
            base_model: Base of the adapter, if another than the one that it names: id, folder or loaded model.
            revision: Git revision on the Hub.
            token: Access token for the Hub.
            device: Default: a GPU if there is one.
            dtype: Floating type of the weights; default float32.
            processor: Default: the one saved beside the adapter or the model, else the base's.

        Raises:
            OSError: The adapter, the model or the base can't be found.
            TypeError: It is not a dual encoder.
            ValueError: The adapter does not fit the base, or no processor is found.
        """
        model: Any = adapter_or_model
        if not isinstance(model, nn.Module):
            model = encoders.load_dual_encoder(model, base_model, revision=revision, token=token, dtype=dtype)
        encoders.check_dual_encoder(model)
        if processor is None:
            processor = encoders.find_processor(adapter_or_model, model, revision=revision, token=token)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), processor)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def score(
        self, prompts: str | Sequence[str], images: Sequence[Any], batch_size: int | None = None
    ) -> torch.Tensor:
        """Reward of each image for its prompt.

        Args:
            prompts: One prompt for all images, or one for each.
            images: PIL images, paths, bytes or arrays.
            batch_size: Images in a batch.

        Returns:
            (N,) float32 rewards, on the CPU.

        Raises:
            ValueError: The numbers of prompts and images differ.
        """
        images = _listed(images)
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise ValueError(
                f"`score` needs one prompt for each image, or a single prompt, but got {len(prompts)} prompts and "
                f"{len(images)} images."
            )
        if not images:
            return torch.empty(0)
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], dtype=torch.long)
        text = self.embed_texts(distinct, batch_size)[rows]
        return self._rewards((text * self.embed_images(images, batch_size)).sum(-1))

    def compare(self, prompt: str, image_a: Any, image_b: Any) -> float:
        """P(`image_a` is preferred to `image_b` for `prompt`) = sigmoid(r(a) - r(b))."""
        reward_a, reward_b = self.score(prompt, [image_a, image_b])
        return torch.sigmoid(reward_a - reward_b).item()

    def rank(self, prompt: str, images: Sequence[Any], top_k: int | None = None) -> list[tuple[int, float]]:
        """Images by reward, best first, as (index, reward); the first `top_k` of them, or all."""
        rewards = self.score(prompt, images)
        order = rewards.argsort(descending=True, stable=True).tolist()
        return [(index, rewards[index].item()) for index in order[:top_k]]

    def classify(self, images: Sequence[Any], labels: Sequence[str], template: str = "{}") -> torch.Tensor:
        """Zero-shot classification with the adapted model.

        Args:
            images: N images.
            labels: L names of classes.
            template: Prompt with one `{}` for the label, such as `"a photo of {}"`.

        Returns:
            (N, L) float32 probabilities: the softmax of the rewards over the labels.

        Raises:
            ValueError: There are no labels, or `template` has no `{}`.
        """
        if not labels:
            raise ValueError("`classify` needs at least one label, but got none.")
        if "{}" not in template:
            raise ValueError(f"`template` should have one '{{}}' for the label, but got {template!r}.")
        text = self.embed_texts([template.replace("{}", label) for label in labels])
        return self._rewards(self.embed_images(_listed(images)) @ text.T).softmax(dim=-1)

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str], batch_size: int | None = None) -> torch.Tensor:
        """Normalised embeddings (N, D), float32, on the CPU. Too long prompts are truncated, with one warning."""
        prompts = list(prompts)
        count_truncated(self.processor, prompts)
        chunks = [
            encoders.embed_texts(self.model, self._move(encoders.tokenize(self.processor, chunk)))
            for chunk in _chunks(prompts, batch_size or self.batch_size)
        ]
        return torch.cat(chunks).cpu() if chunks else torch.empty(0, 0)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Any], batch_size: int | None = None) -> torch.Tensor:
        """Normalised embeddings (N, D), float32, on the CPU."""
        chunks = []
        for chunk in _chunks(list(enumerate(_listed(images))), batch_size or self.batch_size):
            rgb = [to_rgb(image, f"image {number}") for number, image in chunk]
            inputs = self.processor.image_processor(rgb, return_tensors="pt")
            chunks.append(encoders.embed_images(self.model, self._move(inputs)))
        return torch.cat(chunks).cpu() if chunks else torch.empty(0, 0)

    def _rewards(self, cosines: torch.Tensor) -> torch.Tensor:
        """Scale cosines (N,) or (N, L) of N images; one that is not finite would come first in a ranking."""
        rewards = self.scale.cpu() * cosines
        if not torch.isfinite(rewards).all():
            image = int((~torch.isfinite(rewards)).nonzero()[0, 0])
            dtype = next(self.model.parameters()).dtype
            raise ValueError(
                f"the reward of image {image} is not finite, computed in {dtype}: load the model with "
                "`dtype=torch.float32`, or look at its weights."
            )
        return rewards

    def _move(self, inputs: Any) -> dict[str, torch.Tensor]:
        dtype = next(self.model.parameters()).dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }

    def set_scale(self, scale: float) -> None:
        """Scale the adapter at inference: 0 is the base, 1 the taste as trained, between them a milder one.

        Raises:
            TypeError: The model has no LoRA, or one with DoRA.
        """
        layers: list[Any] = [module for module in self.model.modules() if hasattr(module, "set_scale")]
        if not isinstance(self.model, PeftModel) or not layers:
            raise TypeError("`set_scale` needs a model with a LoRA adapter.")
        adapter = self.model.active_adapter
        if any(getattr(layer, "use_dora", {}).get(adapter) for layer in layers):
            raise TypeError(
                "`set_scale` needs a plain LoRA: with DoRA magnitudes are trained too, so 0 is not the base."
            )
        for layer in layers:
            layer.set_scale(adapter, scale)


def _listed(images: Any) -> list[Any]:
    if isinstance(images, (str, bytes, Path)) or hasattr(images, "convert"):
        raise ValueError("`images` should be a list of images, but got a single one: put it into a list.")
    return list(images)


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
