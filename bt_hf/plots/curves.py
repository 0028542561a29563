"""Plots of a training and of a model's calibration.

The plots are drawn on `matplotlib.figure.Figure` objects of their own, without pyplot: no global state, no window, and
safe in threads. The colours are those of Okabe and Ito, which people with any colour vision can tell apart
(https://jfly.uni-koeln.de/color/). Needs Matplotlib, the extra `plots`.

Example:
    >>> from bt_hf.plots import plot_accuracy_by_pairs
    >>> figure = plot_accuracy_by_pairs({"adapter": [(8, 0.61, 0.05), (32, 0.74, 0.03), (128, 0.83, 0.02)]})
    >>> figure.axes[0].get_xlabel()
    'training pairs'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bt_hf.metrics import reliability_bins
from bt_hf.plots.style import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PURPLE, PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Below so many pairs, bins hold so many each: a share of 20 has an interval of about +-20 points.
_MANY, _PAIRS_IN_A_BIN = 300, 20
FEWEST_PAIRS = 2 * _PAIRS_IN_A_BIN  # for a diagram of two points
LINES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (GREY, "v")]


def plot_training_curve(log_history: Sequence[Mapping[str, Any]], path: PathLike | None = None) -> Figure:
    """Loss and accuracy against the training step, from the log that every `Trainer` keeps.

    Args:
        log_history: `trainer.state.log_history`. Drawn, where present: `loss` and `eval_loss`; `accuracy`,
            `eval_accuracy` (with the band `eval_accuracy_low` to `eval_accuracy_high`) and `eval_base_accuracy`. The
            curves of the training begin at `base_loss` and `base_accuracy`, those of the base at step 0.
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
            if series := _series(log_history, f"base_{key}") | _series(log_history, key):
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
    bins: int | None = None,
) -> Figure:
    """Reliability diagram: when the model is 80 % sure, is it right 80 % of the time?

    Below the diagonal a model is surer than it should be, above it less sure. The bars are 95 % Wilson intervals; the
    panel beneath counts the pairs in each bin. See `bt_hf.metrics.calibration_error` for the definitions.

    Args:
        margins: (N,) reward of the chosen image minus that of the rejected one.
        preference: (N,) probability that the chosen image wins, in [0, 1]. Default 1.0.
        path: Where to save the picture, if anywhere. Default None.
        base_margins: (N,) margins of the base model on the same pairs, for comparison. Default None.
        bins: Number of bins of equal width of the confidence, on [0.5, 1]. Default: 10 for 300 pairs and more, and
            for fewer one for each 20 pairs, with about as many in each.

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
    count = len(np.atleast_1d(margins))
    few = bins is None and count < _MANY
    chosen_bins = max(1, count // _PAIRS_IN_A_BIN) if few else bins or 10
    for i, (name, values, colour, marker) in enumerate(models):
        found = reliability_bins(values, preference, bins=chosen_bins, equal_count=few)
        if not found:
            raise ValueError("`margins` should have at least one row, but it is empty.")
        x = np.array([bin.confidence for bin in found])
        y = np.array([bin.agreement for bin in found])
        bars = np.array([[bin.agreement - bin.agreement_low, bin.agreement_high - bin.agreement] for bin in found]).T
        top.errorbar(
            x, y, yerr=bars.clip(0), color=colour, marker=marker, markersize=5, elinewidth=1, alpha=0.9, label=name
        )
        widths = np.array([bin.high - bin.low for bin in found])
        share = 0.8 * widths / len(models)
        left = np.array([bin.low for bin in found]) + 0.1 * widths + i * share
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


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> dict[float, float]:
    """Step -> value, in order; the last value logged at a step wins."""
    found = {entry["step"]: float(entry[key]) for entry in log_history if "step" in entry and key in entry}
    return dict(sorted(found.items()))


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need Matplotlib, the extra bt-hf[plots]: run `pip install matplotlib`.") from error
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
