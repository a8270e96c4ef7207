"""What `dacal evaluate` says of files that do not fit, and what it must not blame on them."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import predictions
from PIL import Image
from test_evaluate_inputs import C, H, W, figures, grey_png, judged, npy, png, refused

from dacal_addon import cli
from dacal_addon.evaluate import files, images, judging, markdown, plan, tables, worst, worst_picture
from dacal_addon.evaluate import predictions as reading
from dacal_addon.evaluate.files import BadFile
from dacal_addon.evaluate.judging import ImageRow
from dacal_addon.evaluate.shapes import Shape

WIDE = {
    "npy": lambda path, x: np.save(path, x),
    "tif": lambda path, x: Image.fromarray(x.astype("int32")).save(path),
    "png": lambda path, x: Image.fromarray(x.astype("uint16")).save(path),
}


def labelled(folder, kind, value):
    """Logits, and labels of which one has a value that is no class."""
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32, ignored=0)
    npy(folder / "p/a.npy", z[0].numpy())
    label = target[0].numpy().copy()
    label[3, 4] = value
    (folder / "l").mkdir(exist_ok=True)
    WIDE[kind](folder / f"l/a.{kind}", label)
    return z, target


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("npy", value) for value in (256, 257, -1, -2, -100, 1000, 70_000, -(1 << 32), 1 << 40)),
        *(("tif", value) for value in (256, -1, -100, 70_000)),
        *(("png", value) for value in (256, 1000, 65_280)),
    ],
)
def test_no_label_is_wrapped_into_8_bits(tmp_path, kind, value):
    z, target = labelled(tmp_path, kind, value)
    for given in ({}, {"ignore_index": (7,)}, {"ignore_index": (value % 256, 7)}):
        assert f"got the value {value}; " in refused(tmp_path, **given)
    (tmp_path / "own.json").write_text('{"0": 0, "1": 1, "2": 2, "3": 3, "254": 3, "255": 3, "232": 3}')
    found = judged(tmp_path, label_map=str(tmp_path / "own.json"))
    assert (found.stats.pixels, found.stats.ignored_pixels) == (H * W - 1, 1)
    target[0, 3, 4] = 255
    for boundary in (0, 1):
        found = judged(tmp_path, ignore_index=(value,), boundary=boundary)
        assert (found.stats.pixels, found.stats.ignored_pixels) == (H * W - 1, 1)
        right = (z.argmax(1) == target)[target != 255]
        assert found.stats.accuracy() == pytest.approx(float(right.double().mean()))


def test_counts_have_narrow_spaces_in_markdown():
    assert markdown.escaped(tables.count(1392)) == "1\u202f392"
    assert files.shown("\u00a0\u3000a\u2028\u200b\x1b") == "\u00a0\u3000a\\u2028\\u200b\\x1b"


def test_two_files_of_one_image_that_differ_in_their_ending(tmp_path):
    z, target = predictions(1, (2, C, H, W), dtype=torch.float32)
    npy(tmp_path / "p/a_leftImg8bit.npy", z[0].numpy())
    np.savez(tmp_path / "p/a_leftImg8bit.npz", z[1].numpy())
    png(tmp_path / "l/a_L.png", target[0].numpy().astype("uint8"))
    npy(tmp_path / "l/a_L.npy", 0 * target[0].numpy())
    said = refused(tmp_path)
    assert "pass --prediction-suffix .npy or --prediction-suffix .npz, or move one" in said
    said = refused(tmp_path, prediction_suffix=(".npz",))
    assert "pass --label-suffix .npy or --label-suffix .png, or move one of them" in said
    seen = [
        figures(judged(tmp_path, prediction_suffix=(one,), label_suffix=(other,)))
        for one in (".npy", ".npz")
        for other in (".png", ".npy")
    ]
    assert len(set(seen)) == 4
    # Endings of files do not keep those of public sets from being known.
    png(tmp_path / "l/a_gtFine_labelTrainIds.png", target[0].numpy().astype("uint8"))
    (tmp_path / "l/a_L.png").unlink()
    assert figures(judged(tmp_path, prediction_suffix=(".npy",), label_suffix=(".png",))) == pytest.approx(seen[0])


@pytest.mark.parametrize("others", [True, False])
def test_classes_without_confidences_are_named(tmp_path, others):
    for name in "ab" if others else "a":
        png(tmp_path / f"p/{name}_confidence.png", np.full((H, W), 200, "uint8"))
        png(tmp_path / f"p/{name}_prediction.png", np.zeros((H, W), "uint8"))
        png(tmp_path / f"l/{name}.png", np.zeros((H, W), "uint8"))
    (tmp_path / "p/a_confidence.png").unlink()
    for given in ({}, {"only_labels_of_predictions": True}):
        said = refused(tmp_path, kind=None, **given)
        assert re.search(r"p/a_prediction\.png: no a_confidence\.png beside it", said)
    skipped = judged(tmp_path, kind=None, keep_going=True).skipped
    assert [Path(bad.path).name for bad in skipped] == ["a_prediction.png"]
    # Beside arrays they are pictures of them.
    npy(tmp_path / "p/a.npy", np.eye(C, dtype="f4")[:, :1, None] * np.full((1, H, W), 9, "f4"))
    if others:
        (tmp_path / "p/b_confidence.png").unlink()
    assert judged(tmp_path, only_labels_of_predictions=True).stats.accuracy() == 1.0


ERRORS = {
    "of this package": (TypeError("unsupported operand"), False),
    "of this package, too": (ValueError("cannot reshape array"), False),
    "a lookup": (KeyError("x"), False),
    "a bug of torch's use": (RuntimeError("The size of tensor a (3) must match"), False),
    "another check": (ValueError("boundary_mask: expected an int64 tensor, got float32; convert it"), False),
    "a check of values": (ValueError("update: expected x: logits, got NaN; look for it"), True),
    "a check of kinds": (TypeError("update: expected x: numbers, got object; convert it"), True),
    "memory": (MemoryError(), True),
    "memory in torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
    "reading": (OSError(5, "Input/output error"), True),
    "too large": (OverflowError("int too large"), True),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("where", ["read_label", "read_prediction", "update"])
def test_an_error_of_this_package_is_not_blamed_on_a_file(tmp_path, monkeypatch, capsys, kind, where):
    error, of_file = ERRORS[kind]
    labelled(tmp_path, "npy", 0)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(*((judging, where) if where != "update" else (plan.CalibrationStats, where)), fail)
    words = ["evaluate", str(tmp_path / "p"), str(tmp_path / "l"), "--num-classes", "4", "--input", "logits"]
    words += ["--out", str(tmp_path / "o"), "--jobs", "1"]
    if of_file:
        assert cli.main(words) == 1
        assert f"{'l' if where == 'read_label' else 'p'}/a.npy: " in capsys.readouterr().err
    else:
        with pytest.raises(type(error)) as found:
            cli.main(words)
        assert found.value is error


def test_an_error_in_the_report_is_no_wrong_use(tmp_path, monkeypatch):
    labelled(tmp_path, "npy", 0)

    def fail(*arguments):
        raise ValueError("of the report")

    monkeypatch.setattr("dacal_addon.evaluate.command.make_report", fail)
    with pytest.raises(ValueError, match="of the report"):
        cli.main(f"evaluate {tmp_path}/p {tmp_path}/l --num-classes 4 --input logits --out {tmp_path}/o".split())


def test_an_error_outside_of_the_decoder_is_not_blamed_on_an_image(tmp_path, monkeypatch):
    png(tmp_path / "a.png", np.zeros((2, 2), "uint8"))
    monkeypatch.setattr(images, "_STEPS", None)
    with pytest.raises(AttributeError):
        images.read_numbers(tmp_path / "a.png")


@pytest.mark.parametrize("what", ["encrypted", "packed data", "no directory"])
def test_archives_that_cannot_be_read(tmp_path, what):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.random.default_rng(0).normal(size=(C, H, W)).astype("f4"))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (entry,) = archive.infolist()
    begin = entry.header_offset + 30 + len(entry.filename)
    if what == "encrypted":
        central = content.rindex(b"PK\x01\x02")
        for at in (entry.header_offset + 6, central + 8):
            content[at] |= 1
    elif what == "packed data":
        content[begin + 20 : begin + 400] = b"\xff" * 380
    else:
        content[-6:-2] = b"\xff\xff\xff\x7f"
    path.write_bytes(bytes(content))
    with pytest.raises(BadFile, match=r"not an archive|not an array"):
        reading.read_prediction(path, folder=tmp_path, shape=Shape(C, (H, W)), kind=reading.PredictionKind("logits"))


@pytest.mark.parametrize("kind", ["float32", "float16", "float64"])
@pytest.mark.parametrize("last", [False, True])
def test_probabilities_that_are_called_logits(tmp_path, kind, last):
    z, target = predictions(1, (2, C, H, W), dtype=torch.float64, ignored=0.1)
    given = {"channels_last": last}

    def write(scores, label=target):
        for i in range(2):
            array = scores[i].permute(1, 2, 0) if last else scores[i]
            npy(tmp_path / f"p/{i}.npy", array.numpy().astype(kind))
            png(tmp_path / f"l/{i}.png", label[i].numpy().astype("uint8"))

    p = z.softmax(1)
    write(torch.where((target == 255)[:, None], z, p))  # anything where nothing counts
    said = refused(tmp_path, **given)
    assert f"{tmp_path / 'p'}: logits are >= 0 and sum to 1 at every pixel" in said
    assert "pass --input probs if they are; or --trust if they are logits" in said
    assert judged(tmp_path, trust=True, **given).stats.pixels == int((target != 255).sum())
    # One pixel in all images that is none.
    y, x = torch.nonzero(target[1] != 255, as_tuple=False)[-1].tolist()
    for change in ((0.01, 0.0), (1.5, -1.5)):
        other = p.clone()
        other[1, :2, y, x] += torch.tensor(change, dtype=torch.float64)
        write(other)
        assert judged(tmp_path, **given).stats.pixels > 0
    write(z)
    assert judged(tmp_path, **given).remarks == []
    write(p)
    assert judged(tmp_path, kind="probs", **given).stats.pixels == int((target != 255).sum())


def test_a_label_of_another_size_may_be_the_wrong_one(tmp_path):
    png(tmp_path / "l/a.png", np.zeros((H, W), "uint8"))
    for scores in ((C, H // 2, W // 2), (C, H // 2, W)):
        npy(tmp_path / "p/a.npy", np.zeros(scores, "f4"))
        told = f"or {tmp_path / 'l/a.png'}, of (12, 16), is not the label of a.npy, of {scores[1:]}: pair them by name"
        assert told in refused(tmp_path)
    npy(tmp_path / "p/a.npy", np.zeros((7, H, W), "f4"))
    assert "is not the label" not in refused(tmp_path)
    (tmp_path / "p/a.npy").unlink()
    for name in ("confidence", "prediction"):
        png(tmp_path / f"p/a_{name}.png", np.zeros((H, 3), "uint8"))
    assert "l/a.png, of (12, 16), is not the label of a_confidence.png, of (12, 3)" in refused(tmp_path, kind=None)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_largest_value_of_a_confidence_is_1(tmp_path, bits):
    most = (1 << bits) - 1
    values = np.random.default_rng(bits).integers(0, most + 1, (H, W))
    values[0, :2] = 0, most
    for part in ("p", "l"):
        (tmp_path / part).mkdir()
    grey_png(tmp_path / "p/a_confidence.png", values, bits)
    png(tmp_path / "p/a_prediction.png", np.zeros((H, W), "uint8"))
    png(tmp_path / "l/a.png", np.zeros((H, W), "uint8"))
    assert judged(tmp_path, kind=None).stats.mean_confidence() == pytest.approx(values.mean() / most, abs=1e-9)


def test_nan_is_found_where_it_is(tmp_path):
    z, target = predictions(1, (1, C, H, W), dtype=torch.float32)
    z[0, 2, 7, 5] = z[0, 1, 9, 0] = z[0, 0, 2, 3] = np.nan
    target[0, 2, 3] = 255  # where nothing counts
    npy(tmp_path / "p/a.npy", z[0].numpy())
    png(tmp_path / "l/a.png", target[0].numpy().astype("uint8"))
    assert re.search(r"p/a\.npy: .*, got NaN at \(7, 5\); look", refused(tmp_path))


def test_the_words_below_the_colours_of_a_worst_image_are_apart(tmp_path):
    label = np.arange(40 * 30).reshape(30, 40) % 5
    seen = worst.Seen(ImageRow("a", 2, 0.5, 0.85, 0.35, 0.25), label, label[::-1], np.full(label.shape, 0.5, "f4"), label == 9)
    names = ["road", "sidewalk", "sky", "car", "bus"]
    figure = worst_picture.picture(seen, names, 1)
    figure.savefig(tmp_path / "a.png", dpi=100)
    renderer = figure.canvas.get_renderer()
    (bar,) = (axis for axis in figure.axes if not axis.images and axis.get_xlabel())
    ticks = [text for text in bar.get_xticklabels() if text.get_text()]
    assert [text.get_text() for text in ticks] == ["0", "0.5", "1"]
    label_box = bar.xaxis.label.get_window_extent(renderer)
    assert bar.get_xlabel() == "confidence"
    assert all(label_box.y1 <= text.get_window_extent(renderer).y0 + 1 for text in ticks)
    assert figure.legends[0].get_window_extent(renderer).y1 <= label_box.y0 + 1
    # In the order of the classes, and not of their pixels.
    rare = worst_picture.picture(seen._replace(label=np.maximum(label, 3), predicted=np.where(label == 0, 0, 4)), names, 1)
    assert [text.get_text() for text in rare.legends[0].get_texts()] == ["road", "car", "bus", "ignored"]
