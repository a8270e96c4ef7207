"""The pictures show the numbers, in one style, whatever the user's matplotlib is set to."""

import io
import itertools
import math
import subprocess
import sys

import matplotlib
import matplotlib.style
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from dacal_addon import plots
from dacal_addon.metrics import ReliabilityTable
from dacal_addon.metrics.binned import class_gap, table_ece


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
    # Weights are 90 x 0.1, 5 x 0.5 and 5 x 0.7 pixels of the class, gaps 0, 0.2 and 0.1.
    assert axis.get_title() == "road\ngap 5.67 %"
    assert class_gap(flat) == pytest.approx((2.5 * 0.2 + 3.5 * 0.1) / 15)
    (dots,) = (one for one in axis.collections if hasattr(one, "get_sizes") and len(one.get_offsets()) == 3)
    assert np.asarray(dots.get_offsets()) == pytest.approx(np.array([[0.1, 0.1], [0.3, 0.5], [0.7, 0.6]]))
    drawn = [one for one in axis.collections if isinstance(one, PathCollection) and len(one.get_offsets())]
    assert drawn == [dots]
    sizes = dots.get_sizes() - 3
    assert sizes / sizes.sum() == pytest.approx([9 / 15, 2.5 / 15, 3.5 / 15])
    lines = [one for one in axis.collections if isinstance(one, LineCollection)]
    colours = {to_hex(one.get_color()[0]).upper(): len(one.get_segments()) for one in lines}
    assert colours == {plots.ORANGE: 1, plots.SKY: 2}
    thickness = {segment[0][1]: width for one in lines for segment, width in zip(one.get_segments(), one.get_linewidths())}
    assert sorted(thickness, key=thickness.get) == pytest.approx([0.5, 0.6, 0.1])  # by their pixels of the class


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_number_of_a_class_is_the_gap_that_is_drawn(data):
    """The lines' lengths with the dots' areas as weights; pixels that neither are of the class nor could be change nothing."""
    fractions = st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4)
    counts = data.draw(st.lists(st.integers(1, 99), min_size=4, max_size=4))
    drawn = table(data.draw(fractions), data.draw(fractions), counts)
    axis = plots.classwise_panel({"a": drawn}).axes[0]
    gaps = {}
    for one in axis.collections:
        if isinstance(one, LineCollection):
            for (x, y), (_, diagonal) in one.get_segments():
                gaps[round(x, 9), round(y, 9)] = abs(diagonal - y)
    (dots,) = (one for one in axis.collections if isinstance(one, PathCollection) and len(one.get_offsets()))
    areas = np.maximum(dots.get_sizes() - 3, 0)
    seen = sum(area * gaps[round(x, 9), round(y, 9)] for (x, y), area in zip(np.asarray(dots.get_offsets()), areas))
    if areas.sum():
        assert class_gap(drawn) == pytest.approx(seen / areas.sum(), abs=1e-6)
    else:
        assert math.isnan(class_gap(drawn))
    elsewhere = [torch.cat([torch.zeros(1).double(), column.double()]) for column in drawn[2:]]
    elsewhere[0][0] = 10**6
    edges = torch.linspace(0, 1, 6).double()
    assert class_gap(ReliabilityTable(edges[:-1], edges[1:], *elsewhere)) == pytest.approx(class_gap(drawn), nan_ok=True)


def test_the_largest_visible_gap_has_the_largest_number():
    """A rare class that is far off, where ECE says the opposite: 0.07 % of a motorcycle, 1.87 % of a road."""
    road = table([0.01, 0.95], [0.02, 0.92], [60_000, 40_000])
    motorcycle = table([0.0001, 0.6], [0.0001, 0.2], [99_800, 200])
    assert table_ece(road) > 10 * table_ece(motorcycle)
    assert class_gap(road) < 0.04
    assert class_gap(motorcycle) > 0.3


def test_of_many_classes_the_worst_are_shown():
    tables = {f"class {c}": table([0.5], [0.5 - (0.01 * c if c != 7 else 0.49)], [3]) for c in range(40)}
    # NaN is neither more nor less than a number: in the middle, it would stop the sorting there.
    tables = {**dict(list(tables.items())[:20]), "never": EMPTY, **tables}
    figure = plots.classwise_panel(tables)
    shown = [axis.get_title().split("\n")[0] for axis in figure.axes if axis.get_visible()]
    assert shown == ["class 7", *(f"class {c}" for c in range(21, 40))]
    assert "20 of 41 classes: those with the largest mean gap" in [text.get_text() for text in figure.texts]


def test_the_lowest_panel_of_each_column_has_the_axis():
    figure = plots.classwise_panel({f"class {c}": TABLE for c in range(6)}, title="a network")
    below, beside = (
        [sum(tick.label1.get_visible() for tick in getattr(axis, of).get_major_ticks()) for axis in figure.axes]
        for of in ("xaxis", "yaxis")
    )
    assert below == [0, 0, 3, 3, 3, 3]
    assert beside == [3, 0, 0, 0, 3, 0]
    written = [text.get_text() for text in figure.texts]
    assert written == ["probability of the class", "share of pixels in the class", "a network"]


def test_a_class_name_is_no_formula(tmp_path):
    plots.save(plots.classwise_panel({"$\\nonsense$": TABLE}), tmp_path / "a.png")


def test_a_temperature_can_be_read_off_its_colour():
    """Every pixel has the colour that the scale shows between the two numbers around its temperature."""
    generator = torch.Generator().manual_seed(0)
    temperature = (0.5 * torch.randn(2, 1, 8, 9, generator=generator)).exp()
    figure = plots.temperature_map(torch.rand(2, 3, 8, 9, generator=generator), temperature, title="source only, step 3")
    figure.canvas.draw()
    assert figure.texts[0].get_text() == "source only, step 3"
    edges = [float(text.get_text()) for text in figure.axes[-1].get_yticklabels()]
    assert 1.0 in edges
    assert 4 <= len(edges) <= 11
    for row, axis in enumerate((figure.axes[1], figure.axes[3])):
        (shown,) = axis.images
        colours = shown.to_rgba(shown.get_array())
        values = temperature[row, 0].numpy()
        for low, high in zip(edges[:-1], edges[1:]):
            inside = (values > low + 0.01) & (values < high - 0.01)
            assert len(np.unique(colours[inside], axis=0)) == min(1, inside.sum()), (low, high)
        between = [colours[(values > low + 0.01) & (values < high - 0.01)] for low, high in zip(edges[:-1], edges[1:])]
        different = [colour[0] for colour in between if len(colour)]
        assert len(np.unique(different, axis=0)) == len(different)
        low, median, high = np.quantile(np.log2(values.astype(float)), (0.05, 0.5, 0.95))
        assert axis.texts[0].get_text() == f"median T {2**median:.2f}\n5 to 95 %: {2**low:.2f} to {2**high:.2f}"


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.999, 1.001), (0.5, 2.0), (1.0, 5.0), (0.01, 0.02), (1e-9, 1e9)])
def test_the_scale_of_temperatures_has_one_in_it_and_few_steps(low, high):
    edges = plots.temperature._steps(math.log2(low), math.log2(high))
    assert edges[0] < 0 < edges[-1]
    assert 0.0 in edges
    assert np.allclose(np.diff(edges), edges[1] - edges[0])
    if low > 1e-9:
        assert len(edges) <= 11
        assert edges[0] <= math.log2(low) <= math.log2(high) <= edges[-1]


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


def test_a_paper_column_holds_every_figure():
    """8.5 cm wide as they are, so that nothing of them is scaled: no letter is smaller than 6.5 points."""
    image, temperature = torch.rand(1, 3, 8, 9), torch.ones(1, 1, 8, 9)
    figures = [plots.reliability_diagram({str(i): TABLE for i in range(n)}) for n in (1, 2, 3)] + [
        plots.classwise_panel({f"class {c}": TABLE for c in range(19)}),
        plots.temperature_map(image, temperature),
    ]
    for figure in figures:
        assert figure.get_size_inches()[0] == pytest.approx(8.5 / 2.54)
        assert min(text.get_fontsize() for text in drawn_texts(figure)) >= 6.5
    assert plots.reliability_diagram({str(i): TABLE for i in range(4)}, columns=4).get_size_inches()[0] > 6


def contrast(one, other):
    """Of two colours, after WCAG 2.1: 1 to 21."""
    linear = [
        np.where(np.array(to_rgb(c)) <= 0.04045, np.array(to_rgb(c)) / 12.92, ((np.array(to_rgb(c)) + 0.055) / 1.055) ** 2.4)
        for c in (one, other)
    ]
    low, high = sorted(float(np.dot(c, (0.2126, 0.7152, 0.0722))) + 0.05 for c in linear)
    return high / low


@pytest.mark.parametrize("dark", [False, True])
def test_letters_and_lines_stand_out_from_the_paper(dark):
    image, temperature = torch.rand(1, 3, 8, 9), torch.ones(1, 1, 8, 9)
    for figure in (
        plots.reliability_diagram({"a": TABLE, "b": EMPTY}, dark=dark),
        plots.classwise_panel({"a": TABLE}, title="a network", dark=dark),
        plots.temperature_map(image, temperature, title="a network", dark=dark),
    ):
        paper = figure.get_facecolor()
        assert (sum(paper[:3]) < 0.5) == dark
        for text in drawn_texts(figure):
            assert contrast(text.get_color(), paper) > 7, text
        for line in [line for axis in figure.axes for line in axis.lines]:
            assert contrast(line.get_color(), paper) > 3, line


def test_a_notebook_shows_a_figure(tmp_path):
    figure = plots.reliability_diagram({"a": TABLE})
    plots.save(figure, tmp_path / "a.png")
    shown = imread(io.BytesIO(figure._repr_png_()))
    assert np.array_equal(shown, imread(tmp_path / "a.png"))


def test_without_matplotlib_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "try:\n    import dacal_addon.plots\n"
        "except ImportError as error:\n    print(error.name, error, sep='; ')"
    )
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert output.strip() == "matplotlib; dacal_addon.plots needs matplotlib; pip install 'dacal-addon[plot]'"
