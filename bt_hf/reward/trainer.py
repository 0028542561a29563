"""Adapt a dual encoder to one person's taste."""

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import EvalPrediction, TrainerCallback
from transformers.processing_utils import ProcessorMixin

from bt_hf.data.cache import CachedPairs, can_be_cached, without_format
from bt_hf.hub.facts import digest_rows
from bt_hf.losses import agreement, bradley_terry_loss, retrieval_kl
from bt_hf.metrics import preference_metrics
from bt_hf.reward import encoders, taste
from bt_hf.reward.against_base import against_base
from bt_hf.reward.cache import FeatureCache, FilePairs, MemoryPairs, store_pairs
from bt_hf.reward.card import reward_facts, write_reward_card
from bt_hf.reward.collator import PreferenceCollator, count_truncated
from bt_hf.reward.config import BradleyTerryConfig
from bt_hf.reward.lora import add_adapter
from bt_hf.reward.posterior import FITTED_PAIRS
from bt_hf.reward.taste import EmbeddedPairs
from bt_hf.reward.words import explain_pairs, in_a_sentence, known_looks
from bt_hf.training.adapters import check_names, take_over, train_in_float32, unwrapped
from bt_hf.training.arguments import check_arguments, check_datasets, map_eval_datasets
from bt_hf.training.finite import check_losses
from bt_hf.training.lora_options import check_adapter_options
from bt_hf.training.saving import prepare_run
from bt_hf.training.sharding import make_shardable
from bt_hf.training.trainer import Metrics, PreferenceTrainer

logger = logging.getLogger(__name__)
Pairs: TypeAlias = Dataset | IterableDataset | MemoryPairs | FilePairs


class BradleyTerryTrainer(PreferenceTrainer):
    """Adapt CLIP and its kin, so that rewards r(t, I) = s cos(text(t), image(I)) predict one person's preferences.

    P(a preferred to b | t) = sigmoid(r(t, a) - r(t, b)), trained with a LoRA (Gallego, arXiv 2308.07929).

    Args:
        model: Hub id or folder of a dual encoder, a loaded one, a `PeftModel`, or the id or folder of a published
            adapter, from which training goes on.
        args: Options; default `BradleyTerryConfig("reward-adapter")`.
        train_dataset: Pairs in the row contract, as `load_preference_pairs` gives them. A `Dataset`, a stream, or
            pairs of a `FeatureCache`.
        eval_dataset: Held-out pairs, or a dict of several.
        processing_class: Processor of the model; default: the one saved beside it.
        data_collator: Default `PreferenceCollator(processing_class)`. One of your own turns the cache off.
        peft_config: Any PEFT config; default: a LoRA on the last layer of both towers, see `LoraOptions`.
        compute_metrics: Further metrics of `EvalPrediction(predictions=(margins, base_margins), label_ids=(preference,
            weight))`, added to the default ones.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.

    Raises:
        FileExistsError: `args.output_dir` already holds an adapter.
        FloatingPointError: A loss is not finite; names the pair.
        PreferenceDataError: A dataset is not in the row contract, or has no rows.
        TypeError: The model is not a dual encoder.
        ValueError: The options contradict each other.

    Example:
        ```python
        from bt_hf import BradleyTerryTrainer, load_preference_pairs

        pairs = load_preference_pairs("my-clicks/")  # prompt, chosen, rejected
        trainer = BradleyTerryTrainer("openai/clip-vit-base-patch32", train_dataset=pairs)
        trainer.train()
        trainer.save_model("my-taste")
        ```
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: BradleyTerryConfig | None = None,
        train_dataset: Pairs | None = None,
        eval_dataset: Pairs | dict[str, Pairs] | None = None,
        processing_class: ProcessorMixin | None = None,
        data_collator: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Metrics | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = BradleyTerryConfig("reward-adapter") if args is None else args
        check_arguments(args, BradleyTerryConfig)
        check_datasets(train_dataset, eval_dataset)
        prepare_run(args)
        source = model
        model, self._fresh_adapter = _adapt(model, args, peft_config)
        processing_class = encoders.find_processor(source, model, processing_class)
        # Weights of the whole model move in full fine-tuning: keep the base for comparison.
        self.reference = None if isinstance(model, PeftModel) else copy.deepcopy(model).eval().requires_grad_(False)
        own_collator = PreferenceCollator(processing_class)
        self.data_digest = digest_rows(train_dataset)
        if isinstance(train_dataset, Dataset):
            count_truncated(processing_class, list(without_format(train_dataset)["prompt"]))
        self.cache: FeatureCache | None = None
        if data_collator is None:
            train_dataset, eval_dataset = self._cache(model, own_collator, args, train_dataset, eval_dataset)
        # Verdict of a cross-validation of these pairs, for the card; set by whoever ran it.
        self.verdict: str | None = None
        self._banks: dict[str, torch.Tensor] = {}
        # Training pairs as the base embeds them, where something needed that before the training.
        self.embedded_base: EmbeddedPairs | None = None
        self._sentence: str | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or own_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(against_base(self))

    def _cache(
        self, model: nn.Module, collator: PreferenceCollator, args: BradleyTerryConfig, train: Any, evaluation: Any
    ) -> tuple[Any, Any]:
        """Replace map-style datasets by ones whose frozen features are computed once."""
        if isinstance(train, MemoryPairs | FilePairs):
            train.cache.check(model)
            self.cache = train.cache
        elif args.cache_features and isinstance(train, Dataset):
            model.to(args.device)
            cache = FeatureCache(model, collator, max_bytes=args.cache_max_gb * 1e9)
            self.cache = cache if cache.useful else None

        def add(pairs: Any) -> Any:
            if self.cache is None or not can_be_cached(pairs):
                return pairs
            if args.cache_dir:
                return store_pairs(self.cache, pairs, args.cache_dir, "Caching frozen features")
            return self.cache.add(pairs) or pairs

        train = add(train)
        if not isinstance(train, CachedPairs):
            self.cache = None
        return train, map_eval_datasets(add, evaluation)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; a fresh LoRA begins at the best constant shift (`warm_start`)."""
        self._prepare(begin=self.checkpoint_of(resume_from_checkpoint) is None)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.sharded:
            make_shardable(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def _prepare(self, begin: bool) -> None:
        """Embed training pairs with the base, for the KL term, and begin a fresh LoRA at the fitted taste."""
        start = begin and self._fresh_adapter and self.args.warm_start
        # Else only to log the base at step 0: neither a stream nor a collator of the user's is read for that.
        ours = isinstance(self._collator_of(self.train_dataset), PreferenceCollator)
        told = begin and (
            ours and isinstance(self.train_dataset, Sized) or isinstance(self.train_dataset, CachedPairs)
        )
        if not (start or self.args.kl_weight or told) or self.train_dataset is None:
            return
        self.place_unsharded()
        layers = taste.output_layers(self.model)
        text_layer = taste.plain_lora(self.model, layers.text) if start and layers else None
        image_layer = taste.plain_lora(self.model, layers.image) if text_layer and layers else None
        pairs = self.embedded_base = self._embed_training_pairs(FITTED_PAIRS, image_layer)
        if not (pairs.weight * (pairs.preference - 0.5)).any():
            logger.warning(
                "The pairs say nothing, as all weights are 0 or all preferences 0.5: the base stays as it is."
            )
        names = known_looks(self.processing_class.tokenizer)
        looks, _ = self._embed_words(names)
        self._sentence = in_a_sentence(explain_pairs(pairs, looks, names, top_k=5))
        if not (start or self.args.kl_weight):
            return
        texts = taste.vocabulary_texts(self.processing_class.tokenizer)
        words, features = self._embed_words(texts, text_layer)
        if self.args.kl_weight:
            size = self.args.kl_bank_size
            banks = {"text": pairs.text, "chosen": pairs.chosen, "rejected": pairs.rejected}
            banks = {name: bank[:size] for name, bank in banks.items()} | {"words": words}
            self._banks = {name: bank.float().to(self.args.device) for name, bank in banks.items()}
        if layers and text_layer is not None and features is not None:
            error = taste.begin_at_taste(self.model, text_layer, image_layer, pairs, words, features, self.args)
            if error > taste.TOLERANCE:
                logger.info("No warm start: a shift would vary by %.0f %% from text to text.", 100 * error)
            self._fresh_adapter = False

    @torch.no_grad()
    def _embed_training_pairs(self, limit: int, image_layer: nn.Module | None = None) -> EmbeddedPairs:
        """Embed up to `limit` training pairs with the base, in their own order, and the inputs of `image_layer`."""
        columns: dict[str, list[torch.Tensor]] = defaultdict(list)
        inputs: list[list[torch.Tensor]] = [[], []]
        seen: list[torch.Tensor] = []
        with ExitStack() as stack:
            if image_layer is not None:
                hook = image_layer.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
                stack.enter_context(hook)
            for batch in self.read_batches(self.train_dataset, limit):
                with self.base_model() as model:
                    text, images = self._embed(model, batch)
                chosen, rejected = images.chunk(2)
                values = {"text": text, "chosen": chosen, "rejected": rejected}
                values |= {name: batch[name] for name in ("preference", "weight")}
                for name, value in values.items():
                    columns[name].append(value.double().cpu())
                if image_layer is not None:
                    entered, left = (value.float() for value in seen)
                    seen.clear()
                    # Some towers add more to the output of this layer before it is the embedding.
                    if left.shape == images.shape and torch.allclose(F.normalize(left, dim=-1), images, atol=1e-3):
                        halves = (entered / left.norm(dim=-1, keepdim=True)).double().cpu().chunk(2)
                        for half, value in zip(inputs, halves, strict=True):
                            half.append(value)
        gathered = torch.cat([value for half in inputs for value in half]) if inputs[0] else None
        return EmbeddedPairs(**{name: torch.cat(values) for name, values in columns.items()}, inputs=gathered)

    @torch.no_grad()
    def _embed_words(
        self, texts: Sequence[str], layer: nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed texts with the base, (K, D), and record the inputs of `layer`, (K, H)."""
        batches = [
            encoders.tokenize(self.processing_class, list(texts[start : start + 128]))
            for start in range(0, len(texts), 128)
        ]
        # An adapter leaves the base as it is, so that trainings with one cache, such as folds, share this.
        kept = self.cache.words if self.cache is not None and self.reference is None else {}
        key = b"".join(batch["input_ids"].numpy().tobytes() for batch in batches) + bytes([layer is not None])
        if key not in kept:
            kept[key] = self._embed_batches(batches, layer)
        return kept[key]

    def _embed_batches(
        self, batches: Sequence[Any], layer: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen: list[torch.Tensor] = []
        words = []
        with ExitStack() as stack:
            if layer is not None:
                hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].float().cpu()))
                stack.enter_context(hook)
            model = stack.enter_context(self.base_model())
            for inputs in batches:
                words.append(encoders.embed_texts(model, self._prepare_inputs(inputs)).cpu())
        return torch.cat(words), torch.cat(seen) if seen else None

    def in_words(self) -> str | None:
        """Return what the training pairs like, in a sentence of words for looks; `None` before training.

        See `PreferenceScorer.explain`; only words count that keep their side when the clicks are drawn again.
        """
        return self._sentence

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """Yield the untouched base, within a context that restores the adapter."""
        if self.reference is not None:
            yield self.reference.to(self.args.device)
            return
        with super().base_model() as model:
            yield model

    def _embed(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised text (B, D) and image (2B, D) embeddings, through the model's own `forward`."""
        inputs = {name: value for name, value in inputs.items() if name not in ("preference", "weight")}
        if self.is_deepspeed_enabled:  # DeepSpeed casts the model, but not its inputs
            dtype = next(model.parameters()).dtype
            inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        recall = self.cache.recall(inputs) if self.cache is not None else nullcontext(inputs)
        with recall as inputs:
            output = model(**inputs)
        return output.text_embeds.float(), output.image_embeds.float()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Bradley-Terry loss of a batch, with the KL term while training. See `BradleyTerryConfig`."""
        preference, weight = inputs["preference"], inputs["weight"]
        scale = encoders.logit_scale(self.accelerator.unwrap_model(model))
        text, images = self._embed(model, inputs)  # (B, D), (2B, D)
        rewards = scale * (text.repeat(2, 1) * images).sum(-1)  # (2B,)
        chosen, rejected = rewards.chunk(2)
        margins = chosen - rejected
        losses = bradley_terry_loss(margins, preference, self.args.label_smoothing)
        with_kl = model.training and bool(self._banks) and self.args.kl_weight > 0
        if with_kl or return_outputs:
            with torch.no_grad(), self.base_model() as base:
                base_text, base_images = self._embed(base, inputs)
        if with_kl:
            divergence = self._kl_divergence(scale, text, images, base_text, base_images)
            losses = losses + self.args.kl_weight * divergence
            self.track(weight, kl=divergence)
        loss = self.weighted_mean(losses, weight, num_items_in_batch)
        if model.training:
            counted = losses.detach().where(weight > 0, 0.0)
            check_losses(counted, self._prompt_of(inputs), self.state.global_step + 1, self.args.output_dir)
            self.track(weight * (preference != 0.5), accuracy=agreement(margins, preference))
            self.track(weight, margin=margins, reward_chosen=chosen, reward_rejected=rejected)
        if not return_outputs:
            return loss
        base_margins = scale * (base_text * (base_images[: len(text)] - base_images[len(text) :])).sum(-1)
        return loss, {"loss": loss, "margins": margins, "base_margins": base_margins}

    def _prompt_of(self, inputs: dict[str, torch.Tensor]) -> Callable[[int], str]:
        """Return a function that reads the prompt of a row of a batch."""
        tokenizer = self.processing_class.tokenizer
        return lambda index: tokenizer.decode(inputs["input_ids"][index], skip_special_tokens=True)

    def _kl_divergence(
        self,
        scale: torch.Tensor,
        text: torch.Tensor,
        images: torch.Tensor,
        base_text: torch.Tensor,
        base_images: torch.Tensor,
    ) -> torch.Tensor:
        """KL(base || adapted) of each pair, (B,), of its prompt over images and of its images over prompts.

        Against fixed banks of base embeddings rather than the batch: a pair's loss then does not depend on which
        other pairs share its batch, so accumulation and several processes change nothing.
        """
        over_images = [
            retrieval_kl(scale * text @ self._banks[name].T, scale * base_text @ self._banks[name].T)
            for name in ("chosen", "rejected", "words")
        ]
        bank = self._banks["text"]
        over_texts = retrieval_kl(scale * images @ bank.T, scale * base_images @ bank.T)  # (2B,)
        return torch.stack(over_images).mean(0) + torch.stack(over_texts.chunk(2)).mean(0)

    def evaluation_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        margins, base_margins = (np.asarray(values, dtype=float) for values in prediction.predictions)
        preference, weight = (np.asarray(values, dtype=float) for values in prediction.label_ids)
        metrics = preference_metrics(margins, preference, weight)
        base = preference_metrics(base_margins, preference, weight)
        metrics |= {f"base_{name}": value for name, value in base.items()}
        self.last_evaluation = {"margins": margins, "base_margins": base_margins, "preference": preference}
        return metrics

    def write_card(self, folder: Path) -> None:
        write_reward_card(folder, reward_facts(self, self.args, self.verdict, self.in_words()))


def _adapt(
    model: str | Path | nn.Module, args: BradleyTerryConfig, peft_config: PeftConfig | None
) -> tuple[nn.Module, bool]:
    """Load `model` and put an adapter on it. Return the model, and True if the adapter is a fresh one."""
    given = model if isinstance(model, nn.Module) else encoders.load_dual_encoder(model, is_trainable=True)
    encoder = unwrapped(given)
    encoders.check_dual_encoder(encoder)
    check_adapter_options(encoder, args, peft_config, args.full_finetuning)
    fresh = not isinstance(encoder, PeftModel) and not args.full_finetuning
    if fresh:
        encoder = add_adapter(encoder, peft_config, args)
    elif isinstance(encoder, PeftModel):
        take_over(encoder)
    else:
        check_names(encoder)
        if not any(value.requires_grad for value in encoder.parameters()):
            encoder.requires_grad_(True)
        # r = s cos(...) with a trained s would only change how sure the model is; the folder contract freezes it.
        encoder.get_parameter("logit_scale").requires_grad_(False)
    train_in_float32(encoder)
    return encoder, fresh
