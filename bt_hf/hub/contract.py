"""Folder contract: file names, kinds and configs of a published adapter. No code of a repo is run."""

import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bt_hf.data.atomic import recover

Content = Path | bytes

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
FAVOURITES = "favourites.png"  # images of the person who clicked; there only if they allowed it
PICTURES = ("before_after.png", FAVOURITES, "reliability.png", "training_curve.png")  # shown by the card
# Words of a tokenizer.
VOCABULARIES = frozenset({"added_tokens.json", "merges.txt", "tokenizer.json", "vocab.json", "vocab.txt"})
# Files that a trainer writes for others, besides `MODEL_WEIGHTS` and `INTERFACE_WEIGHTS`. Anything else stays.
CONTRACT_FILES = VOCABULARIES.union(
    PICTURES,
    (CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, LORA_WEIGHTS, MODEL_CONFIG, "model.safetensors.index.json"),
    ("preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer_config.json"),
)
# A LoRA in the names of ComfyUI, A1111 and Forge. They list LoRAs by file name, so it begins with the run's.
INTERFACE_WEIGHTS = re.compile(r"[A-Za-z0-9][\w.-]{0,95}_comfyui\.safetensors", re.ASCII)
PAIRS = "pairs.parquet"  # published only on request, and never fetched
KINDS = {"reward": "a reward adapter", "lora": "a preference LoRA", "model": "a whole model"}

# Names of branches and tags that Git takes, without those that end a path or hide in it.
_REVISION = re.compile(r"[A-Za-z0-9_][\w./+@-]{0,254}(?<![./])", re.ASCII)
_PICKLES = re.compile(r"(adapter_model|pytorch_model|pytorch_lora_weights)[^/]*\.(bin|ckpt|pkl|pt|pth)")


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


def check_revision(revision: str) -> None:
    """Raise a `ValueError` unless `revision` is the name of a branch, a tag or a commit, and never a path."""
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise ValueError(f"`revision` should be a branch, a tag or a commit, but got {ascii(revision)[:80]}.")


def in_contract(name: str) -> bool:
    """True if a file of this name is published and fetched."""
    return name in CONTRACT_FILES or any(form.fullmatch(name) for form in (MODEL_WEIGHTS, INTERFACE_WEIGHTS))


def contract_files(folder: str | Path, links: bool = False) -> dict[str, Path]:
    """List the files of the folder contract that are in `folder`, by name.

    Args:
        folder: The folder.
        links: Follow links, of which the cache of `huggingface_hub` is made.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: One of them is a link, or something else than a regular file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}': pass the one that `trainer.save_model` wrote.")
    recover(folder)
    files = {file.name: file for file in sorted(folder.iterdir()) if in_contract(file.name)}
    for name, file in files.items():
        if not (links and file.is_file()) and not stat.S_ISREG(file.lstat().st_mode):
            raise ValueError(
                f"{name} of '{folder}' is not a regular file (a link, a folder or a device), which could lead "
                "anywhere: put the file itself in its place, or take it out."
            )
    return files


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


def weights_metadata(content: Content) -> dict[str, str]:
    """Read the `__metadata__` of a safetensors file, see https://huggingface.co/docs/safetensors; empty if damaged."""
    data = read_content(content)
    try:
        found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (AttributeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
