"""report.csv: every figure in a line of its own, for spreadsheets and pandas."""

import csv
import io
from typing import Any, Iterator, List, Mapping, Optional, Union

Value = Union[float, int, str, None]
COLUMNS = ("network", "scope", "name", "metric", "value", "low", "high")
# Of classes and of images, what is no figure.
_NAMES = ("name",)


def make_csv(report: Mapping[str, Any]) -> str:
    """Fractions, not percent; what there is none of is empty. `scope`: all, difference, boundary, threshold, class, image.

    A name that a spreadsheet would take for a formula is given an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in _rows(report):
        writer.writerow([_safe(cell) for cell in row])
    return text.getvalue()


def _rows(report: Mapping[str, Any]) -> Iterator[List[Value]]:
    name = report["name"]
    compared = report["comparison"]
    networks = compared["networks"] if compared else [{"name": name, "metrics": report["metrics"], "differences": None}]
    for network in networks:
        for metric, found in network["metrics"].items():
            yield [network["name"], "all", "", metric, found["value"], found["low"], found["high"]]
        for metric, found in (network["differences"] or {}).items():
            yield [network["name"], "difference", compared["reference"], metric, found["value"], found["low"], found["high"]]
    for metric, value in (report["boundary"] or {}).items():
        yield _row(name, "boundary", "", metric, value)
    for row in report["thresholds"]:
        for metric in ("share", "accuracy"):
            yield _row(name, "threshold", f"{row['threshold']:g}", metric, row[metric])
    for scope, rows in (("class", report["classes"]), ("image", report["per_image"])):
        for row in rows:
            yield from (_row(name, scope, row["name"], key, value) for key, value in row.items() if key not in _NAMES)


def _row(network: str, scope: str, name: str, metric: str, value: Value) -> List[Value]:
    none: Optional[float] = None
    return [network, scope, name, metric, value, none, none]


def _safe(cell: Value) -> Value:
    if not isinstance(cell, str):
        return cell
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) and cell != "-infinite" else cell
