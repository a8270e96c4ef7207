"""The package's docstrings as reStructuredText. They are written to be read in an editor: shapes such as (N, *S) are no markup.

Google's style is understood by napoleon; here is what it does not do.
"""

import re
from importlib import import_module
from itertools import groupby
from types import ModuleType
from typing import Any, Dict, List, Match, Set, Tuple

from sphinx.ext.napoleon import Config, GoogleDocstring

# The page of each is below docs/api/, and a name that several have is documented with the first.
MODULES = (
    "dacal_addon",
    "dacal_addon.calibrate",
    "dacal_addon.learners",
    "dacal_addon.engines",
    "dacal_addon.metrics",
    "dacal_addon.plots",
    "dacal_addon.mixing",
    "dacal_addon.losses",
    "dacal_addon.held_out",
    "dacal_addon.shadows",
    "dacal_addon.integrations.torchmetrics",
    "dacal_addon.integrations.mmengine",
)
# "a, b: what both are" is one entry of two parameters; as a field, the first would be read as the type of the second.
_STYLE = Config(napoleon_use_param=False, napoleon_use_rtype=False, napoleon_use_ivar=True, napoleon_numpy_docstring=False)
_SECTION = re.compile(r"^(?P<name>Args|Returns|Example) \((?P<note>[^()]+)\):$")


def as_restructured_text(lines: List[str]) -> List[str]:
    """Escape what is no markup outside of code and examples, and set examples apart.

    Example:
        >>> as_restructured_text(["(N, *S), |a - b| of `x * y`s", "  >>> 2 * 3", "  6"])
        ['(N, \\\\*S), \\\\|a - b\\\\| of `x * y`\\\\ s', '', '  >>> 2 * 3', '  6']
        >>> as_restructured_text(["`skipped_<kind>`"])
        ['``skipped_<kind>``']
        >>> as_restructured_text(["Say:", "", "    f(*x)", "", "And *so* on."])
        ['Say::', '', '    f(*x)', '', 'And \\\\*so\\\\* on.']
    """
    lines, code = _with_code_marked(lines)
    kinds, example = [], False
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        kinds.append("example" if example else "code" if i in code else "text" if line.strip() else "gap")
    out: List[str] = []
    for kind, group in groupby(zip(kinds, lines), key=lambda pair: pair[0]):
        block = [line for _, line in group]
        if kind == "example" and out and out[-1].strip():
            out.append("")
        out += _escaped("\n".join(block)).split("\n") if kind == "text" else block
    return [part for line in _continued(out) for part in _with_note_below(line)]


def _with_code_marked(lines: List[str]) -> Tuple[List[str], Set[int]]:
    """Lines that are indented behind "...:" and an empty line are code, and not a quotation; which they are."""
    out, code = list(lines), set()
    for i, line in enumerate(lines[:-2]):
        if re.match(r"\S.*[^:]:$", line) and not lines[i + 1].strip() and lines[i + 2].startswith("    "):
            out[i] += ":"
            for j in range(i + 2, len(lines)):
                if lines[j].strip() and not lines[j].startswith(" "):
                    break
                if lines[j].strip():
                    code.add(j)
    return out, code


def _continued(lines: List[str]) -> List[str]:
    """In "Raises:" what goes on on the next line is indented, so that a colon in it begins no other error."""
    out: List[str] = []
    raises = False
    for line in lines:
        raises = line == "Raises:" or (raises and (not line.strip() or line.startswith(" ")))
        goes_on = raises and line.startswith(" ") and not re.match(r" +[\w, ]*(Error|Warning)\b", line)
        out.append("    " + line if goes_on else line)
    return out


def _escaped(text: str) -> str:
    parts = text.split("`")  # every second one is code
    for i, part in enumerate(parts):
        if i % 2:
            part = re.sub(r"\s+", " ", part) if "\n" in part else part
            parts[i] = f"`{part}`" if "<" in part else part  # a role would take <this> for a link's address
            continue
        part = re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part)
        parts[i] = re.sub(r"^(?=\w)", r"\\ ", part) if i else part
    return "`".join(parts)


def _with_note_below(line: str) -> List[str]:
    """ "Args (of both):" is the section Args, and a note before it."""
    match = _SECTION.match(line)
    return [match.group("note").strip() + ".", "", match.group("name") + ":"] if match else [line]


def public_names(module: ModuleType) -> List[str]:
    """`__all__`; where there is none, the functions and classes that the module itself defines, in their order.

    Example:
        >>> public_names(import_module("dacal_addon.held_out"))
        ['hold_out', 'Fingerprints', 'check_apart']
    """
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_")]


def targets() -> Dict[str, str]:
    """Where each public name is documented: {"DACal": "dacal_addon.DACal"}."""
    found: Dict[str, str] = {}
    for module in MODULES:
        try:
            names = public_names(import_module(module))
        except ImportError:  # of an integration whose trainer is not here
            continue
        for name in names:
            found.setdefault(name, f"{module}.{name}")
    return found


_TARGETS: Dict[str, str] = {}


def _linked(lines: List[str], own: str) -> List[str]:
    def link(match: Match[str]) -> str:
        target = _TARGETS.get(match.group(1), "")
        return f":py:obj:`{match.group(1)} <{target}>`" if target and target != own else match.group()

    return [re.sub(r"(?<![:`\w])`(\w+)`(?!`)", link, line) if ">>>" not in line else line for line in lines]


def _process(app: Any, what: str, name: str, of: Any, options: Any, lines: List[str]) -> None:
    if re.match(r"Alias for field number \d+$", lines[0] if lines else ""):  # a field that is called what it is
        lines[:] = []
        return
    text = as_restructured_text(lines)
    if what not in ("attribute", "data", "property"):  # whose text before a colon would be read as their type
        text = GoogleDocstring(text, _STYLE, app=app, what=what, name=name, obj=of, options=options).lines()
    lines[:] = _linked(text, name)


def setup(app: Any) -> Dict[str, bool]:
    _TARGETS.update(targets())
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
