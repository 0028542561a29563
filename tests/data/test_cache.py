"""The cache's files: damaged ones are told and built anew, what is in place is on the disk, formats don't count."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from bt_hf.data import verified
from bt_hf.data.cache import can_be_cached, encode_once, read_tensors, without_format
from bt_hf.data.images import to_rgb
from tiny_models import red_pairs

SIDES = ("chosen", "rejected")


class Encoder:
    """Encodes images to their mean colour and prompts to their length, and counts."""

    def __init__(self) -> None:
        self.images = self.prompts = 0

    def encode_images(self, images: list[Any], names: list[str]) -> dict[str, torch.Tensor]:
        self.images += len(images)
        pixels = [to_rgb(image).resize((1, 1)).getpixel((0, 0)) for image in images]
        return {"mean": torch.tensor([[float(sum(pixel))] for pixel in pixels])}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.prompts += len(prompts)
        return {"length": torch.tensor([float(len(" ".join(prompt.split()))) for prompt in prompts])}

    def tokens_of(self, prompts: list[str]) -> list[bytes]:
        return [" ".join(prompt.lower().split()).encode() for prompt in prompts]

    def run(self, pairs: Dataset, folder: Path) -> dict[str, torch.Tensor]:
        """Encode, and return what each row finds."""
        rows, images, prompts = encode_once(
            pairs, SIDES, self.encode_images, self.encode_prompts, "model", str(folder), "test", self.tokens_of
        )
        found = {name: read_tensors(images, rows[name][:])["mean"] for name in SIDES}
        return {**found, "prompt": read_tensors(prompts, rows["condition"][:])["length"]}


@pytest.fixture
def pairs(tmp_path: Path) -> Dataset:
    """On the disk, so that digests of the rows are kept too."""
    red_pairs(12).save_to_disk(tmp_path / "pairs")
    return Dataset.load_from_disk(str(tmp_path / "pairs"))


def flip(place: float) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        at = int(place * (len(content) - 64))
        return content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 64]) + content[at + 64 :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first block": flip(0),
    "a block in the middle": flip(0.5),
    "last block": flip(1),
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "cut in half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("kind", ["images", "prompts", "digests"])
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *((".arrow", damage) for damage in DAMAGES),
        *((".sha256", damage) for damage in ("first block", "zeros", "empty")),
    ],
)
def test_damaged_files_are_built_anew(
    suffix: str, kind: str, damage: str, pairs: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Encoder().run(pairs, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(f"*/{kind}{suffix}")
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    again = Encoder()
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        found = again.run(pairs, tmp_path / "cache")
    assert [record.getMessage() for record in caplog.records if f"{kind}.arrow' is damaged" in record.getMessage()]
    assert (again.images > 0, again.prompts > 0) == (kind == "images", kind == "prompts")  # nothing else
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert path.read_bytes() == whole
    caplog.clear()
    last = Encoder()
    last.run(pairs, tmp_path / "cache")
    assert (last.images, last.prompts, caplog.text) == (0, 0, "")


@pytest.mark.parametrize("missing", [".arrow", ".sha256"])
def test_lost_files_are_built_anew(missing: str, pairs: Dataset, tmp_path: Path) -> None:
    expected = Encoder().run(pairs, tmp_path / "cache")
    for path in (tmp_path / "cache").glob(f"*/*{missing}"):
        path.unlink()
    found = Encoder().run(pairs, tmp_path / "cache")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_are_synced_before_they_are_moved(
    pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a name may otherwise stand for a file without content."""
    events: list[tuple[str, str]] = []
    synced, replaced = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        synced(handle)

    def replace(path: Path, target: Path) -> Path:
        events.append(("move", Path(target).name))
        return replaced(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    Encoder().run(pairs, tmp_path / "cache")
    for kind in ("digests", "images", "prompts"):
        (folder,) = {path.parent.name for path in (tmp_path / "cache").glob(f"*/{kind}.arrow")}
        own = [event for event in events if event[1].startswith(kind) or event[1] == folder]
        assert own == [
            *(("sync", f"{kind}.part"), ("sync", f"{kind}.sha256.part")),
            *(("move", f"{kind}.sha256"), ("move", f"{kind}.arrow"), ("sync", folder)),
        ]


@pytest.mark.parametrize("moment", range(8))
def test_a_kill_at_any_moment_leaves_what_can_be_used(
    moment: int, pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill does: nothing runs after it, not even the tidying up."""
    left = [moment]

    class Killed(BaseException):
        pass

    def killing(function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(verified, "sync", killing(verified.sync))
        patch.setattr(Path, "replace", killing(Path.replace))
        patch.setattr(Path, "unlink", lambda *args, **options: None)
        with pytest.raises(Killed):
            Encoder().run(pairs, tmp_path / "cache")
    expected = Encoder().run(pairs, tmp_path / "other")
    found = Encoder().run(pairs, tmp_path / "cache")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.suffix for path in (tmp_path / "cache").glob("*/*")} == {".arrow", ".lock", ".sha256"}


@pytest.mark.parametrize("name", ["numpy", "torch", "arrow", "pandas", "python"])
def test_a_format_changes_no_key(name: str, pairs: Dataset, tmp_path: Path) -> None:
    expected = Encoder().run(pairs, tmp_path / "cache")
    again = Encoder()
    for formatted in (pairs.with_format(name), pairs.with_format(name, columns=["prompt"])):
        found = again.run(formatted, tmp_path / "cache")
        assert all(torch.equal(found[column], expected[column]) for column in expected)
        assert without_format(formatted)[0]["prompt"] == pairs[0]["prompt"]
    assert (again.images, again.prompts) == (0, 0)


def test_a_transform_is_not_frozen(pairs: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformed = pairs.with_transform(lambda batch: batch)
    assert not can_be_cached(transformed)
    assert "has a transform (`with_transform`)" in caplog.text
    assert without_format(transformed).format["type"] == "custom"
    with pytest.raises(ValueError, match="Rows of a dataset with a transform can't be cached"):
        Encoder().run(transformed, tmp_path / "cache")
    assert can_be_cached(pairs.with_format("numpy"))
    assert not can_be_cached(pairs.to_iterable_dataset())


def test_prompts_of_the_same_tokens_are_encoded_once(tmp_path: Path) -> None:
    pairs = red_pairs(4)
    texts = ["A red apple", "a boat", " a  red apple ", "a red APPLE"]
    pairs = pairs.remove_columns("prompt").add_column("prompt", texts)
    own = Encoder()
    found = own.run(pairs, tmp_path)
    assert own.prompts == 2 + 1  # the first once more to learn its shape
    assert found["prompt"].tolist() == [11, 6, 11, 11]


def test_work_grows_with_the_number_of_prompts(tmp_path: Path) -> None:
    """2,000 distinct prompts: each is tokenized and encoded once."""
    pairs = red_pairs(2)
    rows = {name: [pairs[0][name]] * 2000 for name in SIDES}
    pairs = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(2000)], **rows}, pairs.features)
    own = Encoder()
    asked: list[str] = []
    tokens_of = own.tokens_of
    own.tokens_of = lambda prompts: (asked.extend(prompts), tokens_of(prompts))[1]
    own.run(pairs, tmp_path)
    assert len(asked) == 2000
    assert own.prompts == 2000 + 2  # two files, each with the first once more
    assert own.images == 2 + 1
