"""Publishing what was meant and no more: texts in any spelling, pictures, columns, and files that are none."""

import io
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from bt_hf import push_adapter
from bt_hf.hub.card_sections import plain_line
from bt_hf.hub.pairs import publishable_pairs
from bt_hf.hub.privacy import check_text, plain_picture
from hub_published import BASE, TASTE
from hub_server import Hub
from tiny_models import picture, red_pairs

pytest_plugins = ["hub_fixtures"]
TOKENS = {
    "hf": "hf_abcdefghijklmnopqrstuvwxyz",
    "github": "ghp_" + "a1" * 18,
    "github, fine": "github_pat_" + "a1" * 20,
    "gitlab": "glpat-" + "a1" * 10,
    "openai": "sk-proj-" + "a1" * 12,
    "aws": "AKIA" + "A1" * 8,
    "google": "AIza" + "a1" * 18,
    "slack": "xoxb-123456789012-abc",
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0",
    "key": "-----BEGIN RSA PRIVATE KEY-----",
}
SECRETS = {
    "password": "password=hunter2",
    "Password:": "Password: hunter2",
    "pwd": "PWD=x1",
    "passphrase": "passphrase = 'correct horse'",
    "api key": "api_key: abc",
    "secret key": "aws_secret_key=abc",
    "access token": "access_token=abc",
    "user and password": "user:pw@host",
    "url with a password": "https://me:hunter2@example.org/x",
    "database": "postgres://me:pw@db.local:5432/x",
    "home": "~/clicks/mine",
    "home of somebody": "~me/clicks",
    "linux": "/home/me/clicks",
    "mac": "/Users/me/clicks",
    "root": "/root/x",
    "disk": "/mnt/data",
    "volume": "/Volumes/USB/x",
    "any path": "/data/me/clicks",
    "windows": "C:\\Users\\me\\clip",
    "windows, slashes": "C:/Users/me/clip",
    "other drive": "D:\\data\\clip\\x",
    "share": "\\\\server\\share",
    "share, longer": "see \\\\nas-1.local\\photos$\\me",
    "file url": "file:///etc/passwd",
    "variable": "$HOME/clicks",
    "windows variable": "%USERPROFILE%\\x",
}
SPELLINGS = {
    "plain": lambda text: text,
    "markdown": plain_line,
    "every sign escaped": lambda text: "".join(
        f"\\{sign}" if not sign.isalnum() and sign != " " else sign for sign in text
    ),
    "html": lambda text: text.replace("_", "&#95;").replace("/", "&#47;").replace(":", "&#58;").replace("=", "&#x3d;"),
    "in a sentence": lambda text: f'so I wrote "{text}" there',
    "unseen spaces": lambda text: text[:2] + "\u200b" + text[2:],
    "wide": lambda text: "".join(
        chr(ord(sign) + 0xFEE0) if sign.isalnum() and sign.isascii() else sign for sign in text
    ),
}
HARMLESS = [
    "a red apple", "two/three apples", "and/or", "me/my-taste", "https://huggingface.co/me/my-taste/tree/main",
    "at 12:30", "a ~ b", "~5 apples", "mailto:me@example.org", "a:b", "C: drive", "token: a word", "pad_token=[PAD]",
    "eos_token=</s>", "the password is secret", "half-price 50%", "<|endoftext|>", "x = y / z", "logit\\_scale",
    "![picture](before_after.png)", "1e-4", "`text_projection`, `visual_projection`", "- time of the steps: 3 s",
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", [*TOKENS, *SECRETS])
def test_every_spelling_of_a_secret_is_found(kind: str, spelling: str) -> None:
    secret = {**TOKENS, **SECRETS}[kind]
    text = SPELLINGS[spelling](secret)
    with pytest.raises(ValueError, match="^it (contains what looks like a|names a path of this machine)") as caught:
        check_text(text, "it")
    assert "\n" not in str(caught.value)
    assert kind not in TOKENS or secret not in str(caught.value)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_pass(text: str) -> None:
    check_text(text, "it")
    check_text(plain_line(text), "it")


def test_long_texts_take_no_time() -> None:
    started = time.monotonic()
    for piece in ("a", "eyJ-", "/a", "a:", "<!-- begin summary", "\\", "~", "C:\\", "password", "&#", "%",
                  "-----BEGIN ", "sk-", " ", "a:b@", "\\\\a\\", "x=", "hf_", "$", "\n"):  # fmt: skip
        try:
            check_text(piece * (100_000 // len(piece)), "it")
        except ValueError:
            continue
    assert time.monotonic() - started < 20


PLACES = [
    "prompt",
    "card",
    "config",
    "processor",
    "tokenizer",
    "weights",
    "nested",
    "message",
    "tag",
    "branch",
    "vocab",
]


@pytest.mark.parametrize("place", PLACES)
def test_every_text_that_leaves_is_checked(hub: Hub, online: Path, bases: None, copied: Path, place: str) -> None:
    secret, options = TOKENS["hf"], {}
    weights = copied / "adapter_model.safetensors"
    if place == "prompt":
        pairs = red_pairs(2)
        options["pairs"] = Dataset.from_dict({**pairs[:], "prompt": ["a", secret]}, features=pairs.features)
    elif place == "card":
        (copied / "README.md").write_text((copied / "README.md").read_text() + f'\n"{plain_line(secret)}"\n')
    elif place in ("config", "processor", "tokenizer"):
        name = {"config": "adapter_config.json", "processor": "processor_config.json"}.get(
            place, "tokenizer_config.json"
        )
        known = json.loads((copied / name).read_text()) if (copied / name).exists() else {}
        key = "base_model_name_or_path" if place == "config" else "name"
        escaped = json.dumps({**known, key: "SECRET"}).replace("SECRET", "".join(f"\\u{ord(c):04x}" for c in secret))
        (copied / name).write_text(escaped)
    elif place == "weights":
        save_file(load_file(weights), weights, metadata={"format": "pt", "note": secret})
    elif place == "nested":
        save_file(load_file(weights), weights, metadata={"format": "pt", "note": json.dumps({"a": {"b": [secret]}})})
    elif place == "vocab":
        (copied / "vocab.txt").write_text(f"a\n{secret}\n")
    else:
        options[{"message": "commit_message", "tag": "tag", "branch": "revision"}[place]] = secret
    with pytest.raises(ValueError, match="contains what looks like a token") as caught:
        push_adapter(copied, TASTE, **{"base_model": None if place == "config" else BASE, **options})
    assert "\n" not in str(caught.value)
    assert secret not in str(caught.value)
    assert hub.state(TASTE) is None


@pytest.mark.parametrize(
    "name", ["vocab.txt", "reliability.png", "README.md", "adapter_model.safetensors", "merges.txt"]
)
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "folder", "socket", "link to a folder"])
def test_other_files_than_regular_ones_are_refused(
    hub: Hub, online: Path, bases: None, copied: Path, tmp_path: Path, monkeypatch, name: str, kind: str
) -> None:
    (tmp_path / "private").write_text("mine")
    (copied / name).unlink(missing_ok=True)
    monkeypatch.chdir(copied)
    if kind.startswith("link"):
        target = {"link": "private", "link to nothing": "nothing", "link to a folder": "."}[kind]
        (copied / name).symlink_to(tmp_path / target)
    elif kind == "pipe":
        os.mkfifo(copied / name)
    elif kind == "folder":
        (copied / name).mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    with pytest.raises(ValueError, match=f"{name} of .* is not a regular file") as caught:
        push_adapter(copied, TASTE, base_model=BASE)
    assert "\n" not in str(caught.value)
    assert hub.state(TASTE) is None


def with_secrets(form: str) -> bytes:
    """A picture that holds more than its pixels."""
    buffer, shown = io.BytesIO(), picture((200, 30, 30))
    exif = Image.Exif()
    exif[0x010E] = "secret of EXIF"
    exif.get_ifd(0x8825)[2] = (47.0, 22.0, 10.0)  # latitude
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "secret of a chunk")
    texts.add_itxt("note", "secret of a packed chunk", zip=True)
    options = {"pnginfo": texts} if form == "PNG" else {"comment": b"secret of a comment"}
    shown.save(buffer, form, exif=exif, icc_profile=b"secret of a profile" * 9, **options)
    return buffer.getvalue() + b"secret behind the end"


def test_pictures_go_out_as_pixels(hub: Hub, online: Path, bases: None, copied: Path) -> None:
    (copied / "reliability.png").write_bytes(with_secrets("PNG"))
    push_adapter(copied, TASTE, base_model=BASE)
    sent = hub.files(TASTE)["reliability.png"]
    assert b"secret" not in sent
    opened = Image.open(io.BytesIO(sent))
    assert not opened.info
    assert not opened.getexif()
    assert np.array_equal(np.asarray(opened), np.asarray(picture((200, 30, 30))))
    assert push_adapter(copied, TASTE, base_model=BASE).oid == hub.repos[TASTE].branches["main"]


@pytest.mark.parametrize("content", [b"", b"mine", b"\x89PNG\r\n\x1a\n", "JPEG", "GIF", "cut", "huge"])
def test_a_png_that_is_none_stays_here(copied: Path, content: bytes | str) -> None:
    if content in ("JPEG", "GIF"):
        buffer = io.BytesIO()
        picture((1, 2, 3)).save(buffer, content)
        content = buffer.getvalue()
    elif content == "cut":
        content = with_secrets("PNG")[:-400]
    elif content == "huge":
        buffer = io.BytesIO()
        Image.new("1", (9000, 9000)).save(buffer, "PNG")
        content = buffer.getvalue()
    with pytest.raises(ValueError, match="reliability.png is not a PNG that can be published") as caught:
        plain_picture(content, "reliability.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_every_mode_keep_their_pixels(mode: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((8, 8), 60).convert(mode).save(buffer, "PNG")
    before = Image.open(io.BytesIO(buffer.getvalue()))
    after = Image.open(io.BytesIO(plain_picture(buffer.getvalue(), "x.png")))
    if mode != "I;16":
        assert np.array_equal(np.asarray(before.convert("RGBA")), np.asarray(after.convert("RGBA")))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pairs_go_out_as_columns_of_the_contract(
    hub: Hub, online: Path, bases: None, copied: Path, tmp_path: Path, form: str
) -> None:
    content = with_secrets(form) if form != "WEBP" else with_secrets("JPEG")
    path = tmp_path / "secret-name.png"
    path.write_bytes(content)
    rows = {
        "prompt": ["a red apple", "two"],
        "chosen": [{"bytes": content, "path": "/home/me/secret.png"}, {"bytes": None, "path": str(path)}],
        "rejected": [{"bytes": content, "path": "secret.png"}] * 2,
        "preference": [1.0, 0.5],
        "email": ["secret@example.org"] * 2,
        "clicked_at": ["secret time"] * 2,
    }
    features = {name: Value("string") for name in ("prompt", "email", "clicked_at")}
    features |= {"chosen": ImageColumn(), "rejected": ImageColumn(), "preference": Value("float32")}
    pairs = Dataset.from_dict(rows, features=Features(features))
    push_adapter(copied, TASTE, base_model=BASE, pairs=pairs)
    sent = hub.files(TASTE)["pairs.parquet"]
    table = pq.read_table(io.BytesIO(sent))
    assert table.column_names == ["prompt", "chosen", "rejected", "preference"]
    stored = [cell for name in ("chosen", "rejected") for cell in table[name].to_pylist()]
    assert all(b"secret" not in cell["bytes"] and cell["path"] is None for cell in stored)
    assert b"secret" not in json.dumps({str(k): str(v) for k, v in (table.schema.metadata or {}).items()}).encode()
    assert not any(Image.open(io.BytesIO(cell["bytes"])).getexif() for cell in stored)
    assert b"secret" not in hub.everything()


def test_clips_are_published_as_first_frames_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    clip = io.BytesIO()
    frames[0].save(clip, "PNG", save_all=True, append_images=frames[1:])
    still = io.BytesIO()
    frames[1].save(still, "PNG")
    rows = {"prompt": ["a"], "chosen": [{"bytes": clip.getvalue()}], "rejected": [{"bytes": still.getvalue()}]}
    features = Features({"prompt": Value("string"), "chosen": ImageColumn(), "rejected": ImageColumn()})
    published = publishable_pairs(Dataset.from_dict(rows, features=features))[0]
    assert published["chosen"].n_frames == 1
    assert published["chosen"].getpixel((0, 0)) == (255, 0, 0)
    assert "1 images of `pairs` are clips, of which the first frames are published" in caplog.text
