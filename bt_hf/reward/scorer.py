"""Use a reward: score, compare, rank and classify images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers.processing_utils import ProcessorMixin

from bt_hf.reward import encoders
from bt_hf.reward.embedder import Embedder
from bt_hf.reward.inputs import check_count, check_text, describe_image, list_images, list_texts
from bt_hf.reward.library import TASTE_WEIGHT, Found, ImageLibrary
from bt_hf.reward.preprocess import preprocess
from bt_hf.reward.taste import image_covariance, output_layers, vocabulary_texts
from bt_hf.reward.words import Lean, embedded_pairs, explain_pairs, explain_shift, known_looks, split_shift


class PreferenceScorer(Embedder):
    """Rewards of images for prompts: r(t, I) = s cos(text(t), image(I)).

    Args:
        model: A loaded dual encoder or `PeftModel`.
        processor: Its processor.
        batch_size: Prompts or images in a batch, where a method is not told otherwise.

    Images are PIL images, paths, bytes, `datasets` values, arrays (H, W, C) or tensors (C, H, W) of `uint8` or floats
    in [0, 1], always in a list, or a batch (N, H, W, C) or (N, C, H, W). Results stand on the CPU.

    Raises:
        TypeError: `model` is not a dual encoder.
        ValueError: The processor is not that of the model.

    Example:
        ```python
        from bt_hf import PreferenceScorer

        scorer = PreferenceScorer.from_pretrained("my-taste")
        scorer.compare("a red apple", "first.png", "second.png")  # P(first is preferred), e.g. 0.83
        ```
    """

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
            ValueError: The adapter does not fit the base, or no processor is found, or one that is damaged.
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

    def score(self, prompts: str | Sequence[str], images: Any, batch_size: int | None = None) -> torch.Tensor:
        """Reward of each image for its prompt.

        Args:
            prompts: One prompt for all images, or one for each.
            images: N images.
            batch_size: Images in a batch.

        Returns:
            (N,) float32 rewards.

        Raises:
            TypeError: A prompt is not text.
            ValueError: The numbers of prompts and images differ, an image can't be read or is a lone one, or a reward
                is not finite.
        """
        images = list_images(images)
        single = isinstance(prompts, str)
        prompts = list_texts([prompts], "prompts") * len(images) if single else list_texts(prompts, "prompts")
        if len(prompts) != len(images):
            raise ValueError(
                f"`score` needs one prompt for each image, or a single prompt, but got {len(prompts)} prompts and "
                f"{len(images)} images."
            )
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        text = self.embed_texts(list(numbers), batch_size)[[numbers[prompt] for prompt in prompts]]
        return self._rewards((text * self.embed_images(images, batch_size)).sum(-1), images)

    def compare(self, prompt: str, image_a: Any, image_b: Any) -> float:
        """P(`image_a` is preferred to `image_b` for `prompt`) = sigmoid(r(a) - r(b))."""
        check_text(prompt, "prompt")
        reward_a, reward_b = self.score(prompt, [image_a, image_b])
        return torch.sigmoid(reward_a - reward_b).item()

    def rank(self, prompt: str, images: Any, top_k: int | None = None) -> list[tuple[int, float]]:
        """Images by reward, best first, as (index, reward); the first `top_k` of them, or all."""
        check_text(prompt, "prompt")
        if top_k is not None:
            check_count(top_k, "top_k", 0)
        rewards = self.score(prompt, images)
        order = rewards.argsort(descending=True, stable=True).tolist()
        return [(index, rewards[index].item()) for index in order[:top_k]]

    def classify(self, images: Any, labels: Sequence[str], template: str = "{}") -> torch.Tensor:
        """Zero-shot classification with the adapted model.

        Args:
            images: N images.
            labels: L names of classes.
            template: Prompt with one `{}` for the label, such as `"a photo of {}"`.

        Returns:
            (N, L) float32 probabilities: the softmax of the rewards over the labels.

        Raises:
            TypeError: `labels` is a lone one, or one is not text.
            ValueError: There are no labels, or `template` has no `{}`.
        """
        images, labels = list_images(images), list_texts(labels, "labels")
        if not labels:
            raise ValueError("`classify` needs at least one label, but got none.")
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"`template` should have one '{{}}' for the label, but got {template!r}.")
        text = self.embed_texts([template.replace("{}", label) for label in labels])
        return self._rewards(self.embed_images(images) @ text.T, images).softmax(dim=-1)

    def reward(self, pixel_values: torch.Tensor, prompts: str | Sequence[str]) -> torch.Tensor:
        """Rewards whose gradients reach the pixels, for whoever guides a generator.

        Args:
            pixel_values: (N, C, H, W) images as the processor gives them: resized and normalised.
            prompts: One prompt for all images, or one for each.

        Returns:
            (N,) float32 rewards, on the device of the model.

        Raises:
            ValueError: The numbers of prompts and images differ.

        Example:
            ```python
            from PIL import Image
            from bt_hf import PreferenceScorer

            scorer = PreferenceScorer.from_pretrained("my-taste")
            images = [Image.open("first.png").convert("RGB")]
            pixels = scorer.processor.image_processor(images, return_tensors="pt")["pixel_values"].requires_grad_()
            scorer.reward(pixels, "a red apple").sum().backward()  # pixels.grad leads to a better image
            ```
        """
        prompts = list_texts([prompts] if isinstance(prompts, str) else prompts, "prompts")
        if len(prompts) not in (1, len(pixel_values)):
            raise ValueError(
                f"`reward` needs one prompt for each image, or a single prompt, but got {len(prompts)} prompts and "
                f"{len(pixel_values)} images."
            )
        text = self.embed_texts(prompts).clone().to(self.device)  # a clone leaves inference mode
        images = encoders.embed_images(self.model, self._move({"pixel_values": pixel_values}))
        return self.scale * (text * images).sum(-1)

    def __call__(self, images: torch.Tensor, prompts: str | Sequence[str]) -> torch.Tensor:
        """Rewards of a generator's images, whose gradients reach them: the reward of a `RewardLoRATrainer`.

        As `reward`, with the processor's resizing and normalising before it.

        Args:
            images: (N, 3, H, W) floats in [0, 1], of any size.
            prompts: One prompt for all images, or one for each.

        Returns:
            (N,) float32 rewards, on the device of the model.

        Raises:
            TypeError: The processor can't be differentiated; see `preprocess`.
            ValueError: The numbers of prompts and images differ, or images have another shape.
        """
        return self.reward(preprocess(self.processor.image_processor, images), prompts)

    def taste(self, images: Any) -> torch.Tensor:
        """Tell how much images are liked, whatever they show: what the adapter added to the reward, without a caption.

        Args:
            images: N images.

        Returns:
            (N,) float32, in logits: differences count, as with rewards.

        Raises:
            TypeError: The model has no adapter.
        """
        _, shift = self._shift()
        return self._rewards(self.embed_images(images) @ shift.mean(0), list_images(images))

    def index(self, images: Any, names: Sequence[str] | None = None) -> ImageLibrary:
        """Embed a library of images once, for `search`.

        Args:
            images: M images.
            names: M names; default: the paths of images that have one, else numbers.
        """
        images = list_images(images)
        names = (
            [describe_image(image, number) for number, image in enumerate(images)] if names is None else list(names)
        )
        if len(names) != len(images):
            raise ValueError(f"`names` should name each of {len(images)} images, but has {len(names)} names.")
        adapted = self.embed_images(images)
        with self._without_adapter():
            base = self.embed_images(images)
        return ImageLibrary(names, base, adapted, self.digest())

    def search(
        self, prompt: str, library: ImageLibrary, top_k: int = 10, taste_weight: float = TASTE_WEIGHT
    ) -> list[Found]:
        """Find images for a prompt: the base retrieves what fits the caption, and taste orders it.

        Where `rank` lets a strong taste outvote the caption, which is right for images of one prompt, a library holds
        images of everything.

        Args:
            prompt: Caption of what is wanted.
            library: Images, as `index` embedded them with this model.
            top_k: Images to return.
            taste_weight: Weight of a logit of taste against one of the caption; 0 is the order of the base.

        Raises:
            ValueError: The library was embedded by another model.
        """
        check_text(prompt, "prompt")
        check_count(top_k, "top_k", 0)
        if library.model != self.digest():
            raise ValueError("`library` was embedded by another model: embed its images anew with `scorer.index`.")
        if not len(library) or not top_k:
            return []
        share, _ = self._shift() if isinstance(self.model, PeftModel) else (1.0, None)
        adapted = self.embed_texts(prompt)[0]
        with self._without_adapter():
            base = self.embed_texts(prompt)[0]
        return library.search(base, adapted - share * base, float(self.scale), top_k, taste_weight)

    def explain(
        self, vocabulary: Sequence[str] | None = None, top_k: int = 10, pairs: Dataset | None = None
    ) -> list[Lean]:
        """Tell which words the taste leans to, and away from.

        Args:
            vocabulary: Words to choose from; default: words for the look of images that the
                tokenizer has as one piece.
            top_k: Words on each side, at most.
            pairs: Clicks in the row contract. With them, words are compared over their images, and only those are
                told that stay on their side when the clicks are drawn again.

        Returns:
            From the strongest liking to the strongest dislike.

        Raises:
            TypeError: The model has no adapter.
            ValueError: `vocabulary` is empty.
        """
        words = known_looks(self.processor.tokenizer) if vocabulary is None else list_texts(vocabulary, "vocabulary")
        if not words:
            raise ValueError("`vocabulary` should hold at least one word, but it is empty.")
        check_count(top_k, "top_k", 1)
        _, shift = self._shift()
        with self._without_adapter():
            embedded = self.embed_texts(words)
            images = None if pairs is None else [self.embed_images(pairs[name][:]) for name in ("chosen", "rejected")]
            text = None if pairs is None else self.embed_texts(pairs["prompt"][:])
        if images is None or text is None:
            layers = output_layers(self.model)
            covariance = image_covariance(self.model, layers) if layers else None
            covariance = torch.eye(shift.shape[1]).double() if covariance is None else covariance
            return explain_shift(shift.mean(0), embedded, words, covariance, top_k)
        return explain_pairs(embedded_pairs(pairs, text, *images), embedded, words, top_k)

    def _shift(self) -> tuple[float, torch.Tensor]:
        """Return the share of the base in adapted texts, and what the adapter adds to each of many words, (K, D)."""
        if not isinstance(self.model, PeftModel):
            raise TypeError("a taste is what an adapter adds to its base, but the model has no adapter.")

        def split() -> tuple[float, torch.Tensor]:
            words = vocabulary_texts(self.processor.tokenizer)
            adapted = self.embed_texts(words)
            with self._without_adapter():
                return split_shift(adapted, self.embed_texts(words))

        found: tuple[float, torch.Tensor] = self._once("shift", split)
        return found

    def _rewards(self, cosines: torch.Tensor, images: list[Any]) -> torch.Tensor:
        """Scale cosines (N,) or (N, L) of N images."""
        rewards = self.scale.cpu() * cosines
        self._check_finite(rewards, "reward", lambda index: describe_image(images[index], index))
        return rewards
