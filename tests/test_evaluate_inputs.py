"""What `dacal evaluate` takes: labels and predictions as people have them, and what it says to the others."""

import json
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import predictions
from PIL import Image

from dacal_addon import cli
from dacal_addon.evaluate import doubts, label_maps, labels, matching, shapes
from dacal_addon.evaluate.files import BadFile, listed
from dacal_addon.evaluate.judging import judge_all, read_image
from dacal_addon.evaluate.options import EvaluateOptions
from dacal_addon.evaluate.plan import make_plan
from dacal_addon.metrics import CalibrationStats, boundary_mask

C, H, W = 4, 12, 16


def png(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path, **options)


def npy(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def options_of(folder, classes=C, kind="logits", **given):
    return EvaluateOptions(folder / "p", folder / "l", classes, input=kind, jobs=1, **given)


def judged(folder, classes=C, kind="logits", **given):
    options = options_of(folder, classes, kind, **given)
    return judge_all(make_plan(options), options)


def refused(folder, classes=C, kind="logits", error=BadFile, **given):
    with pytest.raises(error) as found:
        judged(folder, classes, kind, **given)
    return str(found.value)


def kind_of(classes=C, ignored=(255,), **given):
    return labels.LabelKind(classes, ignored, **given)


# Labels: numbers


@pytest.mark.parametrize(
    ("name", "classes", "some"),
    [
        ("cityscapes", 19, {0: 255, 7: 0, 8: 1, 11: 2, 17: 5, 18: 255, 24: 11, 26: 13, 28: 15, 29: 255, 31: 16, 33: 18}),
        ("acdc", 19, {6: 255, 7: 0, 23: 10, 30: 255, 33: 18}),
        (
            "mapillary",
            19,
            {
                0: 255,
                2: 1,
                3: 4,
                6: 3,
                13: 0,
                15: 1,
                17: 2,
                22: 12,
                24: 0,
                41: 0,
                47: 5,
                27: 10,
                45: 5,
                52: 18,
                55: 13,
                58: 16,
                65: 255,
            },
        ),
        ("ade20k", 150, {0: 255, 1: 0, 13: 12, 150: 149}),
        ("voc", 21, {0: 0, 15: 15, 20: 20, 255: 255}),
        ("binary", 2, {0: 0, 255: 1}),
    ],
)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int64"])
def test_the_raw_labels_of_known_sets(name, classes, some, kind):
    found = label_maps.read_label_map(name, num_classes=classes, ignored=(255,))
    raw = np.array([*some], kind).reshape(1, -1)
    assert found(raw).tolist() == [[*some.values()]]
    # Every class has a raw label, and what is none of them is an error and no guess.
    assert set(found(found.values.astype(kind)).tolist()) - {255} == set(range(classes))
    with pytest.raises(ValueError, match=r"got 200, which the map lacks, at \(0, 1\)"):
        found(np.array([[0, 200]], kind))
    names = labels.read_class_names(name, num_classes=classes)
    assert len(set(names)) == classes
    assert names[-1] == {"voc": "tvmonitor", "ade20k": "flag", "binary": "foreground"}.get(name, "bicycle")


@given(st.dictionaries(st.integers(0, 300), st.integers(0, 5) | st.just(255), min_size=1), st.integers(0, 2**32))
def test_a_label_map_looks_up_every_value(tmp_path_factory, pairs, seed):
    path = tmp_path_factory.getbasetemp() / "map.json"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps({str(raw): train for raw, train in pairs.items()}, indent=1).encode().replace(b"\n", b"\r\n")
    )
    found = label_maps.read_label_map(str(path), num_classes=6, ignored=(255,))
    for kind, low, high in (("uint8", 0, 256), ("uint16", 0, 400), ("int64", -5, 70_000), ("int32", -5, 310)):
        raw = np.random.default_rng(seed).integers(low, high, (4, 5)).astype(kind)
        assert found(raw).tolist() == [[pairs.get(value, 255) for value in row] for row in raw.tolist()]


def test_a_map_or_names_that_are_wrong(tmp_path):
    def said(text, read=label_maps.read_label_map, **given):
        (tmp_path / "x").write_bytes(text)
        with pytest.raises(BadFile) as found:
            read(str(tmp_path / "x"), num_classes=4, **given)
        return str(found.value)

    ignored = {"ignored": (255,)}
    assert "got '7' twice: 0 and 1; keep one" in said(b'{"7": 0, "7": 1}', **ignored)
    assert "mapped to training ids 0..3 or 255, got '7': 4" in said(b'{"7": 4}', **ignored)
    assert "got '07': 0" in said(b'{"07": 0}', **ignored)
    assert "in UTF-8, got other bytes" in said('{"7": 0}'.encode("utf-16"), **ignored)
    assert "expected an object" in said(b"[1]", **ignored)
    read = labels.read_class_names
    assert "got 4, 'a' more than once" in said(b"a\r\nb\r\na\r\nc\r\n", read)
    palette = label_maps.read_palette
    assert "got '#00001': 0" in said(b'{"#00001": 0}', palette, **ignored)
    assert "expected each colour once, got #0102ff twice" in said(b"[[1, 2, 255], [1, 2, 255]]", palette, **ignored)
    assert "expected each colour once, got #0102ff twice" in said(b'{"#0102ff": 0, "#0102FF": 1}', palette, **ignored)
    assert "got [0, 0, 256]: 0" in said(b"[[0, 0, 256]]", palette, **ignored)
    for read, known in ((label_maps.read_label_map, "mapillary"), (palette, "voc")):
        with pytest.raises(BadFile, match=f"nowhere: expected a JSON file .*{known}.*, got neither"):
            read("nowhere", num_classes=4, **ignored)
    with pytest.raises(ValueError, match="expected --num-classes 19 with --label-map cityscapes, got 34"):
        label_maps.read_label_map("cityscapes", num_classes=34, **ignored)


def grey_png(path, values, depth):
    """A grey PNG of any depth, which PIL writes for 1, 8 and 16 bits alone."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b""
    for row in values.tolist():
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


WAYS = {
    "1 bit": (1, lambda path, x: grey_png(path, x, 1), "png"),
    "2 bits": (3, lambda path, x: grey_png(path, x, 2), "png"),
    "4 bits": (15, lambda path, x: grey_png(path, x, 4), "png"),
    "8 bits": (255, lambda path, x: grey_png(path, x, 8), "png"),
    "16 bits": (65535, lambda path, x: grey_png(path, x, 16), "png"),
    "1 bit by PIL": (1, lambda path, x: Image.fromarray(x.astype(bool)).save(path), "png"),
    "TIFF of 8 bits": (255, lambda path, x: png(path, x.astype("uint8")), "tif"),
    "TIFF of 16 bits": (65535, lambda path, x: png(path, x.astype("uint16"), compression="tiff_lzw"), "tiff"),
    "TIFF of 32 bits": (1 << 20, lambda path, x: png(path, x.astype("int32")), "tif"),
    "npy, bool": (1, lambda path, x: np.save(path, x.astype(bool)), "npy"),
    "npy, int64": (1 << 40, lambda path, x: np.save(path, x), "npy"),
    "npy, the other end first": (1 << 30, lambda path, x: np.save(path, x.astype(">u4")), "npy"),
    "npy, Fortran order": (200, lambda path, x: np.save(path, np.asfortranarray(x.astype("uint8"))), "npy"),
}


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_the_numbers_of_the_file(tmp_path, way):
    most, write, ending = WAYS[way]
    values = np.random.default_rng(0).integers(0, most + 1, (5, 7))
    values[0, :2] = 0, most
    write(tmp_path / f"a.{ending}", values)
    assert labels.read_label(tmp_path / f"a.{ending}", folder=tmp_path, kind=kind_of()).tolist() == values.tolist()


def test_labels_in_jpeg_are_taken_with_a_remark_and_pictures_beside_labels_are_not(tmp_path):
    target = np.full((8, 8), 2, "uint8")
    npy(tmp_path / "p/a.npy", 9 * np.stack([target == c for c in range(C)]).astype("f4"))
    png(tmp_path / "l/a.jpg", target, quality=100)
    found = judged(tmp_path)
    assert found.stats.accuracy() == 1.0
    assert found.remarks == ["a.jpg: labels in JPEG, which changes numbers near edges; save labels as PNG"]
    png(tmp_path / "l/a.png", target - 1)
    found = judged(tmp_path)
    assert (found.stats.accuracy(), found.remarks) == (0.0, [])


def bad_label(tmp_path, write, **given):
    path = write(tmp_path)
    with pytest.raises(BadFile) as found:
        labels.read_label(path, folder=tmp_path, kind=kind_of(**given))
    return str(found.value)


def test_labels_that_cannot_be(tmp_path):
    def array(x, **options):
        def write(folder):
            np.save(folder / "a.npy", x, **options)
            return folder / "a.npy"

        return write

    def image(x, ending, **options):
        def write(folder):
            png(folder / f"a.{ending}", x, **options)
            return folder / f"a.{ending}"

        return write

    assert "whole numbers, got float32; save x.astype('uint8')" in bad_label(tmp_path, array(np.zeros((2, 2), "f4")))
    assert "never unpickled" in bad_label(tmp_path, array(np.array([[None]]), allow_pickle=True))
    assert "expected a label (H, W), got (4,)" in bad_label(tmp_path, array(np.zeros(4, int)))
    assert "more than 191; pass --max-pixels" in bad_label(tmp_path, array(np.zeros((12, 16), int)), max_pixels=191)
    assert "12 x 16" not in bad_label(tmp_path, image(np.zeros((12, 16), "uint8"), "png"), max_pixels=191)
    for ending in ("png", "tif"):
        said = bad_label(tmp_path, image(np.zeros((12, 16), "uint8"), ending), max_pixels=191)
        assert "claims 16 x 12 pixels, more than 191: a decompression bomb? Pass --max-pixels" in said
        assert "colour maps need --palette" in bad_label(tmp_path, image(np.zeros((2, 2, 3), "uint8"), ending))
    assert "PIL's mode F" in bad_label(tmp_path, image(np.zeros((2, 2), "f4"), "tif"))
    pages = [Image.fromarray(np.zeros((2, 2), "uint8"))]
    pages_of = image(np.zeros((2, 2), "uint8"), "tif", save_all=True, append_images=pages)
    assert "got 2 pages; save one file an image, or the volume as .npy" in bad_label(tmp_path, pages_of)
    (tmp_path / "b.tif").write_bytes(b"II*\0nothing")
    assert "truncated" in bad_label(tmp_path, lambda folder: folder / "b.tif")
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "out.npy", np.zeros((2, 2), int))
    (tmp_path / "in/a.npy").symlink_to("../out.npy")
    with pytest.raises(BadFile, match="a link that leads out"):
        labels.read_label(tmp_path / "in/a.npy", folder=tmp_path / "in", kind=kind_of())


def test_large_images_need_no_limit_of_pil(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    values = np.random.default_rng(0).integers(0, 4, (H, W)).astype("uint8")
    png(tmp_path / "a.png", values)
    found = labels.read_label(tmp_path / "a.png", folder=tmp_path, kind=kind_of(max_pixels=H * W))
    assert found.tolist() == values.tolist()
    assert Image.MAX_IMAGE_PIXELS == 10


# Labels: colours

COLOURS = {
    # As Cityscapes' labels.py and VOC's development kit list them.
    "cityscapes": (19, {(128, 64, 128): 0, (0, 0, 142): 13, (119, 11, 32): 18, (0, 0, 0): 255, (250, 170, 160): 255}),
    "voc": (21, {(0, 0, 0): 0, (128, 0, 0): 1, (192, 128, 128): 15, (0, 64, 128): 20, (224, 224, 192): 255}),
    "binary": (2, {(0, 0, 0): 0, (255, 255, 255): 1}),
    "list.json": (3, {(9, 8, 7): 0, (0, 0, 1): 1, (255, 0, 0): 2}),
    "object.json": (3, {(9, 8, 7): 2, (0, 0, 1): 0, (171, 205, 239): 255}),
}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "RGB in TIFF"])
def test_colour_maps(tmp_path, name, mode):
    classes, some = COLOURS[name]
    (tmp_path / "list.json").write_text(json.dumps([list(colour) for colour in some]))
    (tmp_path / "object.json").write_text(
        json.dumps({"#{:02X}{:02x}{:02x}".format(*colour): train for colour, train in some.items()})
    )
    given = str(tmp_path / name) if name.endswith(".json") else name
    palette = label_maps.read_palette(given, num_classes=classes, ignored=(255,))
    assert set(palette.classes.tolist()) - {255} == set(range(classes)) or name == "object.json"
    drawn = np.random.default_rng(0).integers(0, len(some), (6, 9))
    picture = Image.fromarray(np.array([*some], "uint8")[drawn])
    picture = picture.quantize(16) if mode == "P" else picture.convert(mode[:4].strip())
    path = tmp_path / ("x.tif" if "TIFF" in mode else "x.png")
    picture.save(path)
    found = labels.read_label(path, folder=tmp_path, kind=kind_of(classes, map=palette))
    assert found.tolist() == np.array([*some.values()])[drawn].tolist()


def test_colours_that_no_palette_has(tmp_path):
    palette = label_maps.read_palette("voc", num_classes=21, ignored=(255,))
    x = np.zeros((4, 6, 3), "uint8")
    x[2, 5] = 1, 2, 3

    def write(ending, values=x, **options):
        png(tmp_path / f"a.{ending}", values, **options)
        return lambda folder: folder / f"a.{ending}"

    said = bad_label(tmp_path, write("png"), classes=21, map=palette)
    assert "got the colour #010203, which the palette lacks, at (2, 5)" in said
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype("uint8")
    assert "JPEG changes numbers" in bad_label(tmp_path, write("jpg", noise), classes=21, map=palette)
    assert "leave out --palette" in bad_label(tmp_path, write("png", x[..., 0]), classes=21, map=palette)
    clear = np.zeros((2, 2, 4), "uint8")
    assert "transparent pixels" in bad_label(tmp_path, write("png", clear), classes=21, map=palette)
    with pytest.raises(ValueError, match="one colour for roads and skyscrapers"):
        label_maps.read_palette("ade20k", num_classes=150, ignored=(255,))


# Labels that mean something else


def test_masks_of_0_and_255(tmp_path):
    foreground = np.zeros((8, 8), bool)
    foreground[:, 4:] = True
    npy(tmp_path / "p/a.npy", np.stack([np.full((8, 8), 3.0), np.zeros((8, 8))]).astype("f4"))
    png(tmp_path / "l/a.png", (foreground * 255).astype("uint8"))
    said = refused(tmp_path, 2)
    assert "no pixel is of class 1, and 32 are ignored: for masks of 0 and 255 pass --label-map binary" in said
    assert "--trust" in said
    found = judged(tmp_path, 2, label_map="binary")
    assert (found.stats.pixels, found.stats.accuracy()) == (64, 0.5)
    assert found.class_names == ["background", "foreground"]
    assert judged(tmp_path, 2, trust=True).stats.pixels == 32
    assert "for masks of 0 and 255 pass --label-map binary" in refused(tmp_path, 2, ignore_index=(7,))
    png(tmp_path / "l/a.png", foreground.astype("uint8") + 254 * (np.arange(8) == 7).astype("uint8"))
    assert judged(tmp_path, 2).stats.pixels == 56
    png(tmp_path / "l/a.png", foreground)
    assert (judged(tmp_path, 2).stats.pixels, judged(tmp_path, 2).stats.accuracy()) == (64, 0.5)


@pytest.mark.parametrize("way", ["1 bit", "1 bit by PIL", "1 bit of a palette", "TIFF", "npy"])
@pytest.mark.parametrize("told", [{"label_map": "binary"}, {"label_map": "own.json"}, {}])
def test_masks_of_one_bit(tmp_path, way, told):
    """True is the foreground, as 255 is of others."""
    mask = np.random.default_rng(0).random((H, W)) < 0.3
    (tmp_path / "l").mkdir()
    if way == "npy":
        np.save(tmp_path / "l/a.npy", mask)
    elif way == "1 bit":
        grey_png(tmp_path / "l/a.png", mask.astype(int), 1)
    elif "palette" in way:
        picture = Image.fromarray(mask.astype("uint8"), "P")
        picture.putpalette([0, 0, 0, 255, 255, 255])
        picture.save(tmp_path / "l/a.png", bits=1)
        assert (tmp_path / "l/a.png").read_bytes()[24:26] == bytes([1, 3])
    else:
        Image.fromarray(mask).save(tmp_path / f"l/a.{'tif' if way == 'TIFF' else 'png'}")
    npy(tmp_path / "p/a.npy", 9 * np.stack([~mask, mask]).astype("f4"))
    if "own.json" in told.values():
        (tmp_path / "own.json").write_text('{"0": 0, "255": 1}')
        told = {"label_map": str(tmp_path / "own.json")}
    found = judged(tmp_path, 2, **told)
    assert found.stats.confusion().tolist() == [[int((~mask).sum()), 0], [0, int(mask.sum())]]


def ade20k(folder, classes=150):
    raw = np.random.default_rng(0).integers(0, classes, (16, 16))
    z = np.full((classes, 16, 16), -9, "f4")
    np.put_along_axis(z, np.maximum(raw - 1, 0)[None], 9, 0)
    npy(folder / "p/a.npy", z)
    png(folder / "l/a.png", raw.astype("uint8"))
    return raw


def test_labels_that_begin_with_1(tmp_path):
    raw = ade20k(tmp_path)
    assert "labels look shifted by one" in refused(tmp_path, 150)
    assert "pass --reduce-zero-label if 0 is unlabelled" in refused(tmp_path, 150)
    for told in ({"reduce_zero_label": True}, {"label_map": "ade20k"}):
        found = judged(tmp_path, 150, **told)
        assert (found.stats.accuracy(), found.stats.pixels) == (1.0, int((raw > 0).sum()))
    assert judged(tmp_path, 150, trust=True).stats.accuracy() < 0.02
    # And the other way round: shifted though 0 is a class.
    png(tmp_path / "l/a.png", np.maximum(raw - 1, 0).astype("uint8"))
    assert judged(tmp_path, 150).stats.accuracy() == 1.0
    assert "leave out --reduce-zero-label" in refused(tmp_path, 150, reduce_zero_label=True)
    png(tmp_path / "l/a.png", np.full((16, 16), 150, "uint8"))
    assert "got the value 150; pass --reduce-zero-label" in refused(tmp_path, 150)


def test_a_network_that_is_half_right_gives_a_remark(tmp_path):
    raw = ade20k(tmp_path)
    z = np.load(tmp_path / "p/a.npy")
    z[:, :6] = 0.0
    z[0, :6] = 9.0
    np.save(tmp_path / "p/a.npy", z)
    found = judged(tmp_path, 150)
    assert len(found.remarks) == 1
    assert "labels look shifted by one" in found.remarks[0]
    assert judged(tmp_path, 150, trust=True).remarks == []
    assert raw.shape == (16, 16)


@given(st.integers(0, 2**32), st.integers(2, 7), st.sampled_from([-1, 1]))
def test_shifts_against_a_count_by_hand(seed, classes, by):
    rng = np.random.default_rng(seed)
    confusion = rng.integers(0, 3, (classes, classes)) * (rng.random((classes, 1)) < 0.8)
    confusion += 4 * np.eye(classes, k=by, dtype=int) * (rng.random((classes, 1)) < 0.8)
    shares = []
    for c in range(classes):
        if 0 <= c + by < classes and confusion[c].sum():
            shares.append(confusion[c, c + by] / confusion[c].sum())
    expected = np.mean(shares) if sum(share > 0.5 for share in shares) >= 3 else 0.0
    assert doubts.shift(torch.from_numpy(confusion), by) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 2**32), st.integers(2, 20), st.booleans())
def test_a_network_that_sees_one_class_everywhere_or_is_right_is_no_doubt(seed, classes, reduced):
    rng = np.random.default_rng(seed)
    one, right = np.zeros((2, classes, classes), int)
    one[:, rng.integers(classes)] = rng.integers(0, 1000, classes)
    right[np.arange(classes), np.arange(classes)] = rng.integers(0, 1000, classes)
    for confusion in (one, right):
        assert doubts.shifted(torch.from_numpy(confusion), reduced=reduced) is None


@pytest.mark.parametrize(
    ("right", "below", "plain"),
    [(0, 95, True), (5, 95, True), (5, 85, False), (20, 80, False), (45, 55, None), (0, 45, None)],
)
def test_how_plain_a_shift_is(right, below, plain):
    """Of 100 pixels of each class, `right` are predicted right, `below` as the class before, and the rest as the last."""
    confusion = np.zeros((7, 7), int)
    for c in range(1, 6):
        confusion[c, c], confusion[c, c - 1], confusion[c, 6] = right, below, 100 - right - below
    found = doubts.shifted(torch.from_numpy(confusion), reduced=False)
    assert (None if found is None else found.plain) is plain
    # With as many pixels of class 0, which is right, a fifth and more are right as they are.
    confusion[0, 0] = 150
    found = doubts.shifted(torch.from_numpy(confusion), reduced=False)
    assert found is None or not found.plain


# Which files


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


NAMED = {
    "Cityscapes": ("ulm_000000_000019_leftImg8bit", "ulm_000000_000019_gtFine_labelTrainIds", "ulm_000000_000019"),
    "ACDC": ("GP01_frame_1_rgb_anon", "GP01_frame_1_gt_labelTrainIds", "GP01_frame_1"),
    "BDD100K": ("7d06fefd", "7d06fefd_train_id", "7d06fefd"),
    "India Driving": ("000000_leftImg8bit", "000000_gtFine_labelcsTrainIds", "000000"),
    "CamVid": ("0001TP", "0001TP_L", "0001TP"),
    "equal names that end in a label's ending": ("scan_L", "scan_L", "scan_L"),
    "the same behind an image's ending": ("scan_L_leftImg8bit", "scan_L", "scan_L"),
    "equal names that end in an image's ending": ("x_leftImg8bit", "x_leftImg8bit", "x"),
    "forms of Unicode": (unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "é"), "é"),
    "a pair": ("u_leftImg8bit_confidence", "u_gtFine_labelTrainIds", "u"),
    "a colour map": ("u_leftImg8bit", "u_gtFine_color", "u"),
}


def match(folder, predicted, labelled, **given):
    folders = folder / "p", folder / "l"
    sides = [[folders[i] / name for name in names] for i, names in enumerate((predicted, labelled))]
    return matching.matched(*sides, folders=folders, **given)


@pytest.mark.parametrize("kind", NAMED)
def test_names_of_public_sets(tmp_path, kind):
    prediction, label, image = NAMED[kind]
    found = match(tmp_path, [f"city/{prediction}.npy"], [f"val/city/{label}.png"])
    assert [*found.predictions] == [*found.labels] == [image]


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a/c", "d/a"]), st.sampled_from("xyz")), unique=True, min_size=1))
def test_frames_of_sequences_are_told_apart_by_their_folders(places):
    folder = Path("root")
    predicted = [f"{place}/{name}_leftImg8bit.npy" for place, name in places]
    labelled = [f"gt/{place}/{name}_gtFine_labelTrainIds.png" for place, name in reversed(places)]
    found = match(folder, predicted, labelled)
    assert len(found.predictions) == len(found.labels) == len(places)
    by_hand = {folder / "p" / one: folder / "l" / other for one, other in zip(predicted, reversed(labelled))}
    paired = {path: found.labels.get(name) for name, path in found.predictions.items()}
    unclear = {place for place, _ in places} >= {"a", "d/a"}  # the one is the end of the other
    assert paired == by_hand or unclear
    assert all(path is None or by_hand[one] == path for one, path in paired.items())


@given(st.text("abv_.12", min_size=1), st.sampled_from(["", ".png", ".PNG", ".NPY", ".tiff", ".pt"]))
def test_a_suffix_may_have_dots_of_its_own(suffix, ending):
    path = Path(f"name{suffix}.png")
    assert matching.ends_in(path, [suffix + ending]) == (ending in ("", ".png", ".PNG"))
    assert matching._without(path.stem, [suffix + ending]) == "name"


def test_suffixes_choose_and_do_not_count(tmp_path):
    given = {"label_suffixes": ["_mask.png"], "prediction_suffixes": ["_out"]}
    found = match(tmp_path, ["x_out.npy", "y_out_confidence.png"], ["x_mask.png", "y_mask.png"], **given)
    assert [*found.predictions] == [*found.labels] == ["x", "y"]
    touch(tmp_path / "l", "x_mask.png", "x_photo.png")
    paths, _ = labels.find_labels(tmp_path / "l", kind_of(), suffixes=["_mask"])
    assert [path.name for path in paths.paths] == ["x_mask.png"]
    with pytest.raises(BadFile, match=r"no label's name ends in _foo; there is, for example, x_mask.png"):
        labels.find_labels(tmp_path / "l", kind_of(), suffixes=["_foo"])
    with pytest.raises(BadFile, match=r"the second file of image 'x', after .*--label-suffix"):
        match(tmp_path, ["x.npy"], ["x.png", "x_L.png"])


def test_which_of_several_kinds_of_labels(tmp_path):
    kinds = ("labelIds", "labelTrainIds", "color", "instanceIds")
    touch(tmp_path, *(f"u_gtFine_{kind}.png" for kind in kinds))

    def chosen(classes, label_map=None, palette=None):
        read = label_maps.read_label_map if label_map else label_maps.read_palette
        name = label_map or palette
        found = None if name is None else read(name, num_classes=classes, ignored=(255,))
        paths, _ = labels.find_labels(tmp_path, kind_of(classes, map=found))
        return [path.stem.rsplit("_", 1)[1] for path in paths.paths]

    assert chosen(19) == ["labelTrainIds"]
    assert chosen(34) == chosen(19, label_map="cityscapes") == ["labelIds"]
    assert chosen(19, palette="cityscapes") == ["color"]
    (tmp_path / "u_gtFine_labelTrainIds.png").unlink()
    assert chosen(19) == ["labelIds"]


def test_hidden_files_and_linked_folders(tmp_path):
    root = tmp_path / "root"
    touch(root, "a.npy", "._a.npy", ".ipynb_checkpoints/a-checkpoint.npy", "real/b.npy", "real/.x/c.npy")
    (root / "link").symlink_to("real")
    (root / "real/circle").symlink_to("..")

    def names(**given):
        return sorted(str(path.relative_to(root)) for path in listed(root, [".npy"], **given).paths)

    assert names() == ["a.npy", "real/b.npy"]
    assert [path.name for path in listed(root, [".npy"]).links] == ["link", "circle"]
    assert names(follow_links=True) == ["a.npy", "link/b.npy"]
    touch(tmp_path, "out/d.npy")
    (root / "away").symlink_to("../out")
    with pytest.raises(BadFile, match="away: a link that leads out of the folder"):
        listed(root, [".npy"], follow_links=True)
    assert names() == ["a.npy", "real/b.npy"]


def test_labels_without_predictions_can_be_left_out(tmp_path):
    z, target = predictions(1, (3, C, H, W), dtype=torch.float32)
    for i, name in enumerate("abc"):
        png(tmp_path / f"l/{name}.png", target[i].numpy().astype("uint8"))
        if name != "b":
            npy(tmp_path / f"p/{name}.npy", z[i].numpy())
    assert "no prediction of image 'b'; pass --only-labels-of-predictions" in refused(tmp_path)
    found = judged(tmp_path, only_labels_of_predictions=True)
    assert ([row.name for row in found.images], found.skipped) == (["a", "c"], [])
    assert found.remarks == ["1 of 3 labels have no prediction and are left out"]
    (tmp_path / "l/c.png").rename(tmp_path / "l/c_mask.png")
    for only in (True, False):
        said = refused(tmp_path, only_labels_of_predictions=only)
        assert "c.npy: no label of image 'c' in" in said
        assert "c_mask.png: say its ending with --label-suffix" in said


# Predictions


def expected(z, target, kind="logits"):
    stats = CalibrationStats(z.shape[1], input=kind)
    stats.update(z, target)
    return stats.ece(), stats.nll(), stats.miou()


def figures(found):
    return found.stats.ece(), found.stats.nll(), found.stats.miou()


@pytest.mark.parametrize("batch", [False, True])
def test_channels_last(tmp_path, batch):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32)
    last = z[0].numpy().transpose(1, 2, 0)
    npy(tmp_path / "p/a.npy", last[None] if batch else last)
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    assert figures(judged(tmp_path, channels_last=True)) == pytest.approx(expected(z, target), abs=1e-12)
    assert "the classes are last: pass --channels-last, or save x.transpose(2, 0, 1)" in refused(tmp_path)
    npy(tmp_path / "p/a.npy", z[0].numpy())
    assert "the classes are first: leave out --channels-last" in refused(tmp_path, channels_last=True)


@pytest.mark.parametrize("shape", [(H, W), (1, H, W), (1, 1, H, W)])
@pytest.mark.parametrize("kind", ["logits", "probs", "uint8"])
def test_one_channel(tmp_path, shape, kind):
    z, target = predictions(1, (1, 2, H, W), dtype=torch.float32)
    one = z[:, 1] - z[:, 0]
    saved = one if kind == "logits" else one.sigmoid()
    if kind == "uint8":
        saved = (255 * saved).round()
    npy(tmp_path / "p/a.npy", saved.reshape(shape).numpy().astype("uint8" if kind == "uint8" else "float32"))
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    given = kind if kind == "logits" else "probs"
    p = torch.sigmoid(one.double()) if kind != "uint8" else saved.double() / 255
    found = judged(tmp_path, 2, given, one_channel=True)
    assert figures(found) == pytest.approx(expected(torch.stack([1 - p, p], 1), target, "probs"), abs=1e-5)
    assert "pass --one-channel" in refused(tmp_path, 2, given)
    assert "judge several sigmoids one by one" in refused(tmp_path, 3, given, ValueError, one_channel=True)


@pytest.mark.parametrize("kind", ["logits", "probs", "log_probs", "float16", "uint8", "other end first"])
def test_lower_resolutions(tmp_path, kind):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float64)
    low = z[:, :, ::4, ::4]
    saved = {"probs": low.softmax(1), "log_probs": low.log_softmax(1), "float16": low.half()}.get(kind, low)
    if kind == "uint8":
        saved = (255 * low.softmax(1)).round()
    given = {"float16": "logits", "other end first": "logits", "uint8": "probs"}.get(kind, kind)
    npy(
        tmp_path / "p/a.npy",
        saved[0].numpy().astype({"uint8": "uint8", "other end first": ">f8"}.get(kind, saved.numpy().dtype)),
    )
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    source = saved.double() / saved.double().sum(1, keepdim=True) if given == "probs" else saved.double()
    x = F.interpolate(source, (H, W), mode="bilinear", align_corners=False)
    found = judged(tmp_path, kind=given, upsample="bilinear")
    p = x if given == "probs" else x.softmax(1)  # the same for log-probabilities as for their logits
    assert figures(found) == pytest.approx(expected(p, target, "probs"), abs=1e-5)
    assert "pass --upsample bilinear" in refused(tmp_path, kind=given)


@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 400), st.booleans())
def test_every_stride_is_a_lower_resolution_and_another_aspect_is_none(stride, height, width, up):
    divided = tuple(-(-size // stride) if up else max(size // stride, 1) for size in (height, width))
    assert shapes._lower(divided, (height, width)) or 1 in divided
    assert not shapes._lower((height + 1, width), (height, width))
    assert not shapes._lower((height // 2, width), (height, width)) or min(height, width) < 9


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("cut", [False, True])
def test_probabilities_in_whole_numbers(tmp_path, kind, cut):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float64)
    most = np.iinfo(kind).max
    scaled = z.softmax(1)[0].numpy() * most
    saved = (np.floor(scaled) if cut else np.round(scaled)).astype(kind)
    npy(tmp_path / "p/a.npy", saved)
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    by_hand = torch.from_numpy(saved.astype("float64") / saved.sum(0, dtype="float64"))[None]
    assert figures(judged(tmp_path, kind="probs")) == pytest.approx(expected(by_hand, target, "probs"), abs=1e-5)
    said = refused(tmp_path)
    assert f"are probabilities times {most} only: pass --input probs" in said
    npy(tmp_path / "p/a.npy", saved // 2)
    assert f"expected probabilities times {most}, whose sum is it" in refused(tmp_path, kind="probs")


def test_probabilities_in_whole_numbers_are_anything_where_nothing_counts(tmp_path):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float64, ignored=0.3)
    void = target[0].numpy() == 255
    saved = (255 * z.softmax(1)[0]).round().numpy().astype("uint8")
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    for some in (0, 9):
        npy(tmp_path / "p/a.npy", np.where(void, np.uint8(some), saved))
        by_hand = torch.from_numpy(saved / saved.sum(0, dtype="float64"))[None]
        assert figures(judged(tmp_path, kind="probs")) == pytest.approx(expected(by_hand, target, "probs"), abs=1e-9)
    saved[:, ~void] = 0
    npy(tmp_path / "p/a.npy", saved)
    assert "expected probabilities times 255, whose sum is it, got the sum 0; save round(255 * p)" in refused(
        tmp_path, kind="probs"
    )


def test_many_classes_leave_nothing_of_8_bits(tmp_path):
    """All 300 of 1 / 300 are cut off to 0."""
    npy(tmp_path / "p/a.npy", np.zeros((300, 4, 4), "uint8"))
    png(tmp_path / "l/a.png", np.zeros((4, 4), "uint8"))
    said = refused(tmp_path, 300, "probs", ignore_index=(-1,))
    assert "got the sum 0; uint8 is too coarse for 300 classes: save floats" in said


def test_a_lower_resolution_of_whole_numbers_counts_where_its_labels_do(tmp_path):
    z, _ = predictions(1, (1, C, 4, 8), dtype=torch.float64)
    saved = (255 * z.softmax(1)[0]).round().numpy().astype("uint8")
    saved[:, :, :2] = 0
    label = np.ones((8, 16), "uint8")
    label[:, :5] = 255
    npy(tmp_path / "p/a.npy", saved)
    png(tmp_path / "l/a.png", label)
    assert judged(tmp_path, kind="probs", upsample="bilinear").stats.pixels == 8 * 11
    label[0, 4] = 1  # a quarter of which is of a pixel without probabilities
    png(tmp_path / "l/a.png", label)
    assert "got the sum 0" in refused(tmp_path, kind="probs", upsample="bilinear")


REMEDIES = {
    "stacked": ((3, C, H, W), "of a batch save one file an image"),
    "swapped": ((C, W, H), "height and width are swapped: save x.transpose(0, 2, 1)"),
    "other classes": ((7, H, W), "pass --num-classes 7"),
    "larger": ((C, 2 * H, 2 * W), "save them at the label's resolution"),
    "cropped": ((C, H, W // 2), "cropped, padded, another image?"),
    "one number a pixel": ((H, W), "pass --one-channel; confidences go in pairs with classes"),
    "a vector": ((C,), "save one array (C, H, W)"),
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_remedies_for_other_shapes(tmp_path, kind):
    shape, remedy = REMEDIES[kind]
    npy(tmp_path / "p/a.npy", np.zeros(shape, "float32"))
    png(tmp_path / "l/a.png", np.zeros((H, W), "uint8"))
    said = refused(tmp_path)
    assert f"a.npy: expected an array (4, 12, 16) as its label has it, got {shape}; " in said
    assert remedy in said


def test_predicted_classes_alone_are_no_scores(tmp_path):
    npy(tmp_path / "p/a.npy", np.zeros((H, W), "int64"))
    png(tmp_path / "l/a.png", np.zeros((H, W), "uint8"))
    assert "predicted classes alone have no confidence" in refused(tmp_path)


def test_arrays_with_the_other_end_first(tmp_path):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32)
    npy(tmp_path / "p/a.npy", z[0].numpy().astype(">f4"))
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    assert figures(judged(tmp_path)) == pytest.approx(expected(z, target), abs=1e-12)


def test_probabilities_of_half_precision_are_normalized_on_request(tmp_path):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float64)
    saved = 1.02 * z.softmax(1).half()
    npy(tmp_path / "p/a.npy", saved[0].numpy())
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    by_hand = saved.double() / saved.double().sum(1, keepdim=True)
    found = judged(tmp_path, kind="probs", normalize=True)
    assert figures(found) == pytest.approx(expected(by_hand, target, "probs"), abs=1e-9)
    assert "sum to 1" in refused(tmp_path, kind="probs")


def test_several_labels_that_do_not_count(tmp_path):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32)
    npy(tmp_path / "p/a.npy", z[0].numpy())
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    found = judged(tmp_path, ignore_index=(2, 255), boundary=1)
    valid = (target != 255) & (target != 2)
    right = z.argmax(1) == target
    assert (found.stats.pixels, found.stats.accuracy()) == (
        int(valid.sum()),
        pytest.approx(float(right[valid].double().mean())),
    )
    near = CalibrationStats(C, input="logits", ignore_index=(2, 255))
    near.update(z, target, boundary_mask(target, 1, ignore_index=(2, 255)))
    assert found.boundary.ece() == pytest.approx(near.ece(), abs=1e-12)


@pytest.mark.parametrize("label", [(1, H, W), (1, 1, H, W)])
@pytest.mark.parametrize("scores", [(C, H, W), (1, C, H, W), (C, 1, H, W), (1, C, 1, H, W)])
def test_a_volume_of_one_slice_is_an_image(tmp_path, label, scores):
    """The label's first dimension goes, and that of the scores, be it of a batch or of a volume."""
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32)
    npy(tmp_path / "p/a.npy", z.reshape(scores).numpy())
    npy(tmp_path / "l/a.npy", target.reshape(label).numpy().astype("uint8"))
    if len(label) == 4 and 1 not in scores[1:]:
        assert "expected an array (4, 1, 12, 16) as its label has it" in refused(tmp_path)
    else:
        assert figures(judged(tmp_path)) == pytest.approx(expected(z, target), abs=1e-12)
    if len(label) == 3 and scores == (C, 1, H, W):  # against a label without, it is a batch
        png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
        (tmp_path / "l/a.npy").unlink()
        assert "of a batch save one file an image" in refused(tmp_path)


def test_a_slice_of_one_with_its_channels_last(tmp_path):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32)
    npy(tmp_path / "l/a.npy", target.numpy().astype("uint8"))
    for last in (z[0].permute(1, 2, 0), z.permute(0, 2, 3, 1), z[None].permute(0, 1, 3, 4, 2)):
        npy(tmp_path / "p/a.npy", last.numpy())
        assert figures(judged(tmp_path, channels_last=True)) == pytest.approx(expected(z, target), abs=1e-12)


def test_volumes(tmp_path):
    """(C, D, H, W) against an .npy of (D, H, W)."""
    z, target = predictions(1, (1, C, 3, 5, 6), dtype=torch.float32)
    npy(tmp_path / "p/a.npy", z[0].numpy())
    npy(tmp_path / "l/a.npy", target[0].numpy().astype("uint8"))
    assert figures(judged(tmp_path)) == pytest.approx(expected(z, target), abs=1e-12)


def test_read_image_gives_what_is_judged(tmp_path):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32)
    npy(tmp_path / "p/a.npy", z[0].numpy())
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    options = options_of(tmp_path)
    found, label = read_image("a", make_plan(options), options)
    assert np.array_equal(found, z.numpy())
    assert np.array_equal(label, target.numpy())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"classes": 300},
            "expected --ignore-index to be given with 300 classes, of which 255 is one, got none; pass --ignore-index 255",
        ),
        ({"label_map": "binary", "reduce_zero_label": True, "classes": 2}, "got --label-map and --reduce-zero-label"),
        ({"label_map": "cityscapes", "classes": 34}, "expected --num-classes 19 with --label-map cityscapes, got 34"),
        ({"normalize": True}, "expected --input probs with --normalize, got logits"),
        ({"kind": "log_probs", "one_channel": True, "classes": 2}, "--input logits or probs with --one-channel"),
    ],
)
def test_options_that_contradict(tmp_path, given, message):
    npy(tmp_path / "p/a.npy", np.zeros((C, H, W), "float32"))
    png(tmp_path / "l/a.png", np.zeros((H, W), "uint8"))
    assert message in refused(tmp_path, error=ValueError, **given)


def test_pairs_take_no_options_of_arrays(tmp_path):
    png(tmp_path / "p/a_confidence.png", np.zeros((H, W), "uint8"))
    png(tmp_path / "l/a.png", np.zeros((H, W), "uint8"))
    assert "a_confidence.png: no a_prediction.png beside it" in refused(tmp_path, kind=None)
    png(tmp_path / "p/a_prediction.png", np.zeros((H, W), "uint8"))
    said = refused(tmp_path, kind=None, error=ValueError, one_channel=True, upsample="bilinear")
    assert "leave out --one-channel and --upsample" in said


def test_the_words_of_the_command(tmp_path, capsys):
    """Repeated options, and names of sets, reach their places."""
    rng = np.random.default_rng(0)
    raw = rng.choice([0, 7, 8, 26], (H, W)).astype("uint8")
    npy(tmp_path / "p/x_out.npy", rng.normal(size=(19, H, W)).astype("f4"))
    touch(tmp_path, "p/x.npy")
    png(tmp_path / "l/x_ids.png", raw)
    png(tmp_path / "l/x_photo.png", raw)
    words = f"evaluate {tmp_path / 'p'} {tmp_path / 'l'} --num-classes 19 --input logits --label-map cityscapes".split()
    words += ["--label-suffix", "_none", "--label-suffix", "_ids", "--prediction-suffix", "_out"]
    words += ["--ignore-index", "255", "--max-pixels", "192"]
    assert cli.main([*words, "--out", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o/report.json").read_text())
    assert (found["images"], found["pixels"], found["classes"][13]["name"]) == (1, int((raw > 0).sum()), "car")
    assert [row["pixels"] for row in found["classes"]][13] == int((raw == 26).sum())
    assert cli.main([*words[:-1], "191", "--out", str(tmp_path / "o")]) == 1
    assert "Pass --max-pixels" in capsys.readouterr().err
