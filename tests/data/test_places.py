"""Data stays in its folder: whatever leads out of it is a bad row, and only regular files are opened."""

import base64
import json
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value

from bt_hf.data import images as images_module
from bt_hf.data.formats import PreferenceDataError
from bt_hf.data.images import to_rgb
from bt_hf.data.pairs import load_preference_pairs
from tiny_images import png


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two images, and a private one beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "private.png").write_bytes(png("lime"))
    (tmp_path / "data-private").mkdir()
    (tmp_path / "data-private" / "a.png").write_bytes(png("lime"))
    (folder / "a.png").write_bytes(png("red"))
    (folder / "b.png").write_bytes(png("blue"))
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    (folder / "inner.png").symlink_to(folder / "a.png")
    (folder / "out").symlink_to(tmp_path)
    return folder


def write(folder: Path, kind: str, value: str, form: str) -> Path:
    """One good row and one whose chosen image is `value`."""
    rows: list[dict[str, Any]] = [
        {"prompt": "good", "chosen": "a.png", "rejected": "b.png"},
        {"prompt": "bad", "chosen": value, "rejected": "b.png"},
    ]
    if form == "ranking":
        rows = [{"prompt": row["prompt"], "image": [row["chosen"], row["rejected"]], "rank": [1, 2]} for row in rows]
    elif form == "one image a row":
        rows = [
            {"prompt": row["prompt"], "image": row[side], "rank": rank}
            for row in rows
            for rank, side in enumerate(("chosen", "rejected"))
        ]
    elif form == "structs":
        rows = [row | {"chosen": {"path": row["chosen"]}} for row in rows]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    elif kind == "Image of parquet":
        features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
        if form == "ranking":
            features = Features({"prompt": Value("string"), "image": List(Image()), "rank": List(Value("int64"))})
        elif form == "one image a row":
            features = Features({"prompt": Value("string"), "image": Image(), "rank": Value("int64")})
        import pyarrow.parquet as pq

        rows = [{k: v["path"] if isinstance(v, dict) else v for k, v in row.items()} for row in rows]
        pq.write_table(Dataset.from_list(rows, features=features).data.table, folder / "metadata.parquet")
    return folder


OUTSIDE = [
    "../private.png",
    "{parent}/private.png",
    "a/../../private.png",
    "link.png",
    "out/private.png",
    "../data-private/a.png",
    "./../private.png",
    "{folder}/../private.png",
]
ADDRESSES = [
    "http://127.0.0.1:1/a.png",
    "HTTPS://127.0.0.1:1/a.png",
    "file://{parent}/private.png",
    "local://{parent}/private.png",
    "zip://a.png::http://127.0.0.1:1/a.zip",
    "simplecache::http://127.0.0.1:1/a.png",
    "zip://a.png::{parent}/a.zip",
    "ftp://127.0.0.1/a.png",
    "s3://bucket/a.png",
    "hf://datasets/some/one/a.png",
    "//127.0.0.1/share/a.png",
    "\\\\127.0.0.1\\share\\a.png",
    "reference://::http://127.0.0.1:1/a",
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["pairs", "structs", "ranking", "one image a row"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "Image of parquet"])
def test_what_leads_out_is_a_bad_row(folder: Path, kind: str, form: str, streaming: bool, no_network: None) -> None:
    # Each value for all kinds of files would take a minute; links and `..` differ from addresses alone.
    for value in ("link.png", "zip://a.png::http://127.0.0.1:1/a.zip"):
        write(folder, kind, value, form)
        with pytest.raises(PreferenceDataError, match=r"row \d of [\w.]+: image (outside the folder|at an address): "):
            list(load_preference_pairs(folder, streaming=streaming))
        kept = list(load_preference_pairs(folder, streaming=streaming, on_bad_rows="drop"))
        assert [row["prompt"] for row in kept] == ["good"]


@pytest.mark.parametrize("value", OUTSIDE + ADDRESSES)
def test_every_way_out(folder: Path, value: str, no_network: None) -> None:
    value = value.format(parent=folder.parent, folder=folder)
    write(folder, "jsonl", value, "pairs")
    with pytest.raises(
        PreferenceDataError, match="row 1 of data: image (outside the folder|at an address|file missing)"
    ) as caught:
        load_preference_pairs(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*arguments: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize("value", ["a.png", "./a.png", "x/../a.png", "inner.png", "{folder}/a.png", "out/data/a.png"])
def test_paths_inside_load(folder: Path, value: str) -> None:
    (folder / "x").mkdir()
    write(folder, "jsonl", value.format(folder=folder), "pairs")
    assert len(load_preference_pairs(folder)) == 2
    assert len(load_preference_pairs(os.path.relpath(folder))) == 2


def test_a_snapshot_of_the_hub_is_links_to_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--me--x" / "snapshots" / "abc", tmp_path / "datasets--me--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("a", "b"):
        (blobs / name).write_bytes(png({"a": "red", "b": "blue"}[name]))
        (snapshot / f"{name}.png").symlink_to(f"../../blobs/{name}")
    (blobs / "m").write_text('{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}')
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/m")
    assert len(load_preference_pairs(snapshot)) == 1


def test_metadata_that_is_a_link_out_is_refused(folder: Path) -> None:
    (folder.parent / "secret").write_text('{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}')
    (folder / "metadata.jsonl").symlink_to(folder.parent / "secret")
    with pytest.raises(PreferenceDataError, match=r"metadata\.jsonl is a link out of the folder"):
        load_preference_pairs(folder)


def test_bytes_win_over_a_path(folder: Path) -> None:
    # `datasets` itself prefers the file, if there is one, and drops the bytes.
    image = {"bytes": png("red"), "path": str(folder.parent / "private.png")}
    rows = [{"prompt": "x", "image": [image, {"bytes": png("blue"), "path": None}], "rank": [1, 2]}]
    Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    for streaming in (False, True):
        (row,) = load_preference_pairs(folder, streaming=streaming)
        assert to_rgb(row["chosen"]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_only_regular_files_are_opened(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, listener = folder / "odd.png", socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "socket":
        monkeypatch.chdir(folder)  # such addresses are short
        listener.bind("odd.png")
    elif kind == "folder":
        odd.mkdir()
    elif kind == "device":
        try:
            os.mknod(odd, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (opened.append(path), real(path, *rest))[1])
    write(folder, "jsonl", "odd.png", "pairs")
    with listener:
        with pytest.raises(
            PreferenceDataError, match=r"row 1 of data: unreadable image: chosen '.*odd\.png' is not a regular"
        ):
            load_preference_pairs(folder)
        with pytest.raises(ValueError, match="not a regular file"):
            to_rgb(odd)
    assert not any("odd" in str(path) for path in opened)


@pytest.mark.parametrize("name", ["metadata.jsonl", "pairs.csv", "pairs.parquet"])
def test_a_fifo_as_the_data_is_refused(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    with pytest.raises(PreferenceDataError, match="regular file"):
        load_preference_pairs(folder / name)
    if name != "pairs.parquet":
        with pytest.raises(PreferenceDataError, match="regular file"):
            load_preference_pairs(folder)


@pytest.mark.parametrize("format", ["EPS", "PDF", "PCX", "SGI", "XBM", "SPIDER", "MSP", "DDS"])
def test_formats_are_listed(folder: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        content = png("red", (8, 8), format)
    except OSError:
        from PIL import Image as PILImage

        mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}[format]
        PILImage.new(mode, (8, 8)).save(folder / "x", format)
        content = (folder / "x").read_bytes()
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    (folder / "a.png").write_bytes(content)
    for value in (content, folder / "a.png", "data:image/png;base64," + base64.b64encode(content).decode()):
        with pytest.raises(ValueError, match="unreadable image: .*of a format other than AVIF, BMP"):
            to_rgb(value)
    data = {
        "prompt": ["x"],
        "chosen": [{"bytes": content, "path": None}],
        "rejected": [{"bytes": png("red"), "path": None}],
    }
    with pytest.raises(PreferenceDataError, match="row 0 of the dataset: unreadable image: chosen"):
        load_preference_pairs(Dataset.from_dict(data))


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000", "AVIF", "MPO"]
)
def test_formats_of_the_list_are_read(format: str) -> None:
    from PIL import Image as PILImage

    PILImage.init()
    if format not in PILImage.SAVE:
        pytest.skip(f"Pillow without {format}")
    content = png("red", (16, 16), format)
    for value in (content, base64.b64encode(content).decode(), {"bytes": content, "path": "a.eps"}):
        assert to_rgb(value).size == (16, 16)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (33, 1), (2, 65)])
def test_extreme_aspect_ratios_are_refused_before_decoding(size: tuple[int, int]) -> None:
    from PIL import Image as PILImage

    for value in (png("red", size), PILImage.new("RGB", size)):
        with pytest.raises(ValueError, match=f"image too narrow: .*{size[0]}x{size[1]} pixels.* 32 times"):
            to_rgb(value)
    assert images_module.MAX_ASPECT_RATIO == 32
    assert to_rgb(png("red", (32, 1))).size == (32, 1)


def test_long_values_make_short_messages(folder: Path) -> None:
    for value in (
        "x" * 10**6,
        "data:image/png;base64," + "A" * 10**6,
        "http://a.example/" + "y" * 10**6,
        "../" * 10**5,
        "iVBORw0KGgo" + "A" * 10**6,
    ):
        write(folder, "jsonl", value, "pairs")
        started = time.monotonic()
        with pytest.raises(PreferenceDataError, match="row 1 of data: ") as caught:
            load_preference_pairs(folder)
        assert len(str(caught.value)) < 500
        assert time.monotonic() - started < 2
    for columns in ({"prompt": ["x"], "preference": [10.0**300]}, {"prompt": [" " * 10**6]}):
        rows = {"chosen": [png("red")], "rejected": [png("blue")]} | columns
        with pytest.raises(PreferenceDataError) as caught:
            load_preference_pairs(Dataset.from_dict(rows))
        assert len(str(caught.value)) < 500
