"""Contact sheet: two rankings or drawings of the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from bt_hf.plots.style import BLUE, FAINT, INK, PathLike


def contact_sheet(
    before: Sequence[Sequence[Image.Image]],
    after: Sequence[Sequence[Image.Image]],
    path: PathLike | None = None,
    prompts: Sequence[str] | None = None,
    columns: int = 8,
    *,
    before_mask: Sequence[Sequence[bool]] | None = None,
    after_mask: Sequence[Sequence[bool]] | None = None,
    mask_label: str = "preferred",
    mask_color: str = BLUE,
    titles: tuple[str, str] = ("before", "after"),
    size: int = 96,
) -> Image.Image:
    """Two rankings of the same images, side by side: a row for each prompt, best image first.

    Args:
        before: For each prompt its images as the base model ranks them.
        after: For each prompt its images as the adapter ranks them.
        path: Where to save the picture, if anywhere. Default None.
        prompts: For each row its text. Default None, no texts.
        columns: Images to show from each ranking, at most. Default 8.
        before_mask: For each image of `before`, whether to frame it. Default None, no frames.
        after_mask: The same for `after`.
        mask_label: What a frame means; stands below the sheet. Default `"preferred"`.
        mask_color: Colour of the frames, as Pillow names them. Default blue.
        titles: Titles of the two blocks. Default `("before", "after")`.
        size: Side of the square that each image is fitted into, in pixels. Default 96.

    Returns:
        The sheet, as an RGB image.

    Raises:
        ValueError: If there are no images, or `before`, `after`, `prompts` and the masks don't line up.

    Example:
        >>> images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
        >>> sheet = contact_sheet([images], [images[::-1]], prompts=["a colour"], after_mask=[[True, False, False]])
        >>> sheet.mode
        'RGB'
    """
    _check_rows(before, after, prompts, before_mask, after_mask)
    shown = [max(min(columns, len(row)) for row in rows) for rows in (before, after)]
    if columns < 1 or min(shown) < 1:
        raise ValueError(f"`before`, `after` and `columns` should leave an image to show, but they leave {shown}.")
    font, bold, gap = _font(size // 7 + 3), _font(size // 7 + 4, bold=True), max(6, size // 10)
    line = round(1.35 * font.size)
    margin, text_width = 2 * gap, 0 if prompts is None else round(1.7 * size)
    cell = size + gap
    lefts = [margin + text_width + (gap if prompts else 0)]
    lefts.append(lefts[0] + shown[0] * cell + 3 * gap)
    top = margin + line + 2 * gap
    framed = before_mask is not None or after_mask is not None
    width = lefts[1] + shown[1] * cell - gap + margin
    height = top + len(before) * cell - gap + margin + (2 * line if framed else 0)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    stroke = gap // 3  # two frames fit between two images, and a gap between the frames

    divider = lefts[1] - 2 * gap
    draw.line([(divider, margin), (divider, top + len(before) * cell - gap)], fill=FAINT, width=max(1, size // 64))
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, margin), title, fill=INK, font=bold)
    for i in range(len(before)):
        y = top + i * cell
        if prompts is not None:
            lines = _wrap(prompts[i], font, text_width, max_lines=size // line)
            text_top = y + (size - line * len(lines)) // 2
            for j, text in enumerate(lines):
                draw.text((margin, text_top + j * line), text, fill=INK, font=font)
        for left, rows, masks in zip(lefts, (before, after), (before_mask, after_mask), strict=True):
            for j, image in enumerate(rows[i][:columns]):
                x = left + j * cell
                fitted = ImageOps.contain(_on_white(image), (size, size), Image.Resampling.LANCZOS)
                sheet.paste(fitted, (x + (size - fitted.width) // 2, y + (size - fitted.height) // 2))
                if masks is not None and masks[i][j]:
                    # Outside the image, in the gap, so that the frame hides nothing.
                    box = (x - stroke, y - stroke, x + size + stroke - 1, y + size + stroke - 1)
                    draw.rectangle(box, outline=mask_color, width=stroke)
    if framed:
        y = height - margin - line
        draw.rectangle((lefts[0], y, lefts[0] + line - 1, y + line - 1), outline=mask_color, width=stroke)
        draw.text((lefts[0] + line + gap, y + line / 2), mask_label, fill=INK, font=font, anchor="lm")
    if path is not None:
        sheet.save(path)
    return sheet


def _font(pixels: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which Matplotlib brings and which writes many alphabets; without it, the font of Pillow."""
    try:
        from matplotlib import get_data_path
    except ImportError:
        font = ImageFont.load_default(pixels)
        assert isinstance(font, ImageFont.FreeTypeFont)  # with a size, Pillow has no other
        return font
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", name)), pixels)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white, as the sheet is."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Breaks a text into lines that fit, between words where it can; what doesn't fit becomes an ellipsis."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < max_lines:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > width:
            end -= 1
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines


def _check_rows(before: Any, after: Any, prompts: Any, before_mask: Any, after_mask: Any) -> None:
    for name, rows in (
        ("after", after),
        ("prompts", prompts),
        ("before_mask", before_mask),
        ("after_mask", after_mask),
    ):
        if rows is not None and len(rows) != len(before):
            raise ValueError(f"`{name}` should have a row for each of the {len(before)} in `before`, has {len(rows)}.")
    if not len(before):
        raise ValueError("`before` should have at least one row of images, but it is empty.")
    for name, masks, images in (("before_mask", before_mask, before), ("after_mask", after_mask, after)):
        for i, (mask, row) in enumerate(zip(masks if masks is not None else [], images, strict=False)):
            if len(mask) != len(row):
                raise ValueError(f"`{name}[{i}]` should have a value for each of {len(row)} images, has {len(mask)}.")
