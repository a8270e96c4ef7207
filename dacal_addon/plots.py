"""Pictures in one style: reliability diagrams, class by class, temperature maps. Needs the extra `plot` (matplotlib >= 3.4).

Every function returns a matplotlib `Figure` with a canvas of its own: no window, no global state of pyplot, and nothing of
what the user's matplotlib is set to. `save` writes it; a notebook shows it. Figures are laid out in inches for a column of
8.5 cm, with letters of 6.5 points or more, and `dark=True` makes them for a dark page.
"""

import io
import math
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from ._check import as_whole, check_tensor, describe, problem
from .metrics.binned import ReliabilityTable

try:  # here, so that a script without it fails at its first line and not after its loop
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError as _error:
    _HOW = "dacal_addon.plots needs matplotlib; pip install 'dacal-addon[plot]'"
    raise ImportError(_HOW, name="matplotlib") from _error

COLUMN = 8.5 / 2.54
"""The width of a paper's column, in inches."""
# Okabe & Ito's colours, which people with any colour vision tell apart; the gaps have hatches of their own too.
BLUE, SKY, ORANGE = "#0072B2", "#56B4E9", "#D55E00"
GREY, LIGHT_GREY = "#666666", "#BBBBBB"
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.6,
    "legend.labelspacing": 0.35,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a class called $x$ is no formula
    "pdf.fonttype": 42,  # TrueType: publishers refuse the default, Type 3
}
_PAPER, _INK = "#161b22", "#e6edf3"
_DARK: Any = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), _PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_SMALL = 6.5
_LINE = 0.125
"""The height of a line of text, in inches."""
_MOST_CLASSES = 20
_STEPS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_MOST_STEPS = 10


class Picture(Figure):
    """A matplotlib `Figure` that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        save(self, content)
        return content.getvalue()


def styled(*, dark: bool = False) -> Any:
    """A context in which matplotlib has this package's style, and its own defaults for the rest."""
    defaults, present = matplotlib.rcParamsDefault, matplotlib.rcParams
    # What the user has changed, and no more: to set a setting that is deprecated to its default gives a warning too.
    changed: Any = {key: value for key, value in defaults.items() if key != "backend" and dict.get(present, key) != value}
    style = {**_STYLE, **(_DARK if dark else {})}
    # DAFormer's matplotlib 3.4 does not know all of them.
    return matplotlib.rc_context({**changed, **{key: value for key, value in style.items() if key in defaults}})


def blank_figure(size: Tuple[float, float], **options: Any) -> Any:
    """A figure without axes; the size is in inches."""
    figure = Picture(figsize=size, **options)
    FigureCanvasAgg(figure)
    return figure


def new_figure(rows: int, columns: int, size: Tuple[float, float], **options: Any) -> Tuple[Any, Any]:
    """A figure that lays itself out, and its axes, (rows, columns); the size is in inches."""
    figure = blank_figure(size, constrained_layout=True)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def place(figure: Any, left: float, bottom: float, width: float, height: float, **options: Any) -> Any:
    """Axes at a place of the figure in inches from its lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes([left / across, bottom / up, width / across, height / up], **options)


def save(figure: Any, path: Union[str, Path, io.BytesIO], *, kind: str = "png") -> None:
    """Write a figure in this package's style; the ending of the path says how, `kind` for what is written to memory."""
    with styled():
        if isinstance(path, io.BytesIO):
            figure.savefig(path, format=kind)
        else:
            figure.savefig(str(path))


def bare(axes: Any) -> None:
    """Nothing around pictures."""
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)


def reliability_diagram(
    tables: Mapping[str, ReliabilityTable],
    *,
    ece: Optional[Mapping[str, float]] = None,
    columns: int = 2,
    dark: bool = False,
) -> Any:
    """One panel a title: accuracy by confidence with its gap to the confidence, and below it how many pixels a bin holds.

    Two titles make a pair of before and after. The vertical lines below are mean confidence and accuracy over all pixels:
    where the first one is on the right, the network is overconfident.

    Args:
        tables: title -> `CalibrationStats.reliability()`, of bins of equal width or mass.
        ece: title -> the calibration error to print, a fraction, where it shall be another one than `table_ece` (debiased,
            mean over images).
        columns: panels in a row, at most. One or two make a figure 8.5 cm wide.
        dark: for a dark page.

    Raises:
        ValueError: no table, a title in `ece` that is not in `tables`, no column.
    """
    _need_tables("reliability_diagram", tables)
    columns = min(as_whole("reliability_diagram", "columns", columns, low=1), len(tables))
    unknown = [title for title in ece or {} if title not in tables]
    if unknown:
        expected = f"titles of ece to be among {', '.join(map(repr, tables))}"
        raise problem("reliability_diagram", expected=expected, got=repr(unknown[0]), remedy="use the titles of the tables")
    rows = -(-len(tables) // columns)
    left, right, apart = 0.64, 0.1, 0.17
    wide = (COLUMN - left - right - (columns == 2) * apart) / min(columns, 2) if columns <= 2 else 1.3
    high, low = (2.1, 0.6) if columns == 1 else (wide, 0.45)
    titles = [_fit(title, 38 if columns == 1 else 18) for title in tables]
    above = _LINE * max(title.count("\n") + 1 for title in titles) + 0.1
    pitch = above + high + 0.1 + low + 0.4
    beside = 2 if columns <= 2 else 3
    below = _LINE * 1.15 * (6 // beside) + 0.1
    with styled(dark=dark):
        figure = blank_figure((left + columns * wide + (columns - 1) * apart + right, rows * pitch + below))
        places = [
            (left + (i % columns) * (wide + apart), below + (rows - 1 - i // columns) * pitch + 0.4) for i in range(len(tables))
        ]
        uppers = [place(figure, x, y + low + 0.1, wide, high) for x, y in places]
        lowers = [place(figure, x, y, wide, low) for x, y in places]
        for title, name, table, upper, lower in zip(titles, tables, tables.values(), uppers, lowers):
            _draw_table(upper, lower, table)
            upper.set_title(_plain(title))
            printed = _percent("ECE", {name: table_ece(table), **(ece or {})}[name])
            paper = {"facecolor": _colour("axes.facecolor"), "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
            upper.text(0.04, 0.96, printed, transform=upper.transAxes, va="top", bbox=paper)
        # One scale for all panels; a bin that holds nearly everything reaches the top, bins of equal mass are no flat line.
        most = max(bar.get_height() for axis in lowers for bar in axis.patches)
        for index, (upper, lower) in enumerate(zip(uppers, lowers)):
            lower.set_ylim(0, min(1.0, 1.1 * most) or 1.0)
            lower.locator_params(axis="y", nbins=3)
            if index % columns == 0:
                upper.set_ylabel("accuracy")
                lower.set_ylabel("share of\npixels")
                # One column, whatever their numbers need.
                for axis in (upper, lower):
                    axis.yaxis.set_label_coords(-0.36 / wide, 0.5)
            else:
                upper.tick_params(labelleft=False)
                lower.tick_params(labelleft=False)
        _legend(figure, [*uppers, *lowers], columns=beside)
        return figure


def _draw_table(upper: Any, lower: Any, table: ReliabilityTable) -> None:
    pixels, confidence, accuracy = _arrays(table)
    left, width = table.lower.numpy(), (table.upper - table.lower).numpy()
    ink = _colour("text.color")
    # No edges around bins of equal mass that are thinner than the edges.
    style: Any = {"align": "edge", "edgecolor": _colour("axes.facecolor"), "linewidth": np.where(width < 0.01, 0, 0.4)}
    upper.bar(left, accuracy, width, color=BLUE, label="accuracy", **style)
    gap = np.where(pixels > 0, confidence - accuracy, 0.0)
    for name, part, colour, hatch in (
        ("overconfidence", np.clip(gap, 0, None), ORANGE, "////"),
        ("underconfidence", np.clip(gap, None, 0), SKY, "...."),
    ):
        upper.bar(left, part, width, bottom=accuracy, color=colour, hatch=hatch, label=name, **style)
    upper.plot([0, 1], [0, 1], color=ink, linewidth=0.9, linestyle="--", label="perfectly calibrated")
    halves: Any = {"xlim": (0, 1), "xticks": [0, 0.5, 1]}
    upper.set(ylim=(0, 1), yticks=[0, 0.5, 1], **halves)
    upper.set_yticklabels(["0", "0.5", "1"])
    upper.tick_params(labelbottom=False)
    total = pixels.sum()
    lower.bar(left, pixels / max(total, 1), width, color=LIGHT_GREY, **style)
    if total:
        for value, line, name in ((confidence, "-", "mean confidence"), (accuracy, ":", "mean accuracy")):
            lower.axvline(float((value * pixels).sum() / total), color=ink, linewidth=1.2, linestyle=line, label=name)
    lower.set(xlabel="confidence", **halves)
    lower.set_xticklabels(["0", "0.5", "1"])


def classwise_panel(tables: Mapping[str, ReliabilityTable], *, title: str = "", dark: bool = False) -> Any:
    """A small diagram a class: how often a pixel is of the class, by the probability that the network gave it.

    The line from a dot to the diagonal is the gap of a bin. A dot's area is the bin's pixels of the class, by label or by
    probability, whichever are more, and the line is as thick. The number is the mean gap with these weights (`class_gap`), so
    that long thick lines make a large number. Pixels that neither are of the class nor could be, which crowd near 0 and make
    class-wise ECE small, have next to no weight in either.

    Args:
        tables: class name -> `CalibrationStats.reliability(of_class=...)`. Of more than 20 classes, those with the largest
            mean gap are shown, in their order.
        title: for example the network's name.
        dark: for a dark page.

    Raises:
        ValueError: no table.
    """
    _need_tables("classwise_panel", tables)
    gaps = {name: class_gap(table) for name, table in tables.items()}
    worst = sorted(gaps, key=lambda name: -1.0 if math.isnan(gaps[name]) else gaps[name], reverse=True)[:_MOST_CLASSES]
    shown = [name for name in tables if name in worst]
    heads = [title] * bool(title)
    if len(shown) < len(tables):
        heads.append(f"{len(shown)} of {len(tables)} classes: those with the largest mean gap")
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    left, right, apart = 0.54, 0.1, 0.13
    wide = min(1.4, (COLUMN - left - right - (columns - 1) * apart) / columns)
    indent = (COLUMN - left - right - columns * wide - (columns - 1) * apart) / 2
    names = [_fit(name, {1: 40, 2: 24, 3: 17, 4: 12}[columns]) for name in shown]
    above = _LINE * (max(name.count("\n") for name in names) + 2) + 0.06
    pitch = above + wide + 0.08
    below, top = 0.45 + 2 * _LINE * 1.15 + 0.1, _LINE * 1.3 * len(heads) + 0.03 * bool(heads)
    with styled(dark=dark):
        figure = blank_figure((COLUMN, rows * pitch + below + top))
        axes = []
        for index, (key, name) in enumerate(zip(shown, names)):
            row, column = divmod(index, columns)
            bottom = below + (rows - 1 - row) * pitch
            axis = place(figure, left + indent + column * (wide + apart), bottom, wide, wide)
            axes.append(axis)
            _draw_class(axis, tables[key])
            axis.set_title(f"{_plain(name)}\n{_percent('gap', gaps[key])}", fontsize=_SMALL, pad=3)
            # The last one of its column need not be in the last row.
            axis.tick_params(labelsize=_SMALL, pad=2, labelleft=column == 0, labelbottom=index + columns >= len(shown))
        height = rows * pitch + below + top
        figure.text(0.5, (below - 0.27) / height, "probability of the class", ha="center", va="center")
        middle = (below + (rows * pitch - above) / 2) / height
        side = "share of pixels in the class" if rows > 1 else "share of pixels\nin the class"
        figure.text(0.16 / COLUMN, middle, side, ha="center", va="center", rotation=90)
        for line, head in enumerate(heads):
            y = 1 - (0.02 + 1.3 * _LINE * line) / height
            figure.text(0.5, y, fitted(head, 60), ha="center", va="top", fontsize=7 if line else 8)
        # Lines and dots of a panel have as many sizes as there are bins: those of the legend are its own.
        marks: Dict[str, Any] = {
            "probability too high": Line2D([], [], color=ORANGE, linewidth=2),
            "probability too low": Line2D([], [], color=SKY, linewidth=2),
            "bin (area: pixels of class)": Line2D([], [], color=BLUE, marker="o", markersize=4, linestyle="none"),
        }
        _legend(figure, axes, columns=2, more=marks)
        return figure


def _draw_class(axis: Any, table: ReliabilityTable) -> None:
    pixels, probability, share = _arrays(table)
    filled = pixels > 0
    probability, share, pixels = probability[filled], share[filled], pixels[filled]
    axis.plot([0, 1], [0, 1], color=_colour("text.color"), linewidth=0.6, linestyle="--", label="perfectly calibrated")
    weight = pixels * np.maximum(probability, share)
    widths = 0.5 + 2.5 * np.sqrt(weight / (weight.max() if weight.any() else 1))
    for high, colour in ((True, ORANGE), (False, SKY)):
        chosen = (probability > share) == high
        axis.vlines(probability[chosen], share[chosen], probability[chosen], color=colour, linewidths=widths[chosen])
    areas = 3 + 60 * weight / (weight.sum() or 1)
    axis.scatter(probability, share, areas, color=BLUE, alpha=0.8, linewidths=0, zorder=3, clip_on=False)
    axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axis.set_xticklabels(["0", "0.5", "1"])
    axis.set_yticklabels(["0", "0.5", "1"])


def temperature_map(
    image: Tensor, temperature: Tensor, *, wrong: Optional[Tensor] = None, title: str = "", dark: bool = False
) -> Any:
    """Rows of images: the image, where the prediction errs if that is known, the temperature of every pixel.

    Temperatures have steps of colour, and the scale names the edge of every step: a colour says between which two numbers
    a pixel is. Below each map stand its median and the range from its 5th to its 95th percentile.

    Args:
        image: (N, 3, H, W) floating in 0..1.
        temperature: (N, 1, H, W) > 0, without unit.
        wrong: (N, H, W) bool, True where the prediction whose temperatures these are is wrong.
        title: for example the network's name and the iteration.
        dark: for a dark page.

    Raises:
        TypeError, ValueError: another kind, shape or temperature.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap

    _check_map(image, temperature, wrong)
    count, _, height, width = image.shape
    pictures = image.detach().cpu().float().permute(0, 2, 3, 1).numpy()
    log_t = temperature.detach().cpu().double().log2().numpy()[:, 0]
    edges = _steps(*(float(np.quantile(log_t, q)) for q in (0.01, 0.99)))
    columns = 2 if wrong is None else 3
    left, right, apart = 0.03, 0.56, 0.06
    wide = (COLUMN - left - right - (columns - 1) * apart) / columns
    high = wide * height / width
    pitch, above = high + 2.4 * _LINE, _LINE * 2 + 0.1 + 1.4 * _LINE * bool(title)
    total = max(count * pitch, 1.4) + above  # the scale needs as much
    with styled(dark=dark):
        figure = blank_figure((COLUMN, total))
        middle = (edges[1:] + edges[:-1]) / 2
        colours = ListedColormap(_diverging(middle / np.abs(edges).max()))
        norm = BoundaryNorm(edges, len(middle), clip=True)
        for row in range(count):
            bottom = total - above - high - row * pitch
            axes = [place(figure, left + c * (wide + apart), bottom, wide, high) for c in range(columns)]
            axes[0].imshow(pictures[row], aspect="auto")
            if wrong is not None:
                grey = np.repeat(pictures[row].mean(2, keepdims=True), 3, 2)
                errs = wrong[row].cpu().numpy()
                axes[1].imshow(0.5 + 0.5 * grey, aspect="auto")
                marked = np.ma.masked_where(~errs, errs)
                axes[1].imshow(marked, cmap=ListedColormap([ORANGE]), interpolation="nearest", aspect="auto")
            shown = axes[-1].imshow(log_t[row], cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
            bare(axes)
            at = [2**q for q in np.quantile(log_t[row], (0.05, 0.5, 0.95))]
            values = f"median T {at[1]:.2f}\n5 to 95 %: {at[0]:.2f} to {at[2]:.2f}"
            axes[-1].text(1, -0.03 / high, values, transform=axes[-1].transAxes, ha="right", va="top", fontsize=_SMALL)
            if row == 0:
                heads = ["image", "where the\nprediction is wrong", "temperature\nof its label"]
                for axis, head in zip(axes, heads if wrong is not None else heads[::2]):
                    axis.set_title(head, fontsize=7)
        bar = min(total - above - 0.1, 2.4)
        scale = figure.colorbar(shown, cax=place(figure, COLUMN - right + 0.06, total - above - bar, 0.1, bar))
        scale.set_ticks(edges.tolist())
        scale.set_ticklabels([f"{2**edge:.2f}" for edge in edges])
        scale.ax.tick_params(labelsize=_SMALL, pad=2)
        scale.ax.set_title("T", fontsize=7)
        if title:
            figure.text(0.5, 1 - 0.02 / total, fitted(title, 60), ha="center", va="top")
        return figure


def _check_map(image: Tensor, temperature: Tensor, wrong: Optional[Tensor]) -> None:
    expected, remedy = "image: a floating tensor (N, 3, H, W)", "pass a batch of images in 0..1"
    check_tensor("temperature_map", "image", image, expected=expected, remedy=remedy)
    if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise problem("temperature_map", expected=expected, got=describe(image), remedy=remedy)
    count, _, height, width = image.shape
    shape, remedy = (count, 1, height, width), "pass temperatures of the size of the image"
    check_tensor("temperature_map", "temperature", temperature, expected=f"a floating tensor {shape}", remedy=remedy)
    if tuple(temperature.shape) != shape or not temperature.is_floating_point():
        expected = f"temperature: a floating tensor {shape}"
        raise problem("temperature_map", expected=expected, got=describe(temperature), remedy=remedy)
    if not bool((temperature > 0).all()):  # also refuses NaN
        got, remedy = f"a minimum of {float(temperature.min()):g}", "pass temperatures, not their logarithms"
        raise problem("temperature_map", expected="temperature > 0", got=got, remedy=remedy)
    if wrong is not None and (wrong.dtype != torch.bool or tuple(wrong.shape) != (count, height, width)):
        expected, remedy = f"wrong: a bool tensor {(count, height, width)}", "compare prediction and label"
        raise problem("temperature_map", expected=expected, got=describe(wrong), remedy=remedy)


def _steps(low: float, high: float) -> np.ndarray:
    """Edges of steps in log2(T) from below `low` to above `high`, T = 1 among them: neither sharpened nor softened.

    The finest steps of which there are at most ten. Neither side is shorter than one step, so that nearly nothing does not
    look like much.

    >>> [f"{2**edge:.2f}" for edge in _steps(-0.4, 0.9)]
    ['0.71', '0.84', '1.00', '1.19', '1.41', '1.68', '2.00']
    """
    for step in _STEPS:
        first, last = min(math.floor(low / step), -1), max(math.ceil(high / step), 1)
        if last - first <= _MOST_STEPS:
            break
    return step * np.arange(first, last + 1)


def _diverging(at: np.ndarray) -> Any:
    """The colours of numbers in -1..1: violet (sharpened) over white (0) to orange (softened)."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = ["#3f007d", "#8073ac", "#f7f7f7", "#e08214", "#7f3b08"]
    return LinearSegmentedColormap.from_list("temperature", ends)((at + 1) / 2)


def class_gap(table: ReliabilityTable) -> float:
    """The mean gap of the bins of one class, each with the weight of its pixels of the class; NaN where there are none.

    sum(w |share - probability|) / sum(w) over the bins, w = pixels x max(share, probability): the bin's pixels of the class
    by label, or as many as its probabilities sum to, whichever are more. In 0..1. Class-wise ECE has w = pixels, and so is
    small for every rare class: most pixels neither are of it nor could be.

    Example:
        >>> edges = torch.tensor([0.0, 0.5, 1.0]).double()
        >>> pixels, probability, share = torch.tensor([[99.0, 1.0], [0.0, 0.75], [0.0, 0.25]]).double()
        >>> table = ReliabilityTable(edges[:-1], edges[1:], pixels.long(), probability, share)
        >>> class_gap(table), table_ece(table)
        (0.5, 0.005)
    """
    pixels, probability, share = _arrays(table)
    weight = pixels * np.maximum(share, probability)
    return float((weight * np.abs(share - probability)).sum() / weight.sum()) if weight.sum() else math.nan


def table_ece(table: ReliabilityTable) -> float:
    """The l1 calibration error of a table's bins, NaN if they are empty.

    Example:
        >>> edges = torch.tensor([0.0, 0.5, 1.0]).double()
        >>> pixels, confidence, accuracy = torch.tensor([[1.0, 3.0], [0.5, 0.75], [0.5, 0.25]]).double()
        >>> table_ece(ReliabilityTable(edges[:-1], edges[1:], pixels.long(), confidence, accuracy))  # 3/4 x 0.5
        0.375
    """
    pixels, confidence, accuracy = _arrays(table)
    return float((pixels * np.abs(accuracy - confidence)).sum() / pixels.sum()) if pixels.sum() else math.nan


def _arrays(table: ReliabilityTable) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, mean confidence and accuracy, 0 where a bin is empty."""
    pixels = table.pixels.double()
    means = (torch.where(pixels > 0, column, torch.zeros_like(column)) for column in (table.confidence, table.accuracy))
    return (pixels.numpy(), *(column.numpy() for column in means))  # type: ignore[return-value]


def _percent(name: str, value: float) -> str:
    return f"{name}: no pixel" if math.isnan(value) else f"{name} {100 * value:.2f} %"


def _need_tables(function: str, tables: Mapping[str, ReliabilityTable]) -> None:
    if not tables:
        remedy = "pass a title and CalibrationStats.reliability()"
        raise problem(function, expected="at least one table", got="none", remedy=remedy)


def fitted(text: str, letters: int) -> str:
    """One line of at most so many letters, of which none makes a formula."""
    return _plain(text if len(text) <= letters else text[: letters - 1] + "…")


def _fit(text: str, letters: int) -> str:
    """At most two lines of so many letters, so that it does not run into the next panel.

    >>> _fit("swimming pool, swimming bath, natatorium, bath", 22)
    'swimming pool,\\nswimming bath, …'
    """
    return textwrap.fill(text, letters, max_lines=2, placeholder=" …")


def _plain(text: str) -> str:
    """Signs that an old matplotlib, which has no `text.parse_math`, would take for a formula."""
    return text if "text.parse_math" in matplotlib.rcParams else text.replace("$", r"\$")


def _colour(key: str) -> Any:
    settings: Any = matplotlib.rcParams  # whose type knows keys by their spelling alone
    return settings[key]


def _legend(figure: Any, axes: Sequence[Any], *, columns: int, more: Optional[Mapping[str, Any]] = None) -> None:
    """One legend below all panels, of everything that any of them has."""
    entries: Dict[str, Any] = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels())}
    entries.update(more or {})
    where: Dict[str, Any] = {"loc": "lower center", "borderaxespad": 0.3, "ncol": columns}
    names: List[str] = list(entries)
    figure.legend([entries[name] for name in names], names, **where)
