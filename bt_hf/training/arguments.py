"""Arguments of both trainers: options and datasets of the right kind."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from bt_hf.data.checks import check_columns, overlapping_rows

logger = logging.getLogger(__name__)


def check_arguments(args: Any, expected: type) -> None:
    """Raise a `TypeError` unless `args` are those of this trainer."""
    if not isinstance(args, expected):
        name = expected.__name__
        raise TypeError(
            f"`args` should be a `{name}`, but got {type(args).__name__}: pass "
            f"`{name}({str(getattr(args, 'output_dir', 'my-taste'))!r}, ...)`, which takes all options of "
            "`TrainingArguments` too."
        )


def check_kind(pairs: Any, name: str) -> None:
    """Raise a `TypeError` unless `pairs` hold rows: a dataset of `datasets` or PyTorch, or a list of dicts.

    Args:
        pairs: What the user passed.
        name: Its name in the error.
    """
    if isinstance(pairs, Dataset | IterableDataset | torch.utils.data.Dataset):
        return
    if isinstance(pairs, list) and pairs and isinstance(pairs[0], Mapping):
        return
    if isinstance(pairs, Mapping) and any(isinstance(value, Dataset | IterableDataset) for value in pairs.values()):
        advice = f"pick a split: {', '.join(map(str, pairs))}"
    elif isinstance(pairs, Mapping):
        advice = "make a dataset of these columns, by `load_preference_pairs(Dataset.from_dict(...))`"
    else:
        advice = "load it by `load_preference_pairs(...)`"
    raise TypeError(f"{name} should be a `Dataset` or a stream of pairs, but got {type(pairs).__name__}: {advice}.")


def check_datasets(train: Any, evaluation: Any) -> None:
    """Check plain datasets (see `check_columns`), and warn of evaluation pairs that are trained on.

    Args:
        train: Pairs, a stream, or a dataset of another kind, whose rows are not checked.
        evaluation: The same, or a dict of several.

    Raises:
        PreferenceDataError: A dataset is not in the row contract, or has no rows.
        TypeError: It is of another kind, such as a dict of columns.
    """
    # A dict of several holds datasets, one of columns lists.
    several = isinstance(evaluation, dict) and not any(isinstance(pairs, list) for pairs in evaluation.values())
    named = {f"`eval_dataset[{name!r}]`": pairs for name, pairs in evaluation.items()} if several else {}
    for name, pairs in {"`train_dataset`": train, **(named or {"`eval_dataset`": evaluation})}.items():
        if pairs is not None:
            check_kind(pairs, name)
    held_out = list(named.values()) or [evaluation]
    for pairs in (train, *held_out):
        if isinstance(pairs, Dataset | IterableDataset):
            check_columns(pairs)
    for pairs in held_out:
        if isinstance(train, Dataset) and isinstance(pairs, Dataset) and (overlap := overlapping_rows(train, pairs)):
            logger.warning(
                "%d of %d evaluation pairs are also in the training set: their accuracy says nothing about new pairs.",
                overlap,
                len(pairs),
            )


def map_eval_datasets(transform: Callable[[Any], Any], evaluation: Any) -> Any:
    """Apply `transform` to an evaluation dataset, or to each of a dict of several."""
    if isinstance(evaluation, dict):
        return {name: transform(pairs) for name, pairs in evaluation.items()}
    return transform(evaluation)
