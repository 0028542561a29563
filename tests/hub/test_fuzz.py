"""Files of somebody hostile: a thousand of each kind, each refused in one line or taken, and none takes long."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from bt_hf.hub.card_sections import add_metadata, address_card, keep_owner_text, owner_text, show_pictures
from bt_hf.hub.checks import check_card
from bt_hf.hub.contract import weights_metadata
from bt_hf.hub.peft_configs import CONFIGS, read_config
from bt_hf.hub.privacy import check_privacy
from bt_hf.hub.tensors import adapter_shapes, check_names, check_tensors, declared_shapes
from tiny_models import build

CASES = 1000
SLOWEST = 2.0  # seconds
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["text_projection", "visual_projection"]}
WORDS = [
    "",
    "a",
    "LORA",
    "../x",
    "/etc/passwd",
    "\u0000",
    "\ud83d\ude00",
    "a\nb",
    "(a+)+$",
    ".*" * 30,
    "x" * 5000,
    "[",
    "\\",
    "None",
    "all-linear",
    "text_projection",
    "pissa",
    "none",
    "os.system",
    "\u2028",
    "{{ 7 * 7 }}",
    "-->",
    "```",
    "---",
    "hf_x",
    "\ud800",
]
NUMBERS = [0, 1, -1, 2, 8, 1.5, 10**8, 10**30, -(10**30), 1e308, float("nan"), float("inf"), True, False, None]


def survives(case: Callable[[random.Random], object], seed: int, allowed: tuple[type[Exception], ...]) -> str:
    """Run a case; its outcome is a word, and whatever it raises is one line and one of ours."""
    started = time.monotonic()
    try:
        case(random.Random(seed))
        outcome = "taken"
    except allowed as error:
        text = str(error)
        assert "\n" not in text, (seed, text)
        assert 20 < len(text) < 1500, (seed, text[:300])
        text.encode("utf-8")  # prints on any terminal
        outcome = "refused"
    assert time.monotonic() - started < SLOWEST, seed
    return outcome


def value(source: random.Random, depth: int = 0) -> Any:
    kind = source.randrange(6 if depth < 3 else 4)
    if kind < 2:
        return source.choice(WORDS)
    if kind < 4:
        return source.choice(NUMBERS)
    if kind == 4:
        return [value(source, depth + 1) for _ in range(source.randrange(4))]
    return {source.choice(WORDS): value(source, depth + 1) for _ in range(source.randrange(4))}


def spoilt(source: random.Random, text: bytes) -> bytes:
    """Change, cut, double or insert bytes."""
    data = bytearray(text)
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(data) + 1)
        how = source.randrange(5)
        if how == 0 and data:
            data[at % len(data)] = source.randrange(256)
        elif how == 1:
            data[at:at] = source.choice(WORDS).encode("utf-8", "surrogatepass")
        elif how == 2:
            del data[at : at + source.randrange(20)]
        elif how == 3:
            data[at:at] = data[at : at + source.randrange(200)]
        else:
            data[at:at] = bytes([source.randrange(256)]) * source.randrange(1, 200)
    return bytes(data)


def a_config(source: random.Random) -> None:
    kind = source.choice(list(CONFIGS))
    keys = [*CONFIGS[kind], "peft_type", "task_type", "megatron_core", "layer_replication", *WORDS]
    config = {**CONFIG, "peft_type": kind} | {
        source.choice(keys): value(source) for _ in range(source.randrange(1, 4))
    }
    data = json.dumps(config).encode()
    data = spoilt(source, data) if source.random() < 0.3 else data
    found = read_config(data, "'fuzz'")
    if not any(sign in json.dumps(found) for sign in "*+("):  # patterns are tried in a process, which takes time
        check_tensors(found, SHAPES, BASE, "'fuzz'")
    else:
        check_names(found, SHAPES, "'fuzz'")


BASE = build()[0]
SHAPES = declared_shapes(CONFIG, BASE)
GOOD = save({name: torch.zeros(shape) for name, shape in SHAPES.items()}, {"format": "pt"})


def a_header(source: random.Random, folder: Path) -> None:
    length = int.from_bytes(GOOD[:8], "little")
    header: Any = json.loads(GOOD[8 : 8 + length])
    how = source.randrange(4)
    if how == 0:
        for _ in range(source.randrange(1, 4)):
            entry = header.setdefault(source.choice([*header, *WORDS]), {})
            if isinstance(entry, dict):
                key = source.choice(["dtype", "shape", "data_offsets", *WORDS])
                entry[key] = source.choice([value(source), ["F32", "I8", "F99"][source.randrange(3)], [2**62, 2]])
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + GOOD[8 + length :]
    elif how == 1:
        data = spoilt(source, GOOD[: 8 + length]) + GOOD[8 + length :]
    elif how == 2:
        data = source.choice([0, 1, 2**31, 2**63, length + 1, length - 1]).to_bytes(8, "little") + GOOD[8:]
    else:
        data = spoilt(source, GOOD)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(data)
    weights_metadata(data)
    check_tensors(CONFIG, adapter_shapes(file, "'fuzz'"), BASE, "'fuzz'")


CARD = (
    "---\nlicense: mit\ntags:\n- a\n---\n<!-- begin summary; tags: a -->\n# x\n<!-- end summary -->\nMine.\n"
    "<!-- begin evaluation -->\n1\n\n<!-- end evaluation -->\n<!-- begin usage -->\n"
    'AutoModel.from_pretrained("a", dtype=torch.float32)\n<!-- end usage -->\n'
    "<!-- begin training -->\n- steps: 2\n<!-- end training -->\n"
)
PIECES = [
    "<!-- begin summary -->\n",
    "<!-- begin summary",
    "<!-- end summary -->",
    "<!--",
    "-->",
    "---\n",
    "\n" * 50,
    "tags: [",
    "&a [*a]\n",
    "!!python/object/apply:os.system ['x']\n",
    "```python\n",
    '"' * 30,
    "model-index:\n- name: x\n  results: 7\n",
    "license: {a: b}\n",
    "base_model: ../x\n",
    "\t",
    "? - :\n",
    "a: &a [1]\nb: [*a, *a]\n",
    "2024-99-99\n",
    *WORDS,
]


def a_card(source: random.Random) -> None:
    text = CARD
    for _ in range(source.randrange(1, 8)):
        at = source.randrange(len(text) + 1)
        piece = source.choice(PIECES)
        text = text[:at] + piece * source.choice([1, 1, 2, 200 if len(piece) < 50 else 3]) + text[at:]
    owner_text(text)
    keep_owner_text(CARD, text)
    check_card(text)
    check_privacy({"README.md": text.encode("utf-8", "replace")})
    addressed = show_pictures(address_card(text, "me/x", "me/base", "`me/base`"), ["reliability.png"])
    add_metadata(addressed, {"tags": ["b"]})


@pytest.mark.parametrize("kind", ["config", "header", "card"])
def test_hostile_files_end_in_one_line(kind: str, tmp_path: Path) -> None:
    case = {"config": a_config, "header": lambda source: a_header(source, tmp_path), "card": a_card}[kind]
    outcomes = [survives(case, seed, (ValueError,)) for seed in range(CASES)]
    assert outcomes.count("refused") > CASES / 10
    assert outcomes.count("taken") > (0 if kind == "config" else 5)


@pytest.mark.parametrize("piece", PIECES, ids=range(len(PIECES)))
def test_long_cards_take_no_time(piece: str) -> None:
    started = time.monotonic()
    text = CARD.replace("Mine.", piece * (200_000 // max(len(piece), 1)))

    def read(source: random.Random) -> None:
        owner_text(text)
        check_card(text)
        keep_owner_text(CARD, text)
        address_card(text, "m/x", "m/b")

    survives(read, 0, (ValueError,))
    assert time.monotonic() - started < SLOWEST
