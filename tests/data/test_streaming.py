"""Streams of files: every row once, whoever reads, and files that can't be read."""

import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader

from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.pairs import load_preference_pairs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, sizes: Iterable[int]) -> Path:
    """Files of so many rows, whose prompts count through all of them; row groups of 2 rows."""
    folder.mkdir(exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        first += size
        columns = {"prompt": [str(n) for n in numbers]}
        columns |= {"chosen": [png(2 * n) for n in numbers], "rejected": [png(2 * n + 1) for n in numbers]}
        Dataset.from_dict(columns).to_parquet(folder / f"part-{shard}.parquet", batch_size=2)
    return folder


def write_webdataset(folder: Path, sizes: Iterable[int]) -> Path:
    folder.mkdir(exist_ok=True)
    first = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for number in range(first, first + size):
                members = {"chosen.png": png(2 * number), "rejected.png": png(2 * number + 1)}
                members |= {"json": json.dumps({"prompt": str(number), "preference": 0.75}).encode()}
                for name, content in members.items():
                    member = tarfile.TarInfo(f"{number:06d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        first += size
    return folder


WRITERS = {"parquet": write_parquet, "webdataset": write_webdataset}


def numbers(rows: Iterable[dict]) -> list[int]:
    """The rows' numbers; their images must be those of the same number."""
    found = []
    for row in rows:
        number = int(row["prompt"])
        for side, name in enumerate(("chosen", "rejected")):
            assert row[name].getpixel((0, 0))[:2] == ((2 * number + side) % 256, (2 * number + side) // 256)
        found.append(number)
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_loaded_and_streamed_are_the_same_rows(kind: str, tmp_path: Path) -> None:
    folder = WRITERS[kind](tmp_path / "data", [3, 2])
    file = next(folder.glob("part-0.*"))
    for source, count in ((folder, 5), (file, 3)):
        loaded, streamed = (load_preference_pairs(source, streaming=streaming) for streaming in (False, True))
        assert numbers(loaded) == numbers(streamed) == list(range(count))
        for row, other in zip(loaded, streamed, strict=True):
            assert row["preference"] == other["preference"] == (0.75 if kind == "webdataset" else 1.0)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("shards", [1, 3, 4], ids="{} shards".format)
def test_processes_and_workers_read_each_row_once(kind: str, shards: int, tmp_path: Path) -> None:
    sizes = [7, 2, 1, 5][:shards]
    pairs = load_preference_pairs(WRITERS[kind](tmp_path / "data", sizes), streaming=True)
    assert isinstance(pairs, IterableDataset)
    assert pairs.num_shards == shards
    assert numbers(pairs) == list(range(sum(sizes)))
    row = next(iter(pairs))
    assert set(row) == {"prompt", "chosen", "rejected", "preference", "weight"}
    assert row["preference"] == (0.75 if kind == "webdataset" else 1.0)
    for workers in (0, 2):
        seen: Counter = Counter()
        for rank in (0, 1):
            mine = split_dataset_by_node(pairs, rank, 2)
            seen.update(numbers(DataLoader(mine, batch_size=None, num_workers=min(workers, mine.num_shards))))
        assert seen == Counter(range(sum(sizes)))


def test_shuffled_passes_differ_and_hold_each_row_once(tmp_path: Path) -> None:
    pairs = load_preference_pairs(write_parquet(tmp_path / "data", [6, 6, 6]), streaming=True)
    pairs = pairs.shuffle(seed=0, buffer_size=4)
    passes = []
    for epoch in (0, 1):
        pairs.set_epoch(epoch)
        passes.append(numbers(pairs))
        assert sorted(passes[-1]) == list(range(18))
    assert passes[0] != passes[1] != list(range(18))


def test_reading_can_go_on_from_a_saved_state(tmp_path: Path) -> None:
    pairs = load_preference_pairs(write_parquet(tmp_path / "data", [5, 5]), streaming=True)
    rows = iter(pairs)
    head = numbers(next(rows) for _ in range(7))
    state = json.loads(json.dumps(pairs.state_dict()))
    again = load_preference_pairs(tmp_path / "data", streaming=True)
    again.load_state_dict(state)
    assert head + numbers(again) == list(range(10))


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "garbage":
        content = bytearray(b"not a file of pairs " * 100)
    elif how == "empty":
        content = bytearray()
    elif how == "cut off":
        content = content[: len(content) // 2]
    elif how == "bytes flipped":
        # The first pages, not the footer that says where they are.
        content[4:120] = bytes(value ^ 0xFF for value in content[4:120])
    file.write_bytes(content)


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("how", ["garbage", "empty", "cut off", "bytes flipped", "gone"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_bad_file_is_named_or_left_out(
    kind: str, how: str, shard: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = WRITERS[kind](tmp_path / "data", [4, 4, 4])
    file = next(folder.glob(f"part-{shard}.*"))
    pairs = None
    if how == "gone":  # after the data was opened, as when a disk goes away
        pairs = {
            policy: load_preference_pairs(folder, streaming=True, on_bad_rows=policy) for policy in ("raise", "drop")
        }
        file.unlink()
    else:
        damage(file, how)

    def read(policy: str) -> list[int]:
        return numbers(pairs[policy] if pairs else load_preference_pairs(folder, streaming=True, on_bad_rows=policy))

    # An archive that ends early is whole but for its last row, which lacks a member.
    torn = (kind, how) == ("webdataset", "cut off")
    expected = f"row 3 of {file.name}" if torn else f"{file.name} cannot be read"
    with pytest.raises(PreferenceDataError, match=rf"{expected}.*on_bad_rows='drop'") as caught:
        read("raise")
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="bt_hf"):
        kept = read("drop")
    lost = set(range(12)) - set(kept)
    assert len(kept) == len(set(kept))
    assert set() < lost <= set(range(4 * shard, 4 * shard + 4))
    message = caplog.records[-1].getMessage()
    assert file.name in message
    assert torn or "1 so far" in message


def test_a_bad_row_is_named_with_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_parquet(tmp_path / "data", [3, 3, 3])
    rows = Dataset.from_parquet(str(folder / "part-1.parquet"), cache_dir=str(tmp_path / "cache")).to_dict()
    rows["chosen"][2] = b"no image"
    Dataset.from_dict(rows).to_parquet(folder / "part-1.parquet")
    pairs = load_preference_pairs(folder, streaming=True)
    loader = DataLoader(split_dataset_by_node(pairs, 1, 3), batch_size=None, num_workers=1)
    with pytest.raises(PreferenceDataError, match="row 2 of part-1.parquet: unreadable image: chosen"):
        list(loader)
    with caplog.at_level(logging.WARNING, logger="bt_hf.data.checks"):
        assert numbers(load_preference_pairs(folder, streaming=True, on_bad_rows="drop")) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert "part-1.parquet: dropping row 2" in caplog.text


def test_rankings_of_one_image_a_row_reach_workers_whole(tmp_path: Path) -> None:
    # A prompt may go on in the next file, so one worker reads them all.
    columns = {"prompt": ["a", "a", "a", "b", "b"], "rank": [1, 2, 3, 1, 2], "image": [png(n) for n in range(5)]}
    data = Dataset.from_dict(columns)
    folder = tmp_path / "data"
    for shard, rows in enumerate(([0, 1], [2, 3, 4])):
        data.select(rows).to_parquet(folder / f"part-{shard}.parquet")
    pairs = load_preference_pairs(folder, streaming=True)
    for workers in (0, 1, 2):
        loader = DataLoader(pairs, batch_size=None, num_workers=workers)
        assert [row["prompt"] for row in loader] == ["a", "a", "a", "b"]
