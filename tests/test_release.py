"""What a release is made of: one version, complete files, a page that an index shows, a public workflow, promises kept."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import dacal_addon

ROOT = Path(__file__).resolve().parent.parent
VERSION = dacal_addon.__version__
LEFT_OUT = {"__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache", ".hypothesis", "_build"}


def run(*arguments, cwd):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def files_of(folder):
    """What a folder of the repository holds, by name, without what runs leave in it."""
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if not LEFT_OUT & set(path.parts))


def setup_cfg():
    config = ConfigParser()
    config.read(str(ROOT / "setup.cfg"))
    return config


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Wheel and sdist, the wheel made of the sdist."""
    out = tmp_path_factory.mktemp("dist")
    # Of a copy: what an earlier build has listed (*.egg-info) setuptools puts into the sdist, whatever MANIFEST.in says.
    tree = tmp_path_factory.mktemp("tree") / "dacal_addon"
    left_out = shutil.ignore_patterns(*LEFT_OUT, ".git", ".venv*", "*.egg-info", "build", "dist")
    shutil.copytree(str(ROOT), str(tree), ignore=left_out)
    run("-m", "build", "--no-isolation", "--outdir", out, ".", cwd=tree)
    return out


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory):
    """The sdist's folder."""
    (sdist,), out = dist.glob("*.tar.gz"), tmp_path_factory.mktemp("sdist")
    with tarfile.open(str(sdist)) as archive:
        archive.extractall(str(out), **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = out.iterdir()
    return folder


def metadata_of(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_version_is_the_same_wherever_it_is_said():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", VERSION)
    assert re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [VERSION]
    newest, state, day = re.search(
        r"^## (\S+) \((unreleased, )?(\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    ).groups()
    assert newest == VERSION.split(".dev")[0]
    released = re.findall(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert released == ([] if state else [day])  # a day in the one is a day in the other


def minor(version):
    return tuple(int(part) for part in version.split("."))


def test_the_classifiers_are_the_pythons_in_which_the_wheel_is_tested():
    metadata = setup_cfg()["metadata"]
    named = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", metadata["classifiers"], re.MULTILINE)
    assert named == sorted(named, key=minor)
    # The oldest is the one that pip still takes, and none between the oldest and the newest is left out.
    assert setup_cfg()["options"]["python_requires"] == f">={named[0]}"
    assert [minor(version)[1] for version in named] == list(range(minor(named[0])[1], minor(named[-1])[1] + 1))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r'\{ python: "([\d.]+)"', workflow) == named


def test_the_workflow_does_what_guards_main():
    yaml = pytest.importorskip("yaml", reason="of the extra dev")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request", "workflow_dispatch"}  # YAML takes `on` for a truth value
    assert workflow[True]["push"] == {"branches": ["main"]}
    assert workflow["permissions"] == {"contents": "read"}
    steps = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert steps["tests"] == [".ci/run"]
    (tests,) = (step for step in workflow["jobs"]["tests"]["steps"] if "run" in step)
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert tests["env"]["TORCH"].split() == [torch, "--index-url", "https://download.pytorch.org/whl/cpu"]
    pythons = next(step["with"]["python-version"] for step in workflow["jobs"]["tests"]["steps"] if "with" in step)
    assert pythons.split()[0] == "3.8"  # for the tests in the oldest environment, which .ci/run leaves out without it
    assert any(step.startswith(".ci/wheel ") for step in steps["wheel"])
    assert all("${{ matrix." in step for step in steps["wheel"])
    for path in (".ci/run", ".ci/wheel"):
        assert (ROOT / path).stat().st_mode & 0o111, path
        subprocess.run(["bash", "-n", str(ROOT / path)], check=True)


def test_the_sdist_has_what_the_tests_need(unpacked):
    needed = [
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "SECURITY.md",
        "LICENSE",
        "MANIFEST.in",
    ]
    needed += ["setup.py", "setup.cfg", "pyproject.toml", ".ci/run", ".ci/wheel", ".github/workflows/ci.yml"]
    needed += [name for folder in ("dacal_addon", "tests", "examples", "benchmarks", "docs") for name in files_of(folder)]
    assert len(needed) > 150
    assert [name for name in needed if not (unpacked / name).is_file()] == []
    for path in unpacked.rglob("*"):
        assert not {"__pycache__", ".venv", ".git"} & set(path.relative_to(unpacked).parts), path
    # And some run in it, on its own package and with the stand-in of a host beside it.
    chosen = "tests/test_mmseg.py::test_the_hosts_own_class_is_one_that_stands_in_the_code"
    where = "import dacal_addon, sys; sys.stdout.write(dacal_addon.__file__)"
    assert Path(run("-c", where, cwd=unpacked)) == unpacked / "dacal_addon/__init__.py"
    assert "1 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", chosen, cwd=unpacked)


def test_the_wheel_has_the_package_alone(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"dacal_addon-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(str(wheel)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(files_of("dacal_addon"))
    assert {"dacal_addon/py.typed", "dacal_addon/evaluate/report.html.j2"} <= names
    metadata = metadata_of(wheel)
    assert metadata["Requires-Python"] == setup_cfg()["options"]["python_requires"]
    needed = {re.match(r"[a-z]+", line).group() for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch", "higher", "numpy", "scipy"}


def test_the_page_on_an_index_has_no_link_that_leads_nowhere(dist):
    (wheel,) = dist.glob("*.whl")
    metadata = metadata_of(wheel)
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload()
    url = f"{setup_cfg()['metadata']['url']}/"
    assert f"]({url}blob/v{VERSION}/" in page
    relative = re.findall(r"\]\((?!https?:|mailto:)[^)]*\)", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE))
    assert relative == []
    for kind, path in re.findall(rf"\]\({re.escape(url)}(\w+)/v{re.escape(VERSION)}/([^)#]+)", page):
        assert (ROOT / path).exists(), path
        assert kind == ("raw" if path.endswith((".png", ".svg")) else "blob")
    words = re.sub(r"\]\([^)]*\)", "", (ROOT / "README.md").read_text()).split()
    assert re.sub(r"\]\([^)]*\)", "", page).split() == words  # links alone have changed


def test_links_are_made_absolute_and_code_is_left_alone():
    spec = spec_from_file_location("setup_py", str(ROOT / "setup.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def absolute(page):
        return module.absolute(page, "https://h/r", "1.2.3")

    blob, raw = "https://h/r/blob/v1.2.3/", "https://h/r/raw/v1.2.3/"
    assert absolute("[a](b/c.md#d) ![e](f.png)") == f"[a]({blob}b/c.md#d) ![e]({raw}f.png)"
    assert absolute("[a](#b) [c](https://d) [e](mailto:f)") == f"[a]({blob}README.md#b) [c](https://d) [e](mailto:f)"
    assert absolute("[`a`](b.md) `x[0](y)`") == f"[`a`]({blob}b.md) `x[0](y)`"
    code = "```python\nx = steps[0](y)\n```\n"
    assert absolute(code + "[a](b)\n" + code) == f"{code}[a]({blob}b)\n{code}"


def test_an_index_takes_both_files(dist):
    pytest.importorskip("twine", reason="of the extra dev")
    output = run("-m", "twine", "--no-color", "check", "--strict", *sorted(dist.iterdir()), cwd=dist)
    assert output.count("PASSED") == 2, output


def test_every_promise_about_security_is_held_by_a_test():
    page = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", page)
    assert len(named) >= 15
    for path, name in named:
        functions = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{path}::{name}"
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert all("`tests/" in row for row in rows if not row.startswith("| ---"))


def test_the_report_loads_nothing_and_runs_no_script():
    page = (ROOT / "dacal_addon/evaluate/report.html.j2").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert policy.split("; ") == ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]
    assert page.index("Content-Security-Policy") < page.index("<title>")  # it holds for what comes after it
    assert not re.search(r"<script|javascript:|\son\w+=|\|\s*safe\b", page)


def test_no_file_of_the_package_imports_what_opens_connections():
    network = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "asyncio", "requests", "urllib3", "httpx", "aiohttp"}
    for path in (ROOT / "dacal_addon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not network & {name.split(".")[0] for name in names}, path
