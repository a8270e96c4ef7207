"""Files of the repository outside of docs/ as pages, or parts of pages, without a second copy.

A line of a page that reads `[NAME](PATH) <!-- shown here -->` stands for that file; with `PATH#SECTION` for the section, its
heading left out; with `<!-- its table N, shown here -->` for the N-th table of it. Where Markdown is read as it is, the line is
a link to the same. Links are led to the page that shows the file, if there is one.
"""

import os
import re
from pathlib import Path
from typing import Any, Dict, List, Match, Tuple

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(
    r"^\[[^\]\n]+\]\((?P<path>[^\s#)]+)(?:#(?P<section>[^\s)]+))?\) <!-- (?:its table (?P<table>\d+), )?shown here -->$",
    re.MULTILINE,
)
_LINK = re.compile(r"(!?\[[^\]]*\])\((?!\w+:)([^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^ {0,3}```")


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give to a heading.

    Example:
        >>> slug("Options: `uda.dacal`"), slug("DAFormer, HRDA, MIC")
        ('options-udadacal', 'daformer-hrda-mic')
    """
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(text: str) -> List[Tuple[int, int, str]]:
    """(line, level, title) of each heading outside of code."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines()):
        fenced ^= bool(_FENCE.match(line))
        match = re.match(r"(#{1,6}) +(.+?)\s*$", line)
        if match and not fenced:
            found.append((number, len(match.group(1)), match.group(2)))
    return found


def section(text: str, anchor: str) -> str:
    """The lines below a heading, up to the next one of its level."""
    lines, found = text.splitlines(), headings(text)
    for i, (number, level, title) in enumerate(found):
        if slug(title) == anchor:
            ends = [other for other, deep, _ in found[i + 1 :] if deep <= level]
            return "\n".join(lines[number + 1 : ends[0] if ends else None])
    raise ValueError(f"expected a heading #{anchor}, found {', '.join(slug(title) for _, _, title in found)}")


def table(text: str, number: int) -> str:
    """The n-th table, from 1."""
    return re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)[number - 1]


def pages(docs: Path) -> Dict[str, str]:
    """Which page shows which file as a whole: {"examples/mic/README.md": "hosts/mic.md"}."""
    found = {}
    for page in sorted(docs.rglob("*.md")):
        for match in LINE.finditer(page.read_text()):
            if not match.group("section"):
                found[_shown_by(page, match)] = page.relative_to(docs).as_posix()
    return found


def _shown_by(page: Path, line: Match[str]) -> str:
    """The file, from the repository's root, that a line of a page stands for."""
    return os.path.relpath(page.parent / line.group("path"), ROOT)


def filled(text: str, page: Path, docs: Path) -> str:
    """A page's text with what it takes from elsewhere; `page` is where it lies."""
    shown = pages(docs)

    def insert(match: Match[str]) -> str:
        path = _shown_by(page, match)
        taken = (ROOT / path).read_text()
        if match.group("section"):
            taken = section(taken, match.group("section"))
        if match.group("table"):
            taken = table(taken, int(match.group("table")))
        return _LINK.sub(lambda link: _led(link, ROOT / path, page, docs, shown), taken).strip("\n")

    def own(part: str) -> str:
        return _LINK.sub(lambda link: _led(link, page, page, docs, shown), part)

    out, end = "", 0
    for match in LINE.finditer(text):
        out += own(text[end : match.start()]) + insert(match)
        end = match.end()
    return out + own(text[end:])


def _led(link: Match[str], origin: Path, page: Path, docs: Path, shown: Dict[str, str]) -> str:
    label, target, anchor = link.group(1), link.group(2), link.group(3) or ""
    whole = (origin.parent / target).resolve() if target else origin
    inside = whole.relative_to(ROOT).as_posix()
    at = docs / shown[inside] if inside in shown else whole
    return f"{label}({anchor if at == page and anchor else os.path.relpath(at, page.parent) + anchor})"


def _source_read(app: Any, name: str, source: List[str]) -> None:
    from sphinx.util import logging  # here, so that the tests can use what is above without Sphinx

    docs = Path(app.srcdir)
    page = Path(app.env.doc2path(name))
    for match in LINE.finditer(source[0]):
        path = ROOT / _shown_by(page, match)
        app.env.note_dependency(str(path))
        if not path.is_file():
            logging.getLogger(__name__).warning("%s shows %s, which is not there", name, match.group("path"), location=name)
            source[0] = f"# {match.group('path')}"
            return
    source[0] = filled(source[0], page, docs)


def setup(app: Any) -> Dict[str, bool]:
    app.connect("source-read", _source_read)
    return {"parallel_read_safe": True}
