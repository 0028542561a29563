"""Folder contract: the files of a published adapter, and how to recognise them."""

from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig


def find_adapter_config(name_or_path: str, revision: str | None = None, token: str | None = None) -> PeftConfig | None:
    """The adapter's config if `name_or_path` holds a PEFT adapter, else `None` (a whole model)."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return PeftConfig.from_pretrained(name_or_path) if (folder / "adapter_config.json").is_file() else None
    try:
        return PeftConfig.from_pretrained(name_or_path, revision=revision, token=token)
    except (ValueError, OSError, HfHubHTTPError, HFValidationError):
        return None
