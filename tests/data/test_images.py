"""`to_rgb` against pixel values worked out by hand."""

import base64
import io
import warnings
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image

from bt_hf.data.images import to_frames, to_rgb


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_every_kind_of_value_gives_the_same_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    path = tmp_path / "a.png"
    values = [image, array, data, bytearray(data), path, str(path), base64.b64encode(data).decode()]
    values += [
        f"data:image/png;base64,{values[-1]}",
        f"data:,{quote_from_bytes(data)}",
        base64.encodebytes(data).decode(),
    ]
    values += [base64.urlsafe_b64encode(data).decode().rstrip("="), {"bytes": None, "path": values[-1]}]
    values += [{"bytes": data, "path": None}, {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    for value in values:
        assert np.array_equal(np.asarray(to_rgb(value)), array)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 3), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 3), (0, 0, 0, 51)), (204, 204, 204)),  # 255 * (1 - 51/255)
        (Image.new("LA", (2, 3), (0, 0)), (255, 255, 255)),
        (Image.new("1", (2, 3), 1), (255, 255, 255)),
        (Image.new("L", (2, 3), 77), (77, 77, 77)),
        (Image.new("CMYK", (2, 3), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (2, 3), 65535), (255, 255, 255)),
        (Image.new("I;16", (2, 3), 257 * 100), (100, 100, 100)),
        (Image.new("I;16B", (2, 3), 257 * 100), (100, 100, 100)),
        (Image.new("I", (2, 3), 257 * 100), (100, 100, 100)),
        (Image.new("F", (2, 3), 0.2), (51, 51, 51)),
        (Image.new("F", (2, 3), 200.0), (200, 200, 200)),
    ],
)
def test_modes(image, expected):
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size, rgb.getpixel((1, 2))) == ("RGB", (2, 3), expected)


def test_16_bit_png_file_is_scaled_not_clipped():
    values = np.array([[0, 257 * 64, 257 * 128, 65535]], dtype=np.uint16)
    rgb = to_rgb(encoded(Image.fromarray(values)))
    assert np.asarray(rgb)[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparent_colour_of_a_png_becomes_white(mode):
    image = Image.new("P", (2, 1), 0) if mode == "P" else Image.new(mode, (2, 1), "black")
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), {"P": 1, "L": 200, "RGB": (200, 0, 0)}[mode])
    rgb = to_rgb(encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0))
    right = {"P": (255, 0, 0), "L": (200, 200, 200), "RGB": (200, 0, 0)}[mode]
    assert [rgb.getpixel((0, 0)), rgb.getpixel((1, 0))] == [(255, 255, 255), right]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), "blue")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by 90 degrees clockwise: top left goes to top right
    rgb = to_rgb(encoded(image, exif=exif))
    assert rgb.size == (2, 4)
    assert rgb.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 1), (3, 2, 2), (3, 2, 4)])
def test_array_shapes(shape):
    assert to_rgb(np.full(shape, 255, dtype=np.uint8)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "image missing"),
        ({"bytes": None, "path": None}, "image missing"),
        ("nowhere/a.png", "image file missing: 'nowhere/a.png'"),
        (b"", "unreadable image: 0 bytes"),
        (b"not an image", "unreadable image"),
        (3, "found int"),
        (np.zeros((2, 2, 3), dtype=np.float32), "found float32"),
        (np.zeros((3, 2, 5), dtype=np.uint8), "found uint8"),
        (Image.new("F", (1, 1), float("nan")), "expected 0 to 255"),
        (Image.new("F", (1, 1), 300.0), "expected 0 to 255"),
    ],
)
def test_errors_are_one_line(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_rgb(value)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise, format)
        with pytest.raises(ValueError, match="unreadable image"):
            to_rgb({"bytes": data[: len(data) // 2], "path": "half.img"})


@pytest.mark.parametrize("pixels", [150, 1000])  # PIL warns above 100 and raises above 200
def test_decompression_bombs_are_refused_and_settings_stay(monkeypatch, pixels):
    data = encoded(Image.new("RGB", (pixels // 10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    filters = list(warnings.filters)
    with pytest.raises(ValueError, match="image too large.*MAX_IMAGE_PIXELS = 100"):
        to_rgb(data)
    assert warnings.filters == filters
    assert Image.MAX_IMAGE_PIXELS == 100


def test_frames_of_clips() -> None:
    shown = [Image.new("RGB", (8, 6), (40 * index, 0, 0)) for index in range(5)]
    buffer = io.BytesIO()
    shown[0].save(buffer, "WEBP", save_all=True, append_images=shown[1:], lossless=True)
    clip = buffer.getvalue()
    for source in (clip, {"bytes": clip, "path": None}, Image.open(io.BytesIO(clip))):
        found = to_frames(source)
        assert [frame.getpixel((0, 0))[0] for frame in found] == [0, 40, 80, 120, 160]
        assert len(to_frames(source, 3)) == 3
        assert to_rgb(source).tobytes() == found[0].tobytes()
    still = np.zeros((4, 4, 3), dtype=np.uint8)
    assert len(to_frames(still)) == 1
    with pytest.raises(ValueError, match="row 3: clip too short: 5 frames, and 9 are asked for"):
        to_frames(clip, 9, "row 3")
    with pytest.raises(ValueError, match="clip too short: 1 frame, and 2"):
        to_frames(still, 2)


def test_a_clip_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(5)]
    buffer = io.BytesIO()
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert len(to_frames(buffer.getvalue(), 3)) == 3
    with pytest.raises(ValueError, match=r"image too large: .* pixels in 4 frames; make it smaller or shorter"):
        to_frames(buffer.getvalue(), 4)
