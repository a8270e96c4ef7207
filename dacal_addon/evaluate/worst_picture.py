"""One of the worst images as a picture: photograph, label, prediction, and where it is sure and wrong."""

import colorsys
from typing import Any, Dict, Sequence

import numpy as np

from .. import plots
from .report import Found
from .sets import SETS
from .worst import Seen

_MOST_NAMES = 12
# Contrasts of 4.3 on a light page and of 4.0 on a dark one, so that one picture with a clear ground does for both.
_GREY = "#7a7a7a"
_VOID, _RIGHT = (128, 128, 128), (226, 230, 234)
_ERRORS = "wrong, darker where sure"


def draw_worst(seen: Sequence[Seen], found: Found) -> Dict[str, Any]:
    """File name -> matplotlib `Figure`, the worst image first."""
    names = found.results.class_names
    return {f"worst-{number}.png": picture(one, names, number) for number, one in enumerate(seen, 1)}


def picture(seen: Seen, names: Sequence[str], number: int) -> Any:
    """A figure 8.5 cm wide: the photograph if there is one, label, prediction, and where it is sure and wrong."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Patch

    colours, void = class_colours(names), seen.void
    predicted = seen.predicted.clip(0, len(names) - 1)  # it may be anything where it does not count
    scale = LinearSegmentedColormap.from_list("sure", ["#fdd49e", plots.ORANGE, "#7f0000"])
    panels = {"label": colours[np.where(void, 0, seen.label)], "prediction": colours[predicted]}
    shades = 255 * scale(seen.confidence)[..., :3]
    panels[_ERRORS] = np.where(seen.wrong[..., None], shades, _RIGHT).astype(np.uint8)
    for name in ("label", _ERRORS):
        panels[name][void] = _VOID
    if seen.photograph is not None:
        panels = {"image": seen.photograph, **panels}
    counts = np.bincount(np.concatenate([seen.label[~void], predicted.ravel()]), minlength=len(names))
    frequent = sorted(c for c in np.argsort(-counts, kind="stable")[:_MOST_NAMES].tolist() if counts[c])
    lines = -(-(len(frequent) + 1) // 3)
    wide, apart, (height, width) = (plots.COLUMN - 0.1) / 2, 0.06, seen.label.shape
    high = min(max(wide * height / width, 0.25), 2.5)
    pitch, below = high + 0.2, 0.46 + 0.14 * lines
    with plots.styled():
        total = 2 * pitch + 0.2 + below
        figure = plots.blank_figure((plots.COLUMN, total), facecolor="none")
        title = plots.fitted(f"{number}. {seen.row.name}", 40) + f": ECE {100 * seen.row.ece:.1f} %"
        figure.text(0.5, 1 - 0.03 / total, title, ha="center", va="top", color=_GREY, fontsize=7)
        for spot, (name, pixels) in zip([0, 1, 2, 3] if len(panels) == 4 else [0, 1, 3], panels.items()):
            left, bottom = 0.02 + spot % 2 * (wide + apart), below + (1 - spot // 2) * pitch
            axis = plots.place(figure, left, bottom, wide, high)
            axis.imshow(pixels, interpolation="nearest", aspect="auto")
            axis.set_title(name, color=_GREY, fontsize=7, pad=2)
            plots.bare(axis)
        bar = plots.place(figure, 0.02 + wide + apart + 0.1, below - 0.12, wide - 0.2, 0.07)
        ticks = figure.colorbar(ScalarMappable(Normalize(0, 1), scale), cax=bar, orientation="horizontal")
        ticks.set_ticks([0, 0.5, 1])
        ticks.set_ticklabels(["0", "0.5", "1"])
        ticks.set_label("confidence", color=_GREY, fontsize=6.5, labelpad=1)
        ticks.outline.set_visible(False)
        bar.tick_params(labelsize=6.5, pad=1, length=2, color=_GREY, labelcolor=_GREY)
        patches = [Patch(color="#{:02x}{:02x}{:02x}".format(*colours[c]), label=plots.fitted(names[c], 18)) for c in frequent]
        patches.append(Patch(color="#{:02x}{:02x}{:02x}".format(*_VOID), label="ignored"))
        where: Dict[str, Any] = {"loc": "lower center", "ncol": 3, "borderaxespad": 0.2}
        figure.legend(handles=patches, fontsize=6.5, labelcolor=_GREY, **where)
        return figure


def class_colours(names: Sequence[str]) -> np.ndarray:
    """(C, 3) uint8: a known set's own colours, or else hues that lie far apart.

    Example:
        >>> class_colours(["road", "sky"]).tolist()
        [[224, 79, 79], [87, 118, 194]]
    """
    for known in SETS.values():
        if known.names == list(names) and known.colours:
            packed = {c: colour for colour, c in known.colours.items()}
            return np.array([[packed[c] >> 16, packed[c] >> 8 & 255, packed[c] & 255] for c in range(len(names))], np.uint8)
    golden, values = (5**0.5 - 1) / 2, (0.88, 0.76, 0.64)
    colours = [colorsys.hsv_to_rgb(c * golden % 1.0, 0.65 - 0.1 * (c % 2), values[c % 3]) for c in range(len(names))]
    whole: np.ndarray = np.rint(255 * np.array(colours)).astype(np.uint8)
    return whole
