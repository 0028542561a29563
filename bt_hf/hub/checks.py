"""What may leave this machine for the Hub, and what may come in: the folder contract, and checks that run no code."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftType

Content = Path | bytes
Shapes = Mapping[str, tuple[int, ...]]

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
# Everything that a trainer writes for others; whatever else lies in a folder stays there.
CONTRACT = frozenset(
    {
        CARD,
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        LORA_WEIGHTS,
        MODEL_CONFIG,
        "model.safetensors.index.json",
        # the processor
        "added_tokens.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        # pictures of the card
        "before_after.png",
        "reliability.png",
        "training_curve.png",
    }
)
PAIRS = "pairs.parquet"  # goes up only if asked, and never comes in
KINDS = {"reward": "a reward adapter", "lora": "a preference LoRA", "model": "a whole model"}

_PICKLES = re.compile(r"(adapter_model|pytorch_model|pytorch_lora_weights)[^/]*\.(bin|ckpt|pkl|pt|pth)")
# Words of a vocabulary may look like paths.
_VOCABULARIES = frozenset({"added_tokens.json", "merges.txt", "tokenizer.json", "vocab.json", "vocab.txt"})
_SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{12,}|api_org_[A-Za-z0-9]{12,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|xox[abps]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.eyJ[\w-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_HOMES = re.compile(
    r"(?<![\w.:/-])(/(home|Users|root|mnt|tmp|var)/[\w.-]+[^\s\"'`)<>]*|[A-Za-z]:\\{1,2}Users\\[^\s\"'`]+)"
)
_PATHS = re.compile(r"(?<![\w.:/~<#)*-])(/(?:[\w.@+-]+/)+[\w.@+-]+|[A-Za-z]:\\{1,2}[\w. -]+\\[^\s\"'`]*)|\bfile://\S+")
_PLACEHOLDER = re.compile(r"\[?More Information Needed\]?", re.IGNORECASE)
# What dual encoders are made of, as parts of the names of an adapter's tensors.
_DUAL_ENCODER = ("text_model", "vision_model", "text_projection", "visual_projection")


def hub_id(name_or_path: str) -> str | None:
    """`name_or_path` if it is a Hub id; `None` if it is a local path, which is nobody else's business."""
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return None if Path(name_or_path).exists() else name_or_path


def in_contract(name: str) -> bool:
    """Whether a file of this name is published and fetched."""
    return name in CONTRACT or MODEL_WEIGHTS.fullmatch(name) is not None


def contract_files(folder: str | Path) -> dict[str, Path]:
    """The files of the folder contract that are in `folder`, by name.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}': pass the one that `trainer.save_model` wrote.")
    return {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and in_contract(file.name)}


def find_kind(names: Iterable[str], source: str) -> str:
    """What the files of a folder or a repo are: a key of `KINDS`.

    Args:
        names: Of all its files.
        source: What to call it in an error.

    Raises:
        ValueError: It is none of these, or its weights are pickled.
    """
    names = set(names)
    pickles = sorted(name for name in names if _PICKLES.fullmatch(name))
    if ADAPTER_WEIGHTS in names and ADAPTER_CONFIG in names:
        return "lora" if LORA_WEIGHTS in names else "reward"
    if pickles:
        raise ValueError(
            f"{source} has its weights as a pickle ({pickles[0]}), which may run code when it is loaded: save them as "
            "safetensors (`model.save_pretrained(folder, safe_serialization=True)`)."
        )
    if ADAPTER_CONFIG in names:
        raise ValueError(f"{source} has an {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}: save the adapter again.")
    if MODEL_CONFIG in names and any(MODEL_WEIGHTS.fullmatch(name) for name in names):
        return "model"
    raise ValueError(
        f"{source} holds no adapter: expected {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as `trainer.save_model` writes "
        f"them, but found {', '.join(sorted(names)[:5]) or 'nothing'}."
    )


def read_config(content: Content, source: str) -> dict[str, Any]:
    """An `adapter_config.json` as a dict.

    Raises:
        ValueError: It is none, or it is of another kind of model than this library's.
    """
    try:
        config = json.loads(read(content))
    except ValueError as error:
        raise ValueError(f"{ADAPTER_CONFIG} of {source} is no JSON ({error}): save the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") not in PeftType.__members__:
        raise ValueError(
            f"{ADAPTER_CONFIG} of {source} has no `peft_type` that PEFT knows: save the adapter with PEFT."
        )
    task, mapping = config.get("task_type"), config.get("auto_mapping") or {}
    if task not in (None, "FEATURE_EXTRACTION"):
        raise ValueError(
            f"{source} is an adapter for another kind of model (task type {task}): expected one for a dual encoder or "
            "for the denoiser of a diffusers pipeline."
        )
    library = mapping.get("parent_library") or "transformers"
    if library.split(".")[0] not in ("diffusers", "transformers"):
        raise ValueError(
            f"{source} asks for code of {library!r}, which is neither of transformers nor of diffusers: it is not "
            "loaded."
        )
    return config


def check_weights(files: Mapping[str, Content], kind: str, source: str) -> dict[str, tuple[int, ...]]:
    """Load all tensors, and say what shapes those of the adapter have.

    Raises:
        ValueError: A file is no safetensors, has no tensors, or one that is not finite; the adapter is not for the
            kind of model that its repo is for; or the files are not of one training.
    """
    loaded: dict[str, dict[str, torch.Tensor]] = {}
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            continue
        try:
            tensors = safetensors.torch.load(read(content))
        except Exception as error:
            raise ValueError(
                f"{name} of {source} is no safetensors file ({_first_line(error)}): save the adapter again."
            ) from error
        broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
        if broken or not tensors:
            problem = f"values that are not finite in {broken[0]}" if broken else "no tensors"
            raise ValueError(f"{name} of {source} has {problem}: it was cut or diverged; train again, or go back.")
        loaded[name] = tensors
    adapter = loaded.get(ADAPTER_WEIGHTS, {})
    shapes = {key: tuple(tensor.shape) for key, tensor in adapter.items()}
    if kind == "lora":
        # diffusers' file has the name of the denoiser in front, PEFT's that of its own wrapper.
        other = {key.partition(".")[2]: tensor for key, tensor in loaded[LORA_WEIGHTS].items()}
        ours = {key.removeprefix("base_model.model."): tensor for key, tensor in adapter.items()}
        if ours.keys() == other.keys() and not all(torch.equal(ours[key], other[key]) for key in ours):
            raise ValueError(
                f"{ADAPTER_WEIGHTS} and {LORA_WEIGHTS} of {source} are not of the same training: save the LoRA again."
            )
    if kind == "reward" and not any(part in key for key in shapes for part in _DUAL_ENCODER):
        raise ValueError(
            f"{source} is an adapter for another kind of model: its tensors ({next(iter(shapes))}, ...) are not those "
            "of a dual encoder such as CLIP, and it has no "
            f"{LORA_WEIGHTS} as a preference LoRA has."
        )
    if kind != "model":
        _check_rank(read_config(files[ADAPTER_CONFIG], source), shapes, source)
    return shapes


def _check_rank(config: Mapping[str, Any], shapes: Shapes, source: str) -> None:
    """Raise a `ValueError` if the tensors of a LoRA have another rank than its config says: PEFT could not load it."""
    rank = config.get("r")
    if config.get("rank_pattern") or not isinstance(rank, int):
        return
    other = [shape[0] for name, shape in shapes.items() if name.endswith(".lora_A.weight") and shape[0] != rank]
    if other:
        raise ValueError(
            f"{source} has tensors of rank {other[0]}, but its {ADAPTER_CONFIG} says r = {rank}: they are not of the "
            "same training; save the adapter again."
        )


def check_fit(adapter: Shapes, base: Shapes, source: str, base_name: str) -> None:
    """Raise a `ValueError` if the LoRA tensors `adapter` do not fit the weights `base`, each name -> shape.

    A base of which nothing is known, as one without safetensors, is taken to fit.
    """
    found = not base
    ends = {name: shape for name, shape in base.items() if name.endswith("weight")}
    for name, shape in adapter.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if match is None:
            continue
        # A checkpoint may call its layers with a prefix that the loaded model has not, or the other way round.
        weight = f"{match[1]}.weight"
        expected = ends.get(weight) or next(
            (size for key, size in ends.items() if key.endswith(f".{weight}") or weight.endswith(f".{key}")), None
        )
        if expected is None:
            continue
        found = True
        ours, theirs = (shape[1:], expected[1:]) if match[2] == "A" else (shape[:1], expected[:1])
        if ours != theirs:
            raise ValueError(
                f"{source} does not fit its base {base_name}: {match[1]} is {_by(expected)} there, but the adapter "
                f"was made for {'inputs' if match[2] == 'A' else 'outputs'} of {_by(ours)}. Name the base that it was "
                "trained on."
            )
    if not found and any(".lora_A." in name for name in adapter):
        raise ValueError(
            f"{source} does not fit its base {base_name}, which has none of the layers that the adapter changes. Name "
            "the base that it was trained on."
        )


def check_privacy(files: Mapping[str, Content], secrets: Iterable[str] = ()) -> None:
    """Raise a `ValueError` if a file says what is nobody's business: a token, or a path of this machine.

    Args:
        files: All that would be published.
        secrets: Tokens that are known.
    """
    known = [secret.encode() for secret in secrets if secret]
    for name, content in files.items():
        data = read(content)
        # Of weights and pictures, what is between the numbers; a path there would be one of a home.
        binary = not name.endswith((".json", ".md", ".txt"))
        text = _metadata(data) if name.endswith(".safetensors") else "" if binary else data.decode(errors="replace")
        if any(secret in data for secret in known) or _SECRETS.search(text):
            raise ValueError(
                f"{name} contains what looks like a token or a key: take it out, and revoke it if it was."
            )
        found = _HOMES.search(text)
        if found is None and not binary and name not in _VOCABULARIES:
            found = _PATHS.search(text)
        if found:
            raise ValueError(
                f"{name} names a path of this machine ({found[0]}), which nobody else has: take it out or write a Hub "
                "id in its place."
            )


def check_card(text: str) -> None:
    """Raise a `ValueError` unless a card says something, and in metadata that huggingface_hub can read."""
    if found := _PLACEHOLDER.search(text):
        raise ValueError(f'{CARD} says "{found[0]}": write what there is to say, or take the line out.')
    try:
        data = ModelCard(text).data
    except Exception as error:  # of YAML, or of huggingface_hub
        raise ValueError(f"{CARD} has metadata that can't be read: {_first_line(error)}") from error
    for name in ("tags", "datasets", "language"):
        value = getattr(data, name, None)
        if value is not None and not isinstance(value, list | str):
            raise ValueError(f"{CARD} has {name}: {value!r} in its metadata, but it should be a list of names.")


def with_base(files: Mapping[str, Content], base_model: str | None, source: str) -> tuple[dict[str, Content], str]:
    """Adapter files that name their base by its Hub id, and that id.

    Args:
        files: Of an adapter.
        base_model: Hub id of the base; `None`: the one that the adapter names.
        source: What to call the adapter in an error.

    Raises:
        ValueError: There is no Hub id.
    """
    config = read_config(files[ADAPTER_CONFIG], source)
    named = config.get("base_model_name_or_path") or ""
    base = base_model or named
    if hub_id(base) is None:
        what = f"the local path {base!r}" if base else "no base model"
        raise ValueError(
            f"{source} names {what} as its base, which others can't load: pass `base_model` (on the command line "
            "--base_model) with the Hub id of the base; publish the base first if it is your own."
        )
    result = dict(files)
    if base != named:
        result[ADAPTER_CONFIG] = (json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n").encode()
    if LORA_WEIGHTS in files:
        result[LORA_WEIGHTS] = _without_paths(files[LORA_WEIGHTS])
    return result, base


def _without_paths(content: Content) -> Content:
    """LoRA weights whose own copy of the config, which diffusers reads, names no base: a path would be private."""
    data = read(content)
    metadata = json.loads(_metadata(data) or "{}")
    try:
        config = json.loads(metadata["lora_adapter_metadata"])
    except (KeyError, ValueError):
        return content
    named = [key for key, value in config.items() if key.endswith("base_model_name_or_path") and value]
    if not named:
        return content
    metadata["lora_adapter_metadata"] = json.dumps({**config, **dict.fromkeys(named)}, indent=2, sort_keys=True)
    return safetensors.torch.save(safetensors.torch.load(data), metadata=metadata)


def file_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors files; the tensors are not read."""
    return {name: tuple(shape) for path in paths for name, shape in _shapes(path)}


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            yield name, file.get_slice(name).get_shape()


def _metadata(data: bytes) -> str:
    """The `__metadata__` of a safetensors file, as JSON: see https://huggingface.co/docs/safetensors."""
    length = int.from_bytes(data[:8], "little")
    try:
        return json.dumps(json.loads(data[8 : 8 + length]).get("__metadata__", {}), ensure_ascii=False)
    except (AttributeError, ValueError):
        return ""


def read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
