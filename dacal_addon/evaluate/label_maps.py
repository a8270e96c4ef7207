"""From the numbers, or the colours, of a label file to classes."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..ignoring import void_label
from .files import BadFile, first_line, read_text
from .sets import IGNORED, SETS, known_set, no_such_set

_MOST_RAW = 1 << 16
_UNKNOWN = np.iinfo(np.int64).min


class LabelMap(NamedTuple):
    """Raw values (colours: 0xRRGGBB) in order, and the class of each."""

    values: np.ndarray
    classes: np.ndarray
    rest: Optional[int]
    """The class of every other value; None: there must be no other."""
    colours: bool = False

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """The classes, int64, of the same shape; `ValueError` that names a value which is not in the map.

        True is the 1 of the map, or in a map of 0 and 255 that 255.
        """
        if raw.dtype == bool:
            raw = np.where(raw, np.uint8(1 if 1 in self.values else 255), np.uint8(0))
        if not self.colours and raw.dtype in (np.uint8, np.uint16):
            table = np.full(1 << 8 * raw.dtype.itemsize, _UNKNOWN if self.rest is None else self.rest)
            fits = self.values < len(table)
            table[self.values[fits]] = self.classes[fits]
            found: np.ndarray = table[raw]
        else:
            place = np.searchsorted(self.values, raw).clip(max=len(self.values) - 1)
            known = self.values[place] == raw
            found = np.where(known, self.classes[place], _UNKNOWN if self.rest is None else self.rest)
        if self.rest is None and (found == _UNKNOWN).any():
            row = tuple(np.argwhere(found == _UNKNOWN)[0].tolist())
            value = int(raw[row])
            what = f"the colour #{value:06x}, which the palette lacks," if self.colours else f"{value}, which the map lacks,"
            raise ValueError(f"expected {self._known()}, got {what} at {row}; is it another kind of file, or resized?")
        return found

    def _known(self) -> str:
        if self.colours:
            return f"the {len(self.values)} colours of the palette"
        shown = ", ".join(map(str, self.values[:4])) + (", ..." if len(self.values) > 4 else "")
        return f"the raw labels {shown} of the label map"


def read_label_map(name: str, *, num_classes: int, ignored: Sequence[int]) -> LabelMap:
    """A label map: that of a known set, or a JSON file with an object such as {"7": 0, "8": 1}; what that lacks is ignored.

    Raises:
        BadFile: not such a file, or a raw value twice in it.
        ValueError: another number of classes than the set has.

    Example:
        >>> read_label_map("voc", num_classes=21, ignored=(255,))(np.array([[0, 20, 255]])).tolist()
        [[0, 20, 255]]
    """
    known = known_set(name, num_classes=num_classes, option="--label-map")
    if known is not None and known.raw is not None:
        return _as_map(known.raw, ignored, rest=None)
    content = _object(name, [key for key, one in SETS.items() if one.raw], '{"7": 0, "8": 1}')
    if not isinstance(content, dict) or not content:
        raise BadFile(name, 'expected an object of raw values and training ids, such as {"7": 0, "8": 1}')
    found = {}
    for raw, train in content.items():
        if len(raw) > 5 or not re.fullmatch("[0-9]+", raw) or str(int(raw)) != raw or int(raw) >= _MOST_RAW:
            train = None
        if not _is_class(train, num_classes, ignored):
            ids = _ids(num_classes, ignored)
            raise BadFile(name, f"expected values 0..65535 mapped to training ids {ids}, got {raw!r}: {content[raw]!r}")
        found[int(raw)] = train
    return _as_map(found, ignored, rest=void_label(ignored))


def read_palette(name: str, *, num_classes: int, ignored: Sequence[int]) -> LabelMap:
    """A palette: that of a known set, or a JSON file, {"#804080": 0, "#f423e8": 1} or a list of colours, [[128, 64, 128], ...].

    Raises:
        BadFile: not such a file, or a colour twice in it.
        ValueError: another number of classes than the set has.

    Example:
        >>> read_palette("cityscapes", num_classes=19, ignored=(255,))(np.array([[0x804080, 0]])).tolist()
        [[0, 255]]
    """
    known = known_set(name, num_classes=num_classes, option="--palette")
    if known is not None and known.colours is not None:
        return _as_map(known.colours, ignored, rest=None, colours=True)
    if name == "ade20k":
        raise ValueError("the palette of ade20k has one colour for roads and skyscrapers; take labels that are numbers")
    form = '{"#804080": 0}, or a list of the colours of classes, [[128, 64, 128], ...]'
    content = _object(name, [key for key, one in SETS.items() if one.colours], form)
    pairs: List[Tuple[Any, Any]] = list(content.items()) if isinstance(content, dict) else []
    if isinstance(content, list):
        pairs = [(colour, place) for place, colour in enumerate(content)]
    if not pairs:
        raise BadFile(name, f"expected {form}, got {type(content).__name__}")
    found: Dict[int, int] = {}
    for colour, train in pairs:
        packed = _packed(colour)
        if packed is None or not _is_class(train, num_classes, ignored):
            expected = f"colours such as #804080 or [128, 64, 128] of classes {_ids(num_classes, ignored)}"
            raise BadFile(name, f"expected {expected}, got {colour!r}: {train!r}")
        if packed in found:
            raise BadFile(name, f"expected each colour once, got #{packed:06x} twice; give each class a colour of its own")
        found[packed] = train
    return _as_map(found, ignored, rest=None, colours=True)


def _as_map(pairs: Dict[int, int], ignored: Sequence[int], *, rest: Optional[int], colours: bool = False) -> LabelMap:
    values = np.array(sorted(pairs), dtype=np.int64)
    classes = [void_label(ignored) if pairs[value] == IGNORED else pairs[value] for value in values.tolist()]
    return LabelMap(values, np.array(classes, dtype=np.int64), rest, colours)


def _is_class(train: object, num_classes: int, ignored: Sequence[int]) -> bool:
    return isinstance(train, int) and not isinstance(train, bool) and (0 <= train < num_classes or train in ignored)


def _ids(num_classes: int, ignored: Sequence[int]) -> str:
    return f"0..{num_classes - 1} or {' or '.join(map(str, ignored))}"


def _packed(colour: object) -> Optional[int]:
    if isinstance(colour, str) and re.fullmatch("#[0-9a-fA-F]{6}", colour):
        return int(colour[1:], 16)
    if isinstance(colour, list) and len(colour) == 3 and all(type(one) is int and 0 <= one <= 255 for one in colour):
        return int(colour[0] << 16 | colour[1] << 8 | colour[2])
    return None


def _object(name: str, known: List[str], form: str) -> Any:
    """What a JSON file holds, with every key once."""
    path = Path(name)
    if not path.is_file():
        raise no_such_set(name, known, f"a JSON file of {form}")

    def once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
        found: Dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadFile(path, f"expected each value once, got {key!r} twice: {found[key]!r} and {value!r}; keep one")
            found[key] = value
        return found

    try:
        return json.loads(read_text(path, "a JSON file"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"not a JSON file that can be read: {first_line(error)}") from error
