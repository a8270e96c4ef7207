"""Saved predictions, read suspiciously: nothing is unpickled, and nothing is allocated on the word of a header alone."""

import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from .._resize import resized_scores
from ..one_channel import two_channels
from .arrays import ARRAYS, Accept, read_array, read_npy
from .files import BadFile, Listed, first_line, inside, listed
from .images import MOST_PIXELS, read_numbers, read_shares
from .matching import CLASS, CONFIDENCE, ends_in
from .shapes import Shape

Array = Union[np.ndarray, torch.Tensor]
Prediction = Union[Array, Tuple[Array, Array]]
# RuntimeError: encrypted, or packed by what this Python does not know.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OSError)


class PredictionKind(NamedTuple):
    """How predictions are read."""

    input: str
    key: Optional[str] = None
    """Which array of an .npz, or of a dictionary in a .pt."""
    max_pixels: int = MOST_PIXELS


def find_predictions(source: Path, *, suffixes: Sequence[str] = (), follow_links: bool = False) -> Listed:
    """The arrays, and the confidences of pairs of PNGs, NAME_confidence.png and NAME_prediction.png.

    Without arrays, also confidences that are missing beside their classes, which reading them says.

    Raises:
        BadFile: no such folder or list, nothing in it.
    """
    found = listed(source, [*ARRAYS, ".png"], follow_links=follow_links)
    wanted = [path for path in found.paths if path.suffix.lower() in ARRAYS or path.stem.endswith(CONFIDENCE)]
    if not any(path.suffix.lower() in ARRAYS for path in wanted):  # beside arrays, they may be pictures of them
        classes = [path for path in found.paths if path.stem.endswith(CLASS) and path.suffix.lower() not in ARRAYS]
        wanted = sorted({*wanted, *(path.with_name(path.stem[: -len(CLASS)] + CONFIDENCE + path.suffix) for path in classes)})
    if not wanted:
        raise BadFile(source, f"no {', '.join(ARRAYS)}, and no pair NAME{CONFIDENCE}.png and NAME{CLASS}.png")
    if suffixes:
        some = [path for path in wanted if ends_in(path, suffixes)]
        if not some:
            told = f"no prediction's name ends in {' or '.join(suffixes)}; there is, for example, {wanted[0].name}"
            raise BadFile(source, told)
        wanted = some
    return found._replace(paths=wanted)


def read_prediction(
    path: Path, *, folder: Path, shape: Shape, kind: PredictionKind, counted: Optional[np.ndarray] = None
) -> Prediction:
    """(1, C, *S) floating, or for PNGs a pair of confidence and predicted class, (1, H, W) each.

    Scores of fewer pixels are interpolated to the label's (`Shape.upsample`), one sigmoid channel becomes two, and
    probabilities times 255 or 65535 in uint8 or uint16 are divided by their sum over the classes, in float64 (NaN where that is
    none of probabilities, and nothing counts).

    Args:
        folder: which the file must not leave.
        counted: (*S) bool, the label's pixels that count: what the others have may be anything. All by default.

    Raises:
        BadFile: missing, truncated, of another shape or kind, pickled, larger than it may be.
    """
    ending = path.suffix.lower()
    if ending == ".png":
        return _read_pair(path, folder, shape, kind)
    inside(path, folder)
    if path.stat().st_size == 0:
        raise BadFile(path, "empty")
    read = {".npy": _read_npy, ".npz": _read_npz}.get(ending, _read_pt)
    array = read(path, shape, kind)
    array = array.reshape(shape.check(path, tuple(array.shape)))
    if shape.channels_last:
        axes = (0, len(shape.size) + 1, *range(1, len(shape.size) + 1))
        array = array.transpose(axes) if isinstance(array, np.ndarray) else array.permute(axes)
    sigmoid, wrong = shape.one_channel, ""
    if not _is_floating(array):
        array, wrong = _probabilities(array, one_channel=sigmoid)
        sigmoid = False
    if sigmoid or tuple(array.shape[2:]) != shape.size:
        scores = torch.as_tensor(array)
        if tuple(scores.shape[2:]) != shape.size:
            scores = resized_scores("evaluate", scores, shape.size)
            if kind.input == "log_probs":  # as interpolated logits would give
                scores = torch.log_softmax(scores, 1)
        # In float64, as `CalibrationStats` does: 1 - p is rounded once more otherwise.
        array = two_channels(scores.double(), input=kind.input) if sigmoid else scores
    if wrong:  # in some pixels, which may be none that count
        nowhere = torch.isnan(torch.as_tensor(array)).any(1)[0].numpy()
        if (nowhere if counted is None else nowhere & counted).any():
            raise BadFile(path, wrong)
    return array


def _is_floating(array: Array) -> bool:
    return array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f"


def _probabilities(array: Array, *, one_channel: bool) -> Tuple[np.ndarray, str]:
    """Of whole numbers, probabilities times the largest one of their kind: (1, C, *S) float64, also of one channel.

    As in a narrower kind 51 / 255 is beyond the bin that ends at 3 / 15: the ECE of some predictions was off by 0.006.

    Returns:
        the probabilities, NaN where the numbers are none, and what is wrong with these, or "".
    """
    values = array.numpy() if isinstance(array, torch.Tensor) else array
    most = int(np.iinfo(values.dtype).max)
    if one_channel:
        values = np.concatenate([most - values, values], 1)
    total = values.sum(1, keepdims=True, dtype=np.int64)
    # Rounding, or cutting off, moves each by at most 1, and of many classes all to 0.
    wrong = (np.abs(total - most) > values.shape[1]) | (total == 0)
    said = ""
    if wrong.any():
        worst = int(total[wrong][np.abs(total[wrong] - most).argmax()])
        remedy = f"save round({most} * p), or floats"
        if worst == 0 and values.shape[1] >= most:
            remedy = f"{values.dtype} is too coarse for {values.shape[1]} classes: save floats"
        said = f"expected probabilities times {most}, whose sum is it, got the sum {worst}; {remedy}"
    scores: np.ndarray = values / np.where(wrong, np.nan, total)
    return scores, said


def _accept(path: Path, shape: Shape, kind: PredictionKind) -> Accept:
    def accept(got: Tuple[int, ...], dtype: np.dtype) -> None:
        _check_kind(path, dtype.kind, dtype.itemsize, str(dtype), got, kind)
        shape.check(path, got)

    return accept


def _check_kind(path: Path, letter: str, size: int, name: str, got: Sequence[int], kind: PredictionKind) -> None:
    """`letter`: "f" floating, "u" unsigned, as numpy has it."""
    if letter == "f" and 2 <= size <= 8:
        return
    if letter == "u" and size <= 2:
        if kind.input == "probs":
            return
        remedy = f"whole numbers are probabilities times {256**size - 1} only: pass --input probs, or save floating numbers"
    elif letter in "iub" and len(got) <= 3 and (len(got) < 3 or got[0] == 1):
        remedy = "predicted classes alone have no confidence: save scores, or pairs of PNGs"
    else:
        remedy = "save x.astype('float32')" if letter in "f" else "save scores as float16 or float32"
    raise BadFile(path, f"expected floating numbers, got {name}; {remedy}")


def _read_npy(path: Path, shape: Shape, kind: PredictionKind) -> Array:
    return read_npy(path, _accept(path, shape, kind))


def _read_npz(path: Path, shape: Shape, kind: PredictionKind) -> Array:
    try:
        with _archive(path) as archive:
            members = archive.infolist()
            entries = {re.sub(r"\.npy$", "", entry.filename): entry for entry in members}
            if len(entries) < len(members):
                raise BadFile(path, "holds two arrays of one name")
            entry = entries[_choose(path, list(entries), kind.key)]
            # Of the others, zipfile unpacks everything at once, however little of it is asked for.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadFile(path, "compressed in a way that numpy does not use; save it with np.savez_compressed")
            with archive.open(entry) as file:
                return read_array(path, file, entry.file_size, _accept(path, shape, kind))
    except _UNREADABLE as error:
        raise _no_archive(path, error) from error


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # of many kinds, for what a damaged file can be
        raise _no_archive(path, error) from error


def _no_archive(path: Path, error: Exception) -> BadFile:
    return BadFile(path, f"not an archive that can be read, truncated? ({first_line(error)})")


def _read_pt(path: Path, shape: Shape, kind: PredictionKind) -> Array:
    # Before 2.6, weights_only could be got around (CVE-2025-32434).
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 6):
        raise BadFile(path, f"torch {torch.__version__} cannot load it safely; save .npy, or use torch >= 2.6")
    if zipfile.is_zipfile(path):
        with _archive(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > shape.most_bytes:
            remedy = "of a part of a tensor save a copy, x.clone(): torch saves the whole otherwise"
            raise BadFile(path, f"unpacks to {size} bytes, where {shape.most_bytes} are enough; {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for what a damaged or hostile file can be
        # Its first line tells to load it without `weights_only`, which runs what a file says.
        if "numpy" in str(error):
            raise BadFile(path, "holds a numpy array, which would be unpickled; save .npy by np.save, or a tensor") from error
        remedy = "it holds more than tensors, or is damaged; save the tensor alone"
        raise BadFile(path, f"torch.load refuses it with weights_only: {remedy}") from error
    if isinstance(content, dict):
        named = {str(name): value for name, value in content.items()}
        content = named[_choose(path, list(named), kind.key)]
    plain = isinstance(content, torch.Tensor) and content.layout == torch.strided and content.device.type == "cpu"
    if not plain:
        found = f"{content.dtype} ({content.layout})" if isinstance(content, torch.Tensor) else type(content).__name__
        raise BadFile(path, f"expected a dense floating tensor, got {found}; save the logits alone")
    tensor: torch.Tensor = content
    letter = "f" if tensor.is_floating_point() else "u" if tensor.dtype == torch.uint8 else "i"
    _check_kind(path, letter, tensor.element_size(), str(tensor.dtype), tensor.shape, kind)
    return tensor


def _read_pair(path: Path, folder: Path, shape: Shape, kind: PredictionKind) -> Tuple[Array, Array]:
    partner = path.with_name(path.stem[: -len(CONFIDENCE)] + CLASS + path.suffix)
    for here, other in ((path, partner), (partner, path)):
        if not other.exists():
            raise BadFile(here, f"no {other.name} beside it; confidences go in pairs with predicted classes")
    inside(path, folder)
    inside(partner, folder)
    confidence = read_shares(path, max_pixels=kind.max_pixels)
    prediction = read_numbers(partner, palette=True, max_pixels=kind.max_pixels)
    for one, file in ((confidence, path), (prediction, partner)):
        if one.shape != shape.size:
            told = f"expected an image {shape.size} (height, width) as its label is, got {one.shape}"
            raise BadFile(file, f"{told}; save it at the label's size{shape.or_the_label(file, one.shape)}")
    return confidence[None], prediction.astype(np.int64)[None]


def _choose(path: Path, names: List[Any], key: Optional[str]) -> str:
    """The array asked for, or the only one."""
    chosen = key if key is not None else names[0] if len(names) == 1 else None
    if chosen not in names:
        expected = "one array; choose with --key" if key is None else f"an array {key!r} for --key"
        listed_ = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise BadFile(path, f"expected {expected}, got {listed_ or 'none'}")
    return str(chosen)
