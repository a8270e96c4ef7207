"""The reliability diagram: accuracy by confidence, and how many pixels have it."""

from typing import Any, Mapping, Optional

import numpy as np

from .._check import as_whole, problem
from ..metrics.binned import ReliabilityTable, filled_columns, table_ece
from .style import (
    BLUE,
    COLUMN,
    LIGHT_GREY,
    LINE,
    ORANGE,
    SKY,
    blank_figure,
    broken,
    colour_of,
    legend,
    need_tables,
    percent,
    place,
    plain,
    styled,
)


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
    need_tables("reliability_diagram", tables)
    columns = min(as_whole("reliability_diagram", "columns", columns, low=1), len(tables))
    unknown = [title for title in ece or {} if title not in tables]
    if unknown:
        expected = f"titles of ece to be among {', '.join(map(repr, tables))}"
        raise problem("reliability_diagram", expected=expected, got=repr(unknown[0]), remedy="use the titles of the tables")
    rows = -(-len(tables) // columns)
    left, right, apart = 0.64, 0.1, 0.17
    wide = (COLUMN - left - right - (columns == 2) * apart) / min(columns, 2) if columns <= 2 else 1.3
    high, low = (2.1, 0.6) if columns == 1 else (wide, 0.45)
    titles = [broken(title, 38 if columns == 1 else 18) for title in tables]
    above = LINE * max(title.count("\n") + 1 for title in titles) + 0.1
    pitch = above + high + 0.1 + low + 0.4
    beside = 2 if columns <= 2 else 3
    below = LINE * 1.15 * (6 // beside) + 0.1
    with styled(dark=dark):
        figure = blank_figure((left + columns * wide + (columns - 1) * apart + right, rows * pitch + below))
        places = [
            (left + (i % columns) * (wide + apart), below + (rows - 1 - i // columns) * pitch + 0.4) for i in range(len(tables))
        ]
        uppers = [place(figure, x, y + low + 0.1, wide, high) for x, y in places]
        lowers = [place(figure, x, y, wide, low) for x, y in places]
        for title, name, table, upper, lower in zip(titles, tables, tables.values(), uppers, lowers):
            _draw_table(upper, lower, table)
            upper.set_title(plain(title))
            printed = percent("ECE", {name: table_ece(table), **(ece or {})}[name])
            paper = {"facecolor": colour_of("axes.facecolor"), "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
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
        legend(figure, [*uppers, *lowers], columns=beside)
        return figure


def _draw_table(upper: Any, lower: Any, table: ReliabilityTable) -> None:
    pixels, confidence, accuracy = filled_columns(table)
    left, width = table.lower.numpy(), (table.upper - table.lower).numpy()
    ink = colour_of("text.color")
    # No edges around bins of equal mass that are thinner than the edges.
    style: Any = {"align": "edge", "edgecolor": colour_of("axes.facecolor"), "linewidth": np.where(width < 0.01, 0, 0.4)}
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
