"""Privacy of what is published: tokens, passwords, paths of this machine, hidden data of pictures, and local bases."""

import html
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

import safetensors.torch
from huggingface_hub import get_token
from PIL import Image

from bt_hf.hub.contract import (
    ADAPTER_CONFIG,
    INTERFACE_WEIGHTS,
    LORA_WEIGHTS,
    VOCABULARIES,
    Content,
    hub_id,
    read_content,
    weights_metadata,
)
from bt_hf.hub.interfaces import with_named_base
from bt_hf.hub.peft_configs import read_config, shown

# Every repetition is bounded: none of these takes more than linear time, whatever the text.
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{12,}|api_org_[A-Za-z0-9]{12,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|A(KI|SI)A[0-9A-Z]{16}|AIza[\w-]{30,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[\w-]{30,}|eyJ[\w-]{10,4000}\.eyJ[\w-]{10,})|-----BEGIN [A-Z ]{0,40}PRIVATE KEY"
)
_PASSWORDS = re.compile(
    r"(?i)(?<![a-z])(pass(word|wd|phrase)|pwd|passwort|(api|access|secret|private)[ _-]?key|client[ _-]?secret"
    r"|(auth|access|bearer|api|hf|github)[ _-]?token)[\"'`]?\s{0,9}[=:]\s{0,9}[\"'`]?(?!null|none|true|false)"
    r"[^\s\"'`,;)}]"
    r"|(?<![\w:])(?!mailto:)[\w.+%-]{1,64}:[^\s:@/\"'`<>]{1,64}@[A-Za-z0-9]"
)
_HOMES = re.compile(
    r"(?<![\w.:/-])/(home|Users|root|mnt|tmp|var|media|private|Volumes)/[\w.-]{1,255}[^\s\"'`)<>]{0,999}"
    r"|(?<![A-Za-z])[A-Za-z]:[\\/]{1,2}Users[\\/][^\s\"'`]{1,999}|(?<![\w~/.])~[\w-]{0,32}[\\/]"
    r"|%(USERPROFILE|HOMEPATH|APPDATA)%|\$\{?(HOME|USERPROFILE)\b"
    r"|(?<!\\)\\\\[\w.-]{1,255}\\[\w$.-]{1,255}"
)
_PATHS = re.compile(
    r"(?<![\w.:/~<#)*-])/(?:[\w.@+-]{1,255}/){1,99}[\w.@+-]{1,255}"
    r"|(?<![A-Za-z])[A-Za-z]:[\\/]{1,2}[\w. -]{1,255}[\\/][^\s\"'`]{0,999}|\bfile://\S{1,999}"
)
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")
_UNSEEN = dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF])
_MOST_PIXELS = 2**26


def check_privacy(files: Mapping[str, Content], secrets: Iterable[str] = ()) -> None:
    """Raise a `ValueError` if a file contains a token, a password or a path of this machine.

    Args:
        files: Everything that would be published, by name.
        secrets: Known tokens.
    """
    known = list(secrets)
    for name, content in files.items():
        # Words of a vocabulary may look like paths.
        for text in _texts(name, read_content(content)):
            check_text(text, name, known, tokens_alone=name in VOCABULARIES)


def known_tokens(token: str | None = None) -> list[str]:
    """Return the access tokens that are known here: the given one, and that of this machine."""
    return [known for known in (token, get_token()) if known]


def check_text(text: str, name: str, secrets: Iterable[str] = (), tokens_alone: bool = False) -> None:
    """Raise a `ValueError` if a text contains a token, a password or a path of this machine, in whatever spelling.

    Args:
        text: The text.
        name: Its name in an error, which does not repeat a secret.
        secrets: Known tokens.
        tokens_alone: Look for tokens and home folders alone.

    Example:
        >>> check_text("two red apples", "the prompt")
    """
    for form in _plain_forms(text):
        if any(secret and secret in form for secret in secrets) or _TOKENS.search(form):
            raise ValueError(
                f"{name} contains what looks like a token or a key: take it out, and revoke it if it was."
            )
        if not tokens_alone and _PASSWORDS.search(form):
            raise ValueError(f"{name} contains what looks like a password: take it out, and change it if it was.")
        found = None if tokens_alone else _HOMES.search(form) or _PATHS.search(form)
        if found:
            raise ValueError(
                f"{name} names a path of this machine ({' '.join(found[0].split())[:200]}), which nobody else has: "
                "take it out or write a Hub id in its place."
            )


def _plain_forms(text: str) -> set[str]:
    """Return a text as it stands, and without the escapes of Markdown, HTML and addresses."""
    forms = {text, _ESCAPED.sub(r"\1", text), html.unescape(text)}
    forms |= {_ESCAPED.sub(r"\1", form) for form in list(forms)}
    forms |= {unquote(form) for form in list(forms) if "%" in form}
    if text.isascii():
        return forms
    return forms | {unicodedata.normalize("NFKC", form.translate(_UNSEEN)) for form in forms}


def _texts(name: str, data: bytes) -> Iterator[str]:
    """Yield the readable parts of a file: a text, the strings of JSON, the header of weights, nothing of a picture."""
    if name.endswith(".safetensors"):
        yield from _header_texts(data)
    elif name.endswith(".json"):
        yield from _strings(_parsed(name, data), name in VOCABULARIES)
    elif name.endswith((".md", ".txt")):
        try:
            yield data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not a text in UTF-8 ({shown(error)}): save it again.") from None


def _parsed(name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({shown(error)}): save it again.") from None


def _header_texts(data: bytes) -> Iterator[str]:
    """Yield the metadata of a safetensors file, and the JSON inside of it."""
    for key, value in weights_metadata(data).items():
        yield key
        try:
            yield from _strings(json.loads(value))
        except (TypeError, ValueError, RecursionError):
            yield str(value)


def _strings(value: Any, joined: bool = False) -> Iterator[str]:
    """Yield every string of parsed JSON, each value with its key before it.

    Args:
        value: Parsed JSON.
        joined: Join them into one text, as for the many words of a vocabulary.
    """
    if joined:
        yield "\n".join(_strings(value))
        return
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        key, item = stack.pop()
        if isinstance(item, dict):
            stack += [(str(name), inner) for name, inner in item.items()]
            yield from map(str, item)
        elif isinstance(item, list):
            stack += [(key, inner) for inner in item]
        elif isinstance(item, str) and item:
            yield item
            # "password": "..." is one, whereas "pad_token": "..." is a word.
            yield f"{key}={item}"


def plain_picture(content: Content, name: str) -> bytes:
    """Encode a picture anew, as PNG: its pixels alone, without EXIF, text chunks, profiles or trailing bytes.

    Args:
        content: A PNG file.
        name: Its name in an error.

    Raises:
        ValueError: It is not a PNG that can be read, or has more than 2**26 pixels.
    """
    try:
        with Image.open(io.BytesIO(read_content(content)), formats=["PNG"]) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            return encode_picture(picture)
    except Exception as error:  # Pillow raises whatever it meets on the way
        raise ValueError(f"{name} is not a PNG that can be published ({shown(error)}): draw it again.") from None


def encode_picture(picture: Image.Image) -> bytes:
    """Encode the pixels of a picture as PNG, and nothing else of it."""
    mode = "RGBA" if picture.has_transparency_data else "L" if picture.mode in ("1", "L") else "RGB"
    pixels = picture.convert(mode)
    plain, buffer = Image.frombytes(mode, pixels.size, pixels.tobytes()), io.BytesIO()
    plain.save(buffer, "PNG")
    return buffer.getvalue()


def plain_pictures(files: Mapping[str, Content]) -> dict[str, Content]:
    """Encode all pictures of a folder anew; see `plain_picture`."""
    return {
        name: plain_picture(content, name) if name.endswith(".png") else content for name, content in files.items()
    }


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
    result |= {name: with_named_base(files[name], base) for name in files if INTERFACE_WEIGHTS.fullmatch(name)}
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
