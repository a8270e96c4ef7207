"""The files of a report, and those of an earlier one in the same folder, which go."""

import io
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping

from .. import plots
from .markdown import make_markdown
from .page import make_page
from .spreadsheet import make_csv

_OURS = re.compile(r"(reliability|classwise|worst-[0-9]{1,6})\.png")
_REPORT = "report.json"


def write(folder: Path, report: Dict[str, Any], light: Mapping[str, Any], dark: Mapping[str, Any]) -> List[str]:
    """Write report.html, .json, .md, .csv and the pictures; returns their names. Pictures of an earlier report are removed.

    Args:
        light: file name -> matplotlib `Figure`; dark: the same for the dark page.
    """
    stale = [name for name in pictures_of_earlier(folder) if name not in light]
    pictures, of_dark = ({name: _png(figure) for name, figure in figures.items()} for figures in (light, dark))
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    report["pictures"] = list(light)
    texts = {
        "report.html": make_page(report, pictures, of_dark),
        _REPORT: json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.md": make_markdown(report, list(light)),
        "report.csv": make_csv(report),
    }
    for name, text in texts.items():
        # A file's name may hold bytes that are no text.
        (folder / name).write_bytes(text.encode("utf-8", "backslashreplace"))
    for name in stale:
        (folder / name).unlink()
    return [*texts, *light]


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    plots.save(figure, content)
    return content.getvalue()


def pictures_of_earlier(folder: Path) -> List[str]:
    """What the report.json in the folder says that this command drew, of the names that it gives to pictures.

    Nothing else is ever removed: neither another's picture of such a name, without a report that lists it, nor a path that
    somebody has put into a report.
    """
    try:
        report: Any = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    ours = isinstance(report, dict) and str(report.get("schema")).startswith("dacal-evaluate/")
    names = report.get("pictures") if ours else None
    listed = [name for name in names if isinstance(name, str) and _OURS.fullmatch(name)] if isinstance(names, list) else []
    return [name for name in dict.fromkeys(listed) if (folder / name).is_file()]
