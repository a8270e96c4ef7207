"""Images of one number, or of one colour, a pixel; sizes are checked before anything is unpacked."""

import struct
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Tuple

import numpy as np

from .files import BadFile, first_line

FORMATS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".jpg": "JPEG", ".jpeg": "JPEG"}
JPEG = (".jpg", ".jpeg")
# As many as PIL takes without a warning.
MOST_PIXELS = 89_478_485
# PIL makes 0..255 of the values of 2 and 4 bits.
_STEPS = {2: 85, 4: 17}
# Width and height of a TIFF's tiles, each of which is unpacked as a whole.
_TILE = (322, 323)
# Tiles may be larger than a small image: 1024 x 1024.
_LARGE_TILE = 1 << 20
# PIL keeps its own limit in a global variable.
_OPENING = threading.Lock()


class Png(NamedTuple):
    """What the header of a PNG file says."""

    width: int
    height: int
    depth: int
    """Bits of a sample."""
    colour: int
    """0 grey, 2 colour, 3 palette, 4 grey with alpha, 6 colour with alpha."""


def read_numbers(path: Path, *, palette: bool = False, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The numbers of a grey image (of 1, 2, 4, 8 or 16 bits, in a TIFF also 32), or the indices of a palette.

    Returns:
        (H, W) bool of 1 bit, else uint8, uint16 or int32.

    Raises:
        BadFile: colours, more than `max_pixels`, no such image, truncated.
    """
    return _read_grey(path, palette, max_pixels)[0]


def read_shares(path: Path, *, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The numbers of a grey image as shares of the largest of as many bits: (H, W) float64 in 0..1; else `BadFile`."""
    values, most = _read_grey(path, False, max_pixels)
    shares: np.ndarray = values / most
    return shares


def _read_grey(path: Path, palette: bool, max_pixels: int) -> Tuple[np.ndarray, float]:
    """The numbers, and the largest that as many bits can hold."""
    header = _png_header(path, max_pixels) if path.suffix.lower() == ".png" else None
    if header is not None and not (header.colour == 0 or (palette and header.colour == 3)):
        kinds = {2: "colour", 3: "palette", 4: "grey with alpha", 6: "colour with alpha"}
        found = f"{header.depth}-bit {kinds.get(header.colour, 'unknown')}"
        raise _not_grey(path, "a grey PNG of at most 16 bits with one number a pixel", found)
    with _opened(path, header, max_pixels) as image:
        modes = ("1", "L", "I;16", "I;16B", "I;16L", "I") + (("P",) if palette else ())
        if header is not None:
            modes = {3: ("P",)}.get(header.colour, {1: ("1",), 16: ("I;16", "I")}.get(header.depth, ("L",)))
        if image.mode not in modes:
            if header is not None:
                raise BadFile(path, f"contradicts its own header: {image.mode} {image.size}")
            raise _not_grey(path, "a grey image with one whole number a pixel", f"PIL's mode {image.mode}")
        if image.mode == "1" or (header is not None and header.depth == 1):
            return np.asarray(_decoded(path, image)).astype(bool), 1.0
        kind = np.int32 if image.mode == "I" and header is None else np.uint16 if image.mode.startswith("I") else np.uint8
        values = np.asarray(_decoded(path, image)).astype(kind)
        step = _STEPS.get(header.depth, 1) if header is not None and header.colour == 0 else 1
        return values if step == 1 else values // step, float(np.iinfo(kind).max // step)


def read_colours(path: Path, *, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The colours of an image, (H, W) int32, as 0xRRGGBB; `BadFile` for a grey one or one with transparent pixels."""
    header = _png_header(path, max_pixels) if path.suffix.lower() == ".png" else None
    with _opened(path, header, max_pixels) as image:
        if image.mode not in ("RGB", "RGBA", "P"):
            remedy = "leave out --palette where labels are numbers"
            raise BadFile(path, f"expected an image of colours for --palette, got PIL's mode {image.mode}; {remedy}")
        values = np.asarray(_decoded(path, image).convert("RGBA")).astype(np.int32)
    if (values[..., 3] != 255).any():
        raise BadFile(path, "expected opaque colours, got transparent pixels; save it without alpha")
    packed: np.ndarray = values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]
    return packed


def read_picture(path: Path, *, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8, to be looked at: colours without alpha, or greys, the brightest of them white; else `BadFile`."""
    header = _png_header(path, max_pixels) if path.suffix.lower() == ".png" else None
    with _opened(path, header, max_pixels) as image:
        if image.mode in ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"):
            return np.asarray(_decoded(path, image).convert("RGB"))
        if image.mode not in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L"):
            raise BadFile(path, f"expected a picture of colours or greys, got PIL's mode {image.mode}")
        grey = np.asarray(_decoded(path, image)).astype(np.float64)
    grey = grey[..., 0] if grey.ndim == 3 else grey
    grey = np.clip(np.rint(grey * (255 / max(grey.max(), 1))), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2)


def _not_grey(path: Path, expected: str, found: str) -> BadFile:
    return BadFile(path, f"expected {expected}, got {found}; colour maps need --palette")


@contextmanager
def _opened(path: Path, header: Optional[Png], max_pixels: int) -> Iterator[Any]:
    """PIL's image, nothing of it unpacked yet: see `_decoded`."""
    from PIL import Image

    kind = FORMATS[path.suffix.lower()]
    with _decoding(path), _OPENING:  # without PIL's limit: `max_pixels` holds instead
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path, formats=[kind])
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        _check_size(path, *image.size, max_pixels)
        # A second header inside of the file would count for PIL and not for the checks of the first.
        if header is not None and image.size != (header.width, header.height):
            raise BadFile(path, f"contradicts its own header: {image.mode} {image.size}")
        if kind == "TIFF":  # telephones put a second picture into a JPEG
            with _decoding(path):
                _check_tiff(path, image)
        yield image


def _decoded(path: Path, image: Any) -> Any:
    """PIL's image, all of it unpacked."""
    with _decoding(path):
        image.load()
    return image


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """`BadFile` for whatever PIL raises, and only where PIL is at work: errors of this package's own are no file's fault."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadFile:
        raise
    except UnidentifiedImageError as error:
        raise BadFile(path, f"not a {FORMATS[path.suffix.lower()]} file, or truncated; is its ending wrong?") from error
    except Exception as error:  # of many kinds, for what a damaged file can be
        raise BadFile(path, f"cannot be decoded, truncated? ({first_line(error)})") from error


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        remedy = "a decompression bomb? Pass --max-pixels for images this large"
        raise BadFile(path, f"claims {width} x {height} pixels, more than {max_pixels}: {remedy}")


def _check_tiff(path: Path, image: Any) -> None:
    if image.n_frames > 1:
        raise BadFile(path, f"expected one image, got {image.n_frames} pages; save one file an image, or the volume as .npy")
    width, height = (image.tag_v2.get(tag, 0) for tag in _TILE)
    if not all(type(size) is int and size >= 0 for size in (width, height)):
        raise BadFile(path, f"claims tiles of {width} x {height} pixels; save it anew")
    if width * height > max(_LARGE_TILE, 4 * image.size[0] * image.size[1]):
        told = f"claims tiles of {width} x {height} pixels in an image of {image.size[0]} x {image.size[1]}"
        raise BadFile(path, f"{told}: a decompression bomb? Save it without tiles")


def _png_header(path: Path, max_pixels: int) -> Png:
    """Size and kind of a PNG."""
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError as error:
        raise BadFile(path, f"cannot be opened: {error.strerror}") from error
    if not head:
        raise BadFile(path, "empty")
    if len(head) < 26 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise BadFile(path, "not a PNG file, or truncated")
    header = Png(*struct.unpack(">IIBB", head[16:26]))
    _check_size(path, header.width, header.height, max_pixels)
    return header
