"""`dacal evaluate` on small folders: its figures, its formats, and every kind of bad file, by name."""

import ast
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import predictions
from PIL import Image

import dacal_addon.evaluate
from dacal_addon import cli
from dacal_addon.evaluate import predictions as reading
from dacal_addon.evaluate.judging import judge_all
from dacal_addon.evaluate.options import EvaluateOptions
from dacal_addon.evaluate.plan import make_plan
from dacal_addon.evaluate.sets import CITYSCAPES
from dacal_addon.evaluate.shapes import Shape
from dacal_addon.metrics import CalibrationStats, boundary_mask
from dacal_addon.metrics.catalogue import CATALOGUE

C, H, W = 4, 12, 16
SAFE_PT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


def png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


@pytest.fixture
def case(tmp_path):
    """Three images: logits a, b, c below pred/, labels below gt/."""
    z, target = predictions(1, (3, C, H, W), dtype=torch.float32, ignored=0.1)
    for i, name in enumerate("abc"):
        (tmp_path / "pred").mkdir(exist_ok=True)
        np.save(tmp_path / "pred" / f"{name}.npy", z[i].numpy())
        png(tmp_path / "gt" / f"{name}.png", target[i].numpy().astype("uint8"))
    return tmp_path, z, target


def run(folder, *arguments, pred="pred", kind="logits", classes=C):
    words = ["evaluate", str(folder / pred), str(folder / "gt"), "--num-classes", str(classes), "--out", str(folder / "out")]
    # Pictures of images, which take half of a run, have tests of their own.
    return cli.main([*words, "--worst", "0", *(["--input", kind] if kind else []), *map(str, arguments)])


def judged(folder, pred="pred", kind="logits", **given):
    options = EvaluateOptions(folder / pred, folder / "gt", C, input=kind, **given)
    return judge_all(make_plan(options), options)


def report(folder):
    return json.loads((folder / "out" / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def expected_stats(z, target, **options):
    stats = CalibrationStats(C, input="logits", per_image=True, **options)
    stats.update(z, target)
    return stats


def test_the_report_is_what_the_statistics_say(case, capsys):
    folder, z, target = case
    names = folder / "names.txt"
    names.write_text("road\nsky\n<b>car</b>\nbus\n")
    assert run(folder, "--classwise", "--boundary", 2, "--class-names", names, "--n-bins", 10) == 0
    found, stats = report(folder), expected_stats(z, target, classwise=True, n_bins=10)
    for name, values in found["metrics"].items():
        assert values["value"] == pytest.approx(getattr(stats, name)(), abs=1e-12), name
        if CATALOGUE[name].interval:
            interval = stats.bootstrap(name)
            assert (values["low"], values["high"]) == pytest.approx((interval.low, interval.high)), name
        else:
            assert (values["low"], values["high"]) == (None, None), name
    assert list(found["metrics"]) == [key for key, metric in CATALOGUE.items() if not metric.classwise]
    assert set(found["metrics"]) | set(found["classes"][0]) >= set(CATALOGUE)
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    for metric in CATALOGUE.values():
        assert f"<dt>{escape(metric.name)}</dt><dd>{escape(metric.definition)}</dd>" in page
    assert (found["images"], found["pixels"], found["skipped"]) == (3, stats.pixels, [])
    assert [row["name"] for row in found["per_image"]] == ["a", "b", "c"]
    for i, row in enumerate(found["per_image"]):
        own = expected_stats(z[i : i + 1], target[i : i + 1], n_bins=10)
        assert (row["pixels"], row["ece"], row["miou"]) == pytest.approx((own.pixels, own.ece(), own.miou()))
    assert [row["name"] for row in found["classes"]] == ["road", "sky", "<b>car</b>", "bus"]
    assert [row["iou"] for row in found["classes"]] == pytest.approx(stats.iou().tolist())
    assert [row["classwise_ece"] for row in found["classes"]] == pytest.approx(stats.classwise_ece(None).tolist())
    confusion = stats.confusion().double()
    assert [row["recall"] for row in found["classes"]] == pytest.approx((confusion.diag() / confusion.sum(1)).tolist())
    assert [row["precision"] for row in found["classes"]] == pytest.approx((confusion.diag() / confusion.sum(0)).tolist())
    assert [row["pixels"] for row in found["reliability"]] == stats.reliability().pixels.tolist()
    near = CalibrationStats(C, input="logits", n_bins=10)
    near.update(z, target, boundary_mask(target, 2))
    assert (found["boundary"]["pixels"], found["boundary"]["ece"]) == pytest.approx((near.pixels, near.ece()))
    assert 0 <= found["seconds"]["reading_share"] <= 1
    output = capsys.readouterr()
    assert f"calibration error (ECE) {100 * stats.ece():.2f} %" in output.out
    for name in ("reliability.png", "classwise.png"):
        with Image.open(folder / "out" / name) as picture:
            assert min(picture.size) > 400


@pytest.mark.parametrize(
    "kind", ["npy, a batch of one", "npy, Fortran order", "float16", "float64 probs", "npz", "npz with key"]
)
def test_formats_of_arrays(case, kind):
    folder, z, target = case
    options, values, given = {}, z.numpy(), "logits"
    for i, name in enumerate("abc"):
        path = folder / "pred" / f"{name}.npy"
        if kind == "npy, a batch of one":
            np.save(path, values[i : i + 1])
        elif kind == "npy, Fortran order":
            np.save(path, np.asfortranarray(values[i]))
        elif kind == "float16":
            np.save(path, values[i].astype("float16"))
        elif kind == "float64 probs":
            np.save(path, torch.softmax(z[i].double(), 0).numpy())
            given = "probs"
        else:
            path.unlink()
            more = {"other": np.zeros(3)} if "key" in kind else {}
            np.savez_compressed(path.with_suffix(".npz"), scores=values[i], **more)
            options = {"key": "scores"} if more else {}
    found = judged(folder, kind=given, **options).stats
    expected = expected_stats(z.half() if kind == "float16" else z, target)
    assert (found.ece(), found.nll()) == pytest.approx((expected.ece(), expected.nll()), abs=1e-9)


@pytest.mark.skipif(not SAFE_PT, reason="torch.load(weights_only=True) is safe since torch 2.6")
@pytest.mark.parametrize("key", [None, "seg", 0])
def test_formats_of_tensors(case, key):
    folder, z, target = case
    for i, name in enumerate("abc"):
        (folder / "pred" / f"{name}.npy").unlink()
        torch.save(z[i].clone() if key is None else {key: z[i].clone(), "step": torch.zeros(1)}, folder / "pred" / f"{name}.pt")
    assert run(folder, *([] if key is None else ["--key", key])) == 0
    assert report(folder)["metrics"]["ece"]["value"] == pytest.approx(expected_stats(z, target).ece(), abs=1e-12)


@pytest.mark.parametrize("bits", [8, 16])
def test_pairs_of_images(case, bits):
    folder, z, target = case
    confidence, prediction = torch.softmax(z, 1).max(1)
    most = (1 << bits) - 1
    stored = (confidence.double().numpy() * most).round().astype(f"uint{bits}")
    for i, name in enumerate("abc"):
        png(folder / "pairs" / f"{name}_confidence.png", stored[i])
        png(folder / "pairs" / f"{name}_prediction.png", prediction[i].numpy().astype(f"uint{bits}"))
    assert run(folder, pred="pairs", kind=None) == 0
    stats = CalibrationStats(C, input="top1")
    stats.update((stored / most, prediction), target)
    found = report(folder)["metrics"]
    assert found["ece"]["value"] == pytest.approx(stats.ece(), abs=1e-12)
    assert found["miou"]["value"] == pytest.approx(stats.miou(), abs=1e-12)
    assert set(found) == {key for key, metric in CATALOGUE.items() if not metric.distribution}
    assert run(folder, pred="pairs", kind="probs") == 2


def test_a_partner_outside_of_the_folder(case, capsys):
    folder, _, _ = case
    for name in "bc":
        (folder / "gt" / f"{name}.png").unlink()
    png(folder / "pairs" / "a_confidence.png", np.zeros((H, W), "uint8"))
    png(folder / "a_prediction.png", np.zeros((H, W), "uint8"))
    (folder / "pairs" / "a_prediction.png").symlink_to("../a_prediction.png")
    assert run(folder, pred="pairs", kind=None) == 1
    assert "a_prediction.png: a link that leads out of the folder" in capsys.readouterr().err


def test_another_ignored_label(case):
    folder, z, target = case
    for i, name in enumerate("abc"):
        png(folder / "gt" / f"{name}.png", target[i].numpy().astype("uint8") % 252)  # 255 becomes 3
    found = judged(folder, ignore_index=(3,), boundary=1)
    stats = CalibrationStats(C, input="logits", ignore_index=3)
    stats.update(z, target % 252)
    near = CalibrationStats(C, input="logits", ignore_index=3)
    near.update(z, target % 252, boundary_mask(target % 252, 1, ignore_index=3))
    assert (found.stats.pixels, found.stats.ece()) == pytest.approx((stats.pixels, stats.ece()))
    figures = (near.pixels, near.accuracy(), near.mean_confidence(), near.ece())
    boundary = found.boundary
    assert (boundary.pixels, boundary.accuracy(), boundary.mean_confidence(), boundary.ece()) == pytest.approx(figures)


def test_no_valid_pixel(case, capsys):
    folder, _, _ = case
    for name in "abc":
        png(folder / "gt" / f"{name}.png", np.full((H, W), 255, "uint8"))
    assert run(folder) == 1
    assert "no valid pixel in any image" in capsys.readouterr().err


def test_names_and_folders_of_cityscapes(tmp_path):
    z, target = predictions(1, (2, 19, H, W), dtype=torch.float32)
    for i, name in enumerate(["frankfurt_000000_000294", "lindau_000001_000019"]):
        city = name.split("_")[0]
        (tmp_path / "pred" / city).mkdir(parents=True)
        np.save(tmp_path / "pred" / city / f"{name}_leftImg8bit.npy", z[i].numpy())
        png(tmp_path / "gt" / city / f"{name}_gtFine_labelTrainIds.png", target[i].numpy().astype("uint8"))
        png(tmp_path / "gt" / city / f"{name}_gtFine_labelIds.png", np.full((H, W), 33, "uint8"))
        png(tmp_path / "gt" / city / f"{name}_gtFine_color.png", np.zeros((H, W, 3), "uint8"))
    assert run(tmp_path, "--class-names", "cityscapes", classes=19) == 0
    found = report(tmp_path)
    assert found["pixels"] == int((target != 255).sum())
    assert [row["name"] for row in found["classes"]] == CITYSCAPES
    assert (len(CITYSCAPES), CITYSCAPES[13]) == (19, "car")


def test_a_label_map_and_a_list(case):
    folder, z, target = case
    raw = np.array([7, 8, 11, 12])
    for i, name in enumerate("abc"):
        values = np.where(target[i].numpy() == 255, 3, raw[target[i].clamp(max=3).numpy()])
        png(folder / "gt" / f"{name}.png", values.astype("uint16" if name == "a" else "uint8"))
    (folder / "map.json").write_text(json.dumps({"7": 0, "8": 1, "11": 2, "12": 3, "5": 255}))
    (folder / "list.txt").write_text("# the first two\npred/a.npy\n\npred/b.npy\n")
    (folder / "gt" / "c.png").unlink()
    assert run(folder, "--label-map", folder / "map.json", pred="list.txt") == 0
    assert report(folder)["metrics"]["ece"]["value"] == pytest.approx(expected_stats(z[:2], target[:2]).ece(), abs=1e-12)


# Bad files


def npy_header(shape, descr="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/dacal-evaluate-was-here",)


def png_bomb(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def png_of_two_minds(path, depth, colour):
    """A second header, which PIL believes, after the first one."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = 1 + W * (depth // 8) * (3 if colour == 2 else 1)
    headers = (chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, d, c, 0, 0, 0)) for d, c in ((8, 0), (depth, colour)))
    data = chunk(b"IDAT", zlib.compress(bytes(size * H))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(headers) + data)


def npy_text(header):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(100)


def bzipped(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("scores.npy", npy_header((C, H, W)) + bytes(4 * C * H * W))


def linked_label(folder):
    (folder / "gt" / "b.png").rename(folder / "b.png")
    (folder / "gt" / "b.png").symlink_to("../b.png")


def bad_npz(path, member, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scores.npy", member, **options)


def of_npy(change):
    """`change`: of the content of b.npy."""
    return lambda folder: (folder / "pred" / "b.npy").write_bytes(change((folder / "pred" / "b.npy").read_bytes()))


def instead(name, write):
    """Another file in the place of b.npy."""

    def spoil(folder):
        (folder / "pred" / "b.npy").unlink()
        write(folder / "pred" / name)

    return spoil


def saved(array):
    return lambda folder: np.save(folder / "pred" / "b.npy", array, allow_pickle=True)


def of_label(write):
    return lambda folder: write(folder / "gt" / "b.png")


def linked(target):
    def spoil(folder):
        (folder / "pred" / "b.npy").unlink()
        np.save(folder / "outside.npy", np.zeros((C, H, W), "float32"))
        (folder / "pred" / "b.npy").symlink_to(target)

    return spoil


SCORES, NO_ARRAY = np.zeros((C, H, W), "float32"), "not an array in numpy's format"
BAD = {
    "empty": (of_npy(lambda old: b""), "b.npy", "empty"),
    "truncated": (of_npy(lambda old: old[:-100]), "b.npy", "truncated: 2972 bytes of numbers where its header says 3072"),
    "cut in its header": (of_npy(lambda old: old[:20]), "b.npy", NO_ARRAY),
    "something else": (of_npy(lambda old: b"GIF89a" + old), "b.npy", NO_ARRAY),
    "header of a huge array": (
        of_npy(lambda old: npy_header((19, 1 << 20, 1 << 20)) + old),
        "b.npy",
        r"expected an array \(4, 12, 16\)",
    ),
    "pickled objects": (saved(np.array([Evil()], object)), "b.npy", "Python objects, which are never unpickled"),
    "integers": (saved(SCORES.astype(int)), "b.npy", "expected floating numbers, got int64"),
    "other size": (
        saved(SCORES[:, :6]),
        "b.npy",
        r"expected an array \(4, 12, 16\) as its label has it, got \(4, 6, 16\); save them at the label's resolution",
    ),
    "other classes": (saved(SCORES[:3]), "b.npy", r"got \(3, 12, 16\)"),
    "channels last": (
        saved(SCORES.transpose(1, 2, 0)),
        "b.npy",
        r"got \(12, 16, 4\); the classes are last: pass --channels-last",
    ),
    "classes": (saved(SCORES[0].astype("uint8")), "b.npy", "whole numbers are probabilities times 255 only"),
    "80 bits": (saved(SCORES.astype(np.longdouble)), "b.npy", "expected floating numbers, got float128; save x.astype"),
    "NaN": (saved(SCORES + np.nan), "b.npy", "expected x: logits below infinity, one of them finite, got NaN"),
    "header: cut syntax": (
        of_npy(lambda old: npy_text("{'descr': '<f4', 'shape': (")),
        "b.npy",
        NO_ARRAY,
    ),
    "header: deep": (of_npy(lambda old: npy_text("-" * 9000 + "1")), "b.npy", NO_ARRAY),
    "header: long sum": (of_npy(lambda old: npy_text("1+1j" + "+1j" * 3000)), "b.npy", NO_ARRAY),
    "header: odd type": (
        of_npy(lambda old: npy_text("{'descr': (((('f4',),),),), 'fortran_order': False, 'shape': (4, 12, 16)}")),
        "b.npy",
        NO_ARRAY,
    ),
    "header: True for 1": (
        of_npy(lambda old: npy_text("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4, 12, 16)}")),
        "b.npy",
        r"got \(True, 4, 12, 16\)",
    ),
    "npz: bzip2": (instead("b.npz", bzipped), "b.npz", "compressed in a way that numpy does not use"),
    "npz: not an archive": (instead("b.npz", lambda path: path.write_bytes(b"PK\x03\x04")), "b.npz", "not an archive"),
    "npz: several arrays": (
        instead("b.npz", lambda path: np.savez(path, x=SCORES, y=SCORES)),
        "b.npz",
        "choose with --key, got x, y",
    ),
    "npz: a bomb": (
        instead("b.npz", lambda path: bad_npz(path, npy_header((1, 1 << 24), "<f8") + bytes(1 << 27))),
        "b.npz",
        r"got \(1, 16777216\)",
    ),
    "npz: a bomb with the right header": (
        instead("b.npz", lambda path: bad_npz(path, npy_header((C, H, W)) + bytes(1 << 27))),
        "b.npz",
        "a decompression bomb: 134217728 bytes of numbers where its header says 3072",
    ),
    "npz: less than it says": (
        instead("b.npz", lambda path: bad_npz(path, npy_header((C, H, W)) + bytes(7))),
        "b.npz",
        "truncated: 7",
    ),
    "a link that leads out": (linked("../outside.npy"), "b.npy", "a link that leads out of the folder"),
    "a link to nothing": (linked("nothing.npy"), "b.npy", "cannot be opened: No such file"),
    "a link to itself": (linked("b.npy"), "b.npy", "cannot be opened"),
    "a folder": (instead("b.npy", lambda path: path.mkdir()), "b.npy", "not a file"),
    "a pipe": (instead("b.npy", os.mkfifo), "b.npy", "not a file"),
    "no prediction": (lambda folder: (folder / "pred" / "b.npy").unlink(), "b.png", "no prediction of image 'b'"),
    "no label": (lambda folder: (folder / "gt" / "b.png").unlink(), "b.npy", "no label of image 'b'"),
    "label: stray": (
        of_label(lambda path: png(path, np.full((H, W), 9, "uint8"))),
        "b.png",
        "expected classes 0..3 or 255, got the value 9; pass --label-map",
    ),
    "label: colour": (
        of_label(lambda path: png(path, np.zeros((H, W, 3), "uint8"))),
        "b.png",
        "expected a grey PNG .* got 8-bit colour",
    ),
    "label: a value that no class has": (
        of_label(lambda path: png(path, np.full((H, W), 4, "uint8"))),
        "b.png",
        "got the value 4; pass --reduce-zero-label if 0 is unlabelled",
    ),
    "label: grey with alpha": (
        of_label(lambda path: Image.new("LA", (W, H)).save(path)),
        "b.png",
        "got 8-bit grey with alpha",
    ),
    "label: two headers, colour": (
        of_label(lambda path: png_of_two_minds(path, 8, 2)),
        "b.png",
        "its own header: RGB",
    ),
    "label: two headers, depth": (
        of_label(lambda path: png_of_two_minds(path, 16, 0)),
        "b.png",
        "its own header: I",
    ),
    "label: a link that leads out": (linked_label, "b.png", "a link that leads out of the folder"),
    "label: empty": (of_label(lambda path: path.write_bytes(b"")), "b.png", "empty"),
    "label: no PNG": (of_label(lambda path: path.write_bytes(b"GIF89a" * 9)), "b.png", "not a PNG file"),
    "label: cut": (of_label(lambda path: path.write_bytes(path.read_bytes()[:60])), "b.png", "cannot be decoded, truncated?"),
    "label: a bomb": (of_label(lambda path: path.write_bytes(png_bomb(40_000, 40_000))), "b.png", "40000 x 40000 pixels.*bomb"),
}


def tensor(content):
    return instead("b.pt", lambda path: torch.save(content, path))


if SAFE_PT:
    BAD.update(
        {
            "pt: code": (tensor({"x": Evil()}), "b.pt", "torch.load refuses it with weights_only"),
            "pt: a plain pickle": (instead("b.pt", lambda path: path.write_bytes(pickle.dumps(Evil()))), "b.pt", "refuses it"),
            "pt: a bomb": (tensor(torch.zeros(1 << 20)), "b.pt", "unpacks to 4.* are enough; .*clone"),
            "pt: sparse": (tensor(torch.zeros(C, H, W).to_sparse()), "b.pt", "dense floating tensor, got torch.float32"),
            "pt: float8": (tensor(torch.zeros(C, H, W).to(torch.float8_e4m3fn)), "b.pt", "."),
            "pt: integers": (tensor(torch.zeros(C, H, W).long()), "b.pt", "floating numbers, got torch.int64"),
            "pt: a list": (tensor([1.0]), "b.pt", "expected a dense floating tensor, got list"),
            "pt: an array": (tensor(SCORES), "b.pt", "holds a numpy array, which would be unpickled; save .npy"),
            "pt: which": (tensor({"x": torch.zeros(1), "y": torch.zeros(1)}), "b.pt", "choose with --key, got x, y"),
        }
    )


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_its_reason(case, capsys, kind):
    folder, z, target = case
    spoil, name, reason = BAD[kind]
    spoil(folder)
    assert run(folder) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dacal evaluate: ")
    assert re.search(rf"{name}: .*{reason}", error), error
    assert not (folder / "out" / "report.json").exists()

    options = EvaluateOptions(folder / "pred", folder / "gt", C, input="logits", keep_going=True)
    found = judge_all(make_plan(options), options)
    assert [os.path.basename(bad.path) for bad in found.skipped] == [name]
    assert found.stats.ece() == pytest.approx(expected_stats(z[[0, 2]], target[[0, 2]]).ece(), abs=1e-12)
    assert not os.path.exists("/tmp/dacal-evaluate-was-here")


@pytest.mark.parametrize("line", ["../x.npy", "/etc/passwd", "pred/../../x.npy", "C:\\x.npy"])
def test_a_list_stays_in_its_folder(case, capsys, line):
    folder, _, _ = case
    (folder / "list.txt").write_text(f"pred/a.npy\n{line}\n")
    assert run(folder, pred="list.txt") == 1
    assert "listed in list.txt, but not a path below its folder" in capsys.readouterr().err


def test_two_files_of_one_image(case, capsys):
    folder, z, _ = case
    np.save(folder / "pred" / "a_leftImg8bit.npy", z[0].numpy())
    assert run(folder) == 1
    assert "a_leftImg8bit.npy: the second file of image 'a', after" in capsys.readouterr().err


def test_names_from_outside_are_harmless(case, capsys):
    folder, _, _ = case
    name = "<script>alert(1)<_script>\x1b[31m.npy"
    (folder / "pred" / name).write_bytes(b"x")
    (folder / "pred" / os.fsdecode(b"\xff\xfe.npy")).write_bytes(b"x")  # no text in any language
    assert run(folder, "--keep-going") == 3
    error = capsys.readouterr().err
    assert "2 skipped, 3 evaluated" in error
    assert [os.path.basename(bad["file"]) for bad in report(folder)["skipped"]] == [name, os.fsdecode(b"\xff\xfe.npy")]
    assert "\\x1b[31m" in error
    assert "\\udcff\\udcfe.npy" in error
    assert "\x1b[31m" not in error
    page = (folder / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ({"kind": None}, 2, "expected --input logits, probs or log_probs"),
        ({"pred": "nowhere"}, 1, "nowhere: no such folder or list"),
        ({"pred": "gt"}, 1, "no .npy, .npz, .pt, .pth, and no pair"),
        ({"extra": ["--class-names", "few.txt"]}, 1, "few.txt: expected 4 different names, one a line, got 1"),
        ({"extra": ["--label-map", "few.txt"]}, 1, "few.txt: not a JSON file"),
        ({"extra": ["--label-map", "bad.json"]}, 1, "mapped to training ids 0..3 or 255, got '7': 4"),
        ({"extra": ["--class-names", "cityscapes"]}, 2, "expected --num-classes 19 with --class-names cityscapes, got 4"),
        ({"extra": ["--n-bins", "1000000000"]}, 2, "evaluate: expected a whole number --n-bins in 1..10000, got 1000000000"),
        ({"extra": ["--out", "few.txt"]}, 1, "few.txt: cannot be written to"),
        ({"kind": "probs"}, 1, "a.npy: expected x: probs whose probabilities are >= 0 and sum to 1"),
    ],
)
def test_wrong_use(case, capsys, monkeypatch, arguments, code, message):
    folder, _, _ = case
    (folder / "few.txt").write_text("road\n")
    (folder / "bad.json").write_text('{"7": 4}')
    monkeypatch.chdir(folder)
    arguments = dict(arguments)
    assert run(folder, *arguments.pop("extra", []), **arguments) == code
    assert message in capsys.readouterr().err


def test_arguments_are_checked_by_the_parser(case):
    for arguments in (["--num-classes", "1"], ["--n-bins", "0"], ["--jobs", "x"], ["--input", "guess"]):
        with pytest.raises(SystemExit) as stopped:
            run(case[0], *arguments)
        assert stopped.value.code == 2


def test_interrupted(case, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dacal_addon.evaluate.judging.read_prediction", stop)
    assert run(case[0]) == 130
    assert "dacal evaluate: interrupted" in capsys.readouterr().err
    assert not (case[0] / "out" / "report.json").exists()


def test_an_old_torch_loads_no_tensors(case, monkeypatch):
    monkeypatch.setattr(reading.torch, "__version__", "2.5.1")
    folder, z, _ = case
    kind = reading.PredictionKind("logits")
    torch.save(z[0], folder / "a.pt")
    with pytest.raises(reading.BadFile, match=r"a.pt: torch 2.5.1 cannot load it safely; save .npy, or use torch >= 2.6"):
        reading.read_prediction(folder / "a.pt", folder=folder, shape=Shape(C, (H, W)), kind=kind)


def test_threads_and_their_number_do_not_matter(case):
    folder, _, _ = case
    threads = torch.get_num_threads()
    found = []
    for jobs in (1, 4):
        assert run(folder, "--jobs", jobs) == 0
        found.append({key: value for key, value in report(folder).items() if key in ("metrics", "per_image", "classes")})
    assert found[0] == found[1]
    assert torch.get_num_threads() == threads


def test_data_flows_one_way():
    """Every file imports from those before it alone, and at its top."""
    read = ["files", "images", "arrays", "matching", "sets", "label_maps", "labels", "shapes", "predictions"]
    judge = ["options", "wording", "plan", "doubts", "judging", "compare", "worst"]
    write = ["report", "pictures", "worst_picture", "tables", "markdown", "spreadsheet", "page", "written", "command"]
    rooms = [*read, *judge, *write]
    folder = Path(dacal_addon.evaluate.__file__).parent
    assert sorted(path.stem for path in folder.glob("*.py")) == sorted([*rooms, "__init__"])
    for place, room in enumerate(rooms):
        tree = ast.parse((folder / f"{room}.py").read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        # `from . import x` has no module.
        names = {node.module or alias.name for node in found if node.level == 1 for alias in node.names}
        assert names <= set(rooms[:place]), room
        assert [node.lineno for node in found if node not in tree.body] == [], room
