"""What is written besides the page: report.csv, report.md, pictures of the worst images; and what of an earlier run goes."""

import colorsys
import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import predictions
from PIL import Image

from dacal_addon import cli
from dacal_addon.evaluate import markdown, spreadsheet, worst, worst_picture, written
from dacal_addon.evaluate.files import BadFile
from dacal_addon.evaluate.judging import ImageRow
from dacal_addon.evaluate.sets import SETS

C, H, W = 3, 12, 16
NAMES = ["=1+1", "a|b_c", "sky"]
ROW = ImageRow("a", 2, 0.5, 0.85, 0.35, 0.25)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Six images whose errors grow with their numbers; photographs of all but one, one of them grey, one damaged."""
    folder = tmp_path_factory.mktemp("written")
    z, target = predictions(3, (6, C, H, W), dtype=torch.float32, ignored=0.1)
    for part in ("pred", "gt", "rgb"):
        (folder / part).mkdir()
    for i in range(6):
        np.save(folder / "pred" / f"{i}_leftImg8bit.npy", z[i].numpy() * (1 + i))
        Image.fromarray(target[i].numpy().astype("uint8")).save(folder / "gt" / f"{i}_gtFine_labelTrainIds.png")
        colour = np.full((2 * H, 2 * W, 3), (10 * i, 100, 200), "uint8")
        Image.fromarray(colour if i < 4 else colour[..., 1]).save(folder / "rgb" / f"{i}_leftImg8bit.png")
    (folder / "rgb" / "2_leftImg8bit.png").unlink()
    (folder / "rgb" / "3_leftImg8bit.png").write_bytes(b"\x89PNG")
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder, z, target


def run(folder, *more, out="out"):
    words = ["evaluate", folder / "pred", folder / "gt", "--num-classes", C, "--input", "logits", "--out", folder / out]
    return cli.main([str(word) for word in [*words, "--class-names", folder / "names.txt", "--jobs", 1, *more]])


@pytest.fixture(scope="module")
def report(case):
    folder, _, _ = case
    assert run(folder, "--images", folder / "rgb", "--worst", 4, "--classwise", "--boundary", 1) == 0
    return json.loads((folder / "out" / "report.json").read_text())


def test_the_report_names_its_schema_and_what_it_drew(case, report):
    folder, _, _ = case
    assert report["schema"] == "dacal-evaluate/2"
    assert report["pictures"] == ["reliability.png", "classwise.png", *(f"worst-{i}.png" for i in (1, 2, 3, 4))]
    assert sorted(path.name for path in (folder / "out").glob("*.png")) == sorted(report["pictures"])


def test_the_spreadsheet_holds_every_figure_of_the_report(case, report):
    folder, _, _ = case
    rows = list(csv.DictReader(io.StringIO((folder / "out" / "report.csv").read_text(encoding="utf-8"))))
    found = {(row["scope"], row["name"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    assert {row["network"] for row in rows} == {"pred"}
    for metric, values in report["metrics"].items():
        for key in ("value", "low", "high"):
            cell = found.pop(("all", "", metric))[key] if key == "high" else found["all", "", metric][key]
            assert (float(cell) if cell else None) == values[key]
    for name, one in zip(("'=1+1", "a|b_c", "sky"), report["classes"]):  # the first would be a formula
        for metric in (key for key in one if key != "name"):
            assert float(found.pop(("class", name, metric))["value"]) == one[metric]
    for one in report["per_image"]:
        for metric in (key for key in one if key != "name"):
            assert float(found.pop(("image", one["name"], metric))["value"]) == one[metric]
    for one in report["thresholds"]:
        for metric in ("share", "accuracy"):
            cell = found.pop(("threshold", f"{one['threshold']:g}", metric))["value"]
            assert (float(cell) if cell else None) == one[metric]
    for metric, value in report["boundary"].items():
        assert float(found.pop(("boundary", "", metric))["value"]) == value
    assert found == {}


@given(st.text())
def test_no_cell_is_a_formula(text):
    cell = spreadsheet._safe(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")) or cell == "-infinite"
    assert cell in (text, f"'{text}")


def test_the_markdown_has_the_tables(case, report):
    folder, _, _ = case
    text = (folder / "out" / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    ece = report["metrics"]["ece"]
    assert f"| ECE | {100 * ece['value']:.2f} % | {100 * ece['low']:.2f} to {100 * ece['high']:.2f} |" in lines
    (row,) = (line for line in lines if line.startswith("| a\\|b\\_c |"))
    cells = re.split(r" (?<!\\)\| ", row.strip("| "))
    one = report["classes"][1]
    figures = (one[key] for key in ("iou", "recall", "confidence", "precision", "classwise_ece", "gap"))
    assert cells[1:] == [str(one["pixels"]), *(f"{100 * figure:.2f}" for figure in figures)]
    for name in report["pictures"]:
        assert f"![{name}]({name})" in lines
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4  # figures, above a confidence, classes, images
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1


@given(st.text())
def test_markdown_takes_a_name_for_text(text):
    """Without the escapes it is the name again, and nothing but escapes can begin markup."""
    safe = markdown.escaped(text)
    assert "\n" not in safe
    bare = re.sub(r"\\([\\`*_{}\[\]<>|#~$&!])", "", safe)
    assert not re.search(r"[\\`*_{}\[\]<>|#~$&!]", bare)


def test_the_class_table_says_how_sure_the_network_is_where_it_predicts_a_class(case, report):
    _, z, target = case
    p = torch.softmax(z.double() * torch.arange(1, 7).view(6, 1, 1, 1), 1)
    confidence, predicted = p.max(1)
    valid = target != 255
    for c, row in enumerate(report["classes"]):
        chosen = valid & (predicted == c)
        assert row["confidence"] == pytest.approx(float(confidence[chosen].mean()), abs=1e-9)
        assert row["precision"] == pytest.approx(float((target[chosen] == c).double().mean()), abs=1e-9)


def test_the_worst_images_are_drawn_and_no_other_is_read_again(case, report, monkeypatch, capsys):
    folder, _, _ = case
    order = [row["name"] for row in sorted(report["per_image"], key=lambda row: -row["ece"])]
    again, drawn = [], []
    read, draw = worst.read_image, worst_picture.picture
    monkeypatch.setattr(worst, "read_image", lambda name, *rest: again.append(name) or read(name, *rest))
    monkeypatch.setattr(worst_picture, "picture", lambda seen, *rest: drawn.append(seen) or draw(seen, *rest))
    assert run(folder, "--images", folder / "rgb", "--worst", 6, out="all") == 0
    assert again == [seen.row.name for seen in drawn] == order
    by_name = {seen.row.name: seen.photograph for seen in drawn}
    assert by_name["1"].shape == (2 * H, 2 * W, 3)
    assert by_name["1"][0, 0].tolist() == [10, 100, 200]
    assert by_name["4"][0, 0].tolist() == [255, 255, 255]  # grey, and as bright as it gets
    assert by_name["2"] is by_name["3"] is None
    told = capsys.readouterr().err
    assert f"warning: no photograph of image '2' in {folder / 'rgb'}" in told
    assert "3_leftImg8bit.png: not a PNG file, or truncated" in told.replace("PNG image", "PNG file")
    assert run(folder, "--images", folder / "nowhere", out="none") == 1
    assert "nowhere: no such folder or list" in capsys.readouterr().err


@given(st.data())
def test_what_is_looked_at(data):
    """Against numpy, whatever the predictions are; of a volume, the slice that is surest of what is wrong."""
    size = data.draw(st.sampled_from([(4, 6), (3, 4, 6), (5,)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    z = rng.normal(size=(1, C, *size)) * 3
    label = rng.integers(0, C, (1, *size))
    label[rng.random(label.shape) < 0.2] = 255
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    kind = data.draw(st.sampled_from(["logits", "probs", "log_probs", "top1"]))
    given_ = {"logits": z, "probs": p, "log_probs": np.log(p), "top1": (p.max(1), p.argmax(1))}[kind]
    seen = worst.look(ROW, given_, label, kind, (255,))
    flat = [array.reshape(-1, *((1, *size)[-2:])) for array in (p.max(1), p.argmax(1), label)]
    confidence, predicted, target = flat
    wrong = (predicted != target) & (target != 255)
    index = int((confidence * wrong).sum((1, 2)).argmax())
    assert seen.confidence == pytest.approx(confidence[index], abs=1e-5)
    assert np.array_equal(seen.predicted, predicted[index])
    assert np.array_equal(seen.label, target[index])
    assert np.array_equal(seen.wrong, wrong[index])


def test_large_images_are_thinned_and_not_moved():
    label = np.zeros((1, 30, 1000), np.int64)
    label[:, :, 600:] = 1
    scores = np.eye(2)[label].transpose(0, 3, 1, 2)
    seen = worst.look(ROW, scores, label, "probs", (255,))
    assert seen.label.shape == (10, 334)
    assert not seen.wrong.any()
    assert np.array_equal(seen.predicted, np.repeat((np.arange(0, 1000, 3) >= 600)[None], 10, 0))


def test_the_picture_shows_where_it_is_sure_and_wrong():
    label, predicted = np.array([[0, 1, 2, 255]]), np.array([[0, 0, 0, 0]])
    confidence = np.array([[1.0, 0.2, 0.9, 0.5]], np.float32)
    seen = worst.Seen(ROW, label, predicted, confidence, label == 255, np.full((1, 4, 3), 7, np.uint8))
    figure = worst_picture.picture(seen, ["road", "sky", "car"], 1)
    panels = {axis.get_title(): np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images}
    assert list(panels) == ["image", "label", "prediction", "wrong, darker where sure"]
    colours = worst_picture.class_colours(["road", "sky", "car"])
    assert np.array_equal(panels["label"][0, :3], colours)
    assert np.array_equal(panels["prediction"][0], colours[[0, 0, 0, 0]])
    right, unsure, sure, void = (panels["wrong, darker where sure"][0, i].astype(int) for i in range(4))
    assert panels["label"][0, 3].tolist() == void.tolist()
    assert len({tuple(one) for one in (right, unsure, sure, void)}) == 4
    assert sure.sum() < unsure.sum() < right.sum()
    assert figure.texts[0].get_text() == "1. a: ECE 35.0 %"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["road", "sky", "car", "ignored"]
    without = worst_picture.picture(seen._replace(photograph=None), ["road", "sky", "car"], 1)
    assert sum(bool(axis.images) for axis in without.axes) == 3


@pytest.mark.parametrize("name", [name for name, known in SETS.items() if known.colours])
def test_known_classes_have_their_own_colours(name):
    known = SETS[name]
    for c, colour in enumerate(worst_picture.class_colours(known.names).tolist()):
        assert known.colours[colour[0] << 16 | colour[1] << 8 | colour[2]] == c


@given(st.integers(2, 40))
def test_other_classes_have_different_colours(count):
    colours = worst_picture.class_colours([f"class {c}" for c in range(count)])
    assert len(np.unique(colours, axis=0)) == count
    hues = [colorsys.rgb_to_hsv(*(colour / 255))[0] for colour in colours[: min(count, 8)]]
    assert all(min(abs(a - b), 1 - abs(a - b)) > 0.05 for i, a in enumerate(hues) for b in hues[:i])


def test_pictures_of_an_earlier_run_go_and_nothing_else(case):
    folder, _, _ = case
    out = folder / "stale"
    assert run(folder, "--classwise", "--worst", 3, out="stale") == 0
    foreign = ["worst-9.png", "mine.png", "worst-2.png.bak", "notes.txt"]
    for name in foreign:
        (out / name).write_text("mine")
    assert run(folder, "--worst", 1, out="stale") == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["reliability.png", "worst-1.png", "report.html", "report.json", "report.md", "report.csv", *foreign]
    )


@pytest.mark.parametrize(
    "content",
    [
        {"schema": "other/1", "pictures": ["worst-1.png"]},
        {"schema": "dacal-evaluate/2", "pictures": ["../worst-1.png", "notes.txt", 3, None, "sub/worst-1.png"]},
        {"schema": "dacal-evaluate/2", "pictures": {"worst-1.png": 1}},
        {"pictures": ["worst-1.png"]},
        ["worst-1.png"],
        "{",
    ],
)
def test_a_report_that_is_not_ours_removes_nothing(tmp_path, content):
    for name in ("worst-1.png", "notes.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert written.pictures_of_earlier(tmp_path) == []


COLOUR = np.array([[[10, 20, 30], [200, 5, 60]]], "uint8")
GREY = np.array([[0, 128, 255]], "uint8")
PHOTOGRAPHS = {
    "colour": (Image.fromarray(COLOUR), COLOUR),
    "transparent": (Image.fromarray(np.concatenate([COLOUR, [[[0], [99]]]], 2).astype("uint8")), COLOUR),
    "a palette": (Image.fromarray(COLOUR).quantize(4), COLOUR),
    "grey": (Image.fromarray(GREY), GREY[..., None].repeat(3, 2)),
    "grey, transparent": (Image.fromarray(np.stack([GREY, 0 * GREY], 2), "LA"), GREY[..., None].repeat(3, 2)),
    "grey of 16 bits": (Image.fromarray(GREY.astype("uint16") * 16), GREY[..., None].repeat(3, 2)),
    "one bit": (Image.fromarray(GREY > 99), (GREY > 99)[..., None].repeat(3, 2) * 255),
}


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_photographs_of_any_kind_without_their_alpha(tmp_path, kind, ending):
    picture, pixels = PHOTOGRAPHS[kind]
    picture.save(tmp_path / f"a.{ending}")
    assert worst.read_photograph(tmp_path / f"a.{ending}", tmp_path, 100).tolist() == pixels.tolist()


def test_a_photograph_that_is_none_is_named_with_its_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(BadFile, match=r"a\.png: not a PNG file"):
        worst.read_photograph(tmp_path / "a.png", tmp_path, 100)
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    with pytest.raises(BadFile, match=r"claims 2 x 1 pixels, more than 1"):
        worst.read_photograph(tmp_path / "a.png", tmp_path, 1)
    Image.fromarray(np.zeros((2, 2), "f4")).save(tmp_path / "a.tif")
    with pytest.raises(BadFile, match=r"expected a picture of colours or greys, got PIL's mode F"):
        worst.read_photograph(tmp_path / "a.tif", tmp_path, 100)


def test_a_photograph_outside_of_its_folder_is_not_shown(case, capsys):
    folder, _, _ = case
    (folder / "img").mkdir()
    (folder / "secret").mkdir()
    Image.fromarray(COLOUR).save(folder / "secret" / "s.png")
    (folder / "img" / "5_leftImg8bit.png").symlink_to("../secret/s.png")
    (folder / "img.txt").write_text("img/5_leftImg8bit.png\n")
    with pytest.raises(BadFile, match="a link that leads out of the folder"):
        worst.read_photograph(folder / "img" / "5_leftImg8bit.png", folder / "img", 100)
    assert run(folder, "--images", folder / "img", "--worst", 6, out="linked") == 0
    assert "5_leftImg8bit.png: a link that leads out of the folder" in capsys.readouterr().err
    # A list's folder is the one that no file may leave.
    assert run(folder, "--images", folder / "img.txt", "--worst", 1, out="linked") == 0
    assert "leads out" not in capsys.readouterr().err


def test_a_worst_image_that_cannot_be_read_again_is_a_remark(case, capsys, monkeypatch):
    folder, _, _ = case

    def gone(name, plan, options):
        raise BadFile(plan.predictions[name], "cannot be opened: No such file or directory")

    monkeypatch.setattr(worst, "read_image", gone)
    assert run(folder, "--worst", 1, out="gone") == 0
    assert re.search("warning: no picture of image '.': .*leftImg8bit.npy: cannot be opened", capsys.readouterr().err)
    assert json.loads((folder / "gone" / "report.json").read_text())["pictures"] == ["reliability.png"]


def test_classes_predicted_where_nothing_counts_may_be_anything():
    label, predicted = np.array([[0, 1, 255]]), np.array([[0, 1, 255]])
    seen = worst.Seen(ROW, label, predicted, np.ones((1, 3), np.float32), label == 255)
    figure = worst_picture.picture(seen, ["road", "sky"], 1)
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["ignored", "road", "sky"]
