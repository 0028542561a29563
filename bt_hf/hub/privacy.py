"""Privacy of published files: tokens, home folders, and the local path of a base."""

import json
import re
from collections.abc import Iterable, Mapping

import safetensors.torch

from bt_hf.hub.contract import (
    ADAPTER_CONFIG,
    LORA_WEIGHTS,
    VOCABULARIES,
    Content,
    hub_id,
    read_content,
    weights_metadata,
)
from bt_hf.hub.peft_configs import read_config

_SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{12,}|api_org_[A-Za-z0-9]{12,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}"
    r"|xox[abps]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.eyJ[\w-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_HOMES = re.compile(
    r"(?<![\w.:/-])(/(home|Users|root|mnt|tmp|var)/[\w.-]+[^\s\"'`)<>]*|[A-Za-z]:\\{1,2}Users\\[^\s\"'`]+)"
)
_PATHS = re.compile(r"(?<![\w.:/~<#)*-])(/(?:[\w.@+-]+/)+[\w.@+-]+|[A-Za-z]:\\{1,2}[\w. -]+\\[^\s\"'`]*)|\bfile://\S+")


def check_privacy(files: Mapping[str, Content], secrets: Iterable[str] = ()) -> None:
    """Raise a `ValueError` if a file contains a token or a path of this machine.

    Args:
        files: Everything that would be published, by name.
        secrets: Known tokens.
    """
    known = [secret.encode() for secret in secrets if secret]
    for name, content in files.items():
        data = read_content(content)
        text = _text(name, data)
        if any(secret in data for secret in known) or _SECRETS.search(text):
            raise ValueError(
                f"{name} contains what looks like a token or a key: take it out, and revoke it if it was."
            )
        found = _HOMES.search(text)
        # Words of a vocabulary may look like paths, and metadata of weights has names of layers.
        if found is None and name not in VOCABULARIES and not name.endswith(".safetensors"):
            found = _PATHS.search(text)
        if found:
            raise ValueError(
                f"{name} names a path of this machine ({found[0]}), which nobody else has: take it out or write a Hub "
                "id in its place."
            )


def _text(name: str, data: bytes) -> str:
    """Decode the readable part of a file: a text, the metadata of weights, nothing of a picture."""
    if name.endswith(".safetensors"):
        return json.dumps(weights_metadata(data), ensure_ascii=False)
    return data.decode(errors="replace") if name.endswith((".json", ".md", ".txt")) else ""


def with_base(files: Mapping[str, Content], base_model: str | None, source: str) -> tuple[dict[str, Content], str]:
    """Write the Hub id of the base into an adapter's files.

    Args:
        files: Files of an adapter.
        base_model: Hub id of the base; `None` keeps the one that the adapter names.
        source: Name of the adapter in an error.

    Returns:
        The files, and the Hub id.

    Raises:
        ValueError: There is no Hub id.
    """
    config = read_config(files[ADAPTER_CONFIG], source)
    named = config.get("base_model_name_or_path") or ""
    base = base_model or named
    if hub_id(base) is None:
        base = f"the local path {base!r}" if base else "no base model"
        raise ValueError(
            f"{source} names {base} as its base, which others can't load: pass `base_model` (on the command line "
            "--base_model) with the Hub id of the base; publish the base first if it is your own."
        )
    result = dict(files)
    if base != named:
        result[ADAPTER_CONFIG] = (json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n").encode()
    if LORA_WEIGHTS in files:
        result[LORA_WEIGHTS] = _without_base(files[LORA_WEIGHTS])
    return result, base


def _without_base(content: Content) -> Content:
    """Remove the base, which may be a local path, from the config that LoRA weights carry in their metadata."""
    data = read_content(content)
    metadata = weights_metadata(data)
    try:
        config = json.loads(metadata["lora_adapter_metadata"])
    except (KeyError, ValueError):
        return content
    named = [key for key, value in config.items() if key.endswith("base_model_name_or_path") and value]
    if not named:
        return content
    metadata["lora_adapter_metadata"] = json.dumps({**config, **dict.fromkeys(named)}, indent=2, sort_keys=True)
    return safetensors.torch.save(safetensors.torch.load(data), metadata=metadata)
