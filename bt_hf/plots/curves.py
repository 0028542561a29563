"""Pictures of a preference model: how it trained, how far to trust it, and what it prefers.

The plots are drawn on `matplotlib.figure.Figure` objects of their own, without pyplot: no global state, no window, and
safe in threads. The colours are those of Okabe and Ito, which people with any colour vision can tell apart
(https://jfly.uni-koeln.de/color/). Needs Matplotlib: `pip install "bt-hf[plots]"`.

Example:
    >>> from bt_hf.plots.curves import plot_accuracy_by_pairs
    >>> figure = plot_accuracy_by_pairs({"adapter": [(8, 0.61, 0.05), (32, 0.74, 0.03), (128, 0.83, 0.02)]})
    >>> figure.axes[0].get_xlabel()
    'training pairs'
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bt_hf.metrics.scores import reliability_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]

INK, GREY, FAINT = "#222222", "#767676", "#d9d9d9"
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
LINES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (GREY, "v")]


def plot_training_curve(log_history: Sequence[Mapping[str, Any]], path: PathLike | None = None) -> Figure:
    """Loss and accuracy against the training step, from the log that every `Trainer` keeps.

    Args:
        log_history: `trainer.state.log_history`. Drawn, where present: `loss` and `eval_loss`; `accuracy`,
            `eval_accuracy` (with the band `eval_accuracy_low` to `eval_accuracy_high`) and `eval_base_accuracy`.
        path: Where to save the picture, if anywhere. Default None.

    Returns:
        The figure: one panel for the losses, one for the accuracies, each only if it has something to show.

    Raises:
        ValueError: If no entry has a step and one of the keys above.

    Example:
        >>> log = [{"step": 10, "loss": 0.69}, {"step": 20, "loss": 0.51, "eval_accuracy": 0.8}]
        >>> [axes.get_ylabel() for axes in plot_training_curve(log).axes]
        ['loss', 'accuracy']
    """
    styles: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
        "loss": {
            "loss": ("training", {"color": BLUE, "alpha": 0.55}),
            "eval_loss": ("evaluation", {"color": ORANGE, "marker": "o"}),
        },
        "accuracy": {
            "accuracy": ("training", {"color": BLUE, "alpha": 0.55}),
            "eval_accuracy": ("evaluation", {"color": ORANGE, "marker": "o"}),
            "eval_base_accuracy": ("base model", {"color": GREY, "linestyle": "--"}),
        },
    }
    panels = {label: keys for label, keys in styles.items() if any(_series(log_history, key) for key in keys)}
    if not panels:
        expected = sorted(key for keys in styles.values() for key in keys)
        raise ValueError(f"`log_history` should have entries with a `step` and one of {expected}, but has none.")
    figure = _new_figure(6.4, 2.7 * len(panels) + 0.3)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, (label, keys) in zip(grid[:, 0], panels.items(), strict=True):
        if label == "accuracy":
            low, high = _series(log_history, "eval_accuracy_low"), _series(log_history, "eval_accuracy_high")
            steps = sorted(low.keys() & high.keys())
            axes.fill_between(
                steps, [low[s] for s in steps], [high[s] for s in steps], color=ORANGE, alpha=0.15, linewidth=0
            )
        for key, (name, style) in keys.items():
            if series := _series(log_history, key):
                # A single value is invisible as a line.
                style = {"markersize": 4, **style} | ({"marker": "o"} if len(series) == 1 else {})
                axes.plot(list(series), list(series.values()), label=name, **style)
        if label == "accuracy":
            _as_accuracy(axes)
        axes.set_ylabel(label)
        _legend(axes)
    grid[-1, 0].set_xlabel("training step")
    return _save(figure, path)


def plot_reliability(
    margins: ArrayLike,
    preference: ArrayLike | None = None,
    path: PathLike | None = None,
    base_margins: ArrayLike | None = None,
    bins: int = 10,
) -> Figure:
    """Reliability diagram: when the model is 80 % sure, is it right 80 % of the time?

    Below the diagonal a model is surer than it should be, above it less sure. The bars are 95 % Wilson intervals; the
    panel beneath counts the pairs in each bin. See [`~bt_hf.metrics.scores.calibration_error`] for the definitions.

    Args:
        margins: (N,) reward of the chosen image minus that of the rejected one.
        preference: (N,) probability that the chosen image wins, in [0, 1]. Default 1.0.
        path: Where to save the picture, if anywhere. Default None.
        base_margins: (N,) margins of the base model on the same pairs, for comparison. Default None.
        bins: Number of equal bins of the confidence, on [0.5, 1]. Default 10.

    Returns:
        The figure: the diagram and the counts.

    Raises:
        ValueError: If a column has the wrong shape or a value that isn't finite or out of range, or there are no rows.

    Example:
        >>> figure = plot_reliability([2.0, -0.1, 0.7, 1.5], bins=5)
        >>> figure.axes[0].get_ylabel()
        'how often it was right'
    """
    models = [("adapter", margins, BLUE, "o")]
    if base_margins is not None:
        models = [("base", base_margins, GREY, "s"), ("adapter", margins, BLUE, "o")]
    figure = _new_figure(5.2, 5.8)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="perfect")
    width = 0.5 / bins
    for i, (name, values, colour, marker) in enumerate(models):
        found = reliability_bins(values, preference, bins=bins)
        if not found:
            raise ValueError("`margins` should have at least one row, but it is empty.")
        x = np.array([bin.confidence for bin in found])
        y = np.array([bin.agreement for bin in found])
        bars = np.array([[bin.agreement - bin.agreement_low, bin.agreement_high - bin.agreement] for bin in found]).T
        top.errorbar(
            x, y, yerr=bars.clip(0), color=colour, marker=marker, markersize=5, elinewidth=1, alpha=0.9, label=name
        )
        share = 0.8 * width / len(models)
        left = np.array([bin.low for bin in found]) + 0.1 * width + i * share
        bottom.bar(left, [bin.pairs for bin in found], width=share, align="edge", color=colour)
    _as_accuracy(top, chance=False)
    _as_percent(bottom.xaxis)
    top.set_xlim(0.49, 1.01)
    low = min(0.4, top.get_ylim()[0])
    top.set_ylim(max(0.0, low), 1.02)
    top.set_ylabel("how often it was right")
    bottom.set_xlabel("how sure the model was")
    bottom.set_ylabel("pairs")
    _legend(top)
    figure.align_ylabels()
    return _save(figure, path)


def plot_accuracy_by_pairs(
    results: Mapping[str, Sequence[tuple[int, float, float | None]]], path: PathLike | None = None
) -> Figure:
    """Accuracy against the number of training pairs, which doubles with each step to the right.

    Args:
        results: For each line its label and its points `(n_pairs, mean, std)`; std may be None.
        path: Where to save the picture, if anywhere. Default None.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no points, or a number of pairs is below 1.

    Example:
        >>> figure = plot_accuracy_by_pairs({"ours": [(8, 0.6, None), (16, 0.7, 0.02)]})
        >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
        ['8', '16']
    """
    numbers = sorted({n for points in results.values() for n, _, _ in points})
    if not numbers or numbers[0] < 1:
        raise ValueError(f"`results` should have points with at least 1 pair, but the numbers of pairs are {numbers}.")
    figure = _new_figure(6.4, 4.0)
    axes = figure.subplots()
    for i, (label, points) in enumerate(results.items()):
        pairs, mean, std = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        colour, marker = LINES[i % len(LINES)]
        spread = [0.0 if s is None else s for s in std]
        axes.errorbar(
            pairs, mean, yerr=spread if any(spread) else None, color=colour, marker=marker, capsize=3, label=label
        )
    axes.set_xscale("log", base=2)
    span = np.log2(numbers[-1] / numbers[0])
    ticks = [numbers[0]]
    for n in numbers[1:]:  # leave out the numbers whose labels would touch
        if np.log2(n / ticks[-1]) >= span / 14:
            ticks.append(n)
    axes.set_xticks(ticks, labels=[f"{n:,}" for n in ticks])
    axes.minorticks_off()
    _as_accuracy(axes)
    axes.set_xlabel("training pairs")
    axes.set_ylabel("accuracy")
    _legend(axes)
    return _save(figure, path)


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


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> dict[float, float]:
    """Step -> value, in order; the last value logged at a step wins."""
    found = {entry["step"]: float(entry[key]) for entry in log_history if "step" in entry and key in entry}
    return dict(sorted(found.items()))


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The plots need Matplotlib: pip install "bt-hf[plots]"') from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: Figure, path: PathLike | None) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(color=GREY, labelcolor=INK)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
    if path is not None:
        figure.savefig(path)
    return figure


def _as_percent(axis: Any) -> None:
    # Matplotlib's own PercentFormatter writes 85.0 % or rounds 57.5 to 57 %.
    axis.set_major_formatter(lambda value, position: f"{round(100 * value, 3):g} %")


def _as_accuracy(axes: Axes, chance: bool = True) -> None:
    _as_percent(axes.yaxis)
    if chance:
        axes.axhline(0.5, color=GREY, linestyle=":", linewidth=1, label="chance")
        axes.set_ylim(bottom=min(0.48, axes.get_ylim()[0]))


def _legend(axes: Axes) -> None:
    """Above the axes rather than in them, in as many columns as fit: no line is hidden, no label cut off."""
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    handles, labels = zip(*sorted(entries, key=lambda entry: entry[1] in {"chance", "perfect"}), strict=True)
    columns = max(1, int(axes.figure.bbox.width / axes.figure.dpi * 14 // (max(map(len, labels)) + 6)))
    axes.legend(
        handles,
        labels,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        fontsize="small",
    )


def _font(pixels: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib brings: the font of the plots, and it writes far more alphabets than Pillow's."""
    try:
        from matplotlib import get_data_path
    except ImportError as error:
        raise ImportError('The contact sheet needs Matplotlib: pip install "bt-hf[plots]"') from error
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
