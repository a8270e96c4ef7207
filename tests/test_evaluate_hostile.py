"""Label files made to harm: what they claim is not believed, and what they hold is not bent into a label."""

import struct

import numpy as np
import pytest

from dacal_addon.evaluate import images
from dacal_addon.evaluate.files import BadFile
from dacal_addon.evaluate.judging import judge_all
from dacal_addon.evaluate.options import EvaluateOptions
from dacal_addon.evaluate.plan import make_plan


def tiled(path, size, tile, data=b"\0" * 64, compression=5):
    """A TIFF of one tile, with whatever it claims of it."""
    width, height = size
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, compression), (262, 3, 1), (277, 3, 1),
        (322, 4, tile[0]), (323, 4, tile[1]), (324, 4, 8), (325, 4, len(data)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


@pytest.mark.parametrize("tile", [(32768, 32768), (1 << 20, 16), (16, 1 << 20), (65536, 65536)])
def test_tiles_larger_than_their_image(tmp_path, tile):
    tiled(tmp_path / "a.tif", (16, 16), tile)
    with pytest.raises(BadFile, match=rf"claims tiles of {tile[0]} x {tile[1]} pixels in an image of 16 x 16: a decomp"):
        images.read_numbers(tmp_path / "a.tif")
    with pytest.raises(BadFile, match="claims tiles of"):
        images.read_picture(tmp_path / "a.tif")
    with pytest.raises(BadFile, match="claims tiles of"):
        images.read_colours(tmp_path / "a.tif")


@pytest.mark.parametrize("tile", [(16, 16), (256, 256), (512, 512)])
def test_tiles_as_people_have_them(tmp_path, tile):
    """Small images have one tile that is larger than they are."""
    values = np.random.default_rng(0).integers(0, 255, tile[::-1]).astype("uint8")
    tiled(tmp_path / "a.tif", (13, 9), tile, values.tobytes(), compression=1)
    assert images.read_numbers(tmp_path / "a.tif").tolist() == values[:9, :13].tolist()


@pytest.mark.parametrize("most", [1 << 63, (1 << 64) - 1])
def test_numbers_beyond_int64_are_no_labels(tmp_path, most):
    for part in ("p", "l"):
        (tmp_path / part).mkdir()
    np.save(tmp_path / "p/a.npy", np.zeros((2, 2, 2), "f4"))
    np.save(tmp_path / "l/a.npy", np.array([[0, 1], [1, most]], "uint64"))
    options = EvaluateOptions(tmp_path / "p", tmp_path / "l", 2, input="logits", ignore_index=(-1, -(1 << 52)), jobs=1)
    with pytest.raises(BadFile, match=f"a.npy: expected labels up to 9223372036854775807, got {most}"):
        judge_all(make_plan(options), options)
    np.save(tmp_path / "l/a.npy", np.array([[0, 1], [1, 1]], "uint64"))
    assert judge_all(make_plan(options), options).stats.pixels == 4
