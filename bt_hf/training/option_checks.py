"""Checks of options by their dataclass: names with a near match, types, words from a list, numbers in their bounds."""

import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from enum import Enum
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Names of transformers 4, of other libraries, and short forms, none of which looks like the option that is meant.
_RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "fp16_backend": "fp16=True",
    "group_by_length": "train_sampling_strategy",
    "half_precision_backend": "bf16=True",
    "include_inputs_for_metrics": "include_for_metrics",
    "learning_rate_schedule": "lr_scheduler_type",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "r": "lora_r",
    "rank": "lora_r",
    "scheduler": "lr_scheduler_type",
    "steps": "max_steps",
    "target_modules": "lora_target_modules",
    "train_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps, a share of all steps if it is below 1",
}
_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "None",
    dict: "a dictionary",
    list: "a list",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean ...?" with the nearest of the known names, or nothing if none is near.

    Example:
        >>> did_you_mean("learning_rat", ["learning_rate", "seed"])
        ', did you mean learning_rate?'
    """
    known = list(known)
    longer = [word for word in known if len(name) > 2 and word.startswith(name)]
    near = longer[:1] or get_close_matches(name.lower(), known, n=1)
    found = _RENAMED.get(name) or (near[0] if near else None)
    return f", did you mean {found}?" if found else ""


def check_names(cls: type, given: Iterable[str]) -> None:
    """Raise a `TypeError` for a name that is not an option of a dataclass.

    Example:
        >>> from bt_hf import BradleyTerryConfig
        >>> check_names(BradleyTerryConfig, ["learning_rat"])
        Traceback (most recent call last):
        TypeError: unknown option learning_rat of BradleyTerryConfig, did you mean learning_rate?
    """
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in given:
        if name not in known:
            raise TypeError(f"unknown option {name} of {cls.__name__}{did_you_mean(name, known)}")


def is_given(options: Any, name: str) -> bool:
    """Return True if an option exists and is not at its default."""
    field = type(options).__dataclass_fields__.get(name)
    if field is None:  # another version of transformers has it
        return False
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    value = getattr(options, name)
    try:
        return value is not default and bool(value != default)
    except ValueError:  # an array has many truths
        return True


def check_types(options: Any) -> None:
    """Check each option against the type of its field, its enum and its `choices`.

    Args:
        options: Instance of a dataclass, before it has converted its values. A single string may stand for a list of
            them, and text for a `Path`.

    Raises:
        ValueError: Names the option, what was expected, what came, and a near match of a misspelt word.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        empty = value is None and field.default == ""  # as the command line spells it
        # `Trainer.train` takes words and truth values alike for this one.
        resumes = field.name == "resume_from_checkpoint" and isinstance(value, bool)
        if field.init and value is not field.default and not empty and not resumes:
            _check_value(field, hints[field.name], value)


def check_bounds(options: Any, bounds: Mapping[str, tuple[float, float, str]]) -> None:
    """Check numbers against their bounds.

    Args:
        options: Instance of a dataclass.
        bounds: Name -> (lowest, highest, words for it); `None` as a value passes, infinity and NaN never do.

    Raises:
        ValueError: Names the option and what was expected.
    """
    for name, (low, high, words) in bounds.items():
        value = getattr(options, name, None)
        if value is not None and not (low <= value <= high and math.isfinite(value)):  # so that NaN fails, too
            raise ValueError(f"`{name}` should be {words}, but got {value!r}.")


def _check_value(field: dataclasses.Field, hint: Any, value: Any) -> None:
    words = field.metadata.get("choices") or _words(hint)
    if words and isinstance(value, str) and value not in words:
        near = did_you_mean(value, words)
        raise ValueError(f"`{field.name}` should be one of {_few(words)}, but got {value!r}{near or '.'}")
    if isinstance(value, str) and value.startswith("{") and dict in _parts(hint):
        try:
            json.loads(value)
        except ValueError as error:
            raise ValueError(f"`{field.name}` should be a JSON object, but {value!r} is not: {error}.") from None
    converted = dataclasses.is_dataclass(value)  # by transformers, in options that are copied by `replace`
    if not (_fits(value, hint) or converted):
        kinds = " or ".join(dict.fromkeys(_describe(part) for part in _parts(hint)))
        raise ValueError(f"`{field.name}` should be {kinds}, but got {_short(value)}.")


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, containers as their class."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for member in get_args(hint) for part in _parts(member))
    return (get_origin(hint) if get_origin(hint) in (dict, list) else hint,)


def _words(hint: Any) -> list[str]:
    """Return the words that an enum or a `Literal` allows; none if other texts are allowed as well."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    literals = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if literals and str in members:
        return []
    return [item.value for enum in enums for item in enum] + [word for word in literals if isinstance(word, str)]


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in get_args(hint))
    if origin is list or hint is list:
        kind = (get_args(hint) or (Any,))[0]
        return (isinstance(value, str) and kind is str) or (
            isinstance(value, list | tuple) and all(_fits(item, kind) for item in value)
        )
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return _KINDS.get(hint) or f"a {getattr(hint, '__name__', str(hint))}"


def _few(words: Collection[str]) -> str:
    words = list(words)
    return ", ".join(words[:10]) + (f" and {len(words) - 10} more" if len(words) > 10 else "")


def _short(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"
