"""The package as users get it: names, files, wheel, examples, benchmarks."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dacal_addon
from dacal_addon import cli
from dacal_addon.engines import ENGINES
from dacal_addon.integrations.options import HostOptions, parse
from dacal_addon.learners import JUDGED_SETS, SkipKind
from dacal_addon.losses import OUTER_LOSSES

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments, cwd=ROOT, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=str(cwd), check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    ).stdout  # fmt: skip


def test_the_public_names_are_there():
    for name in dacal_addon.__all__:
        assert getattr(dacal_addon, name).__doc__, name
    assert {
        "MetaTemperatureNet", "SoftPseudoLabeler", "SoftPseudoLabels", "BilevelCalibrationStep",
        "CalibrationStepResult", "hypergradient", "soft_cross_entropy",
    } <= set(dacal_addon.__all__)  # fmt: skip
    for module, names in (("metrics", ["ece"]), ("mixing", ["class_mask", "cut_mask", "complement", "mix"])):
        assert all(callable(getattr(importlib.import_module(f"dacal_addon.{module}"), name)) for name in names)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_only_one_file_imports_higher_and_the_core_needs_nothing_but_its_dependencies():
    core = {"torch", "numpy", "scipy", "higher"}
    extras = {"matplotlib", "tqdm", "sklearn", "PIL", "jinja2"}
    by_file = {
        path.relative_to(ROOT / "dacal_addon").as_posix(): set(imports(path)) for path in ROOT.glob("dacal_addon/**/*.py")
    }
    assert [name for name, modules in by_file.items() if "higher" in modules] == ["engines/unroll.py"]
    by_file["integrations/mmseg.py"].remove("mmseg")  # the host, which only this file may import
    by_file["integrations/torchmetrics.py"].remove("torchmetrics")  # likewise
    by_file["integrations/mmengine.py"] -= {"mmengine", "mmcv", "mmseg"}  # likewise
    by_file["metrics/triton_kernel.py"].remove("triton")  # likewise
    by_file["metrics/backends.py"].remove("triton")  # for its version alone
    by_file["metrics/fused.py"] -= {"numba", "llvmlite"}  # likewise
    for name, modules in by_file.items():
        installed = {module for module in modules if "site-packages" in str(importlib.util.find_spec(module).origin)}
        with_extras = name.startswith(("demo/", "evaluate/", "plots/")) or name in ("cli.py", "progress.py")
        assert installed <= core | (extras if with_extras else set()), name


def test_importing_the_package_loads_neither_higher_nor_an_extra():
    code = (
        "import sys, torch; before = set(sys.modules)  # torch itself takes tqdm where there is one\n"
        "import dacal_addon.metrics; new = set(sys.modules) - before\n"
        "print([m for m in ('higher', 'matplotlib', 'tqdm', 'sklearn') if m in new])"
    )
    assert python("-c", code).strip() == "[]"


def test_the_wheel_installs_into_an_empty_directory_and_imports_from_there(tmp_path):
    python("-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ".")
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    assert wheel.name == f"dacal_addon-{dacal_addon.__version__}-py3-none-any.whl"
    assert re.fullmatch(rf"dacal.addon-{dacal_addon.__version__}\.tar\.gz", sdist.name)
    target = tmp_path / "empty"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target", target, wheel)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import dacal_addon, dacal_addon.engines.unroll, dacal_addon.demo.run\n"
        "print(dacal_addon.__file__)\n"
        "import torch; print(float(dacal_addon.MetaTemperatureNet(3)(torch.zeros(1, 3, 4, 4)).mean().detach()))"
    )
    where, temperature = python("-c", code, cwd=tmp_path).split()
    assert Path(where).parent == target / "dacal_addon"
    assert temperature == "1.0"
    assert (target / "dacal_addon" / "py.typed").exists()
    assert not (target / "tests").exists()


@pytest.mark.parametrize("host", ["daformer", "hrda", "mic"])
def test_the_patches_add_files_and_touch_none(host, tmp_path):
    patch = (ROOT / "examples" / host / "dacal.patch").read_text()
    headers = ("diff ", "new file ", "index ", "--- /dev/null", "+++ ", "@@ ")
    lines = [line for line in patch.splitlines() if not line.startswith(headers)]
    assert lines
    assert all(line.startswith("+") for line in lines)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", str(ROOT / "examples" / host / "dacal.patch")], cwd=tmp_path, check=True)
    configs = list(tmp_path.rglob("dacal/*.py"))
    assert sorted(path.name for path in configs) == ["cs2acdc.py", "gta2cs.py", "synthia2cs.py"]
    for path in configs:
        compile(path.read_text(), str(path), "exec")
    namespace = {}
    exec(next(path for path in configs if path.name == "gta2cs.py").read_text(), namespace)
    assert parse(namespace["uda"]["dacal"]) == HostOptions()
    assert namespace["uda"]["type"] == "DACalDACS"
    subprocess.run(["bash", "-n", str(ROOT / "examples" / host / "try.sh")], check=True)


def test_the_hosts_page_lists_every_option_and_its_default():
    page = (ROOT / "examples/mmseg/README.md").read_text()
    section = page[page.index("## Options") : page.index("## What the log shows")]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE))
    assert list(rows) == [name for name in HostOptions._fields if name in rows]
    assert set(rows) == set(HostOptions._fields)  # one row each
    defaults, fit = HostOptions(), HostOptions(learner="fit")
    written = {name: value.strip("`") for name, value in rows.items()}
    assert written.pop("warmup_iters") == f"{defaults.warmup}, with `'fit'` {fit.warmup}"
    assert written.pop("meta_lr") == "3e-4, with `'fit'` 2e-3"
    assert (defaults.learning_rate, fit.learning_rate) == (3e-4, 2e-3)
    assert {name: ast.literal_eval(value) for name, value in written.items()} == {
        name: getattr(defaults, name) for name in written
    }
    for name in [*JUDGED_SETS, *OUTER_LOSSES, *ENGINES]:
        assert f"`'{name}'`" in section
    for kind in set(SkipKind) - {SkipKind.HARD_LABELS}:  # where it is, no learner is called
        assert f"_{kind.value}`" in page


def test_the_tiny_data_sets_have_what_the_hosts_look_for(tmp_path):
    python("examples/mmseg/tiny_data.py", tmp_path, "--images", "1")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {"gta/images/00001.png", "gta/labels/00001_labelTrainIds.png", "synthia/GT/LABELS/00001_labelTrainIds.png"} <= files
    assert "cityscapes/leftImg8bit/train/tiny/tiny_000000_000019_leftImg8bit.png" in files
    assert "acdc/gt/val/fog/GP010001_frame_000001_gt_labelTrainIds.png" in files
    stats = json.loads((tmp_path / "gta/sample_class_stats.json").read_text())
    assert sum(n for key, n in stats[0].items() if key != "file") == 256 * 128
    assert set(stats[0]) - {"file"} <= {"0", "1", "2", "4", "5", "7", "8", "10", "11", "13"}


@pytest.mark.slow
def test_the_benchmark_of_the_pieces_runs():
    output = python("benchmarks/costs.py", "--size", "64", "--runs", "1")
    assert re.search(r"student forward +\d+\.\d +1\.00\n", output)
    for engine in ("higher", "forward", "finite_difference"):
        if engine != "forward" or hasattr(torch, "func"):
            assert re.search(rf"meta-step, engine {engine} +\d+\.\d +\d+\.\d\d +\d+\.\d x\n", output)


@pytest.mark.skipif(not hasattr(torch, "func"), reason="the benchmark's student uses fused attention: torch >= 2.0")
@pytest.mark.slow
def test_the_benchmark_of_the_engines_runs(tmp_path):
    output = python("benchmarks/hypergradient.py", "--size", "32", "--runs", "1", "--quick", "--out", tmp_path)
    assert re.search(r"forward: iteration, shared +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d\n", output)
    assert int(python("benchmarks/hypergradient.py", "--size", "32", "--peak-of", "plain student step")) > 10e6
    result = json.loads((tmp_path / "hypergradient.json").read_text())
    assert (tmp_path / "hypergradient.png").stat().st_size > 10_000
    smooth = result["agreement"]["GELU"]
    assert len(smooth) == 1
    assert all(row["forward, float64"] <= 1e-10 and row["finite_difference, float64"] <= 1e-6 for row in smooth)
    assert all(row["forward, float32"] <= 1e-4 and row["finite_difference, float32"] <= 1e-2 for row in smooth)


@pytest.mark.skipif(not hasattr(torch, "func"), reason="counts what is dispatched: torch >= 2.0")
@pytest.mark.slow
def test_a_meta_step_asks_few_operations_and_waits_seldom(tmp_path):
    python("benchmarks/operations.py", "--out", tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = {row["work"]: row for row in json.loads((tmp_path / "operations.json").read_text())["rows"]}
    for engine in ("forward", "finite_difference"):
        row = rows[f"{engine}: meta-step"]
        assert row["operations"] < 8 * rows["plain student step"]["operations"]
        assert row["waits"] <= 3


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="one of its rows is compiled: torch >= 2.0")
@pytest.mark.slow
def test_the_benchmark_of_the_metrics_runs(tmp_path):
    size = ["--height", "64", "--width", "64"]
    output = python("benchmarks/metrics_throughput.py", *size, "--runs", "1", "--quick", "--out", tmp_path)
    for name in ("CalibrationStats, torch", "CalibrationStats, compile", "CalibrationStats, numba", "torchmetrics", "netcal"):
        assert re.search(rf"^{name} +\d+\.\d\d +\d+\.\d$", output, re.MULTILINE), output
    assert len(json.loads((tmp_path / "metrics_throughput.json").read_text())["rows"]) >= 11
    assert 0 <= int(python("benchmarks/metrics_throughput.py", *size, "--peak-of", "CalibrationStats, torch", "3")) < 50e6


def test_commands_of_several_threads_begin_again_with_threads_that_sleep(monkeypatch):
    begun = []

    def execv(*arguments):
        begun.append(arguments)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back
    for command, again in (("demo", True), ("calibrate", True), ("evaluate", False)):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setattr(
            sys, "argv", ["dacal", command, "a", "b"] if command != "demo" else ["dacal", "demo", "--seed", "1"]
        )
        with pytest.raises(SystemExit):
            cli.main()
        assert ("OMP_WAIT_POLICY" in os.environ) == again
    assert [words[1:3] + words[3:4] for _, words in begun] == [
        ["-m", "dacal_addon", "demo"],
        ["-m", "dacal_addon", "calibrate"],
    ]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # as the user says
    monkeypatch.setattr(cli, "_demo", lambda options: 0)
    monkeypatch.setattr(sys, "argv", ["dacal", "demo"])
    assert cli.main() == 0
    assert len(begun) == 2
