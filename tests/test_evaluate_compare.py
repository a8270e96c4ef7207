"""Several folders of predictions in one run: the same images for all, differences in pairs, the better one only where it is."""

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
from dacal_addon.evaluate import compare, judging, tables
from dacal_addon.evaluate.compare import difference
from dacal_addon.evaluate.judging import read_image
from dacal_addon.metrics import CalibrationStats
from dacal_addon.metrics.bootstrap import Bootstrap
from dacal_addon.metrics.catalogue import CATALOGUE

C, H, W = 4, 8, 10
IMAGES = ("d", "a", "a1", "b")


def save(folder, network, z, names=IMAGES):
    (folder / network).mkdir(exist_ok=True, parents=True)
    for name, scores in zip(names, z):
        np.save(folder / network / f"{name}.npy", scores.numpy())


@pytest.fixture
def case(tmp_path):
    """Four images, of which one network is right more often than in the next, and all pixels count."""
    z, target = predictions(1, (4, C, H, W), dtype=torch.float32, ignored=0)
    for i in range(4):
        z[i, 0].view(-1)[: 10 * i] += 100
    save(tmp_path, "first", z)
    (tmp_path / "gt").mkdir()
    for name, label in zip(IMAGES, target):
        Image.fromarray(label.numpy().astype("uint8")).save(tmp_path / "gt" / f"{name}.png")
    return tmp_path, z, target


def run(folder, *others, more=()):
    words = ["evaluate", folder / "first", folder / "gt", "--num-classes", C, "--input", "logits", "--out", folder / "out"]
    words += ["--worst", 0, "--jobs", 1, "--compare", *others, *more]
    return cli.main([str(word) for word in words])


def report(folder):
    return json.loads((folder / "out" / "report.json").read_text())


def differences(folder):
    return report(folder)["comparison"]["networks"][1]["differences"]


def test_a_network_and_itself_differ_by_nothing(case):
    folder, z, _ = case
    save(folder, "again", z)
    assert run(folder, folder / "again") == 0
    found = differences(folder)
    assert list(found) == [key for key, metric in CATALOGUE.items() if metric.interval and not metric.classwise]
    for key, one in found.items():
        assert one == {"value": 0, "low": 0, "high": 0, "better": None}, key


def test_differences_are_taken_in_pairs(case):
    """Every image loses five right pixels of 80: so does every draw, however much the accuracies of the images differ."""
    folder, z, target = case
    worse = z.clone()
    for i in range(4):
        right = torch.nonzero(z[i].argmax(0) == target[i], as_tuple=False)[:5]
        for y, x in right.tolist():
            worse[i, :, y, x] = torch.eye(C)[(int(target[i, y, x]) + 1) % C]
    # In folders, and with the endings of the labels, with which they have other names in another order: a1_L, a_L.
    for name in IMAGES:
        (folder / "gt" / f"{name}.png").rename(folder / "gt" / f"{name}_L.png")
    for place, part in (("2", slice(0, 2)), ("1", slice(2, 4))):
        save(folder, f"worse/{place}", worse[part], [f"{name}_L" for name in IMAGES[part]])
    assert run(folder, folder / "worse") == 0
    found, all_of_it = differences(folder), report(folder)
    assert all_of_it["metrics"]["accuracy"]["high"] - all_of_it["metrics"]["accuracy"]["low"] > 0.05
    accuracy = found["accuracy"]
    assert [accuracy[key] for key in ("value", "low", "high")] == pytest.approx([-1 / 16] * 3, abs=1e-12)
    assert accuracy["better"] == "first"
    assert found["mean_confidence"]["better"] is None  # neither more nor less of it is better
    for name, scores in (("first", z), ("worse", worse)):
        stats = CalibrationStats(C, input="logits")
        stats.update(scores, target)
        (network,) = (one for one in all_of_it["comparison"]["networks"] if one["name"] == name)
        for key, values in network["metrics"].items():
            assert values["value"] == pytest.approx(getattr(stats, key)(), abs=1e-12), (name, key)
        assert network["iou"] == pytest.approx(stats.iou().tolist())
        assert [row["pixels"] for row in network["reliability"]] == stats.reliability().pixels.tolist()


def test_images_that_one_network_lacks_are_an_error_before_anything_is_judged(case, capsys, monkeypatch):
    folder, z, _ = case
    save(folder, "few", z[:3], IMAGES[:3])
    monkeypatch.setattr(compare, "judge_together", lambda *a: pytest.fail("judged"))
    assert run(folder, folder / "few") == 1
    assert "b.png: no prediction of image 'b'" in capsys.readouterr().err


def test_images_that_one_network_lacks_are_skipped_in_all(case, capsys):
    """One is missing, one turns out to be truncated when it is read, in different networks."""
    folder, z, target = case
    save(folder, "few", z[:3] / 2, IMAGES[:3])
    save(folder, "broken", z / 3)
    whole = (folder / "broken" / "d.npy").read_bytes()
    (folder / "broken" / "d.npy").write_bytes(whole[:-7])
    assert run(folder, folder / "few", folder / "broken", more=["--keep-going"]) == 3
    found = report(folder)
    assert [row["name"] for row in found["per_image"]] == ["a", "a1"]
    for network, scale in zip(found["comparison"]["networks"], (1, 2, 3)):
        stats = CalibrationStats(C, input="logits")
        stats.update(z[1:3] / scale, target[1:3])
        assert network["metrics"]["ece"]["value"] == pytest.approx(stats.ece(), abs=1e-7), network["name"]
    reasons = {bad["file"].rsplit("/", 1)[1]: bad["reason"] for bad in found["skipped"]}
    assert reasons["b.png"].startswith("no prediction of image 'b'")
    assert reasons["b.png"].endswith("; missing in few, left out of all networks")
    assert reasons["d.npy"].startswith("truncated")
    assert len(reasons) == len(found["skipped"]) == 2
    assert "2 skipped, 2 evaluated" in capsys.readouterr().err


def test_networks_have_names_of_their_own(case, capsys):
    folder, z, _ = case
    save(folder, "a=b", z)
    save(folder, "deep/first", z)
    assert run(folder, folder / "a=b", f"mine={folder / 'deep' / 'first'}", more=["--name", "x|y"]) == 0
    assert [one["name"] for one in report(folder)["comparison"]["networks"]] == ["x|y", "a=b", "mine"]
    assert (
        "| Metric | x\\|y | a=b | Difference of a=b | mine | Difference of mine |" in (folder / "out" / "report.md").read_text()
    )
    capsys.readouterr()
    assert run(folder, folder / "deep" / "first") == 2
    told = capsys.readouterr().err
    assert "expected networks of different names, got 'first' twice; pass --compare NAME=" in told


@given(st.sampled_from(sorted(CATALOGUE)), st.lists(st.floats(-1, 1), min_size=2, max_size=40))
def test_which_is_better(key, moved):
    """Swapped networks swap the sign and the better one; an interval with 0 in it has none."""
    base = torch.linspace(0, 1, len(moved)).double()
    first = Bootstrap(0.5, 0.0, 1.0, base)
    other = Bootstrap(0.7, 0.0, 1.0, base + torch.tensor(moved, dtype=torch.float64))
    found, swapped = difference(key, first, other), difference(key, other, first)
    assert [swapped[end] for end in ("value", "low", "high")] == pytest.approx([-0.2, -found["high"], -found["low"]])
    assert swapped["better"] == {"first": "other", "other": "first", None: None}[found["better"]]
    exact = np.quantile(base.numpy() + np.array(moved) - base.numpy(), (0.025, 0.975))
    assert (found["low"], found["high"]) == pytest.approx(tuple(exact), abs=1e-12)
    more_is_better = key in ("accuracy", "miou")
    if key == "mean_confidence" or found["low"] <= 0 <= found["high"]:
        assert found["better"] is None
    else:
        assert (found["better"] == "other") == ((found["low"] > 0) == more_is_better)


def test_a_figure_without_a_value_is_better_for_nobody():
    none = Bootstrap(float("nan"), float("nan"), float("nan"), torch.full((5,), float("nan")).double())
    assert difference("ece", none, none)["better"] is None


@pytest.mark.parametrize(
    ("better", "marked"), [((None, None), []), (("b", None), ["b"]), (("a", "a"), ["a"]), (("a", "c"), ["c"])]
)
def test_what_is_marked(better, marked):
    """The first one only where it is better than all others."""
    networks = []
    for name, who in zip("abc", (None, *better)):
        metrics = {"ece": {"value": 0.1, "low": 0.0, "high": 0.2, "why": None}}
        networks.append({"name": name, "metrics": metrics, "differences": None})
        if name != "a":
            networks[-1]["differences"] = {"ece": {"value": 0.01, "low": -0.5, "high": None, "better": who}}
    (row,) = tables.comparison({"comparison": {"networks": networks}}).rows
    cells = dict(zip("abc", (row[1], row[2], row[4])))
    assert [name for name, cell in cells.items() if cell.endswith("\u2713")] == marked
    assert row[3] == "+1.00 (-50.00 to n/a)"


def test_one_image_has_no_interval_and_the_report_says_why(case, capsys):
    folder, z, _ = case
    (folder / "one").mkdir()
    np.save(folder / "one" / "d.npy", z[0].numpy() / 2)
    words = ["--only-labels-of-predictions", "--name", "n"]
    for name in IMAGES[1:]:
        (folder / "first" / f"{name}.npy").unlink()
    assert run(folder, folder / "one", more=words) == 0
    found = report(folder)
    assert {one["why"] for key, one in found["metrics"].items() if CATALOGUE[key].interval} == {"needs two images or more"}
    assert found["comparison"]["networks"][1]["differences"] == {}
    page = (folder / "out" / "report.html").read_text()
    assert page.count("none: needs two images or more") == 2 * (len(found["metrics"]) - 1)
    told = capsys.readouterr().err
    assert "warning: 3 of 4 labels have no prediction" in told
    assert "are in every network" not in told  # since none has more


def test_images_that_are_not_in_every_network_are_left_out_of_all_and_it_says_so(case, capsys):
    folder, z, _ = case
    save(folder, "few", z[:2], IMAGES[:2])
    (folder / "first" / "d.npy").unlink()
    assert run(folder, folder / "few", more=["--only-labels-of-predictions"]) == 0
    assert [row["name"] for row in report(folder)["per_image"]] == ["a"]
    told = "1 of 4 images are in every network; the others are left out of all"
    assert capsys.readouterr().err.count(f"warning: {told}") == 1


def test_every_image_is_judged_once_though_one_is_bad_in_one_network(case, monkeypatch):
    folder, z, _ = case
    save(folder, "broken", z)
    (folder / "broken" / "d.npy").write_bytes(b"")
    read = []
    monkeypatch.setattr(judging, "read_image", lambda name, *rest: read.append(name) or read_image(name, *rest))
    assert run(folder, folder / "broken", more=["--keep-going"]) == 3
    assert sorted(read) == sorted(2 * IMAGES)
    assert [row["name"] for row in report(folder)["per_image"]] == ["a", "a1", "b"]


def test_a_remark_on_labels_is_made_once_and_with_numbers(tmp_path, capsys):
    z, target = predictions(2, (3, C, H, W), dtype=torch.float32, ignored=0.5)
    target[target == 2] = 255
    save(tmp_path, "first", z, "xyz")
    save(tmp_path, "other", z / 2, "xyz")
    (tmp_path / "gt").mkdir()
    for name, label in zip("xyz", target):
        Image.fromarray(label.numpy().astype("uint8")).save(tmp_path / "gt" / f"{name}.png")
    assert run(tmp_path, tmp_path / "other") == 0
    share = 100 * float((target == 255).double().mean())
    told, page = capsys.readouterr().err, (tmp_path / "out" / "report.html").read_text()
    markdown = (tmp_path / "out" / "report.md").read_text()
    for text in (" no target pixel: class 2.", f"{share:.1f} % of the pixels are ignored"):
        assert len(re.findall(f"dacal evaluate: warning: [^\n]*{re.escape(text)}", told)) == 1
        assert page.count(text) == 1
        assert len(re.findall(f"\n- [^\n]*{re.escape(text)}", markdown)) == 1
    assert report(tmp_path)["ignored_pixels"] == int((target == 255).sum())


def test_the_command_draws_all_intervals_of_a_network_at_once(case, monkeypatch):
    """One resample for all metrics: one each took 49 of the 52 s of a report on 500 images."""
    folder, z, _ = case
    save(folder, "again", z)
    asked = []
    bootstrap = CalibrationStats.bootstrap
    monkeypatch.setattr(CalibrationStats, "bootstrap", lambda self, keys, **o: asked.append(keys) or bootstrap(self, keys, **o))
    assert run(folder, folder / "again") == 0
    assert len(asked) == 2
