"""`benchmarks/cells.py` at a size that takes a minute, and what its page counts, on rows with a known answer."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytest.importorskip("torch.func", reason="the benchmarks need torch >= 2.0")


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def cells(*arguments, check=True):
    command = [sys.executable, str(BENCHMARKS / "cells.py"), "--quick", *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    cells("--out", folder, "--cache", folder / "cache", "--cells", "mitochondria-4")
    return folder


@pytest.mark.slow
def test_quick_trains_every_method_and_tries_every_fold(quick):
    from cell_folds import CURVE, LABELLED
    from cell_methods import METHODS

    from dacal_addon.calibrate import ESTIMATORS

    rows = {row["method"]: row for row in json.loads((quick / "cells.json").read_text())}
    assert set(rows) == set(METHODS)
    for name, row in rows.items():
        assert {"best", "taken"} <= set(row["folds"]) <= {"best", "taken", "typical", *ESTIMATORS}
        assert len(row["curve"]) == len(CURVE)
        assert row["folds"]["best"]["ece"] <= min(row["ece"], *row["curve"]) + 0.02
        # A temperature changes no prediction.
        assert row["folds"]["taken"]["miou"] == row["miou"]
        assert row["folds"]["taken"]["accuracy"] == row["accuracy"]
        assert (set(row["labelled"]) == set(map(str, LABELLED))) == (name == "hard")
    page = (quick / "cells.md").read_text()
    assert all(method.title in page for method in METHODS.values())


@pytest.mark.slow
def test_an_interrupted_grid_goes_on_and_the_same_command_gives_the_same(quick, tmp_path):
    rows = json.loads((quick / "cells.json").read_text())
    kept = [row for row in rows if row["method"] != "soft"]
    (tmp_path / "cells.json").write_text(json.dumps(kept))
    output = cells(
        "--out", tmp_path, "--cache", tmp_path / "cache", "--cells", "mitochondria-4", "--methods", "hard", "soft"
    ).stdout
    assert " 1 of 1 " in output
    again = {row["method"]: row for row in json.loads((tmp_path / "cells.json").read_text())}
    assert again["hard"] == next(row for row in rows if row["method"] == "hard")
    soft = next(row for row in rows if row["method"] == "soft")
    assert {**again["soft"], "seconds": 0} == {**soft, "seconds": 0}


@pytest.mark.slow
def test_without_real_pictures_it_says_so(quick):
    output = cells("--out", quick, "--cache", quick / "cache", "--cells", "mitochondria-4", "--data", quick).stdout
    assert "real pictures: none" in output


def row(cell, method, *, seed=0, miou=50.0, ece=10.0, taken=5.0, best=2.0):
    figures = {
        "accuracy": 80.0,
        "confidence": 90.0,
        "ece_mass": ece,
        "ece_classwise": 1.0,
        "brier": 30.0,
        "ece_wrong": 60.0,
        "nll": 0.7,
    }
    own = {"miou": miou, "ece": ece, **figures}
    folds = {name: {**own, "ece": value, "temperature": 1.5} for name, value in (("best", best), ("taken", taken))}
    labelled = {str(k): {"alone": [9.0, 7.0], "combined": [4.0, 2.0]} for k in (1, 2, 5, 10, 20)}
    return {
        "cell": cell,
        "seed": seed,
        "method": method,
        **own,
        "folds": folds,
        "labelled": labelled if method == "hard" else {},
    }


def line(page, start):
    (found,) = [each for each in page.splitlines() if each.startswith(f"| {start} |")]
    return [entry.strip() for entry in found.strip("|").split("|")]


def test_the_page_counts_cells_and_names_the_worst():
    from cell_methods import METHODS
    from cells_report import summary

    rows = [
        row("a", "hard"),
        row("b", "hard", ece=4.0, taken=4.6, best=3.0),
        row("c", "hard", ece=4.0, taken=3.2, best=3.0),  # three quarters of the bound, though not 40 %
        row("a", "soft", miou=49.0, ece=11.0),
        row("b", "soft", miou=50.6, ece=2.0),
    ]
    page = summary(rows, METHODS)
    assert line(page, "hard pseudo-labels")[1:6] == ["3", "0", "0", "0", "0"]
    assert line(page, "hard pseudo-labels + fold")[1:] == ["3", "2", "1", "1", "0", "+0.0", "-1.73", "b +0.60", "a +0.0"]
    assert line(page, "hard pseudo-labels + fold, 10 labelled")[1:4] == ["3", "3", "0"]
    assert line(page, "soft pseudo-labels, T = 1")[1:] == ["2", "1", "1", "1", "1", "-0.2", "-0.50", "a +1.00", "a -1.0"]


def test_differences_are_paired_by_seed():
    from cells_report import outcomes

    rows = [row("a", "hard", seed=0, miou=40.0), row("a", "hard", seed=1, miou=60.0), row("a", "soft", seed=1, miou=59.0)]
    (outcome,) = outcomes(rows, "soft", lambda each: each["ece"])
    assert (outcome.seeds, outcome.gained) == (1, pytest.approx(-1.0))


def test_the_best_temperature_is_found():
    from cell_folds import best_temperature

    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 64, 64, generator=g) * 2
    label = torch.distributions.Categorical(logits=z.permute(0, 2, 3, 1)).sample()
    assert best_temperature(1.7 * z, label) == pytest.approx(1.7, rel=0.05)


@pytest.fixture(scope="module")
def small():
    from dacal_addon.demo.datasets import hold_out_source, load_dataset
    from dacal_addon.demo.recipes import Recipe
    from dacal_addon.demo.training import train_start

    dataset, held_out = hold_out_source(load_dataset("mitochondria", seed=0, train_images=8, test_images=4))
    recipe = Recipe(source_iterations=2, iterations=3, meta_warmup=1, threshold=0.3)
    start = train_start(dataset, recipe, seed=0, device=torch.device("cpu"))
    return dataset, held_out, recipe, start


def trained(small, method, dataset=None):
    from cell_methods import METHODS

    from dacal_addon.demo.training import train

    given, held_out, recipe, start = small

    def make(*arguments):
        return METHODS[method](*arguments, held_out=held_out)

    return train(make, start, dataset or given, recipe, seed=0, device=torch.device("cpu"))


def test_bounds_alone_see_the_targets_labels(small):
    from cell_methods import METHODS

    dataset = small[0]
    # Other labels, not merely renamed ones.
    others = dataset._replace(target_train=dataset.target_train._replace(label=dataset.target_train.label.flip(-1)))
    for name, method in METHODS.items():
        one, two = (trained(small, name, data).student.state_dict() for data in (dataset, others))
        same = all(torch.equal(one[key], two[key]) for key in one)
        assert same == (not method.bound), name


def test_methods_differ_from_hard_labels(small):
    from cell_methods import METHODS

    students = {name: trained(small, name).student.state_dict() for name in METHODS}
    for name, state in students.items():
        if name != "hard":
            assert any(not torch.equal(state[key], students["hard"][key]) for key in state), name


def test_one_temperature_follows_the_gap_on_shadows(small, monkeypatch):
    import cell_methods

    dataset, held_out, recipe, start = small
    student = copy.deepcopy(start.student)
    teaching = cell_methods.ShadowFeedback(student, torch.optim.SGD(student.parameters(), lr=0.1), recipe, held_out=held_out)
    before = float(teaching.log_t)
    assert before == pytest.approx(-0.6931, abs=1e-4)  # between 1/4 and 1
    from dacal_addon.demo.batches import batches

    stream = batches(dataset, recipe, seed=0, device=torch.device("cpu"))
    monkeypatch.setattr(cell_methods, "gap_on", lambda *_: torch.tensor(0.5))
    teaching.teach(start.student, next(stream))  # the warm-up
    assert float(teaching.log_t) == before
    teaching.teach(start.student, next(stream))
    assert float(teaching.log_t) == pytest.approx(before + 0.4 * 0.5)
    for _ in range(5):
        teaching.teach(start.student, next(stream))
    assert float(teaching.log_t) == 0.0  # the cap


def test_the_gap_is_of_confidence_and_accuracy(small):
    from cell_methods import gap_on

    from dacal_addon.demo.batches import batches
    from dacal_addon.learners import ShadowSet

    dataset, held_out, recipe, _ = small
    batch = next(batches(dataset, recipe, seed=0, device=torch.device("cpu")))
    label = held_out.label.clone()
    label[:, :8] = 255
    share = float((label == 0).sum() / (label != 255).sum())

    def sure(image):
        return torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(len(image), 2, *image.shape[-2:])

    shadows = ShadowSet(held_out.image, label, count=len(label))
    assert float(gap_on(shadows, sure, batch)) == pytest.approx(1 / (1 + 2.718281828**-2) - share, abs=1e-5)


def test_pasta_noises_high_frequencies_most_and_leaves_the_range():
    from cell_methods import pasta

    image = torch.full((16, 3, 32, 32), 0.5)
    image += 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    noised = pasta(image, torch.Generator().manual_seed(0))
    assert 0 <= float(noised.min()) <= float(noised.max()) <= 1
    before, after = (torch.fft.fft2(x).abs() for x in (image, noised))
    change = ((after - before).abs() / before).mean((0, 1))
    assert float(change[12:20, 12:20].mean()) > 3 * float(change[:3, :3].mean())
