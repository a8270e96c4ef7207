"""The pictures show the numbers, in one style, whatever the user's matplotlib is set to."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

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
    nothing = table([math.nan] * 2, [math.nan] * 2, [0, 0])
    one = table([math.nan, 1.0], [math.nan, 0.5], [0, 7])
    figure = plots.reliability_diagram({"wide": wide, "nothing": nothing, "one": one})
    assert [width for _, width, _, _ in bars(figure.axes[0], "accuracy")] == pytest.approx([0.6, 0.4])
    assert [axis.texts[0].get_text() for axis in figure.axes[:3]] == ["ECE 10.00 %", "ECE: no pixel", "ECE 50.00 %"]
    assert figure.axes[5].containers[0][1].get_height() == 1


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
    sizes = dots.get_sizes() - 6
    assert sizes / sizes.sum() == pytest.approx([0.9, 0.05, 0.05])
    colours = {to_hex(one.get_color()[0]).upper(): len(one.get_segments()) for one in axis.collections if one is not dots}
    assert colours == {plots.ORANGE: 1, plots.SKY: 2}


def test_of_many_classes_the_worst_are_shown():
    tables = {f"class {c}": table([0.5], [0.5 - (0.01 * c if c != 7 else 0.49)], [3]) for c in range(40)}
    tables["never"] = table([math.nan], [math.nan], [0])
    figure = plots.classwise_panel(tables)
    shown = [axis.get_title().split("\n")[0] for axis in figure.axes if axis.get_visible()]
    assert shown == ["class 7", *(f"class {c}" for c in range(21, 40))]
    assert figure._suptitle.get_text() == "20 of 41 classes: those with the largest error"


def test_the_temperature_map_is_centred_on_one():
    image, logits = torch.rand(2, 3, 8, 9), torch.randn(2, 4, 8, 9)
    temperature = torch.full((2, 1, 8, 9), 0.5)
    temperature[:, :, :4] = 2.0
    figure = plots.temperature_map(image, logits.argmax(1), logits, temperature)
    last = figure.axes[5].images[-1]
    assert np.asarray(last.get_array()) == pytest.approx(np.log2(temperature[1, 0].numpy()))
    assert (last.norm.vmin, last.norm.vcenter, last.norm.vmax) == pytest.approx((-1, 0, 1))
    assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["0.50", "0.71", "1.00", "1.41", "2.00"]
    assert figure.axes[1].images[-1].get_array().mask.all()  # nothing is wrong


def test_the_users_settings_neither_matter_nor_change(tmp_path):
    plots.save(plots.reliability_diagram({"a": TABLE, "b": TABLE}), tmp_path / "expected.png")
    hostile = {
        "figure.facecolor": "black",
        "text.color": "white",
        "font.size": 30,
        "axes.prop_cycle": "cycler('color', ['red'])",
    }
    with matplotlib.rc_context({**hostile, "text.usetex": True, "savefig.dpi": 20}):
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
