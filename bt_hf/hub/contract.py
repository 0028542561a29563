"""Folder contract: file names, kinds and configs of a published adapter. No code of a repo is run."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftType

from bt_hf.data.atomic import recover

Content = Path | bytes

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICTURES = ("before_after.png", "reliability.png", "training_curve.png")  # shown by the card
# Words of a tokenizer.
VOCABULARIES = frozenset({"added_tokens.json", "merges.txt", "tokenizer.json", "vocab.json", "vocab.txt"})
# Files that a trainer writes for others, besides shards of `MODEL_WEIGHTS`. Anything else in a folder stays there.
CONTRACT_FILES = VOCABULARIES.union(
    PICTURES,
    (CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, LORA_WEIGHTS, MODEL_CONFIG, "model.safetensors.index.json"),
    ("preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer_config.json"),
)
PAIRS = "pairs.parquet"  # published only on request, and never fetched
KINDS = {"reward": "a reward adapter", "lora": "a preference LoRA", "model": "a whole model"}

_PICKLES = re.compile(r"(adapter_model|pytorch_model|pytorch_lora_weights)[^/]*\.(bin|ckpt|pkl|pt|pth)")


def find_adapter_config(name_or_path: str, revision: str | None = None, token: str | None = None) -> PeftConfig | None:
    """Load the adapter's config if `name_or_path` holds a PEFT adapter; `None` for a whole model."""
    folder = Path(name_or_path)
    if folder.is_dir():
        recover(folder)
        return PeftConfig.from_pretrained(name_or_path) if (folder / ADAPTER_CONFIG).is_file() else None
    try:
        return PeftConfig.from_pretrained(name_or_path, revision=revision, token=token)
    except (ValueError, OSError, HfHubHTTPError, HFValidationError):
        return None


def hub_id(name_or_path: str) -> str | None:
    """Return `name_or_path` if it is a Hub id; `None` if it is a local path, which stays private."""
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return None if Path(name_or_path).exists() else name_or_path


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` unless `repo_id` is "name" or "owner/name"."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` should be 'name' or 'owner/name', but got {repo_id!r}.") from error


def in_contract(name: str) -> bool:
    """True if a file of this name is published and fetched."""
    return name in CONTRACT_FILES or MODEL_WEIGHTS.fullmatch(name) is not None


def contract_files(folder: str | Path) -> dict[str, Path]:
    """List the files of the folder contract that are in `folder`, by name.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}': pass the one that `trainer.save_model` wrote.")
    recover(folder)
    return {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and in_contract(file.name)}


def read_content(content: Content) -> bytes:
    """Return the bytes of a file, or bytes as they are."""
    return content if isinstance(content, bytes) else content.read_bytes()


def find_kind(names: Iterable[str], source: str) -> str:
    """Recognise a folder or repo by its file names.

    Args:
        names: Every file name in it.
        source: Its name in an error.

    Returns:
        A key of `KINDS`.

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
    """Parse an `adapter_config.json`.

    Args:
        content: The file.
        source: Name of the adapter in an error.

    Raises:
        ValueError: It is not valid, or belongs to another kind of model than this library's.
    """
    try:
        config = json.loads(read_content(content))
    except ValueError as error:
        raise ValueError(
            f"{ADAPTER_CONFIG} of {source} is not valid JSON ({error}): save the adapter again."
        ) from error
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
