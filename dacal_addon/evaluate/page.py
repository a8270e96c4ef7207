"""report.html: one page that needs nothing else, made from what report.json holds and from pictures."""

import base64
import io
import shlex
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple

from . import tables

# The pictures have 300 dots an inch; a browser's inch has 96, and theirs are to be read at arm's length.
_SHOWN = 1.35 * 96 / 300
# PIL's method for pictures with transparency, whose name has moved with its versions.
_OCTREE = 2


class Shown(NamedTuple):
    """A picture of the page, as base64."""

    light: str
    dark: str
    """Empty where one does for both."""
    width: int
    """In the browser's pixels."""


def make_page(report: Mapping[str, Any], light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The page; what comes from a file is escaped, and the page forbids itself scripts and requests.

    Args:
        light: file name -> PNG.
        dark: the same pictures for a dark page, of those that need another one there.
    """
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    pictures: Dict[str, Shown] = {}
    for name, content in light.items():
        width = int.from_bytes(content[16:20], "big")  # where the header of a PNG has it
        pictures[name] = Shown(_encoded(content), _encoded(dark[name]) if name in dark else "", round(width * _SHOWN))
    command = " ".join(shlex.quote(word) for word in report["command"])
    return page.render(report=report, pictures=pictures, tables=tables, caption=tables.caption, command=command)


def _encoded(content: bytes) -> str:
    """The PNG with at most 256 colours: a third of the bytes, and no difference to be seen in diagrams."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(io.BytesIO(content)) as picture:
        picture.convert("RGBA").quantize(256, method=_OCTREE).save(small, "PNG")
    return base64.b64encode(small.getvalue()).decode()
