"""README and docs/: code runs, links lead somewhere, public names are in the reference, pages open."""

import ast
import configparser
import contextlib
import doctest
import html
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dacal_addon import cli
from dacal_addon.calibrate import folded_temperature
from dacal_addon.learners import SkipKind

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

from repository_pages import LINE, filled, headings, pages, section, slug  # noqa: E402  # it lies in the folder that was just named

README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
LINKED = [
    *PAGES,
    *sorted(ROOT.glob("examples/**/README.md")),
    *[
        ROOT / name
        for name in ("benchmarks/README.md", "benchmarks/results/cells.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
    ],
]
FENCED = r"^ {0,3}```.*?^ {0,3}```"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAS_SPHINX = all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo", "latex2mathml"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """(words behind the language, code) of each fenced block."""
    found = re.findall(rf"^```{language}\b *([^\n]*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [(words.split(), code) for words, code in found]


# What the pages call "yours". Recipes, and the page of the command line, declare their own.
STAND_INS = """
import copy
import torch
torch.manual_seed(0)
student = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 19, 1))
teacher, network = copy.deepcopy(student), copy.deepcopy(student)
teacher[2].weight.data *= 100  # confident, so that its labels have weight
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
images = lambda n: torch.rand(n, 3, 16, 16)
labels = lambda n: torch.arange(n * 256).view(n, 16, 16) % 19
source_images, held_out_images, target_images = images(4), images(4), images(4)
source_labels, held_out_labels, target_labels = labels(4), labels(4), labels(4)
source_dataset = torch.utils.data.TensorDataset(images(16), labels(16))
validation = [(images(2), labels(2)) for _ in range(3)]
loader = [(images(2), labels(2), images(2)) for _ in range(3)]
updates, checkpoint = [], {"student": student.state_dict()}
update_teacher = lambda teacher, student: updates.append(copy.deepcopy(student.state_dict()))
torch.save(student.state_dict(), "student.pth")
"""
# Why a page cannot run everywhere: what it shows did not exist, or is not installed.
NEEDS = {
    "docs/recipes/transformers.md": (bool(importlib.util.find_spec("transformers")), "transformers is not installed"),
    "docs/recipes/lightning.md": (bool(importlib.util.find_spec("lightning")), "lightning is not installed"),
    "docs/recipes/amp.md": (hasattr(torch, "autocast"), "autocast on a CPU came with torch 1.10"),
    "docs/recipes/ddp.md": (torch.distributed.is_available(), "torch was built without torch.distributed"),
    "docs/troubleshooting.md": (hasattr(torch, "func"), "one of its messages is of forward mode, which came with torch 2.0"),
}
SCRIPTS = ["docs/recipes/ddp.md"]  # it starts processes, which import it
OTHERS_WARN = ["docs/recipes/lightning.md", "docs/recipes/transformers.md"]  # of themselves
WITH_CODE = [path for path in PAGES if blocks(path, "python")]


def needed(path):
    there, reason = NEEDS.get(name_of(path), (True, ""))
    if not there:
        pytest.skip(reason)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in; the global random state is as before afterwards."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        yield tmp_path


def run(path, scope):
    """All blocks of a page that are to run through, top to bottom; an error names the page's line."""
    text = path.read_text()
    for words, code in blocks(path, "python"):
        if not words:
            line = text[: text.index(code)].count("\n")
            exec(compile("\n" * line + code, str(path), "exec"), scope)
            if name_of(path).startswith("docs/recipes") and "mixed" in scope:
                assert float(scope["mixed"].labels.weight.max()) > 0  # something of the target is taught


@pytest.mark.parametrize("path", [path for path in WITH_CODE if name_of(path) not in SCRIPTS], ids=name_of)
def test_every_block_of_a_page_runs(path, folder):
    needed(path)
    scope = {"__name__": "page"}
    with warnings.catch_warnings():
        if name_of(path) in OTHERS_WARN:
            warnings.simplefilter("ignore")
        if not name_of(path).startswith("docs/recipes"):
            exec(STAND_INS, scope)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run(path, scope)
    AFTERWARDS.get(name_of(path), lambda scope, folder, printed: None)(scope, folder, printed.getvalue())


def after_the_readme(scope, folder, printed):
    """Its quick starts did what they say."""
    assert len(scope["updates"]) == 3
    saved_before_the_fold(folder, trained=scope["updates"][2])
    assert scope["mixed"].learned.skipped.kind is SkipKind.HARD_LABELS
    (resume,) = re.findall(r"# (dacal.load_state_dict.*) to resume", README.read_text())
    exec(resume, scope)
    assert scope["stats"].images == 6
    assert (folder / "reliability.png").stat().st_size > 10_000
    original, calibrated = (torch.load(str(folder / name)) for name in ("student.pth", "calibrated.pth"))
    t = scope["found"].temperature
    assert t == folded_temperature(calibrated) == 1.25
    for name in original:
        assert torch.allclose(calibrated[name], original[name] / t if name.startswith("2.") else original[name])


def saved_before_the_fold(folder, trained):
    """To go on training from, though `state_dict()` shares its memory with the student that is folded."""
    saved = torch.load(str(folder / "last.pth"))
    assert saved["student"].keys() == trained.keys()
    assert all(torch.equal(saved["student"][name], value) for name, value in trained.items())
    assert saved["dacal"].keys() == {"learner", "generator"}


def after_the_loop(scope, folder, printed):
    assert len(scope["updates"]) == 6  # of the two loops that update the teacher
    saved_before_the_fold(folder, trained=scope["updates"][2])
    folded, t = torch.load(str(folder / "calibrated.pth")), scope["found"].temperature
    assert t == 1.25
    assert torch.allclose(folded["2.weight"] * t, scope["updates"][2]["2.weight"])
    kept = [image for image, _ in scope["kept"]]
    assert len(kept) == len(scope["source_dataset"]) // 8
    assert all(torch.equal(stacked, image) for stacked, image in zip(scope["source"][0], kept))
    assert not any(torch.equal(image, other) for image in kept for other, _ in scope["train"])
    assert scope["learned"].skipped is None
    assert scope["shadows"].count == 8
    assert "warm-up: iteration 1 of 1" in printed
    assert re.search(r"^[01]\.\d+$", printed, re.MULTILINE)  # a mean temperature: it learned
    assert scope["calibrate"].iteration == 3


def after_engines(scope, folder, printed):
    assert [result.engine for result in scope["results"]] == ["higher", "finite_difference"]
    (values,) = re.findall(r"\[(.*)\]", printed)
    first, second = map(float, values.split(","))
    assert first == pytest.approx(second, rel=1e-2)
    assert first != 0


def after_the_fold(scope, folder, printed):
    assert re.search(r"typical: 1\.25, .*\n.*shadows: ", printed)
    assert "labels of target images say" in printed
    assert "('2',) 1.4" in printed
    scaled, image = scope["scaled"], scope["target_images"]
    plain = copy_of(scope["network"], torch.load("student.pth"))  # `scaled` holds the network that was folded below it
    assert torch.allclose(scaled(image), plain(image) / 1.4**2, atol=1e-5)


def copy_of(network, state):
    import copy

    network = copy.deepcopy(network)
    network.load_state_dict(state)
    return network


def after_lightning(scope, folder, printed):
    assert re.findall(r"^(None|fit|bilevel) \{'ECE': ", printed, re.MULTILINE) == ["None", "fit", "bilevel"]
    saved = torch.load(str(folder / "end.ckpt"), weights_only=False)
    assert saved["dacal"]["iteration"] == 4
    teacher, calibrated = scope["module"].teacher.state_dict(), torch.load(str(folder / "calibrated.pth"))
    assert not torch.equal(calibrated["0.weight"], teacher["0.weight"])  # a student that is not trained is its teacher's copy


def after_transformers(scope, folder, printed):
    """A checkpoint of transformers was folded, and says so; the teacher moved on from the student that it is a copy of."""
    kept, folded = (type(scope["student"]).from_pretrained(str(folder / name)) for name in ("trained", "calibrated"))
    t, name = folded.config.dacal_temperature, "decode_head.classifier.weight"
    assert not hasattr(kept.config, "dacal_temperature")
    assert t == scope["found"].temperature == 1.25
    assert torch.allclose(folded.state_dict()[name] * t, kept.state_dict()[name])
    torch.manual_seed(0)
    first = type(kept)(kept.config).state_dict()  # of the page's seed
    assert not torch.equal(scope["teacher"].state_dict()[name], first[name])


def after_medical(scope, folder, printed):
    trained, calibrated = (torch.load(str(folder / name)) for name in ("trained.pth", "calibrated.pth"))
    assert folded_temperature(calibrated) == scope["found"].temperature == 1.25
    assert torch.allclose(calibrated["outc.weight"] * 1.25, trained["outc.weight"])
    assert set(scope["label"].unique().tolist()) == {0, 1}


def after_the_command_line(scope, folder, printed):
    """The file that it shows is one that `dacal calibrate` takes."""
    ((_, code),) = blocks(DOCS / "command_line.md", "python")
    (folder / "setup.py").write_text(code)
    torch.save(scope["network"]().state_dict(), "student.pth")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["calibrate", "student.pth", "setup.py", "--out", "calibrated.pth"]) == 0
    assert folded_temperature(torch.load("calibrated.pth")) in (None, 1.25)
    assert (folder / "calibrated.pth.json").exists()


AFTERWARDS = {
    "README.md": after_the_readme,
    "docs/loop.md": after_the_loop,
    "docs/command_line.md": after_the_command_line,
    "docs/engines.md": after_engines,
    "docs/checkpoint.md": after_the_fold,
    "docs/recipes/lightning.md": after_lightning,
    "docs/recipes/medical.md": after_medical,
    "docs/recipes/transformers.md": after_transformers,
    "docs/recipes/amp.md": lambda scope, folder, printed: float(printed.split()[0]) > 0 or pytest.fail(printed),
}


@pytest.mark.slow
def test_the_processes_of_the_recipe_work_together(folder):
    needed(DOCS / "recipes/ddp.md")
    ((_, code),) = blocks(DOCS / "recipes/ddp.md", "python")
    (folder / "train.py").write_text(code)
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    images, temperature = re.search(r"^(\d+) images, ECE 0\.\d+, T (\d\.\d+)$", done.stdout, re.MULTILINE).groups()
    assert images == "4"  # of both
    assert temperature != "1.000"  # it learned


def test_the_wrap_is_at_most_eight_lines_and_the_readme_one_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 180
    for path in (README, DOCS / "loop.md"):
        (wrap,) = [code for _, code in blocks(path, "python") if "mixed = dacal(source" in code and "  #\n" in code]
        marked = [line for line in wrap.splitlines() if re.search(r"\S.*  #", line)]
        assert 5 <= len(marked) <= 8


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    table = re.findall(r"^\| .*hard labels.*\|$|^\| .* \| \d \| \d \| .*\|$", README.read_text(), re.MULTILINE)
    measured = [line for line in table if re.search(r"\| [+-]\d\.\d\d \|", line)]
    assert len(measured) >= 6
    report = (ROOT / "benchmarks/README.md").read_text().splitlines()
    assert [line for line in measured if line not in report] == []


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_no_line_of_a_page_is_taken_for_a_comment(path):
    """MyST hides a line that begins with %, and the rest of its sentence is read without it."""
    text = re.sub(FENCED, "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\s*(?:%|\+\+\+).*", text, re.MULTILINE) == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_a_page_shows_of_another_file_is_a_link_where_it_is_read_as_it_is(path):
    """On GitHub a page is read as it is: it says where the rest stands."""
    text = path.read_text()
    assert text.count("<!--") == len(LINE.findall(text))  # one that is misspelt would show nothing, here and there
    read = re.sub(r"^```{(?:toctree|eval-rst)}.*?^```", "", re.sub(r"<!--.*?-->", "", text), flags=re.MULTILINE | re.DOTALL)
    assert re.search(r"\w", read)
    assert "<!--" not in filled(text, path, DOCS)


def test_a_page_shows_the_table_that_it_names():
    tables = re.findall(r"(?:^\|.*\|$\n?)+", section((ROOT / "benchmarks/README.md").read_text(), "what-holds"), re.MULTILINE)
    evidence = filled((DOCS / "evidence.md").read_text(), DOCS / "evidence.md", DOCS)
    assert all(table.strip() in evidence for table in tables[:2])
    mic = filled((DOCS / "hosts/mic.md").read_text(), DOCS / "hosts/mic.md", DOCS)
    assert mic.startswith("# MIC with DA-Cal\n")
    assert "](mmseg.md#checkpoints)" in mic  # a link of the file's, led to the page that shows its target


def test_no_page_installs_from_an_index_what_is_not_published():
    newest = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group()
    if "unreleased" in newest:
        found = [name_of(path) for path in LINKED if re.search(r"pip install (\S+ )*'?dacal[-_]addon", path.read_text())]
        assert found == ["CONTRIBUTING.md"]  # how a maintainer tries a release


def test_the_install_page_names_every_extra():
    config = configparser.ConfigParser()
    config.read(str(ROOT / "setup.cfg"))
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "install.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(config["options.extras_require"])


# Troubleshooting: a message, and below it what brings it about.


def entries():
    found = re.findall(
        r"^### ([^\n]+)\n\n```text\n(.*?)\n```\n\n```(python|console) (\w+)\n(.*?)^```",
        (DOCS / "troubleshooting.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert len(found) == (DOCS / "troubleshooting.md").read_text().count("\n### ")
    return found


def matches(message, said):
    """Whether a page's message, with ... for what varies, is part of what was said."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in message.split("..."))
    return re.search(pattern, " ".join(said.split())) is not None


@pytest.fixture
def predictions(folder):
    """Two images, their labels, the same labels under other names, and with 1 added."""
    for name in ("predictions", "labels", "others", "from_one"):
        (folder / name).mkdir()
    g = np.random.default_rng(0)
    for i in range(2):
        label = g.integers(0, 4, (16, 24)).astype("uint8")
        np.save(folder / "predictions" / f"a{i}.npy", g.normal(size=(4, 16, 24)))
        for name, values in (("labels/a", label), ("others/b", label), ("from_one/a", label + 1)):
            Image.fromarray(values).save(folder / f"{name}{i}.png")


def test_every_message_of_troubleshooting_is_one_that_is_said(predictions):
    path = DOCS / "troubleshooting.md"
    needed(path)
    scope = {}
    run(path, scope)
    for title, message, kind, how, code in entries():
        said = io.StringIO()
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said):
            warnings.simplefilter("always")
            if kind == "console":
                with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
                    assert cli.main(shlex.split(code)[1:]) != 0
            elif how == "raises":
                with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                    exec(code, scope)
                print(error.value)
            else:
                exec(code, scope)
        if how == "warns":
            said.write(" ".join(str(one.message) for one in warned))
        assert how in ("raises", "warns", "prints", "fails"), title
        assert matches(message, said.getvalue()), f"{title}: {said.getvalue()}"


def test_a_message_with_dots_is_found_and_another_is_not():
    assert matches("got a ... value; do\nthis", "f: got a very large value; do this")
    assert not matches("got a ... value; do this", "f: got a very large value; do that")
    assert not matches("got (1)", "got 1")


# Links, commands


def test_the_examples_of_what_builds_the_pages_run():
    names = ["repository_pages", *(["docstrings"] if HAS_SPHINX else [])]
    for name in names:
        done = doctest.testmod(importlib.import_module(name))
        assert done.attempted > 0
        assert done.failed == 0


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(FENCED, "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_every_relative_link_and_anchor_leads_somewhere(path):
    shown = {DOCS / page: ROOT / source for source, page in pages(DOCS).items()}
    text = re.sub(r"^    .*$", "", without_code(path.read_text()), flags=re.MULTILINE)
    broken = []
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        if not to.exists() or ROOT not in to.parents:
            broken.append(target)
        elif anchor:
            source = shown.get(to, to)
            if anchor not in [slug(title) for _, _, title in headings(source.read_text())]:
                broken.append(target)
    assert broken == []


def commands(path):
    """Lines of code that call `dacal`, without comments."""
    text = path.read_text()
    lines = [line for line in text.splitlines() if re.match(r"(    )?dacal \w+ [^|]", line)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


WITH_COMMANDS = [path for path in LINKED if commands(path)]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_on_the_pages_are_ones_that_the_parser_takes(path):
    (choices,) = [action.choices for action in cli._parser()._actions if isinstance(action.choices, dict)]
    for words in commands(path):
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= set(choices[words[0]]._option_string_actions)  # in full: the parser takes their beginnings too
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                cli._parser().parse_args(words)
            except SystemExit:
                pytest.fail(f"{words}: {said.getvalue()}")


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_options_make_targets_and_scripts_that_a_page_names_exist(path):
    text = path.read_text()
    parser = cli._parser()
    (choices,) = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for command, rest in re.findall(r"`dacal (evaluate|calibrate|demo)([^`\n]*)`", text):
        for option in re.findall(r"--[\w-]+", rest):
            assert option in choices[command]._option_string_actions, option
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    # Paths of hosts' own scripts are not from here.
    for script in re.findall(r"python (?:ADDON/|/path/to/dacal_addon/)?((?:examples|benchmarks)/\S+\.py)", text):
        assert (ROOT / script).exists(), script


# The built pages


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if not HAS_SPHINX:
        pytest.skip("Sphinx or an extension is not installed (they need a newer Python than 3.8): pip install '.[docs]'")
    out = tmp_path_factory.mktemp("docs")
    words = ["-b", "html", "-q", "-W", "--keep-going", "-n", "-d", str(out / "doctrees"), str(DOCS), str(out / "html")]
    command = [sys.executable, "-m", "sphinx", *words]
    done = subprocess.run(command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return out / "html"


MODULES = ("", ".calibrate", ".engines", ".learners", ".metrics", ".plots")
# Without `__all__`; the integrations import trainers, and are looked at and not imported.
PARTS = ("mixing", "losses", "held_out", "shadows", "integrations.torchmetrics", "integrations.mmengine")


def defined(part):
    """Names of a file's functions and classes, without those that the reference leaves out."""
    code = ast.parse((ROOT / f"dacal_addon/{part.replace('.', '/')}.py").read_text())
    names = {node.name for node in code.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = {target.id for node in code.body if isinstance(node, ast.Assign) for target in node.targets}
    left_out = []
    for page in (DOCS / "api").glob("*.md"):
        pattern = rf"automodule:: dacal_addon\.{re.escape(part)}\n(?: +:.*\n)*? +:exclude-members: (.*)\n"
        found = re.findall(pattern, page.read_text())
        left_out += [name for line in found for name in line.split(", ")]
    assert set(left_out) <= names | assigned
    return {name for name in names if not name.startswith("_")} - set(left_out)


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(built):
    documented = set(re.findall(r'id="(dacal_addon\.[\w.]+)"', "".join(page.read_text() for page in built.glob("api/*.html"))))
    modules = {name: importlib.import_module(f"dacal_addon{name}") for name in MODULES}
    objects = [getattr(module, name) for module in modules.values() for name in module.__all__]
    assert len(objects) > 60
    missing = []
    for where, module in modules.items():
        for name in module.__all__:
            # A name of several modules is documented once.
            same = [
                f"dacal_addon{other}.{name}"
                for other, their in modules.items()
                if getattr(their, name, None) is getattr(module, name)
            ]
            if not documented & set(same):
                missing.append(f"dacal_addon{where}.{name}")
    # A name of the front door too is documented there.
    missing += [
        f"{part}.{name}"
        for part in PARTS
        for name in defined(part)
        if not documented & {f"dacal_addon.{part}.{name}", f"dacal_addon.{name}"}
    ]
    assert missing == []
    for kind in ("DACalEncoderDecoder", "DACalCascadeEncoderDecoder"):
        assert f"dacal_addon.integrations.mmengine.{kind}" in documented
    for name in ("DACal.__call__", "DACal.calibrate", "metrics.CalibrationStats.update", "metrics.CalibrationStats.bootstrap"):
        assert f"dacal_addon.{name}" in documented


# Loads every page into a frame, one after the other, and notes what a reader would see.
LOOK = """<!doctype html><meta charset=utf-8><body><script>
const pages = PAGES, seen = {};
function scrolls(one, inner) {  // whether what is too wide can be moved into sight
  for (let above = one; above.tagName !== 'ARTICLE'; above = above.parentElement)
    if (/auto|scroll/.test(inner.getComputedStyle(above).overflowX)) return true;
  return false;
}
(async () => {
  for (const page of pages) {
    const frame = document.createElement('iframe');
    Object.assign(frame, {src: page, width: WIDTH, height: 900});
    const loaded = new Promise(done => { frame.onload = done; });
    document.body.append(frame);
    await loaded;
    await new Promise(done => setTimeout(done, 200));  // what the page itself asks for afterwards
    const inner = frame.contentWindow, root = inner.document.documentElement;
    seen[page] = {
      title: inner.document.title,
      cut: [...inner.document.querySelectorAll('article *')].filter(one =>
        one.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(one, inner)).map(one => one.outerHTML),
      formulas: [...inner.document.querySelectorAll('math')].filter(one => one.getBoundingClientRect().width > 5).length,
      broken: [...inner.document.images].filter(one => one.complete && !one.naturalWidth).map(one => one.src),
      requests: inner.performance.getEntriesByType('resource').map(one => one.name).filter(name => !/^(file|data):/.test(name)),
    };
    frame.remove();
  }
  const pre = document.createElement('pre');
  pre.id = 'seen';
  pre.textContent = JSON.stringify(seen);
  document.body.append(pre);
})();
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `apt-get install chromium` (.ci/run does)")
@pytest.mark.parametrize("width", [1280, 400])
def test_every_page_opens_in_a_browser_without_an_error_or_a_network(built, tmp_path, width):
    names = sorted(path.relative_to(built).as_posix() for path in built.rglob("*.html"))
    names = [name for name in names if not name.startswith("_static")]
    assert len(names) > 30
    harness = built / f"look-{width}.html"
    harness.write_text(LOOK.replace("PAGES", json.dumps(names)).replace("WIDTH", str(width)))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr"
    flags += f" --user-data-dir={tmp_path / 'profile'} --virtual-time-budget=120000 --dump-dom"
    try:
        done = subprocess.run([CHROMIUM, *flags.split(), harness.as_uri()], capture_output=True, text=True, timeout=300)
    finally:
        harness.unlink()
    assert re.findall(r".*CONSOLE.*", done.stderr) == []
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL).group(1)))
    assert sorted(seen) == names
    for name, page in seen.items():
        assert (page["cut"], page["broken"], page["requests"]) == ([], [], []), (name, page)
    for name in ("method", "definitions"):
        written = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", (DOCS / f"{name}.md").read_text(), re.DOTALL)
        assert seen[f"{name}.html"]["formulas"] == len(written) > 20
