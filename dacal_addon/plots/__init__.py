"""Pictures in one style: reliability diagrams, class by class, temperature maps. Needs the extra `plot` (matplotlib >= 3.4).

Every function returns a matplotlib `Figure` with a canvas of its own: no window, no global state of pyplot, and nothing of
what the user's matplotlib is set to. `save` writes it; a notebook shows it. Figures are laid out in inches for a column of
8.5 cm, with letters of 6.5 points or more, and `dark=True` makes them for a dark page.

The files: `style` (what all have in common), `reliability`, `classes`, `temperature` (one kind of picture each).
"""

try:  # here, so that a script without it fails at its first line and not after its loop
    import matplotlib  # noqa: F401 - it is only asked whether it is there
except ImportError as _error:
    _HOW = "dacal_addon.plots needs matplotlib; pip install 'dacal-addon[plot]'"
    raise ImportError(_HOW, name="matplotlib") from _error

from .classes import classwise_panel
from .reliability import reliability_diagram
from .style import (
    BLUE,
    COLUMN,
    GREY,
    LIGHT_GREY,
    ORANGE,
    SKY,
    Picture,
    bare,
    blank_figure,
    fitted,
    new_figure,
    place,
    save,
    styled,
)
from .temperature import temperature_map

__all__ = [
    "BLUE",
    "COLUMN",
    "GREY",
    "LIGHT_GREY",
    "ORANGE",
    "SKY",
    "Picture",
    "bare",
    "blank_figure",
    "classwise_panel",
    "fitted",
    "new_figure",
    "place",
    "reliability_diagram",
    "save",
    "styled",
    "temperature_map",
]
