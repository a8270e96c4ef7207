"""Saved predictions, read suspiciously: nothing is unpickled, and nothing is allocated on the word of a header alone."""

import re
import threading
import zipfile
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch

from .files import BadFile, by_stem, first_line, inside, listed
from .labels import read_png

ARRAYS = (".npy", ".npz", ".pt", ".pth")
_CONFIDENCE, _CLASS = "_confidence", "_prediction"
# Besides the numbers themselves: headers, names, the structure of an archive.
_SLACK = 1 << 20
# numpy parses headers with `ast`, which in Python 3.11 fails in two threads at a time (SystemError, python/cpython#106905).
_HEADERS = threading.Lock()
Array = Union[np.ndarray, torch.Tensor]


class Shape(NamedTuple):
    """What a prediction must be, from its label."""

    classes: int
    height: int
    width: int

    def check(self, path: Path, got: Tuple[int, ...]) -> None:
        """`BadFile` unless `got` is (C, H, W), or (1, C, H, W)."""
        whole = all(type(size) is int for size in got)  # in a header, True is 1 as well
        if not whole or tuple(got) not in (tuple(self), (1, *self)):
            remedy = "resize the logits, or save them at the label's resolution, yourself"
            raise BadFile(path, f"expected an array {tuple(self)} as its label has it, got {tuple(got)}; {remedy}")

    @property
    def most_bytes(self) -> int:
        """In float64."""
        return 8 * self.classes * self.height * self.width + _SLACK


def find_predictions(source: Path) -> Dict[str, Path]:
    """Image -> file: an array, or the confidence of a pair of PNGs, NAME_confidence.png and NAME_prediction.png.

    Raises:
        BadFile: no such folder or list, nothing in it, two predictions of one image.
    """
    paths = listed(source, [*ARRAYS, ".png"])
    wanted = [path for path in paths if path.suffix.lower() in ARRAYS or path.stem.endswith(_CONFIDENCE)]
    if not wanted:
        raise BadFile(source, f"no {', '.join(ARRAYS)}, and no pair NAME{_CONFIDENCE}.png and NAME{_CLASS}.png")
    return by_stem(wanted)


def read_prediction(path: Path, *, folder: Path, shape: Shape, key: Optional[str]) -> Union[Array, Tuple[Array, Array]]:
    """(1, C, H, W) floating, or for PNGs a pair of confidence and predicted class, (1, H, W) each.

    Args:
        folder: which the file must not leave.
        key: which array of an .npz, or of a dictionary in a .pt.

    Raises:
        BadFile: missing, truncated, of another shape or kind, pickled, larger than it may be.
    """
    inside(path, folder)
    kind = path.suffix.lower()
    if kind == ".png":
        return _read_pair(path, folder, shape)
    if path.stat().st_size == 0:
        raise BadFile(path, "empty")
    read = {".npy": _read_npy, ".npz": _read_npz}.get(kind, _read_pt)
    array = read(path, shape, key)
    return array.reshape(1, *shape)


def _read_npy(path: Path, shape: Shape, key: Optional[str]) -> Array:
    with path.open("rb") as file:
        return _read_array(path, file, path.stat().st_size, shape)


def _read_npz(path: Path, shape: Shape, key: Optional[str]) -> Array:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            entries = {re.sub(r"\.npy$", "", entry.filename): entry for entry in members}
            if len(entries) < len(members):
                raise BadFile(path, "holds two arrays of one name")
            entry = entries[_choose(path, list(entries), key)]
            # Of the others, zipfile unpacks everything at once, however little of it is asked for.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadFile(path, "compressed in a way that numpy does not use")
            with archive.open(entry) as file:
                return _read_array(path, file, entry.file_size, shape)
    except zipfile.BadZipFile as error:
        raise BadFile(path, f"not an archive that can be read, truncated? ({error})") from error


def _read_array(path: Path, file: Any, size: int, shape: Shape) -> np.ndarray:
    """One array in numpy's format; its header is believed only as far as the label and the file's size bear it out."""
    try:
        with _HEADERS:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            got, fortran, dtype = header(file)
    except Exception as error:  # of many kinds, since it parses Python's syntax; among them MemoryError and RecursionError
        raise BadFile(path, f"not an array in numpy's format ({first_line(error)})") from error
    if dtype.kind != "f":
        found = "Python objects, which are never unpickled" if dtype.hasobject else str(dtype)
        raise BadFile(path, f"expected floating numbers, got {found}")
    shape.check(path, got)
    expected, left = int(np.prod(got)) * dtype.itemsize, size - file.tell()
    if left != expected:
        what = "truncated" if left < expected else "damaged, or a decompression bomb"
        raise BadFile(path, f"{what}: {left} bytes of numbers where its header says {expected}")
    content = bytearray(expected)  # and not bytes: torch wants memory that can be written
    view, filled = memoryview(content), 0
    while filled < expected:
        count = file.readinto(view[filled:])
        if not count:
            raise BadFile(path, f"truncated: {filled} of {expected} bytes")
        filled += count
    array = np.frombuffer(content, dtype)
    return array.reshape(got[::-1]).T if fortran else array.reshape(got)


def _read_pt(path: Path, shape: Shape, key: Optional[str]) -> Array:
    # Before 2.6, weights_only could be got around (CVE-2025-32434).
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise BadFile(path, f"torch {torch.__version__} cannot load it safely; save .npy, or use torch >= 2.6")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > shape.most_bytes:
            remedy = "of a part of a tensor save a copy, x.clone(): torch saves the whole otherwise"
            raise BadFile(path, f"unpacks to {size} bytes, where {shape.most_bytes} are enough; {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for what a damaged or hostile file can be
        raise BadFile(path, f"torch.load(weights_only=True) refuses it: {first_line(error)}") from error
    if isinstance(content, dict):
        named = {str(name): value for name, value in content.items()}
        content = named[_choose(path, list(named), key)]
    plain = isinstance(content, torch.Tensor) and content.layout == torch.strided and content.device.type == "cpu"
    if not plain or not content.is_floating_point():
        found = f"{content.dtype} ({content.layout})" if isinstance(content, torch.Tensor) else type(content).__name__
        raise BadFile(path, f"expected a dense floating tensor, got {found}")
    shape.check(path, content.shape)
    tensor: torch.Tensor = content
    return tensor


def _read_pair(path: Path, folder: Path, shape: Shape) -> Tuple[Array, Array]:
    partner = path.with_name(path.stem[: -len(_CONFIDENCE)] + _CLASS + path.suffix)
    inside(partner, folder)
    confidence, prediction = read_png(path), read_png(partner, palette=True)
    for one, file in ((confidence, path), (prediction, partner)):
        if one.shape != tuple(shape[1:]):
            raise BadFile(file, f"expected an image {tuple(shape[1:])} (height, width) as its label is, got {one.shape}")
    scale = 255.0 if confidence.dtype == np.uint8 else 65535.0
    return (confidence / scale)[None], prediction.astype(np.int64)[None]


def _choose(path: Path, names: Any, key: Optional[str]) -> str:
    """The array asked for, or the only one."""
    chosen = key if key is not None else names[0] if len(names) == 1 else None
    if chosen not in names:
        listed_ = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise BadFile(
            path, f"expected {'one array; choose with --key' if key is None else f'an array {key!r}'}, got {listed_ or 'none'}"
        )
    return str(chosen)
