"""The examples that a user runs first: two loops and the notebook. Those inside of trainers have tests of their own."""

import ast
import copy
import importlib
import json
import re
import subprocess

import pytest
import torch
from test_package import ROOT, python

from dacal_addon.learners import LEARNERS

EXAMPLES = ROOT / "examples"
PAGE = EXAMPLES / "README.md"
FIGURES = r"target mIoU (\d+\.\d) %, ECE (\d+\.\d\d) %\n"
BEFORE_AND_AFTER = rf"as trained  {FIGURES}folded T = (\d\.\d\d) into the last layer: .+\nafter fold  {FIGURES}"


def before_and_after(output):
    """mIoU and ECE as trained, T, mIoU and ECE after the fold; percent."""
    (found,) = re.findall(BEFORE_AND_AFTER, output)
    return tuple(float(figure) for figure in found)


def assert_folded_as_said(output, learner):
    """The fold moves no prediction, and ECE where it does anything; after so short a training it may well abstain."""
    miou, ece, temperature, miou_folded, ece_folded = before_and_after(output)
    assert miou == miou_folded
    assert (ece == ece_folded) == (temperature == 1)
    said = "abstains, T = 1" in output if learner is None else "T = 1: nothing is known of networks of this kind" in output
    assert temperature == (1 if said else 1.25)
    assert said or learner is None


def of(learner):
    return ["--learner", learner] if learner else []


@pytest.mark.parametrize("learner", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in LEARNERS)])
def test_the_plain_loop_prints_before_and_after(learner):
    output = python("examples/plain_loop.py", "--iters", "80", "--batch", "2", *of(learner))
    assert_folded_as_said(output, learner)
    assert ("iteration 0: warm-up: iteration 1 of 20\n" in output) == (learner == "bilevel")
    learned = re.search(r"iteration 70: loss on the judged set \d\.\d{4}, T \d\.\d\d\.\.\d\.\d\d\n", output)
    assert bool(learned) == (learner is not None)


def test_a_few_target_labels_decide_the_temperature_of_soft_labels():
    output = python("examples/plain_loop.py", "--iters", "8", "--batch", "2", "--learner", "fit", "--labelled", "5")
    assert "labels of target images say" in output
    miou, ece, temperature, miou_folded, ece_folded = before_and_after(output)
    assert temperature != 1
    assert miou == miou_folded
    assert ece != ece_folded


@pytest.mark.parametrize("learner", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in LEARNERS)])
def test_the_lightning_loop_prints_before_and_after_and_resumes(learner, tmp_path):
    pytest.importorskip("lightning", reason="an extra that needs a newer Python than 3.8")
    saved = str(tmp_path / "end.ckpt")
    loop = ("examples/lightning_loop.py", "--batch", "2", "--checkpoint", saved, *of(learner))
    output = python(*loop, "--iters", "60")
    assert_folded_as_said(output, learner)
    if learner == "bilevel":
        first = torch.load(saved, weights_only=False)
        python(*loop, "--iters", "62", "--resume", saved)
        then = torch.load(saved, weights_only=False)
        assert (first["dacal"]["iteration"], then["dacal"]["iteration"]) == (60, 62)
        assert first["dacal"]["temperature_net"]["last.bias"] != 0
        steps = [one["dacal"]["meta_optimizer"]["state"][0]["step"] for one in (first, then)]
        assert steps[0] < steps[1] <= steps[0] + 2
        assert not [name for name in first["state_dict"] if "layers" in name]  # no part of the module


@pytest.mark.slow
@pytest.mark.parametrize("learner", list(LEARNERS))
def test_two_processes_of_the_lightning_loop_print_what_one_does(learner, tmp_path):
    pytest.importorskip("lightning", reason="an extra that needs a newer Python than 3.8")
    saved = {devices: str(tmp_path / f"{devices}.ckpt") for devices in ("1", "2")}
    loop = ("examples/lightning_loop.py", "--batch", "2", "--iters", "40", *of(learner))
    trained = {devices: python(*loop, "--devices", devices, "--checkpoint", path) for devices, path in saved.items()}
    one, two = (torch.load(path, weights_only=False) for path in saved.values())
    assert two["dacal"]["temperature_net"]["last.bias"] != 0
    # Each process has pictures of its own: with the same ones two would train as one does.
    weight = "student.3.weight"
    assert not torch.allclose(one["state_dict"][weight], two["state_dict"][weight], atol=1e-3)
    # One student, whose test pictures one process judges, or two, one half each: counts are summed, not figures averaged.
    again = python(*loop, "--resume", saved["2"])
    assert before_and_after(again) == before_and_after(trained["2"])


def test_the_lightning_loop_takes_a_checkpoint_from_before_the_add_on(monkeypatch):
    pytest.importorskip("lightning", reason="an extra that needs a newer Python than 3.8")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    loop = importlib.import_module("lightning_loop")
    with torch.random.fork_rng(devices=[]):
        ours, resumed = (loop.SelfTraining(None, iters=4, batch=2, seed=seed) for seed in (0, 1))
    saved, own = {}, resumed.dacal.state_dict()
    resumed.on_load_checkpoint({"state_dict": {}})
    assert torch.equal(resumed.dacal.state_dict()["generator"], own["generator"])
    ours.on_save_checkpoint(saved)
    assert not torch.equal(saved["dacal"]["generator"], own["generator"])
    resumed.on_load_checkpoint(saved)
    assert torch.equal(resumed.dacal.state_dict()["generator"], saved["dacal"]["generator"])


@pytest.mark.parametrize("name", ["none.pth", "."])
def test_a_hosts_checkpoint_that_is_no_file_is_said_before_the_host_is_asked_for(name, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        python(EXAMPLES / "mmseg/calibrate.py", "config.json", name, "--out", "calibrated.pth", cwd=tmp_path)
    got = "which does not exist" if name == "none.pth" else "a folder"
    said = f"ValueError: calibrate: expected checkpoint to be a file, got {name}, {got}; check the path\n"
    assert failed.value.stdout.endswith(said)


WORKED = r"^\| (\d) \| (.+) \|$"
"""A row of the page's table: the seed, and for every learner mIoU, ECE as trained and after the fold, T."""


def rows_of_the_page():
    """(seed, learner) -> mIoU, ECE as trained, ECE after the fold."""
    found = {}
    for seed, cells in re.findall(WORKED, PAGE.read_text(), re.MULTILINE):
        for learner, cell in zip([None, *LEARNERS], cells.split(" | ")):
            found[int(seed), learner] = tuple(float(figure) for figure in re.findall(r"\d+\.\d+", cell))
    return found


def test_the_page_shows_what_the_default_and_every_learner_do_with_several_seeds():
    rows = rows_of_the_page()
    assert {learner for _, learner in rows} == {None, *LEARNERS}
    assert len({seed for seed, _ in rows}) >= 3
    for (_, learner), (_, ece, folded) in rows.items():
        assert folded < ece if learner is None else folded == ece  # the default does no harm in any


@pytest.mark.slow
@pytest.mark.parametrize("learner", [None, *LEARNERS])
def test_the_figures_on_the_page_are_what_its_command_prints(learner):
    shown = rows_of_the_page()[0, learner]
    miou, ece, _, _, folded = before_and_after(python("examples/plain_loop.py", *of(learner)))
    # Other processors sum in another order, and training takes its own way from there.
    assert miou == pytest.approx(shown[0], abs=4)
    assert (ece, folded) == pytest.approx(shown[1:], abs=2)


def test_the_page_names_every_example_and_no_other():
    named = set(re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", PAGE.read_text(), re.MULTILINE))
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    there |= {f"{path.name}/README.md" for path in EXAMPLES.iterdir() if (path / "README.md").exists()}
    assert named == there


def test_examples_call_a_learner_a_learner():
    """The words of `DACal`: `--learner NAME` or nothing, which is hard labels."""
    options = {}
    for path in EXAMPLES.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args:
                settings = {keyword.arg: keyword.value for keyword in node.keywords}
                options.setdefault(node.args[0].value, []).append((path, settings))
    assert not {"--labels", "--learn", "--method", "--methods"} & set(options)
    assert options["--learner"]
    for path, settings in options["--learner"]:
        names = settings["choices"]
        names = LEARNERS if "LEARNERS" in ast.dump(names) else ast.literal_eval(names)
        assert set(names) == set(LEARNERS), path
        assert "default" not in settings, path


TOUR = EXAMPLES / "tour.ipynb"
NUMBER = re.compile(r"(?P<name>\w+) +(?P<percent>\d+\.\d+) %|(?P<other>\d+\.\d+)")


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def calibration_errors(notebook):
    """Row of the notebook's tables -> ECE, percent."""
    text = "".join(printed(cell) for cell in code_cells(notebook))
    return {name: float(ece) for name, ece in re.findall(r"^(\w.*?)  +mIoU .* ECE +(\d+\.\d+) %$", text, re.MULTILINE)}


def test_the_notebook_is_stored_as_it_ran_from_top_to_bottom():
    notebook = json.loads(TOUR.read_text())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", name) for name in names)  # words, which do not change when it is run again
    assert not [cell for cell in cells if cell["metadata"]]  # nor does the time of a run stand there
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 4
    assert TOUR.stat().st_size < 400_000


def test_the_notebook_says_what_its_figures_show():
    errors = calibration_errors(json.loads(TOUR.read_text()))
    assert errors["source only, on the source"] < errors["source only, on the target"] / 2
    assert errors["hard labels, after the fold"] < 0.75 * errors["hard labels, as trained"]
    assert errors["bilevel, ten labels, folded"] < errors["bilevel, as trained"]


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_is_stored():
    nbclient = pytest.importorskip("nbclient", reason="of the extra `notebook`, which needs a newer Python than 3.8")
    import nbformat

    stored = nbformat.read(str(TOUR), as_version=4)
    nbformat.validate(stored)
    ran = copy.deepcopy(stored)
    nbclient.NotebookClient(ran, timeout=1200, record_timing=False).execute()  # an error in a cell is one here
    for before, after in zip(code_cells(stored), code_cells(ran)):
        then, now = printed(before), printed(after)
        assert NUMBER.sub("#", now) == NUMBER.sub("#", then), before["id"]  # counts, without a point, stay as they are
        for old, new in zip(NUMBER.finditer(then), NUMBER.finditer(now)):
            # Other processors sum in another order, and training takes its own way from there.
            allowed = 0.4 if old["other"] else 2.5 if old["name"] == "ECE" else 5
            figures = [float(found["other"] or found["percent"]) for found in (old, new)]
            assert figures[1] == pytest.approx(figures[0], abs=allowed), (before["id"], old[0])
        assert [output["output_type"] for output in after["outputs"]].count("execute_result") == [
            output["output_type"] for output in before["outputs"]
        ].count("execute_result")
    errors = calibration_errors(ran)
    assert errors["hard labels, after the fold"] < errors["hard labels, as trained"]
