"""`DACalDACS` in the real DAFormer, HRDA and MIC: their own training entry point, on tiny images.

    make upstream DAFORMER=path HRDA=path MIC=path

Skipped without checkouts (DACAL_DAFORMER, DACAL_HRDA, DACAL_MIC) and their environment's python (DACAL_HOST_PYTHON). Nothing is
written into a checkout: the tests work on a copy of its tracked files.
"""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dacal_addon.calibrate.estimators import TYPICAL

ROOT = Path(__file__).parent.parent
HOSTS = {"daformer": "DACAL_DAFORMER", "hrda": "DACAL_HRDA", "mic": "DACAL_MIC"}
PYTHON = os.environ.get("DACAL_HOST_PYTHON", "")


@pytest.fixture(scope="module", params=HOSTS)
def host(request, tmp_path_factory):
    """The folder to run a host in: a clean copy of its checkout, with the example's patch."""
    checkout = os.environ.get(HOSTS[request.param])
    if not checkout or not PYTHON:
        pytest.skip(f"no checkout: set {HOSTS[request.param]} and DACAL_HOST_PYTHON, or use make upstream")
    copy = tmp_path_factory.mktemp(request.param)
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=checkout, stdout=subprocess.PIPE, check=True, text=True)
    archive = ["git", "archive", "--output", str(copy / "host.tar"), "HEAD", "--", ":!*.gif", ":!*.png"]
    subprocess.run(archive, cwd=top.stdout.strip(), check=True)
    subprocess.run(["tar", "-xf", "host.tar"], cwd=copy, check=True)
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "apply", str(ROOT / "examples" / request.param / "dacal.patch")], cwd=copy, check=True)
    return copy / "seg" if (copy / "seg").is_dir() else copy


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tiny data sets, once for all runs."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    subprocess.run([PYTHON, str(ROOT / "examples/mmseg/tiny_data.py"), str(folder)], env=environment(), check=True)
    return folder


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(host, data, work, *changes, config="gta2cs", iters=4, resume=None):
    """The host's training as a process."""
    work.mkdir(exist_ok=True)
    if not (work / "data").exists():
        (work / "data").symlink_to(data, target_is_directory=True)
    command = [PYTHON, str(ROOT / "examples/mmseg/try_on_cpu.py"), f"configs/dacal/{config}.py", "--iters", str(iters)]
    command += ["--work-dir", str(work), *(["--resume-from", str(resume)] if resume else []), "--set", *changes]
    with open(work / "output.txt", "a") as output:  # the process has a copy of the descriptor
        return subprocess.Popen(command, cwd=host, env=environment(), stdout=output, stderr=subprocess.STDOUT)


def run(host, data, work, *changes, **options):
    """The host's training; returns its log's training rows and the last checkpoint's state."""
    process = start(host, data, work, *changes, **options)
    assert process.wait() == 0, (work / "output.txt").read_text()[-3000:]
    lines = [json.loads(line) for path in sorted(work.glob("*.log.json")) for line in path.read_text().splitlines()]
    return [line for line in lines if line.get("mode") == "train"], checkpoint(work / "latest.pth")


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=False)["state_dict"]


def of_the_host(state):
    return {name: value for name, value in state.items() if not name.startswith("dacal.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(rows):
    return [{name: value for name, value in row.items() if "loss_" in name or "acc_" in name} for row in rows]


@pytest.fixture(scope="module")
def upstream(host, data, tmp_path_factory):
    """The host alone."""
    return run(host, data, tmp_path_factory.mktemp("alone"), "uda.type=DACS")


@pytest.mark.parametrize(("learn", "every"), [("fit", 0), ("fit", 1), ("bilevel", 1)])
def test_with_hard_labels_every_number_is_upstreams(host, data, upstream, tmp_path, learn, every):
    changes = ("uda.dacal.labels=hard", f"uda.dacal.learner={learn}", f"uda.dacal.every={every}")
    rows, state = run(host, data, tmp_path, *changes)
    assert repr(losses(rows)) == repr(
        [{k: v for k, v in row.items() if not k.startswith("dacal")} for row in losses(upstream[0])]
    )
    assert same(of_the_host(state), upstream[1])
    assert bool(every) == any(name.startswith("dacal.") for name in state)


@pytest.mark.parametrize(("config", "learn"), [("gta2cs", "fit"), ("synthia2cs", "bilevel"), ("cs2acdc", "fit")])
def test_it_trains(host, data, upstream, tmp_path, config, learn):
    rows, state = run(host, data, tmp_path, f"uda.dacal.learner={learn}", "uda.dacal.every=1", config=config, iters=5)
    assert len(rows) == 5
    for row in rows:
        values = {name: value for name, value in row.items() if "loss_seg" in name or name.startswith("dacal.")}
        assert values
        assert all(math.isfinite(value) for value in values.values())
        assert row["dacal.temperature_min"] <= row["dacal.temperature_mean"] <= row["dacal.temperature_max"]
    assert [row["dacal.skipped_warmup"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 0.0]
    loss = {"fit": "dacal.fit_loss", "bilevel": "dacal.outer_loss"}[learn]
    assert [(loss in row) for row in rows] == [False, False, True, True, True]
    assert state["dacal.temperature_net.last.weight"].abs().max() > 0
    assert int(state["dacal.iteration"]) == 5
    assert list(tmp_path.glob("*debug/000001_temperature.png"))
    if config == "gta2cs":
        assert rows[0]["mix.decode.loss_seg"] != upstream[0][0]["mix.decode.loss_seg"]  # the labels are soft
        assert rows[0]["decode.loss_seg"] == upstream[0][0]["decode.loss_seg"]


def test_as_the_config_has_it_the_papers_step_is_taken_at_every_fourth_iteration(host, data, tmp_path):
    rows, state = run(host, data, tmp_path, iters=7)
    assert [row["dacal.skipped_warmup"] for row in rows] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert [row["dacal.skipped_every"] for row in rows] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    # Between meta-steps mmcv's log repeats the last one's.
    judged = [row.get("dacal.outer_loss") for row in rows]
    assert judged[:2] == [None, None]
    assert math.isfinite(judged[2])
    assert judged[2] == judged[3] == judged[4] == judged[5] != judged[6]
    assert "dacal.fit_loss" not in rows[-1]
    assert int(state["dacal.meta_optimizer.0.step"]) == 2
    assert int(state["dacal.iteration"]) == 7


def test_the_engines_agree(host, data, tmp_path):
    found = {}
    for engine in ("higher", "finite_difference"):
        rows, _ = run(host, data, tmp_path / engine, "uda.dacal.learner=bilevel", f"uda.dacal.engine={engine}", iters=3)
        found[engine] = rows[-1]["dacal.outer_loss"], rows[-1]["dacal.hypergradient_log10"]
    assert found["higher"] == pytest.approx(found["finite_difference"], rel=1e-3)


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_a_killed_run_is_resumed_where_it_was(host, data, tmp_path, learn):
    own = (f"uda.dacal.learner={learn}", "uda.dacal.every=1", "uda.dacal.meta_lr=0.01")
    changes = ("checkpoint_config.interval=3", *own, "uda.dacal.restore_teacher=True")
    process = start(host, data, tmp_path, *changes, iters=2000)
    saved = tmp_path / "iter_3.pth"
    deadline = time.time() + 300
    while not saved.exists() or not list(tmp_path.glob("iter_[6-9].pth")):  # then the third is whole
        assert process.poll() is None, (tmp_path / "output.txt").read_text()[-3000:]
        assert time.time() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = checkpoint(saved)
    assert int(state["dacal.iteration"]) == int(state["dacal.local_iter"]) == 3
    # Resumed for no more iterations than it has, and for one more.
    again, more = tmp_path / "again", tmp_path / "more"
    rows, after = run(host, data, more, *changes[1:], iters=4, resume=saved)
    assert len(rows) == 1
    assert int(after["dacal.iteration"]) == int(after["dacal.local_iter"]) == 4
    assert int(after["dacal.meta_optimizer.0.step"]) == 2
    moved = after["dacal.temperature_net.last.bias"] - state["dacal.temperature_net.last.bias"]
    assert 0 < moved.abs().max() <= 0.011  # one step of Adam from where it was
    teacher = next(name for name in state if name.startswith("ema_model.") and state[name].dim() > 1)
    decay = 1 - 1 / 4
    student = state[teacher.replace("ema_model.", "model.", 1)]
    expected = decay * state[teacher] + (1 - decay) * student
    torch.testing.assert_close(after[teacher], expected)
    _, upstreams = run(host, data, again, *own, iters=4, resume=saved)
    torch.testing.assert_close(upstreams[teacher], student)  # upstream's teacher begins anew, as the student
    assert int(upstreams["dacal.iteration"]) == 4


def test_inference_is_the_students_alone(host, data, tmp_path):
    work = tmp_path / "run"
    run(host, data, work, iters=3)
    # The second time without what DA-Cal has left in the checkpoint and in the config.
    config, found = re.subn(r"custom_imports = dict\(.*?\)\n", "", (work / "tiny.py").read_text(), flags=re.DOTALL)
    assert found == 1
    (work / "plain.py").write_text(config)
    torch.save({"state_dict": of_the_host(checkpoint(work / "latest.pth"))}, work / "plain.pth")
    outputs = []
    for config, weights in (("tiny.py", "latest.pth"), ("plain.py", "plain.pth")):
        outputs.append(tmp_path / weights)
        save_predictions(host, work / config, work / weights, outputs[-1])
    names = sorted(path.relative_to(outputs[0]) for path in outputs[0].rglob("*.npy"))
    assert len(names) == 2
    for name in names:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
    # And `dacal evaluate` takes them as they are.
    evaluate(outputs[0], data, tmp_path / "report")
    assert (tmp_path / "report/report.json").stat().st_size > 1000


def save_predictions(host, config, weights, out):
    """All probabilities of the validation images, by the example's script."""
    command = [PYTHON, str(ROOT / "examples/mmseg/save_predictions.py"), str(config), str(weights)]
    subprocess.run([*command, "--out", str(out), "--probabilities"], cwd=host, env=environment(), check=True)


def evaluate(predictions, data, report):
    """`dacal evaluate`'s figures by name."""
    labels = str(data / "cityscapes/gtFine/val")
    command = [sys.executable, "-m", "dacal_addon", "evaluate", str(predictions), labels, "--out", str(report)]
    subprocess.run([*command, "--num-classes", "19", "--input", "probs"], check=True)
    return json.loads((report / "report.json").read_text())


# The host's own script as it is, on a machine without a GPU.
TEST = """
import runpy, sys
sys.path[:0] = [sys.argv.pop(1), "."]
import try_on_cpu
try_on_cpu.run_without_gpu()
runpy.run_path("tools/test.py", run_name="__main__")
"""


def host_test(host, config, weights, out):
    """The host's `tools/test.py`: its label maps, and the table that it prints."""
    command = [PYTHON, "-c", TEST, str(ROOT / "examples/mmseg"), str(config), str(weights), "--eval", "mIoU", "--out", str(out)]
    done = subprocess.run(command, cwd=host, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return np.stack(pickle.loads(out.read_bytes())), [line for line in done.stdout.splitlines() if line.startswith("|")]


def calibrate(host, config, weights, out, *options):
    command = [PYTHON, str(ROOT / "examples/mmseg/calibrate.py"), str(config), str(weights), "--out", str(out), *options]
    return subprocess.run(command, cwd=host, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_trained_checkpoint_is_calibrated(host, data, tmp_path):
    work = tmp_path / "run"
    run(host, data, work, "uda.type=DACS", iters=20)
    config, before, after = work / "tiny.py", work / "latest.pth", tmp_path / "calibrated.pth"
    held_out = ["--source-dir", str(data / "synthia/RGB"), str(data / "synthia/GT/LABELS")]  # images it has not seen
    done = calibrate(host, config, before, after, "--labelled", "2", *held_out)
    assert done.returncode == 0, done.stdout[-3000:]
    # What was done is said and noted.
    note = torch.load(after, map_location="cpu", weights_only=False)["meta"]["dacal"]
    t = note["temperature"]
    assert 0 < t != 1
    assert note["taken"] == "labelled and prior"
    assert note["estimates"]["typical"]["temperature"] == TYPICAL  # its labels were hard
    assert note["source_held_out"]
    assert len(note["labelled_target"]) == 2
    assert {"shadows", "blends", "labelled"} <= {line.split(" ")[0] for line in done.stdout.splitlines()}
    assert f"taken: T = {t:.4g} (labelled and prior)" in done.stdout
    assert "has been trained on these source images" not in done.stdout
    # The last layers of the student are divided, and nothing else has changed.
    old, new = checkpoint(before), checkpoint(after)
    assert list(old) == list(new)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed
    assert {name.rpartition(".")[0] for name in changed} == set(note["layers"])
    for name in changed:
        assert name.startswith("model.decode_head.")
        assert torch.equal(new[name], old[name] / t)
    # The host's own test finds the same labels, and the probabilities are softmax(z / T).
    (labels, table), (same_labels, same_table) = (
        host_test(host, config, weights, tmp_path / f"{weights.stem}.pkl") for weights in (before, after)
    )
    assert (labels != same_labels).mean() < 1e-4  # two logits may be as good as equal
    assert table
    assert same_table == table
    figures = []
    for weights in (before, after):
        save_predictions(host, config, weights, tmp_path / weights.stem)
        figures.append(evaluate(tmp_path / weights.stem, data, tmp_path / f"report_{weights.stem}"))
    for path in (tmp_path / "calibrated").rglob("*.npy"):
        p = np.load(tmp_path / "latest" / path.relative_to(tmp_path / "calibrated")).astype(np.float64) ** (1 / t)
        np.testing.assert_allclose(np.load(path), p / p.sum(0), atol=4e-3)
    old, new = ({name: figure["value"] for name, figure in each["metrics"].items()} for each in figures)
    # The probabilities are float16, in which more of them are equal.
    assert (new["accuracy"], new["miou"]) == (pytest.approx(old["accuracy"], abs=1e-3), pytest.approx(old["miou"], abs=1e-3))
    assert new["nll"] < old["nll"]  # T lies between 1 and what the labels of both images say
    # Without labels of the target: what is typical, or 1.
    done = calibrate(host, config, before, tmp_path / "typical.pth", "--images", "4")
    assert done.returncode == 0, done.stdout[-3000:]
    note = torch.load(tmp_path / "typical.pth", map_location="cpu", weights_only=False)["meta"]["dacal"]
    assert (note["taken"], note["temperature"]) == (("none", 1) if note["abstained"] else ("typical", TYPICAL))
    assert "has been trained on these source images" in done.stdout
    # From the new one there is no way on but to the old one.
    again = calibrate(host, config, after, tmp_path / "again.pth", "--temperature", "2")
    assert again.returncode
    assert "expected weights into which nothing is folded" in again.stdout
    assert not (tmp_path / "again.pth").exists()


def test_of_students_of_soft_labels_no_temperature_is_typical(host, data, tmp_path):
    work, after = tmp_path / "run", tmp_path / "calibrated.pth"
    run(host, data, work, iters=4)
    done = calibrate(host, work / "tiny.py", work / "latest.pth", after, "--images", "4")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "taken: T = 1 (none); T = 1: nothing is known of networks of this kind" in done.stdout
    note = torch.load(after, map_location="cpu", weights_only=False)["meta"]["dacal"]
    assert note["estimates"]["typical"]["temperature"] == note["temperature"] == 1
    assert same(checkpoint(work / "latest.pth"), checkpoint(after))
