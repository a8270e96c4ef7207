"""report.md: the tables for a repository or an issue, with the pictures beside it."""

import re
import shlex
from typing import Any, List, Mapping, Optional, Sequence

from . import tables
from .files import shown
from .tables import Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&!])")


def make_markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report in Markdown, as GitHub has it. `pictures`: their file names, which the text points to."""
    lines = ["# Calibration report", "", f"{escaped(report['name'])}: {tables.said(report)}", "", f"**{report['headline']}**"]
    if report["remarks"]:
        lines += ["", *(f"- {escaped(remark)}" for remark in report["remarks"])]
    drawn = {
        "Comparison" if report["comparison"] else "Figures": ["reliability.png"],
        "Classes": ["classwise.png"],
        "Images with the largest calibration error": tables.pictures_of_worst(pictures),
    }
    for title, table in (
        ("Comparison", tables.comparison(report)),
        ("Classes of all networks", tables.compared_classes(report)),
        ("Figures", tables.figures(report)),
        ("Above a confidence", tables.thresholds(report)),
        ("Classes", tables.classes(report)),
        ("Images with the largest calibration error", tables.worst(report)),
        ("Skipped files", tables.skipped(report)),
    ):
        lines += _section(title, table)
        for name in drawn.get(title, []):
            if name in pictures:
                lines += ["", f"![{name}]({name})", "", f"{tables.caption(name)}"]
    lines += ["", "## Definitions", "", tables.described(report), ""]
    lines += [f"- **{escaped(name)}**: {escaped(definition)}" for name, definition in tables.definitions(report)]
    command = " ".join(shlex.quote(word) for word in report["command"])
    lines += ["", "## How this was made", "", escaped(command), "", tables.timed(report)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown takes for nothing but text, on one line.

    >>> escaped("a|b <i>_c_")
    'a\\\\|b \\\\<i\\\\>\\\\_c\\\\_'
    """
    return _SPECIAL.sub(r"\\\1", shown(text))


def _section(title: str, table: Optional[Table]) -> List[str]:
    if table is None:
        return []
    head = "| " + " | ".join(map(escaped, table.head)) + " |"
    rule = "| --- |" + (" --- |" if table.wordy else " ---: |") * (len(table.head) - 1)
    return ["", f"## {title}", "", head, rule, *("| " + " | ".join(map(escaped, row)) + " |" for row in table.rows)]
