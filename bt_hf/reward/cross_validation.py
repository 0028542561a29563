"""Cross-validation against the untouched base: what a few clicks prove."""

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.processing_utils import ProcessorMixin
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from bt_hf.data.cache import without_format
from bt_hf.data.checks import check_columns, check_images
from bt_hf.reward import encoders
from bt_hf.reward.cache import FeatureCache
from bt_hf.reward.collator import PreferenceCollator
from bt_hf.reward.config import BradleyTerryConfig
from bt_hf.reward.lora import add_adapter
from bt_hf.reward.trainer import BradleyTerryTrainer
from bt_hf.reward.verdict import (
    CrossValidation,
    count_contradictions,
    judge,
    number_pairs,
    number_prompts,
    probe_margins,
)
from bt_hf.training.adapters import Untouched, unwrapped
from bt_hf.training.arguments import check_arguments, check_kind


def cross_validate(
    model: str | Path | nn.Module,
    dataset: Dataset,
    args: BradleyTerryConfig | None = None,
    folds: int = 5,
    processing_class: ProcessorMixin | None = None,
    peft_config: PeftConfig | None = None,
    seed: int = 0,
    progress: bool = True,
    callbacks: list[TrainerCallback] | None = None,
) -> CrossValidation:
    """Train on all folds but one, predict that one, for each fold; then compare with the base on the same pairs.

    Thirty pairs can't spare a test set, and here every pair is trained on and tested on. The folds share the cache of
    frozen features, so this costs seconds.

    A fold holds whole prompts, so that the verdict is about new prompts. Where all pairs have one prompt, such as the
    default one of `load_preference_pairs`, it holds whole pairs, copies and swapped ones together, and the verdict
    says that it is about more pairs like those.

    Args:
        model: Hub id or folder of a dual encoder, or a loaded one, without an adapter.
        dataset: Pairs in the row contract, N rows.
        args: Options of each training; default `BradleyTerryConfig`. Nothing is written to its `output_dir`.
        folds: How many folds; at most one for each distinct prompt or, of one prompt, for each distinct pair.
        processing_class: Processor; default: the one saved beside the model.
        peft_config: As in `BradleyTerryTrainer`.
        seed: Which prompts or pairs share a fold.
        progress: Show a progress bar.
        callbacks: Callbacks of each training, as in `Trainer`. One that raises ends all of them.

    Returns:
        A `CrossValidation`; `print` it for the table and the verdict.

    Raises:
        TypeError: `dataset` is a stream, or `args` are not a `BradleyTerryConfig`.
        ValueError: Fewer than two folds or two distinct pairs, `model` has an adapter, which may have been trained on
            these pairs, or FSDP or DeepSpeed is on.

    Example:
        ```python
        from bt_hf import cross_validate, load_preference_pairs

        result = cross_validate("openai/clip-vit-base-patch32", load_preference_pairs("my-clicks/"))
        print(result.verdict)
        ```
    """
    args = BradleyTerryConfig("reward-adapter", report_to="none") if args is None else args
    check_arguments(args, BradleyTerryConfig)
    _check_map_style(dataset)
    dataset = without_format(dataset)
    if parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "`cross_validate` trains one model again for each fold, which can't be once FSDP or DeepSpeed has divided "
            "its weights: pass `--cross_validate 0`, or run it beforehand on one device."
        )
    source = model
    # A copy, as the adapters of the folds come and go, and leave the weights frozen.
    base: Any = encoders.load_dual_encoder(model) if isinstance(model, str | Path) else copy.deepcopy(unwrapped(model))
    if isinstance(base, PeftModel):
        raise ValueError(
            "`cross_validate` needs a base model, but got one with an adapter, which may have seen these pairs: pass "
            "its base, or use held-out pairs and `evaluate`."
        )
    processor = encoders.find_processor(source, base, processing_class)
    prompts = find_prompts(processor, dataset)
    by_prompt = len(np.unique(prompts)) > 1
    groups = prompts if by_prompt else number_pairs(dataset)
    assignment = assign_folds(groups.tolist(), folds, seed)
    args = _quiet(args)
    untouched = Untouched(base)
    pairs: Any = dataset
    if args.cache_features:
        # The adapter decides which layers are frozen, so one is put on while the cache is built.
        adapted = base if args.full_finetuning else add_adapter(base, peft_config, args)
        adapted.to(args.device)
        cache = FeatureCache(adapted, PreferenceCollator(processor), max_bytes=args.cache_max_gb * 1e9)
        pairs = (cache.add(dataset) if cache.useful else None) or dataset
        untouched.restore()
    if pairs is dataset:
        check_images(dataset)  # by the numbers of its rows, which the folds do not know
    margins, base_margins = np.zeros(len(dataset)), np.zeros(len(dataset))
    preference, weight = (np.array(_column(dataset, name), dtype=float) for name in ("preference", "weight"))
    difference: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir = scratch
        for fold in tqdm(np.unique(assignment), desc="Cross-validation", unit="fold", disable=not progress):
            held_out = np.flatnonzero(assignment == fold)
            trainer = BradleyTerryTrainer(
                copy.deepcopy(base) if args.full_finetuning else base,
                args,
                train_dataset=pairs.select(np.flatnonzero(assignment != fold).tolist()),
                processing_class=processor,
                peft_config=peft_config,
                callbacks=callbacks,
            )
            trainer.remove_callback(PrinterCallback)
            if difference is None:
                difference = _image_differences(trainer, pairs)
            trainer.train()
            predictions = trainer.predict(pairs.select(held_out.tolist())).predictions
            margins[held_out], base_margins[held_out] = predictions
            untouched.restore()
    assert difference is not None  # there are at least two folds
    return judge(
        margins,
        base_margins,
        probe_margins(difference, preference, weight, assignment),
        preference,
        weight,
        assignment,
        prompts,
        groups,
        by_prompt,
        count_contradictions(dataset, prompts),
    )


def find_prompts(processor: ProcessorMixin, dataset: Dataset) -> np.ndarray:
    """Number the prompts of a dataset, (N,) int: those that the model can't tell apart are one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return number_prompts(tokenizer, list(dataset["prompt"]), encoders.context_length(processor))


@torch.no_grad()
def _image_differences(trainer: BradleyTerryTrainer, pairs: Any) -> np.ndarray:
    """Embed the images with the base, (N, D): each chosen one minus its rejected one."""
    found = []
    for batch in trainer.read_batches(pairs):
        with trainer.base_model() as model:
            chosen, rejected = trainer._embed(model, batch)[1].chunk(2)
        found.append((chosen - rejected).double().cpu().numpy())
    return np.concatenate(found)


def _check_map_style(dataset: Any) -> None:
    """Check the columns of a `Dataset`; raise a `TypeError` for a stream or anything else that has no known length."""
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "`cross_validate` splits the pairs into folds, but got a stream, which has no length: load it whole, by "
            "`Dataset.from_list(list(stream), features=stream.features)`."
        )
    check_kind(dataset, "`dataset`")
    check_columns(dataset)


def assign_folds(groups: Sequence[Hashable], folds: int, seed: int = 0) -> np.ndarray:
    """Assign each row to a fold, (N,) int: all rows of a group share one, and folds are about equally large.

    Args:
        groups: Prompt or pair of each row.
        folds: How many folds, at most.
        seed: Which groups share a fold.

    Raises:
        ValueError: Fewer than two folds or two distinct groups.
    """
    counts = Counter(groups)
    folds = min(folds, len(counts))
    if folds < 2:
        raise ValueError(
            f"Cross-validation needs at least 2 folds, and 2 prompts or pairs that the model can tell apart, but got "
            f"{len(counts)}: collect more, since what is trained on may not be tested on."
        )
    order = sorted(counts, key=str)
    random.Random(seed).shuffle(order)
    sizes = [0] * folds
    fold_of: dict[Hashable, int] = {}
    # The largest first, each into the emptiest fold.
    for group in sorted(order, key=lambda group: -counts[group]):
        fold_of[group] = sizes.index(min(sizes))
        sizes[fold_of[group]] += counts[group]
    return np.array([fold_of[group] for group in groups])


def _column(dataset: Dataset, name: str) -> list[float]:
    return list(dataset[name]) if name in dataset.column_names else [1.0] * len(dataset)


def _quiet(args: BradleyTerryConfig) -> BradleyTerryConfig:
    """Copy the options so that nothing is written, logged or reported."""
    args = copy.copy(args)
    args.save_strategy, args.eval_strategy, args.logging_strategy = (
        SaveStrategy.NO,
        IntervalStrategy.NO,
        IntervalStrategy.NO,
    )
    args.report_to, args.disable_tqdm, args.push_to_hub, args.load_best_model_at_end = [], True, False, False
    args.eval_on_start = False
    args.overwrite_output_dir, args.resume_from_checkpoint = True, None
    return args
