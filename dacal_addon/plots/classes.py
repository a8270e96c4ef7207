"""Class by class: how often a pixel is of the class, by the probability that the network gave it."""

import math
from typing import Any, Dict, Mapping

import numpy as np
from matplotlib.lines import Line2D

from ..metrics.binned import ReliabilityTable, class_gap, filled_columns
from .style import (
    BLUE,
    COLUMN,
    LINE,
    ORANGE,
    SKY,
    SMALL,
    blank_figure,
    broken,
    colour_of,
    fitted,
    legend,
    need_tables,
    percent,
    place,
    plain,
    styled,
)

_MOST_CLASSES = 20


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
    need_tables("classwise_panel", tables)
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
    names = [broken(name, {1: 40, 2: 24, 3: 17, 4: 12}[columns]) for name in shown]
    above = LINE * (max(name.count("\n") for name in names) + 2) + 0.06
    pitch = above + wide + 0.08
    below, top = 0.45 + 2 * LINE * 1.15 + 0.1, LINE * 1.3 * len(heads) + 0.03 * bool(heads)
    with styled(dark=dark):
        figure = blank_figure((COLUMN, rows * pitch + below + top))
        axes = []
        for index, (key, name) in enumerate(zip(shown, names)):
            row, column = divmod(index, columns)
            bottom = below + (rows - 1 - row) * pitch
            axis = place(figure, left + indent + column * (wide + apart), bottom, wide, wide)
            axes.append(axis)
            _draw_class(axis, tables[key])
            axis.set_title(f"{plain(name)}\n{percent('gap', gaps[key])}", fontsize=SMALL, pad=3)
            # The last one of its column need not be in the last row.
            axis.tick_params(labelsize=SMALL, pad=2, labelleft=column == 0, labelbottom=index + columns >= len(shown))
        height = rows * pitch + below + top
        figure.text(0.5, (below - 0.27) / height, "probability of the class", ha="center", va="center")
        middle = (below + (rows * pitch - above) / 2) / height
        side = "share of pixels in the class" if rows > 1 else "share of pixels\nin the class"
        figure.text(0.16 / COLUMN, middle, side, ha="center", va="center", rotation=90)
        for line, head in enumerate(heads):
            y = 1 - (0.02 + 1.3 * LINE * line) / height
            figure.text(0.5, y, fitted(head, 60), ha="center", va="top", fontsize=7 if line else 8)
        # Lines and dots of a panel have as many sizes as there are bins: those of the legend are its own.
        marks: Dict[str, Any] = {
            "probability too high": Line2D([], [], color=ORANGE, linewidth=2),
            "probability too low": Line2D([], [], color=SKY, linewidth=2),
            "bin (area: pixels of class)": Line2D([], [], color=BLUE, marker="o", markersize=4, linestyle="none"),
        }
        legend(figure, axes, columns=2, more=marks)
        return figure


def _draw_class(axis: Any, table: ReliabilityTable) -> None:
    pixels, probability, share = filled_columns(table)
    filled = pixels > 0
    probability, share, pixels = probability[filled], share[filled], pixels[filled]
    axis.plot([0, 1], [0, 1], color=colour_of("text.color"), linewidth=0.6, linestyle="--", label="perfectly calibrated")
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
