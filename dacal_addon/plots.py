"""Pictures in one style: reliability diagrams, class by class, temperature maps. Needs the extra `plot` (matplotlib).

Every function returns a matplotlib `Figure` with a canvas of its own: no window, no global state of pyplot, and nothing of
what the user's matplotlib is set to. `save` writes it; a notebook shows it.
"""

import math
import textwrap
from pathlib import Path
from typing import Any, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from ._check import check_tensor, describe, problem
from .metrics.binned import ReliabilityTable

# Okabe & Ito's colours, which people with any colour vision tell apart; the gaps have hatches of their own too.
BLUE, SKY, ORANGE = "#0072B2", "#56B4E9", "#D55E00"
GREY, LIGHT_GREY = "#666666", "#BBBBBB"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.6,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "text.parse_math": False,  # a class called $x$ is no formula
    "pdf.fonttype": 42,  # TrueType: publishers refuse the default, Type 3
}
_MOST_CLASSES = 20


def styled() -> Any:
    """A context in which matplotlib has this package's style, and its own defaults for the rest."""
    import matplotlib

    defaults: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    # DAFormer's matplotlib 3.4 does not know all of them.
    return matplotlib.rc_context({**defaults, **{key: value for key, value in _STYLE.items() if key in defaults}})


def new_figure(rows: int, columns: int, size: Tuple[float, float], **options: Any) -> Tuple[Any, Any]:
    """A figure and its axes, (rows, columns); the size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, constrained_layout=True)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, path: Union[str, Path]) -> None:
    """Write a figure in this package's style; the ending of the path says how."""
    with styled():
        figure.savefig(str(path))


def bare(axes: Any) -> None:
    """Nothing around pictures."""
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)


def reliability_diagram(tables: Mapping[str, ReliabilityTable], *, ece: Optional[Mapping[str, float]] = None) -> Any:
    """One panel a title: accuracy by confidence with its gap to the confidence, and below it how many pixels a bin holds.

    Two titles make a pair of before and after. The vertical lines below are mean confidence and accuracy over all pixels:
    where the first one is on the right, the network is overconfident.

    Args:
        tables: title -> `CalibrationStats.reliability()`, of bins of equal width or mass.
        ece: title -> the calibration error to print, a fraction, where it shall be another one than `table_ece` (debiased,
            mean over images).

    Raises:
        ValueError: no table, or a title in `ece` that is not in `tables`.
    """
    _need_tables("reliability_diagram", tables)
    unknown = [title for title in ece or {} if title not in tables]
    if unknown:
        expected = f"titles of ece to be among {', '.join(map(repr, tables))}"
        raise problem("reliability_diagram", expected=expected, got=repr(unknown[0]), remedy="use the titles of the tables")
    with styled():
        size = (max(2.45 * len(tables), 3.5), 4.2 if len(tables) == 1 else 4.0)
        figure, axes = new_figure(2, len(tables), size, sharex="col", sharey="row", height_ratios=(3, 1.2))
        figure.get_layout_engine().set(wspace=0.06)  # the 1 of a panel and the 0 of the next one shall not read as 10
        for (title, table), (upper, lower) in zip(tables.items(), axes.T):
            _draw_table(upper, lower, table)
            upper.set_title(_fit(title, 26))
            printed = _percent("ECE", {title: table_ece(table), **(ece or {})}[title])
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
            upper.text(0.04, 0.96, printed, transform=upper.transAxes, va="top", bbox=paper)
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("share of\npixels")
        # One scale for all panels; a bin that holds nearly everything reaches the top, bins of equal mass are no flat line.
        most = max(bar.get_height() for axis in axes[1] for bar in axis.patches)
        axes[1, 0].set_ylim(0, min(1.0, 1.1 * most) or 1.0)
        axes[1, 0].locator_params(axis="y", nbins=3)
        _legend(figure, axes, columns=2 if len(tables) == 1 else 3)
        return figure


def _draw_table(upper: Any, lower: Any, table: ReliabilityTable) -> None:
    pixels, confidence, accuracy = _arrays(table)
    left, width = table.lower.numpy(), (table.upper - table.lower).numpy()
    # No edges around bins of equal mass that are thinner than the edges.
    style: Any = {"align": "edge", "edgecolor": "white", "linewidth": np.where(width < 0.01, 0, 0.4)}
    upper.bar(left, accuracy, width, color=BLUE, label="accuracy", **style)
    gap = np.where(pixels > 0, confidence - accuracy, 0.0)
    for name, part, colour, hatch in (
        ("overconfidence", np.clip(gap, 0, None), ORANGE, "////"),
        ("underconfidence", np.clip(gap, None, 0), SKY, "...."),
    ):
        upper.bar(left, part, width, bottom=accuracy, color=colour, hatch=hatch, label=name, **style)
    upper.plot([0, 1], [0, 1], color="black", linewidth=0.9, linestyle="--", label="perfectly calibrated")
    upper.set(xlim=(0, 1), ylim=(0, 1))
    total = pixels.sum()
    lower.bar(left, pixels / max(total, 1), width, color=LIGHT_GREY, **style)
    if total:
        for value, line, name in ((confidence, "-", "mean confidence"), (accuracy, ":", "mean accuracy")):
            lower.axvline(float((value * pixels).sum() / total), color="black", linewidth=1.2, linestyle=line, label=name)
    lower.set(xlabel="confidence", xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])


def classwise_panel(tables: Mapping[str, ReliabilityTable]) -> Any:
    """A small diagram a class: how often a pixel is of the class, by the probability that the network gave it.

    The area of a dot grows with the share of the pixels, which crowd near 0; the line to the diagonal is the gap.

    Args:
        tables: class name -> `CalibrationStats.reliability(of_class=...)`. Of more than 20 classes, those with the largest
            class-wise ECE are shown, in their order.

    Raises:
        ValueError: no table.
    """
    _need_tables("classwise_panel", tables)
    errors = {name: table_ece(table) for name, table in tables.items()}
    worst = sorted(errors, key=lambda name: -1.0 if math.isnan(errors[name]) else errors[name], reverse=True)[:_MOST_CLASSES]
    shown = [name for name in tables if name in worst]
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    with styled():
        size = (max(1.75 * columns + 0.4, 3.2), 1.85 * rows + (0.6 if columns > 3 else 1.1))
        figure, axes = new_figure(rows, columns, size, sharex=True, sharey=True)
        for index, (axis, name) in enumerate(zip(axes.flat, shown)):
            pixels, probability, share = _arrays(tables[name])
            filled = pixels > 0
            probability, share, pixels = probability[filled], share[filled], pixels[filled]
            axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", label="perfectly calibrated")
            for high, colour, label in ((True, ORANGE, "probability too high"), (False, SKY, "probability too low")):
                chosen = (probability > share) == high
                axis.vlines(probability[chosen], share[chosen], probability[chosen], color=colour, linewidth=2.5, label=label)
            areas = 6 + 120 * pixels / max(pixels.sum(), 1)
            axis.scatter(probability, share, areas, color=BLUE, alpha=0.8, linewidths=0, zorder=3, clip_on=False)
            # A class name is no formula, whatever its signs.
            axis.set_title(f"{_fit(name, 22)}\n{_percent('ECE', errors[name])}", fontsize=8, parse_math=False)
            axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            axis.set(xticklabels=["0", "0.5", "1"], yticklabels=["0", "0.5", "1"])
            if index + columns >= len(shown):  # the last one of its column, which need not be in the last row
                axis.set_xlabel("probability of class")
                axis.tick_params(labelbottom=True)
        # For the legend alone: the dots of a panel have as many sizes as there are bins.
        axes[0, 0].scatter([], [], 30, color=BLUE, alpha=0.8, linewidths=0, label="a bin (area: share of pixels)")
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("share of pixels\nin the class")
        if len(shown) < len(tables):
            figure.suptitle(f"{len(shown)} of {len(tables)} classes: those with the largest class-wise ECE", fontsize=9)
        _legend(figure, axes, columns=4 if columns > 3 else 2 if columns == 3 else 1)
        return figure


def temperature_map(image: Tensor, temperature: Tensor, *, wrong: Optional[Tensor] = None) -> Any:
    """Rows of images: the image, where the prediction errs if that is known, the temperature over the image.

    Args:
        image: (N, 3, H, W) floating in 0..1.
        temperature: (N, 1, H, W) > 0, without unit.
        wrong: (N, H, W) bool, True where the prediction whose temperatures these are is wrong.

    Raises:
        TypeError, ValueError: another kind, shape or temperature.
    """
    from matplotlib.colors import ListedColormap, TwoSlopeNorm

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
    pictures = image.detach().cpu().float().permute(0, 2, 3, 1).numpy()
    log_t = temperature.detach().cpu().double().log2().numpy()[:, 0]
    # The middle of the scale is T = 1, neither sharpened nor softened; its ends are the 1st and the 99th percentile,
    # neither side shorter than a quarter of the other, so that nearly nothing does not look like much.
    low, high = (float(np.quantile(log_t, q)) for q in (0.01, 0.99))
    low, high = min(low, -high / 4, -0.05), max(high, -low / 4, 0.05)
    with styled():
        columns = 2 if wrong is None else 3
        figure, axes = new_figure(count, columns, (3.2 * columns + 0.2, 0.3 + 3.0 * count * height / width))
        for row, picture in zip(axes, range(count)):
            grey = np.repeat(pictures[picture].mean(2, keepdims=True), 3, 2)
            row[0].imshow(pictures[picture])
            for axis in row[1:]:
                axis.imshow(0.5 + 0.5 * grey)
            if wrong is not None:
                errs = wrong[picture].cpu().numpy()
                row[1].imshow(np.ma.masked_where(~errs, errs), cmap=ListedColormap([ORANGE]), interpolation="nearest")
            shown = row[-1].imshow(log_t[picture], cmap="PuOr_r", norm=TwoSlopeNorm(0.0, low, high), alpha=0.65)
        titles = ["image", "where the prediction is wrong", "temperature of its label"]
        for axis, title in zip(axes[0], titles if wrong is not None else titles[::2]):
            axis.set_title(title)
        bare(axes)
        colours = figure.colorbar(shown, ax=list(axes[:, -1]), fraction=0.05, pad=0.02)
        ticks = np.linspace(low, 0, 3).tolist() + np.linspace(0, high, 3).tolist()[1:]
        colours.set_ticks(ticks)
        colours.set_ticklabels([f"{2**tick:.2f}" for tick in ticks])
        colours.set_label("temperature T\n(> 1 softens)")
        return figure


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


def _fit(text: str, letters: int) -> str:
    """At most two lines of so many letters, so that it does not run into the next panel.

    >>> _fit("swimming pool, swimming bath, natatorium, bath", 22)
    'swimming pool,\\nswimming bath, …'
    """
    return textwrap.fill(text, letters, max_lines=2, placeholder=" …")


def _legend(figure: Any, axes: Any, *, columns: int) -> None:
    """One legend below all panels, of everything that any of them has."""
    entries = {name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncol=columns)
