"""The diagrams of a report, for light pages and for dark ones."""

from typing import Any, Dict, Sequence

from .. import plots
from .options import EvaluateOptions
from .report import Found


def make_pictures(found: Sequence[Found], options: EvaluateOptions, *, dark: bool = False) -> Dict[str, Any]:
    """File name -> matplotlib `Figure`. `found`: the network itself, then those that are compared with it."""
    first = found[0]
    tables = {"all pixels": first.results.stats.reliability()}
    if len(found) == 1 and options.name:
        tables = {options.name: tables["all pixels"]}
    if first.results.boundary is not None:
        tables["near boundaries"] = first.results.boundary.reliability()
    if len(found) > 1:
        tables = {one.network.name: one.results.stats.reliability() for one in found}
    figures = {"reliability.png": plots.reliability_diagram(tables, columns=max(2, min(4, len(found))), dark=dark)}
    if options.classwise:
        names = first.results.class_names
        by_class = {name: first.results.stats.reliability(of_class=c) for c, name in enumerate(names)}
        title = first.network.name if options.name or len(found) > 1 else ""
        figures["classwise.png"] = plots.classwise_panel(by_class, title=title, dark=dark)
    return figures
