"""What all pictures have in common: sizes in inches, colours, letters, legends, and how a figure is written."""

import io
import math
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .._check import problem
from ..metrics.binned import ReliabilityTable

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
SMALL = 6.5
LINE = 0.125
"""The height of a line of text, in inches."""


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


def percent(name: str, value: float) -> str:
    return f"{name}: no pixel" if math.isnan(value) else f"{name} {100 * value:.2f} %"


def need_tables(function: str, tables: Mapping[str, ReliabilityTable]) -> None:
    if not tables:
        remedy = "pass a title and CalibrationStats.reliability()"
        raise problem(function, expected="at least one table", got="none", remedy=remedy)


def fitted(text: str, letters: int) -> str:
    """One line of at most so many letters, of which none makes a formula."""
    return plain(text if len(text) <= letters else text[: letters - 1] + "…")


def broken(text: str, letters: int) -> str:
    """At most two lines of so many letters, so that it does not run into the next panel.

    >>> broken("swimming pool, swimming bath, natatorium, bath", 22)
    'swimming pool,\\nswimming bath, …'
    """
    return textwrap.fill(text, letters, max_lines=2, placeholder=" …")


def plain(text: str) -> str:
    """Signs that an old matplotlib, which has no `text.parse_math`, would take for a formula."""
    return text if "text.parse_math" in matplotlib.rcParams else text.replace("$", r"\$")


def colour_of(key: str) -> Any:
    settings: Any = matplotlib.rcParams  # whose type knows keys by their spelling alone
    return settings[key]


def legend(figure: Any, axes: Sequence[Any], *, columns: int, more: Optional[Mapping[str, Any]] = None) -> None:
    """One legend below all panels, of everything that any of them has."""
    entries: Dict[str, Any] = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels())}
    entries.update(more or {})
    where: Dict[str, Any] = {"loc": "lower center", "borderaxespad": 0.3, "ncol": columns}
    names: List[str] = list(entries)
    figure.legend([entries[name] for name in names], names, **where)
