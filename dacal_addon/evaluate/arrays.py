"""Arrays in numpy's format, read suspiciously: nothing is unpickled, and nothing is allocated on a header's word alone."""

import threading
from pathlib import Path
from typing import Any, Callable, Tuple

import numpy as np

from .files import BadFile, first_line

ARRAYS = (".npy", ".npz", ".pt", ".pth")
"""Endings of predictions."""
# numpy parses headers with `ast`, which in Python 3.11 fails in two threads at a time (SystemError, python/cpython#106905).
_HEADERS = threading.Lock()
Accept = Callable[[Tuple[int, ...], np.dtype], None]
"""`BadFile` unless an array of this shape and kind is wanted."""


def read_npy(path: Path, accept: Accept) -> np.ndarray:
    """The array of an .npy file; see `read_array`."""
    size = path.stat().st_size
    if not size:
        raise BadFile(path, "empty")
    with path.open("rb") as file:
        return read_array(path, file, size, accept)


def read_array(path: Path, file: Any, size: int, accept: Accept) -> np.ndarray:
    """One array; its header is believed only as far as `accept` and the file's size bear it out.

    Args:
        path: for messages.
        file: which can be read, at the array's first byte.
        size: of the whole in bytes.

    Raises:
        BadFile: not in numpy's format, not accepted, truncated, longer than its header says.
    """
    try:
        with _HEADERS:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            got, fortran, dtype = header(file)
    except Exception as error:  # of many kinds, since it parses Python's syntax; among them MemoryError and RecursionError
        raise BadFile(path, f"not an array in numpy's format ({first_line(error)})") from error
    if dtype.hasobject:
        raise BadFile(path, "expected numbers, got Python objects, which are never unpickled; save x.astype(float)")
    accept(got, dtype)
    expected, left = int(np.prod(got, dtype=np.int64)) * dtype.itemsize, size - file.tell()
    if left != expected:
        what = "truncated" if left < expected else "damaged, or a decompression bomb"
        raise BadFile(path, f"{what}: {left} bytes of numbers where its header says {expected}")
    content = np.empty(expected, np.uint8)  # zeros would take longer than reading
    view, filled = content.data, 0
    while filled < expected:
        count = file.readinto(view[filled:])
        if not count:
            raise BadFile(path, f"truncated: {filled} of {expected} bytes")
        filled += count
    array = content.view(dtype)
    if not dtype.isnative:  # torch takes no other
        array = array.astype(dtype.newbyteorder("="))
    return array.reshape(got[::-1]).T if fortran else array.reshape(got)
