"""Allowed adapters: types of PEFT, the keys of their configs, and their values. All else is refused."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from bt_hf.hub.contract import ADAPTER_CONFIG, Content, check_revision, read_content

MAX_RANK = 65_536
_LONGEST = 4 * 2**20  # bytes of a config; one that names every layer of a large model takes a tenth
_SHOWN = 60


class Values(NamedTuple):
    """Values that a key may have: a test, and its words in an error."""

    fit: Callable[[Any], bool]
    words: str


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _optional(values: Values) -> Values:
    return Values(lambda value: value is None or values.fit(value), f"{values.words}, or null")


def _by_pattern(values: Values) -> Values:
    return Values(
        lambda value: isinstance(value, dict) and all(key and values.fit(item) for key, item in value.items()),
        f"for each pattern {values.words}",
    )


_FLAG = Values(lambda value: isinstance(value, bool), "true or false")
_TEXT = _optional(Values(lambda value: isinstance(value, str), "a text"))
_NUMBER = Values(_is_number, "a finite number")
_SHARE = Values(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
_RANK = Values(lambda value: _is_whole(value, 1, MAX_RANK), f"a rank from 1 to {MAX_RANK}")
_COUNT = Values(lambda value: _is_whole(value, -1, 10**9), "a whole number")
_NAMES = _optional(Values(lambda value: isinstance(value, str) or _is_texts(value), "a text or a list of texts"))
_LIST = _optional(Values(_is_texts, "a list of texts"))
_LAYERS = _optional(
    Values(
        lambda value: (
            _is_whole(value, 0, 10**6) or (isinstance(value, list) and all(_is_whole(n, 0, 10**6) for n in value))
        ),
        "a layer's number or a list of them",
    )
)
# Starts that leave the base as it is; "pissa", "olora" and their like take their start out of its weights.
_START = Values(
    lambda value: value in (True, False, "gaussian", "orthogonal"), 'true, false, "gaussian", "orthogonal"'
)
_UNBIASED = Values(lambda value: value == "none", '"none", since biases are the base\'s own')
_MASKS = _optional(
    _by_pattern(
        Values(
            lambda value: isinstance(value, list) and all(isinstance(item, bool) for item in value),
            "a list of true and false",
        )
    )
)

_ALL = {
    "auto_mapping": Values(lambda value: value is None or isinstance(value, dict), "the class of the base"),
    "base_model_name_or_path": _TEXT,
    "inference_mode": _FLAG,
    "peft_version": _TEXT,
    "revision": _TEXT,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _LIST,
}
_LAYERED = {"layers_to_transform": _LAYERS, "layers_pattern": _NAMES, "alpha_pattern": _by_pattern(_NUMBER)}
_LORA = {
    **_ALL,
    **_LAYERED,
    "r": _RANK,
    "rank_pattern": _by_pattern(_RANK),
    "lora_alpha": _NUMBER,
    "lora_dropout": _SHARE,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
    "bias": _UNBIASED,
    "init_lora_weights": _START,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
}
_HADAMARD = {
    **_ALL,
    **_LAYERED,
    "r": _RANK,
    "rank_pattern": _by_pattern(_RANK),
    "alpha": _NUMBER,
    "rank_dropout": _SHARE,
    "module_dropout": _SHARE,
    "use_effective_conv2d": _FLAG,
    "init_weights": Values(lambda value: value in (True, False, "lycoris"), 'true, false or "lycoris"'),
}
# Keys in use, by type. Further keys of PEFT have to stand at their default.
CONFIGS: Mapping[str, Mapping[str, Values]] = {
    "LORA": _LORA,
    "ADALORA": {
        **_LORA,
        "rank_pattern": _MASKS,
        **dict.fromkeys(("init_r", "target_r"), _RANK),
        **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), _NUMBER),
        **dict.fromkeys(("tinit", "tfinal", "deltaT"), _COUNT),
        "total_step": _optional(_COUNT),
    },
    "LOHA": _HADAMARD,
    "LOKR": {**_HADAMARD, "decompose_both": _FLAG, "decompose_factor": _COUNT, "rank_dropout_scale": _FLAG},
    "IA3": {**_ALL, "feedforward_modules": _NAMES, "fan_in_fan_out": _FLAG, "init_ia3_weights": _FLAG},
}
# Ends of the tensors' names, by type.
TENSORS: Mapping[str, re.Pattern[str]] = {
    "LORA": re.compile(r"lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?"),
    "ADALORA": re.compile(r"lora_[ABE]"),
    "LOHA": re.compile(r"hada_(w[12]_[ab]|t[12])"),
    "LOKR": re.compile(r"lokr_(w[12](_[ab])?|t2)"),
    "IA3": re.compile(r"ia3_l"),
}


def read_config(content: Content, source: str) -> dict[str, Any]:
    """Parse an `adapter_config.json`, and check every key of it.

    Args:
        content: The file.
        source: Name of the adapter in an error.

    Raises:
        ValueError: It is not valid, or holds something else than the adapters that this library publishes.
    """
    data = read_content(content)
    try:
        if len(data) > _LONGEST:
            raise ValueError(f"{len(data)} bytes")
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{ADAPTER_CONFIG} of {source} is not valid JSON ({shown(error)}): save the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{ADAPTER_CONFIG} of {source} has no `peft_type` that PEFT knows: save the adapter with PEFT."
        )
    check_config(config, f"{ADAPTER_CONFIG} of {source}")
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise a `ValueError` unless a config is one that this library publishes.

    Args:
        config: Config of an adapter, as JSON gives it.
        where: Name of the config in an error.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PeftType.__members__:
        raise ValueError(f"{where} has no `peft_type` that PEFT knows: save the adapter with PEFT.")
    if kind not in CONFIGS:
        raise ValueError(f"{where} has the type {kind}, but expected one of {', '.join(CONFIGS)}: it is not loaded.")
    if config.get("task_type") not in (None, "FEATURE_EXTRACTION"):
        task = shown(config["task_type"]).strip("'")
        raise ValueError(
            f"{where} is of an adapter for another kind of model (task type {task}): expected one for a dual "
            "encoder or for the denoiser of a diffusers pipeline."
        )
    known = {key: field for key, field in _defaults(kind).items() if key not in CONFIGS[kind]}
    for key, value in config.items():
        if key in ("peft_type", "task_type"):
            continue
        if key in CONFIGS[kind]:
            values = CONFIGS[kind][key]
            if not values.fit(value):
                raise ValueError(f"{where} has `{key}` = {shown(value)}, but expected {values.words}.")
        elif value not in (None, False, {}, [], known.get(key)):
            raise ValueError(
                f"{where} asks for {shown(key)} = {shown(value)}, which is never published: it is not loaded."
            )
    _check_mapping(config.get("auto_mapping") or {}, where)
    if config.get("revision"):
        check_revision(config["revision"])


def _defaults(kind: str) -> dict[str, Any]:
    """Return the defaults of the keys of a type of PEFT."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
    }


def _check_mapping(mapping: Mapping[str, Any], where: str) -> None:
    """Raise a `ValueError` if the class of the base is of another library."""
    library, name = mapping.get("parent_library") or "transformers", mapping.get("base_model_class") or "Model"
    if not isinstance(library, str) or library.split(".")[0] not in ("diffusers", "transformers"):
        raise ValueError(
            f"{where} asks for code of {shown(library)}, which is neither of transformers nor of diffusers: it is not "
            "loaded."
        )
    if not isinstance(name, str) or not name.isidentifier() or set(mapping) - {"parent_library", "base_model_class"}:
        raise ValueError(f"{where} has an `auto_mapping` {shown(mapping)}, but expected the class of the base.")


def shown(value: object) -> str:
    """Write a value of a file in an error: short, and on one line whatever it holds."""
    text = " ".join(str(value).split()) if isinstance(value, BaseException) else ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
