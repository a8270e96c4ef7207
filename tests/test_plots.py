"""The pictures show the numbers, in one style, whatever the user's matplotlib is set to."""

import itertools
import math
import subprocess
import sys

import matplotlib
import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from dacal_addon import plots
from dacal_addon.metrics import CalibrationStats, ReliabilityTable


def table(confidence, accuracy, pixels, edges=None):
    edges = torch.linspace(0, 1, len(pixels) + 1, dtype=torch.float64) if edges is None else torch.tensor(edges).double()
    columns = (torch.tensor(column, dtype=torch.float64) for column in (confidence, accuracy))
    confidence, accuracy = columns
    return ReliabilityTable(edges[:-1], edges[1:], torch.tensor(pixels), confidence, accuracy)


TABLE = table([math.nan, 0.4, 0.7, 0.9], [math.nan, 0.5, 0.7, 0.6], [0, 2, 4, 2])


def bars(axis, label):
    (container,) = (one for one in axis.containers if one.get_label() == label)
    return [(bar.get_x(), bar.get_width(), bar.get_y(), bar.get_height()) for bar in container]


EMPTY = table([math.nan] * 2, [math.nan] * 2, [0, 0])


def drawn_texts(figure):
    """What is written in the figure, and where: in pixels."""
    figure.canvas.draw()
    hidden = {text for axis in figure.axes if not axis.get_visible() for text in axis.findobj(Text)}
    for axis in [one for axes in figure.axes for one in (axes.xaxis, axes.yaxis)]:
        low, high = axis.get_view_interval()
        hidden.update(tick.label1 for tick in axis.majorTicks if not low <= tick.get_loc() <= high)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    return {text: text.get_window_extent() for text in texts}


def test_the_diagram_shows_the_table():
    figure = plots.reliability_diagram({"a title": TABLE})
    upper, lower = figure.axes
    assert upper.get_title() == "a title"
    left = np.array([0, 0.25, 0.5, 0.75])
    for label, bottom, height in [
        ("accuracy", [0, 0, 0, 0], [0, 0.5, 0.7, 0.6]),
        ("overconfidence", [0, 0.5, 0.7, 0.6], [0, 0, 0, 0.3]),
        ("underconfidence", [0, 0.5, 0.7, 0.6], [0, -0.1, 0, 0]),
    ]:
        expected = np.stack([left, np.full(4, 0.25), bottom, height], 1)
        assert np.array(bars(upper, label)) == pytest.approx(expected, abs=1e-12), label
    (histogram,) = lower.containers
    assert [bar.get_height() for bar in histogram] == [0, 0.25, 0.5, 0.25]
    means = {line.get_label(): line.get_xdata()[0] for line in lower.lines}
    assert means == pytest.approx({"mean confidence": (0.8 + 2.8 + 1.8) / 8, "mean accuracy": (1.0 + 2.8 + 1.2) / 8})
    assert [text.get_text() for text in upper.texts] == ["ECE 10.00 %"]  # (2 x 0.1 + 2 x 0.3) / 8
    assert (lower.get_xlabel(), upper.get_ylabel(), lower.get_ylabel()) == ("confidence", "accuracy", "share of\npixels")
    assert [axis.get_xlim() for axis in figure.axes] == [(0, 1)] * 2


def test_bins_of_unequal_width_and_empty_tables():
    wide = table([0.3, 0.9], [0.2, 0.8], [5, 5], edges=[0, 0.6, 1.0])
    one = table([math.nan, 1.0], [math.nan, 0.5], [0, 7])
    figure = plots.reliability_diagram({"wide": wide, "nothing": EMPTY, "one": one})
    assert [width for _, width, _, _ in bars(figure.axes[0], "accuracy")] == pytest.approx([0.6, 0.4])
    assert [axis.texts[0].get_text() for axis in figure.axes[:3]] == ["ECE 10.00 %", "ECE: no pixel", "ECE 50.00 %"]
    assert figure.axes[5].containers[0][1].get_height() == 1
    assert figure.axes[4].lines[:] == []  # no pixel, no mean


@pytest.mark.parametrize(
    ("pixels", "top"), [([1, 99], 1.0), ([0, 8], 1.0), ([5] * 20, 0.055), ([0, 0], 1.0)], ids=["99 %", "one", "mass", "empty"]
)
def test_the_scale_of_the_histogram_is_that_of_the_largest_bin_of_all_panels(pixels, top):
    first = table([0.5] * len(pixels), [0.5] * len(pixels), pixels)
    figure = plots.reliability_diagram({"a": first, "b": EMPTY})
    assert [axis.get_ylim() for axis in figure.axes[2:]] == [(0, pytest.approx(top))] * 2


def test_bins_thinner_than_their_edges_have_none():
    """White edges of 0.4 points would hide a bar that is no wider than they are."""
    upper = plots.reliability_diagram({"": table([0.5, 0.995], [0.5, 0.9], [5, 5], edges=[0, 0.995, 1])}).axes[0]
    assert [[bar.get_linewidth() for bar in bars] for bars in upper.containers] == [[0.4, 0]] * 3


def test_an_ece_of_the_callers_is_printed_instead():
    figure = plots.reliability_diagram({"a": TABLE, "b": TABLE}, ece={"b": 0.0321})
    assert [axis.texts[0].get_text() for axis in figure.axes[:2]] == ["ECE 10.00 %", "ECE 3.21 %"]
    with pytest.raises(ValueError, match=r"expected titles of ece to be among 'a', 'b', got 'c'; use the titles"):
        plots.reliability_diagram({"a": TABLE, "b": TABLE}, ece={"c": 0.1})


def test_the_legend_has_what_any_panel_has():
    figure = plots.reliability_diagram({"empty": EMPTY, "full": TABLE})
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"mean confidence", "mean accuracy", "overconfidence", "underconfidence"} < set(names)


@pytest.mark.parametrize("function", [plots.reliability_diagram, plots.classwise_panel])
def test_no_table_at_all_is_refused(function):
    with pytest.raises(ValueError, match=rf"{function.__name__}: expected at least one table, got none"):
        function({})


LONG = "a name of several words that goes on and on and on"
FIGURES = {
    **{f"{n} panels": (plots.reliability_diagram, {f"{i} {LONG}": TABLE for i in range(n)}) for n in (1, 2, 4)},
    **{f"{n} classes": (plots.classwise_panel, {f"{i} {LONG}": TABLE for i in range(n)}) for n in (1, 2, 3, 7, 19, 25)},
}


def test_the_numbers_of_neighbouring_panels_stay_apart():
    """Else the 1 of the left one and the 0 of the right one read as 10."""
    figure = plots.reliability_diagram({"a": TABLE, "b": TABLE})
    figure.canvas.draw()
    left, right = (axis.get_xticklabels() for axis in figure.axes[2:])
    one, zero = left[-1].get_window_extent(), right[0].get_window_extent()
    assert zero.x0 - one.x1 > 1.5 * one.width


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_on_another_one_or_outside(name):
    function, tables = FIGURES[name]
    figure = function(tables)
    texts = drawn_texts(figure)
    assert len(texts) > 10
    for (one, here), (other, there) in itertools.combinations(texts.items(), 2):
        assert not here.overlaps(there), (one.get_text(), other.get_text())
    for text, box in texts.items():
        assert figure.bbox.contains(box.x0, box.y0), text
        assert figure.bbox.contains(box.x1, box.y1), text


def test_the_gaps_differ_in_more_than_colour():
    upper = plots.reliability_diagram({"": TABLE}).axes[0]
    looks = {one.get_label(): one[0] for one in upper.containers}
    over, under = looks["overconfidence"], looks["underconfidence"]
    assert over.get_hatch() != under.get_hatch()
    grey = [np.dot(bar.get_facecolor()[:3], (0.2126, 0.7152, 0.0722)) for bar in (over, under, looks["accuracy"])]
    assert min(abs(a - b) for i, a in enumerate(grey) for b in grey[:i]) > 0.04  # and in brightness, for grey prints


def test_class_panels_show_their_tables():
    flat = table([0.1, 0.3, 0.7, math.nan], [0.1, 0.5, 0.6, math.nan], [90, 5, 5, 0])
    figure = plots.classwise_panel({"road": flat, "sky": TABLE})
    axis = figure.axes[0]
    assert axis.get_title() == "road\nECE 1.50 %"  # (5 x 0.2 + 5 x 0.1) / 100
    (dots,) = (one for one in axis.collections if hasattr(one, "get_sizes") and len(one.get_offsets()) == 3)
    assert np.asarray(dots.get_offsets()) == pytest.approx(np.array([[0.1, 0.1], [0.3, 0.5], [0.7, 0.6]]))
    drawn = [one for one in axis.collections if isinstance(one, PathCollection) and len(one.get_offsets())]
    assert drawn == [dots]
    sizes = dots.get_sizes() - 6
    assert sizes / sizes.sum() == pytest.approx([0.9, 0.05, 0.05])
    lines = [one for one in axis.collections if isinstance(one, LineCollection)]
    colours = {to_hex(one.get_color()[0]).upper(): len(one.get_segments()) for one in lines}
    assert colours == {plots.ORANGE: 1, plots.SKY: 2}


def test_of_many_classes_the_worst_are_shown():
    tables = {f"class {c}": table([0.5], [0.5 - (0.01 * c if c != 7 else 0.49)], [3]) for c in range(40)}
    # NaN is neither more nor less than a number: in the middle, it would stop the sorting there.
    tables = {**dict(list(tables.items())[:20]), "never": EMPTY, **tables}
    figure = plots.classwise_panel(tables)
    shown = [axis.get_title().split("\n")[0] for axis in figure.axes if axis.get_visible()]
    assert shown == ["class 7", *(f"class {c}" for c in range(21, 40))]
    assert figure._suptitle.get_text() == "20 of 41 classes: those with the largest class-wise ECE"


def test_the_lowest_panel_of_each_column_has_the_axis():
    figure = plots.classwise_panel({f"class {c}": TABLE for c in range(7)})
    labelled = [index for index, axis in enumerate(figure.axes) if axis.get_xlabel() == "probability of class"]
    assert labelled == [2, 3, 4, 5, 6]
    numbers = [sum(text.get_visible() for text in axis.get_xticklabels()) for axis in figure.axes[:7]]
    assert numbers == [0, 0, 3, 3, 3, 3, 3]


def test_a_class_name_is_no_formula(tmp_path):
    plots.save(plots.classwise_panel({"$\\nonsense$": TABLE}), tmp_path / "a.png")


def test_the_temperature_map_is_centred_on_one():
    temperature = torch.full((2, 1, 8, 9), 0.5)
    temperature[:, :, :4] = 2.0
    figure = plots.temperature_map(torch.rand(2, 3, 8, 9), temperature)
    last = figure.axes[3].images[-1]
    assert np.asarray(last.get_array()) == pytest.approx(np.log2(temperature[1, 0].numpy()))
    assert (last.norm.vmin, last.norm.vcenter, last.norm.vmax) == pytest.approx((-1, 0, 1))
    assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["0.50", "0.71", "1.00", "1.41", "2.00"]


def test_the_temperature_map_shows_what_is_wrong_and_minds_no_gradient():
    wrong = torch.tensor([[[False, True], [False, False]]])
    temperature = torch.ones(1, 1, 2, 2, requires_grad=True)
    figure = plots.temperature_map(torch.rand(1, 3, 2, 2), temperature, wrong=wrong)
    assert (~figure.axes[1].images[-1].get_array().mask).tolist() == wrong[0].tolist()
    assert len(figure.axes) == 4  # three columns and the scale


def test_a_temperature_map_of_something_else_is_refused():
    good = {"image": torch.rand(2, 3, 4, 5), "temperature": torch.ones(2, 1, 4, 5), "wrong": torch.ones(2, 4, 5).bool()}
    for name, bad, message in [
        ("image", torch.rand(2, 4, 5, 3), r"expected image: a floating tensor \(N, 3, H, W\), got float32 \(2, 4, 5, 3\)"),
        ("image", torch.zeros(2, 3, 4, 5).byte(), r"got uint8 \(2, 3, 4, 5\)"),
        ("wrong", torch.ones(2, 4, 4).bool(), r"expected wrong: a bool tensor \(2, 4, 5\), got bool \(2, 4, 4\)"),
        ("wrong", torch.ones(2, 4, 5), r"expected wrong: a bool tensor \(2, 4, 5\), got float32"),
        ("temperature", torch.ones(2, 1, 2, 5), r"expected temperature: a floating tensor \(2, 1, 4, 5\)"),
        ("temperature", torch.full((2, 1, 4, 5), -0.5), r"expected temperature > 0, got a minimum of -0.5"),
        ("temperature", torch.full((2, 1, 4, 5), math.nan), r"expected temperature > 0, got a minimum of nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            plots.temperature_map(**{**good, name: bad})
    with pytest.raises(TypeError, match="expected temperature: a floating tensor"):
        plots.temperature_map(**{**good, "temperature": 1.5})


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_ending_of_the_path_says_how_to_save(ending, start, tmp_path):
    path = tmp_path / f"figure.{ending}"
    plots.save(plots.reliability_diagram({"a": TABLE}), path)
    assert path.read_bytes().startswith(start)
    assert path.stat().st_size > 5000
    if ending == "pdf":
        assert b"/Type3" not in path.read_bytes()  # fonts that publishers refuse


def test_pyplot_is_left_alone():
    code = (
        "import math, sys, torch; from dacal_addon import metrics, plots\n"
        "logits = torch.rand(1, 3, 4, 4); label = logits.argmax(1)\n"
        "table = metrics.reliability(logits, label, input='logits')\n"
        "figures = [plots.reliability_diagram({'a': table}), plots.classwise_panel({'a': table}),"
        " plots.temperature_map(logits, torch.ones(1, 1, 4, 4))]\n"
        "[figure.canvas.draw() for figure in figures]\n"
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert output.split() == ["True", "False"]


def test_the_users_settings_neither_matter_nor_change(tmp_path):
    plots.save(plots.reliability_diagram({"a": TABLE, "b": TABLE}), tmp_path / "expected.png")
    hostile = {
        "figure.facecolor": "black",
        "text.color": "white",
        "font.size": 30,
        "axes.prop_cycle": "cycler('color', ['red'])",
    }
    dark = matplotlib.style.library["dark_background"]
    with matplotlib.rc_context({**dark, **hostile, "text.usetex": True, "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        plots.save(plots.reliability_diagram({"a": TABLE, "b": TABLE}), tmp_path / "got.png")
        assert dict(matplotlib.rcParams) == before
    expected, got = (imread(tmp_path / name) for name in ("expected.png", "got.png"))
    assert expected.shape == got.shape
    assert np.array_equal(expected, got)
    assert 0.5 < expected[..., :3].mean() < 0.99


def test_statistics_plot_themselves():
    stats = CalibrationStats(2, input="top1", n_bins=4)
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.6]).view(1, 1, 4)
    stats.update((confidence, torch.zeros(1, 1, 4).long()), torch.tensor([[[0, 0, 1, 0]]]))
    figure = stats.plot(title="mine")
    assert figure.axes[0].get_title() == "mine"
    assert [height for *_, height in bars(figure.axes[0], "accuracy")] == pytest.approx([0, 0, 1, 2 / 3])
    assert plots.table_ece(stats.reliability()) == pytest.approx(stats.ece())
