"""Digests: whatever can differ changes them, and nothing else does."""

import contextlib
import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor  # holds two tensors, as torchao's do

from bt_hf.data.fingerprint import describe, describe_tokenizer, digest_weights, tokenize_plainly
from tiny_models import build, clip_tokenizer

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
]


class Holder(nn.Module):
    """One tensor, as weights that are kept in a model."""

    def __init__(self, tensor: torch.Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("tensor", tensor, persistent=persistent)


def fingerprint(tensor: torch.Tensor) -> str:
    return digest_weights([Holder(tensor)])


def values(dtype: torch.dtype, count: int = 5000) -> torch.Tensor:
    return (torch.arange(count) % 2).to(dtype).reshape(count // 10, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 313, 2501, 4999])
def test_each_value_counts(dtype: torch.dtype, place: int) -> None:
    tensor = values(dtype)
    other = tensor.clone().flatten()
    other[place] = torch.tensor(1 - place % 2).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint(other.view(tensor.shape))


def test_neighbouring_values_of_wide_types_count() -> None:
    """They are one number once cast to float32."""
    for values, dtype in (((2**60, 2**60 + 1), torch.int64), ((1.0, 1.0 + 2**-50), torch.float64)):
        one, other = (torch.tensor([value], dtype=dtype) for value in values)
        assert fingerprint(one) != fingerprint(other)
        assert describe(one) != describe(other)


def test_types_and_shapes_count() -> None:
    prints = [fingerprint(values(dtype)) for dtype in DTYPES] + [fingerprint(values(torch.float32).T)]
    prints.append(fingerprint(values(torch.float32).flatten()))
    assert len(set(prints)) == len(prints)
    # The order in memory does not.
    tensor = values(torch.float32)
    assert fingerprint(tensor.T.contiguous().T) == fingerprint(tensor)
    assert fingerprint(nn.Parameter(tensor).data) == fingerprint(tensor)


def quantised(scale: float = 0.1, zero: int = 0, change: float = 0.0) -> torch.Tensor:
    tensor = torch.linspace(-1, 1, 40)
    tensor[7] += change
    return torch.quantize_per_tensor(tensor, scale, zero, torch.qint8)


def per_channel(scale: float = 0.1) -> torch.Tensor:
    scales = torch.tensor([0.1, scale], dtype=torch.float64)
    return torch.quantize_per_channel(torch.ones(2, 5), scales, torch.zeros(2, dtype=torch.int64), 0, torch.qint8)


def wrapped(inner: float = 0.0, outer: float = 0.0) -> torch.Tensor:
    return TwoTensor(torch.full((3,), inner), torch.full((3,), outer))


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning", "ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (quantised, [{"scale": 0.2}, {"zero": 1}, {"change": 0.5}]),
        (per_channel, [{"scale": 0.2}]),
        (wrapped, [{"inner": 1.0}, {"outer": 1.0}]),
        (lambda at=3: torch.zeros(9).index_fill(0, torch.tensor([at]), 1.0).to_sparse(), [{"at": 4}]),
        (lambda value=1.0: torch.full((2, 2), value).to_sparse_csr(), [{"value": 2.0}]),
        (lambda value=1.0: torch.complex(torch.ones(3), torch.full((3,), value)).conj(), [{"value": 2.0}]),
        (lambda width=3: torch.empty(2, width, device="meta"), [{"width": 4}]),
        (lambda count=0: torch.ones(count, 3), [{"count": 1}]),
        (lambda value=1.0: torch.tensor(value), [{"value": 2.0}]),
    ],
    ids=["quantised", "per channel", "subclass", "sparse", "csr", "complex", "meta", "empty", "scalar"],
)
def test_tensors_of_every_kind(make, changes: list[dict]) -> None:
    assert fingerprint(make()) == fingerprint(make())
    assert len({fingerprint(make()), *(fingerprint(make(**change)) for change in changes)}) == 1 + len(changes)


def test_one_vector_of_an_embedding_counts() -> None:
    """A textual inversion: the same word with another vector."""
    model, _ = build()
    other = copy.deepcopy(model)
    other.text_model.get_input_embeddings().weight.data[57] += 1e-3  # past autograd's count of changes
    assert digest_weights([model]) != digest_weights([other])
    assert digest_weights([model]) == digest_weights([copy.deepcopy(model)])


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_count(persistent: bool) -> None:
    one, other = (Holder(torch.tensor([value]), persistent) for value in (1.0, 2.0))
    assert digest_weights([one]) != digest_weights([other])


def test_offloaded_weights_count() -> None:
    """accelerate leaves empty tensors in the model and the values in a map beside it."""

    def offloaded(change: float = 0.0) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[1].weight.data[1, 2] += change
        return cpu_offload(model, "cpu")

    assert offloaded()[1].weight.is_meta
    assert digest_weights([offloaded()]) == digest_weights([offloaded()])
    assert digest_weights([offloaded()]) != digest_weights([offloaded(1.0)])


@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
def test_state_of_adapters_counts(config: type) -> None:
    """On, off, merged."""
    options = {"feedforward_modules": []} if config is IA3Config else {}
    model = get_peft_model(build()[0], config(target_modules=["q_proj"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "ia3" in name:
            nn.init.normal_(parameter)
    prints = [digest_weights([model])]
    with model.disable_adapter():
        prints.append(digest_weights([model]))
    assert digest_weights([model]) == prints[0]
    model.merge_adapter()
    prints.append(digest_weights([model]))
    assert len(set(prints)) == 3


class Slow:
    """A tokenizer in Python, whose merges stand beside its vocabulary."""

    chat_template = None

    def __init__(self, merges: str) -> None:
        self.merges = merges

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}

    def save_vocabulary(self, folder: str) -> None:
        Path(folder, "merges.txt").write_text(self.merges)


def test_merges_of_slow_tokenizers_count() -> None:
    assert describe_tokenizer(Slow("a b")) == describe_tokenizer(Slow("a b"))
    assert describe_tokenizer(Slow("a b")) != describe_tokenizer(Slow("b a"))


def test_descriptions_tell_values_apart() -> None:
    groups = [
        [torch.float16, torch.bfloat16],
        [torch.device("cpu"), torch.device("cuda")],
        [np.zeros(3), np.ones(3), np.zeros((3, 1)), np.zeros(3, "float32")],
        [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")],
        [b"a", b"b"],
        [{"a", "b"}, {"a", "c"}],
        [Path("a"), Path("b")],
        [torch.zeros(40), torch.zeros(40).index_fill(0, torch.tensor([7]), 1e-9)],
        [build, clip_tokenizer],
    ]
    for group in groups:
        described = [repr(describe(value)) for value in group]
        assert len(set(described)) == len(group), group
        assert described == [repr(describe(copy.deepcopy(value))) for value in group]
    assert describe(object()) == describe(object())  # no place in memory


def test_descriptions_are_the_same_in_every_process() -> None:
    code = (
        "from bt_hf.data.fingerprint import describe, describe_tokenizer, digest_weights\n"
        "from tiny_models import build\n"
        "model, processor = build()\n"
        "print(digest_weights([model]), describe(model), describe({'a', 'b', 'c'}), describe_tokenizer(processor),"
        " describe(processor.image_processor.to_dict()))"
    )
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(1 + hash("a") % 1000),  # another one than here
        "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests" / "support"))),
    }
    other = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(code, {})
    assert other.stdout == here.getvalue()
    assert len(other.stdout) > 100


def test_tokens_without_padding() -> None:
    tokenizer = clip_tokenizer()
    plain, spaced, longer = tokenize_plainly(tokenizer, ["A red apple", " a  red\tapple ", "a " * 40])
    assert plain == spaced
    assert len(longer) == 42
    assert len(tokenize_plainly(tokenizer, ["a " * 40], 16)[0]) == 16
    assert tokenize_plainly(build()[1], ["A red apple"]) == [plain]
