"""Generated parts of a model card, between comments that a reader does not see.

    <!-- begin usage -->
    ...
    <!-- end usage -->

Text outside of such a pair is its owner's, and is kept when the card is renewed.
"""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_PART = re.compile(r"<!-- begin (\w+)[^>]*-->\n.*?<!-- end \1 -->\n?", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TAGS = re.compile(r"<!-- begin summary; tags: ([^>]*) -->")
# Placeholder in the drafts of PEFT and the Trainer, which nobody wrote.
_DRAFT = re.compile(r"More Information Needed", re.IGNORECASE)
# Numbers of the old run would be a claim about another model.
_NEVER_KEPT = ("model-index",)
# Addresses of the repo and of its base in the code of a card.
_ADDRESS = re.compile(
    r"((?:PreferenceScorer|AutoProcessor)\.from_pretrained\(|PeftModel\.from_pretrained\([\w.]+, |"
    r'load_lora_weights\()"[^"\n]*"'
)
_BASE = re.compile(r'((?:AutoModel|DiffusionPipeline)\.from_pretrained\(|base_model=)"[^"\n]*"')
_BASE_NOTE = re.compile(r"\n?<!-- begin base -->\n.*?<!-- end base -->\n", re.DOTALL)


def owner_text(card: str) -> str:
    """Return the text of a card outside of its generated parts; a card without parts is all its owner's."""
    return _COMMENT.sub("", _PART.sub("", _body(card))).strip()


def has_parts(card: str) -> bool:
    """True if a card has generated parts."""
    return bool(_PART.search(card))


def keep_owner_text(new: str, old: str) -> str:
    """Renew the generated parts of a card, and leave the rest as its owner wrote it.

    Args:
        new: Generated card.
        old: Existing card. One with text but without generated parts is kept as it is, unless it is a draft of PEFT
            or the Trainer. A part that its owner took out stays out.

    Returns:
        The card. In its metadata the run's own fields are renewed; further fields and tags are kept.
    """
    if not has_parts(old) and _DRAFT.search(old):
        return new
    if not has_parts(old) and owner_text(old):
        return old
    parts = {match[1]: match[0] for match in _PART.finditer(new)}
    body = _PART.sub(lambda match: parts.get(match[1], ""), _body(old)) if has_parts(old) else _body(new)
    return _merge_metadata(new, old) + body


def add_metadata(card: str, fields: Mapping[str, Any]) -> str:
    """Add fields to the metadata of a card; tags are added to those that it has."""
    data = ModelCard(card).data.to_dict()
    for name, value in fields.items():
        if name == "tags":
            value = list(dict.fromkeys([*data.get("tags", []), *([value] if isinstance(value, str) else value)]))
        data[name] = value
    return f"---\n{_dump(data)}---\n" + _body(card)


def address_card(card: str, repo_id: str, base_model: str | None) -> str:
    """Write the addresses of a model and its base into the code of a card's usage part.

    Args:
        card: A card, whose run may have known neither.
        repo_id: Repo in which the card is published.
        base_model: Hub id of the base; `None` for a model without one, which is its own base.
    """

    def addressed(match: re.Match[str]) -> str:
        if match[1] != "usage":
            return match[0]
        part = _ADDRESS.sub(rf'\g<1>"{repo_id}"', match[0])
        return _BASE_NOTE.sub("", _BASE.sub(rf'\g<1>"{base_model or repo_id}"', part))

    card = _PART.sub(addressed, card)
    data = ModelCard(card).data.to_dict()
    if base_model is None or data.get("base_model") == base_model:
        return card
    data |= {"base_model": base_model, "base_model_relation": "adapter"}
    return f"---\n{_dump(data)}---\n" + _body(card)


def _body(card: str) -> str:
    """Return a card without its front matter."""
    return _FRONT_MATTER.sub("", card)


def _merge_metadata(new: str, old: str) -> str:
    """Return the front matter of `new`, with the additions of the owner of `old`."""
    ours = ModelCard(new).data.to_dict()
    theirs = ModelCard(old, ignore_metadata_errors=True).data.to_dict()
    generated = _TAGS.search(old)
    known = set(generated[1].split(", ")) if generated else set()
    tags = [*ours.get("tags", []), *(tag for tag in theirs.get("tags") or [] if tag not in known)]
    added = {key: value for key, value in theirs.items() if key not in ours and key not in _NEVER_KEPT}
    merged = {**ours, "tags": list(dict.fromkeys(tags)), **added}
    if not merged["tags"]:
        del merged["tags"]
    front = _FRONT_MATTER.match(new)
    return front[0] if front and merged == ours else f"---\n{_dump(merged)}---\n"


def _dump(data: dict[str, object]) -> str:
    """Write metadata as YAML."""
    return yaml_dump(data, sort_keys=False).strip() + "\n"
