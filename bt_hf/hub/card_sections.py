"""Generated parts of a model card, between comments that a reader does not see.

    <!-- begin usage -->
    ...
    <!-- end usage -->

Text outside of such a pair is its owner's, and is kept when the card is renewed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from bt_hf.hub.contract import CARD

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_BEGIN = re.compile(r"<!-- begin (summary|evaluation|usage|training|limits|versions)[^>\n]{0,2000}-->\n")
_TAGS = re.compile(r"<!-- begin summary; tags: ([^>\n]{0,2000}) -->")
# Placeholder in the drafts of PEFT and the Trainer, which nobody wrote.
_DRAFT = re.compile(r"More Information Needed", re.IGNORECASE)
# Numbers of the old run would be a claim about another model.
_NEVER_KEPT = ("model-index",)
# Addresses of the repo and of its base in the code of a card.
_STRING = r'"(?:[^"\\\n]|\\.){0,2000}"'
_ADDRESS = re.compile(
    r"((?:PreferenceScorer|AutoProcessor)\.from_pretrained\(|PeftModel\.from_pretrained\([\w.]{1,99}, |"
    rf"load_lora_weights\(){_STRING}"
)
_BASE = re.compile(rf"((?:AutoModel|DiffusionPipeline)\.from_pretrained\(|base_model=){_STRING}")
_BASE_NOTE = re.compile(r"\n?<!-- begin base -->\n(?:(?!<!--).){0,4000}<!-- end base -->\n", re.DOTALL)
# Markup of Markdown, and a quotation mark.
_MARKUP = re.compile(r'([\\`*_~<>\[\]&$|"])')
_PUBLISHED = "- base, when this was published: "
_TITLE = re.compile(r"^# .{0,2000}$", re.MULTILINE)
_CAPTIONS = {
    "before_after.png": "Images before and after training, with the same seeds",
    "favourites.png": "Images that the person likes most and least, shown with their consent",
    "reliability.png": "How often it is right, for how sure it is",
    "training_curve.png": "Loss and accuracy at each step of the training",
}
# Longer cards, and longer runs of empty lines, would keep the Hub's own patterns busy.
_LONGEST, _EMPTY_LINES = 1_000_000, re.compile(r"\s{2000}")


def read_card(text: str, ignore_metadata_errors: bool = False) -> ModelCard:
    """Parse a card of anybody.

    Args:
        text: The card.
        ignore_metadata_errors: Take metadata that can't be read for none.

    Raises:
        ValueError: It is too long, or its metadata can't be read.
    """
    if len(text) > _LONGEST or _EMPTY_LINES.search(text):
        raise ValueError(f"{CARD} is longer than {_LONGEST} letters, or has 2000 empty ones in a row: shorten it.")
    try:
        return ModelCard(text, ignore_metadata_errors=ignore_metadata_errors)
    except Exception as error:  # YAML and the Hub's classes raise their own
        problem = " ".join(str(error).split())[:300]
        raise ValueError(f"{CARD} has metadata that can't be read ({problem}): write it again.") from error


def plain_line(text: str) -> str:
    """Write a text of anybody on one line of Markdown, as it stands."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def in_code(text: str) -> str:
    """Write a text as a string of Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _parts(card: str) -> list[tuple[str, int, int]]:
    """Find the generated parts: name, begin and end of each, in their order."""
    found: list[tuple[str, int, int]] = []
    at, open_ended = 0, set()
    while match := _BEGIN.search(card, at):
        at = match.end()
        if match[1] in open_ended:
            continue
        ending = f"<!-- end {match[1]} -->"
        end = card.find(ending, at)
        if end < 0:
            open_ended.add(match[1])
            continue
        at = end + len(ending)
        at += card[at : at + 1] == "\n"
        found.append((match[1], match.start(), at))
    return found


def _replace_parts(card: str, new: Callable[[str, str], str]) -> str:
    """Replace each generated part by `new(name, part)`."""
    pieces, at = [], 0
    for name, begin, end in _parts(card):
        pieces += [card[at:begin], new(name, card[begin:end])]
        at = end
    return "".join([*pieces, card[at:]])


def _without_comments(text: str) -> str:
    """Take out the comments of a text."""
    pieces, at = [], 0
    while (begin := text.find("<!--", at)) >= 0 and (end := text.find("-->", begin + 4)) >= 0:
        pieces.append(text[at:begin])
        at = end + 3
    return "".join([*pieces, text[at:]])


def owner_text(card: str) -> str:
    """Return the text of a card outside of its generated parts; a card without parts is all its owner's."""
    return _without_comments(_replace_parts(_body(card), lambda name, part: "")).strip()


def has_parts(card: str) -> bool:
    """True if a card has generated parts."""
    return bool(_parts(card))


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
    parts = {name: new[begin:end] for name, begin, end in _parts(new)}
    body = _replace_parts(_body(old), lambda name, part: parts.get(name, "")) if has_parts(old) else _body(new)
    return _merge_metadata(new, old) + body


def add_metadata(card: str, fields: Mapping[str, Any]) -> str:
    """Add fields to the metadata of a card; tags are added to those that it has."""
    data = read_card(card).data.to_dict()
    for name, value in fields.items():
        if name == "tags":
            value = list(dict.fromkeys([*data.get("tags", []), *([value] if isinstance(value, str) else value)]))
        data[name] = value
    return f"---\n{_dump(data)}---\n" + _body(card)


def address_card(card: str, repo_id: str, base_model: str | None, base: str | None = None) -> str:
    """Write the addresses of a model and its base into the generated parts of a card.

    Args:
        card: A card, whose run may have known neither.
        repo_id: Repo in which the card is published; its name becomes the title.
        base_model: Hub id of the base; `None` for a model without one, which is its own base.
        base: The base in words, as it stands on the Hub.
    """

    def addressed(name: str, part: str) -> str:
        if name == "summary":
            return _TITLE.sub(lambda match: f"# {repo_id.rpartition('/')[2]}", part, count=1)
        if name == "usage":
            part = _ADDRESS.sub(lambda match: f'{match[1]}"{repo_id}"', part)
            part = _BASE.sub(lambda match: f'{match[1]}"{base_model or repo_id}"', part)
            return _BASE_NOTE.sub("", part)
        if name == "training" and base is not None:
            lines = [line for line in part.split("\n") if not line.startswith(_PUBLISHED)]
            last = max((row for row, line in enumerate(lines) if line.startswith("- ")), default=None)
            if last is not None:
                lines.insert(last + 1, _PUBLISHED + base)
            return "\n".join(lines)
        return part

    card = _replace_parts(card, addressed)
    data = read_card(card).data.to_dict()
    if base_model is None or data.get("base_model") == base_model:
        return card
    data |= {"base_model": base_model, "base_model_relation": "adapter"}
    return f"---\n{_dump(data)}---\n" + _body(card)


def show_pictures(card: str, pictures: Sequence[str]) -> str:
    """Show pictures that lie beside a card and that it does not show, at the end of its evaluation.

    Args:
        card: A card; one without generated parts is its owner's, and stays as it is.
        pictures: File names.
    """
    new = [name for name in pictures if f"]({name})" not in card]
    shown = "".join(f"\n![{_CAPTIONS.get(name, name)}]({name})\n" for name in new)
    ending = "\n<!-- end evaluation -->"
    return _replace_parts(card, lambda name, part: part.replace(ending, shown + ending, 1) if new else part)


def _body(card: str) -> str:
    """Return a card without its front matter."""
    return _FRONT_MATTER.sub("", card)


def _merge_metadata(new: str, old: str) -> str:
    """Return the front matter of `new`, with the additions of the owner of `old`."""
    ours = read_card(new).data.to_dict()
    theirs = read_card(old, ignore_metadata_errors=True).data.to_dict()
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
