"""The pictures: what stands on them is checked in the artists, and that something is drawn in the pixels."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

pytest.importorskip("matplotlib")

from bt_hf.plots import contact_sheet, plot_accuracy_by_pairs, plot_reliability, plot_training_curve
from bt_hf.plots.style import BLUE

LOG = [
    {"step": 10, "loss": 0.69, "accuracy": 0.5, "epoch": 0.1},
    {"step": 20, "loss": 0.5, "accuracy": 0.7, "epoch": 0.2},
    {"step": 20, "eval_loss": 0.6, "eval_accuracy": 0.65, "eval_base_accuracy": 0.52},
    {"step": 20, "train_loss": 0.6, "train_runtime": 3.0},
]


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def assert_drawn(path, least_colours=50):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > least_colours


def assert_nothing_sticks_out(figure):
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1


def test_import_is_light_and_pyplot_stays_out(tmp_path):
    code = (
        "import sys; from bt_hf import plots; print('matplotlib' in sys.modules, 'torch' in sys.modules);"
        f"plots.plot_accuracy_by_pairs({{'a': [(1, 0.5, None)]}}, {str(tmp_path / 'plot.png')!r});"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["False"] * 3, run.stderr


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"bt-hf\[plots\]"):
        plot_accuracy_by_pairs({"a": [(1, 0.5, None)]})


# Training curve


def test_training_curve(tmp_path):
    figure = plot_training_curve(LOG, tmp_path / "curve.png")
    assert_drawn(tmp_path / "curve.png")
    assert_nothing_sticks_out(figure)
    loss, accuracy = figure.axes
    assert legend_of(loss) == ["training", "evaluation"]
    assert legend_of(accuracy) == ["training", "evaluation", "base model", "chance"]
    assert accuracy.get_xlabel() == "training step"
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[10, 0.69], [20, 0.5]])


@pytest.mark.parametrize(("keys", "panels"), [({"loss"}, ["loss"]), ({"eval_accuracy"}, ["accuracy"])])
def test_training_curve_with_missing_keys(keys, panels):
    log = [{key: value for key, value in entry.items() if key in keys | {"step"}} for entry in LOG]
    assert [axes.get_ylabel() for axes in plot_training_curve(log).axes] == panels


def test_training_curve_draws_the_interval():
    entry = {"step": 10, "eval_accuracy": 0.8, "eval_accuracy_low": 0.7, "eval_accuracy_high": 0.85}
    axes = plot_training_curve([entry, {**entry, "step": 20}]).axes[0]
    assert axes.dataLim.bounds[1] <= 0.7
    assert len(axes.collections) == 1


def test_training_curve_without_anything_to_draw():
    with pytest.raises(ValueError, match="eval_base_accuracy"):
        plot_training_curve([{"step": 1, "epoch": 0.1}])


# Reliability


def test_reliability(tmp_path):
    rng = np.random.default_rng(0)
    margins, wins = rng.normal(1, 1, 100), rng.integers(0, 2, 100)
    figure = plot_reliability(margins, wins, tmp_path / "reliability.png", base_margins=0.1 * margins)
    assert_drawn(tmp_path / "reliability.png")
    assert_nothing_sticks_out(figure)
    top, bottom = figure.axes
    assert legend_of(top) == ["base", "adapter", "perfect"]
    assert sum(bar.get_height() for bar in bottom.patches) == 200
    assert bottom.get_xlabel() == "how sure the model was"


@pytest.mark.parametrize(("pairs", "points"), [(12, 1), (42, 2), (100, 5), (299, 14)])
def test_reliability_of_few_pairs_has_few_bins_of_equal_count(pairs, points):
    margins = np.random.default_rng(0).normal(1, 2, pairs)
    top, bottom = plot_reliability(margins).axes
    counts = [bar.get_height() for bar in bottom.patches]
    assert len(counts) == points
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == pairs
    assert top.lines[1].get_xdata().size == points


def test_curves_begin_at_the_base():
    log = [
        {"step": 0, "base_loss": 1.2, "base_accuracy": 0.5},
        {"step": 5, "loss": 0.4, "accuracy": 0.9},
        {"step": 10, "loss": 0.5, "accuracy": 0.95},
    ]
    losses, accuracies = plot_training_curve(log).axes
    assert list(losses.lines[0].get_xdata()) == [0, 5, 10]
    assert list(losses.lines[0].get_ydata()) == [1.2, 0.4, 0.5]
    assert list(accuracies.lines[0].get_ydata()) == [0.5, 0.9, 0.95]


def test_reliability_shows_every_interval():
    """Three of three in one bin, none of three in another: the bars reach close to 0."""
    top = plot_reliability([0.1] * 3 + [5.0] * 3, [1, 1, 1, 0, 0, 0], bins=10).axes[0]
    assert top.get_ylim()[0] <= 0
    assert top.get_ylim()[1] > 1


def test_reliability_needs_rows():
    with pytest.raises(ValueError, match="`margins` should have at least one row"):
        plot_reliability([])
    with pytest.raises(ValueError, match=r"`margins\[0\]` is nan"):
        plot_reliability([float("nan")])


# Accuracy by pairs


def test_accuracy_by_pairs(tmp_path):
    results = {"adapter": [(32, 0.7, 0.02), (8, 0.6, 0.05)], "base": [(8, 0.52, None), (32, 0.52, None)]}
    figure = plot_accuracy_by_pairs(results, tmp_path / "pairs.png")
    assert_drawn(tmp_path / "pairs.png")
    assert_nothing_sticks_out(figure)
    (axes,) = figure.axes
    assert legend_of(axes) == ["adapter", "base", "chance"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8", "32"]
    np.testing.assert_array_equal(axes.containers[0].lines[0].get_xydata(), [[8, 0.6], [32, 0.7]])


def test_crowded_ticks_and_long_labels_do_not_touch():
    numbers = [1, 2, 4, 8, 16, 30, 31, 32, 33, 1000, 1024]
    figure = plot_accuracy_by_pairs(
        {f"a model with quite a long name, {i}": [(n, 0.5, 0.1) for n in numbers] for i in range(3)}
    )
    assert_nothing_sticks_out(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("results", [{}, {"a": []}, {"a": [(0, 0.5, None)]}])
def test_accuracy_by_pairs_needs_pairs(results):
    with pytest.raises(ValueError, match="at least 1 pair"):
        plot_accuracy_by_pairs(results)


# Contact sheet

RED, GREEN = "#ff0000", "#00ff00"


def squares(*colours, size=32):
    return [Image.new("RGB", (size, size), colour) for colour in colours]


def columns_with(sheet, colour):
    """The columns of pixels in which a colour occurs."""
    found = (np.asarray(sheet) == ImageColor.getrgb(colour)).all(-1)
    return np.flatnonzero(found.any(0))


def test_contact_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    sheet = contact_sheet(
        [squares(RED, GREEN)] * 2,
        [squares(GREEN, RED)] * 2,
        path,
        prompts=["one", "two"],
        after_mask=[[True, False]] * 2,
    )
    assert_drawn(path, least_colours=20)
    with Image.open(path) as saved:
        assert saved.size == sheet.size
    red, green, frame = (columns_with(sheet, colour) for colour in (RED, GREEN, BLUE))
    # Before: red then green; after: green then red. All of the same size.
    assert len(red) == len(green) == 2 * 96
    assert red[0] < green[0] < green[-1] < red[-1]
    # The frames stand around the first image of `after`, and beside the label at the bottom.
    assert frame[-1] > green[96]
    assert frame[-1] < red[96]


def test_frames_hide_nothing():
    images = [squares(RED)]
    plain = contact_sheet(images, images)
    framed = contact_sheet(images, images, before_mask=[[True]], after_mask=[[True]])
    count = [(np.asarray(sheet) == (255, 0, 0)).all(-1).sum() for sheet in (plain, framed)]
    assert count == [2 * 96 * 96] * 2


def test_columns_limit_and_ragged_rows():
    wide = contact_sheet([squares(*[RED] * 10), squares(RED)], [squares(GREEN), []], columns=4, size=40)
    assert len(columns_with(wide, RED)) == 4 * 40
    assert len(columns_with(wide, GREEN)) == 40


def test_shapes_and_modes_of_images():
    clear = Image.new("RGBA", (64, 16), (255, 0, 0, 0))
    sheet = contact_sheet([[clear]], [[Image.new("L", (16, 64), 0)]])
    assert len(columns_with(sheet, RED)) == 0  # transparent is white
    assert len(columns_with(sheet, "#000000")) == 24  # 96 high, a quarter as wide


@pytest.mark.parametrize("prompt", ["", "word " * 200, "w" * 500, "a\nnew line", "дом и é"])
def test_prompts_stay_in_their_column(prompt):
    images = [squares("white")]
    with_text, without = contact_sheet(images, images, prompts=[prompt]), contact_sheet(images, images, prompts=[""])
    changed = np.argwhere((np.asarray(with_text) != np.asarray(without)).any(-1))
    assert (len(changed) > 0) == bool(prompt)
    if prompt:
        assert changed[:, 1].max() < round(1.7 * 96) + 2 * 9
        assert changed[:, 0].max() < with_text.height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": []}, "`after` should have a row for each of the 1"),
        ({"before": [], "after": []}, "`before` should have at least one row"),
        ({"prompts": ["a", "b"]}, "`prompts` should have a row for each of the 1"),
        ({"after_mask": [[True, False]]}, r"`after_mask\[0\]` should have a value for each of 1 images, has 2"),
        ({"columns": 0}, "should leave an image to show"),
        ({"before": [[]]}, "should leave an image to show"),
    ],
)
def test_contact_sheet_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**{"before": [squares(RED)], "after": [squares(RED)], **arguments})
