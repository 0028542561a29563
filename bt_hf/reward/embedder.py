"""Embed prompts and images with a dual encoder, with and without its adapter."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.processing_utils import ProcessorMixin

from bt_hf.data.fingerprint import digest_weights
from bt_hf.reward import encoders
from bt_hf.reward.collator import count_truncated
from bt_hf.reward.inputs import check_count, describe_image, list_images, list_texts, to_image


class Embedder:
    """Embeddings of prompts and images.

    Args:
        model: A loaded dual encoder or `PeftModel`.
        processor: Its processor.
        batch_size: Prompts or images in a batch, where a method is not told otherwise.

    Raises:
        TypeError: `model` is not a dual encoder.
        ValueError: The processor is not that of the model.
    """

    def __init__(self, model: nn.Module, processor: ProcessorMixin, batch_size: int = 32) -> None:
        encoders.check_dual_encoder(model)
        self.processor = encoders.find_processor(model, model, processor)
        self.model = model.eval()
        self.batch_size = batch_size
        self.scale = encoders.logit_scale(model)
        self._known: dict[str, tuple[list[tuple[int, int]], Any]] = {}
        self._measured: set[str] = set()  # prompts of the last call, whose length is known

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def embed_texts(self, prompts: str | Sequence[str], batch_size: int | None = None) -> torch.Tensor:
        """Normalised embeddings (N, D), float32, of N prompts or one. Too long ones are cut, with one warning."""
        prompts = list_texts([prompts] if isinstance(prompts, str) else prompts, "prompts")
        count_truncated(self.processor, [prompt for prompt in prompts if prompt not in self._measured])
        self._measured = set(prompts)
        chunks = [self._embed_texts(chunk) for chunk in self._chunks(prompts, batch_size)]
        return self._joined(chunks, lambda index: f"prompt {prompts[index]!r}")

    @torch.inference_mode()
    def embed_images(self, images: Any, batch_size: int | None = None) -> torch.Tensor:
        """Normalised embeddings (N, D), float32, of N images."""
        images = list_images(images)
        chunks = []
        for chunk in self._chunks(list(enumerate(images)), batch_size):
            rgb = [to_image(image, f"image {index}") for index, image in chunk]
            inputs = self.processor.image_processor(rgb, return_tensors="pt")
            chunks.append(encoders.embed_images(self.model, self._move(inputs)))
        return self._joined(chunks, lambda index: describe_image(images[index], index))

    def _chunks(self, items: list[Any], size: int | None) -> list[list[Any]]:
        size = self.batch_size if size is None else size
        check_count(size, "batch_size", 1)
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _embed_texts(self, prompts: list[str]) -> torch.Tensor:
        return encoders.embed_texts(self.model, self._move(encoders.tokenize(self.processor, prompts)))

    def _joined(self, chunks: list[torch.Tensor], name: Callable[[int], str]) -> torch.Tensor:
        """Join embeddings of chunks to (N, D) on the CPU, and name the first that is not finite."""
        joined = torch.cat(chunks).cpu() if chunks else self._embed_texts(["a"])[:0].cpu()
        self._check_finite(joined, "embedding", name)
        return joined

    def _check_finite(self, values: torch.Tensor, kind: str, name: Callable[[int], str]) -> None:
        """Raise a `ValueError` for a row that is not finite: it would come first in a ranking."""
        finite = torch.isfinite(values)
        if not finite.all():
            raise ValueError(
                f"the {kind} of {name(int((~finite).nonzero()[0, 0]))} is not finite, computed in "
                f"{next(self.model.parameters()).dtype}: load the model with `dtype=torch.float32`, or look at its "
                "weights."
            )

    def _move(self, inputs: Any) -> dict[str, torch.Tensor]:
        dtype = next(self.model.parameters()).dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }

    def set_scale(self, scale: float) -> None:
        """Scale the adapter at inference: 0 is the base, 1 the taste as trained, between them a milder one.

        Raises:
            TypeError: The model has no LoRA, or one with DoRA.
            ValueError: `scale` is not finite.
        """
        if not math.isfinite(scale):
            raise ValueError(f"`scale` should be a finite number, but got {scale}.")
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
        self._known.clear()

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            yield

    def digest(self) -> str:
        return self._once("digest", lambda: digest_weights([self.model]))

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` gives, computed again only once weights have changed in place or been replaced."""
        state = [(id(value), value._version) for value in self.model.parameters()]
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = (state, compute())
        return self._known[name][1]
