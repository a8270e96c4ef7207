"""`dacal calibrate`: what it writes and prints, in which forms a checkpoint may be, and what a misfit is told."""

import argparse
import json
import math
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from dacal_addon import cli
from dacal_addon.calibrate import command, estimate_temperature, folded_temperature
from dacal_addon.cli import main

SETUP = """
    import pathlib
    import torch
    from torch import nn

    HERE = pathlib.Path(__file__).parent

    def network():
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 1))

    def images(n, seed):
        return torch.rand(n, 3, 12, 16, generator=torch.Generator().manual_seed(seed))

    def source():
        (HERE / "worked").touch()
        return images(8, 1), torch.load(HERE / "source.pt")

    def target():
        return images(8, 2)

    def labelled_target():
        return images(8, 2), torch.load(HERE / "target.pt")
"""
T = 1.7


def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 1))


def images(n=5, seed=7, size=(12, 16)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def labels(network, seed, temperature):
    """Drawn from softmax(z / temperature)."""
    with torch.no_grad():
        p = (network.eval()(images(8, seed)) / temperature).softmax(1).permute(0, 2, 3, 1)
    draw = torch.Generator().manual_seed(3)
    return torch.multinomial(p.flatten(0, 2), 1, generator=draw).view(p.shape[:-1])


class World:
    """A folder with a network and its set-up file."""

    def __init__(self, folder):
        self.folder = folder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = build()
            self.network.train()(images(20))  # statistics of its own
        self.network[-1].weight.data *= 9
        self.network.eval()
        torch.save(labels(self.network, 1, 1.5), str(folder / "source.pt"))
        torch.save(labels(self.network, 2, 3.0), str(folder / "target.pt"))
        self.set_up()
        self.save(self.network.state_dict())

    def set_up(self, more=""):
        (self.folder / "setup.py").write_text(textwrap.dedent(SETUP) + textwrap.dedent(more))

    def save(self, checkpoint):
        torch.save(checkpoint, str(self.folder / "before.pt"))

    def run(self, *arguments, checkpoint="before.pt", setup="setup.py", out="after.pt"):
        where = [] if out is None else ["--out", str(self.folder / out)]
        return main(["calibrate", str(self.folder / checkpoint), str(self.folder / setup), *where, *arguments])

    @property
    def worked(self):
        return (self.folder / "worked").exists()

    def files(self):
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def error_of(world, capsys, *arguments, worked=False, **where):
    """The one line that a run complains with; it changes no file."""
    before, path = world.files(), list(sys.path)
    assert world.run(*arguments, **where) == 1
    assert world.files() == before or worked
    assert sys.path == path
    assert world.worked == worked
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert err.startswith("dacal calibrate: ")
    assert "calibrate: calibrate" not in err
    return err


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


FORMS = {
    "state dict": (lambda state: state, lambda saved: saved, [], ""),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, lambda saved: saved["state_dict"], [], ""),
    "meta": (lambda state: {"state_dict": state, "meta": {"a": 1}}, lambda saved: saved["state_dict"], [], ""),
    "key": (lambda state: {"net": state, "state_dict": {"x": torch.ones(2)}}, lambda s: s["net"], ["--key", "net"], ""),
    "key, plain": (lambda state: {"net": dict(state), "step": 3}, lambda saved: saved["net"], ["--key", "net"], ""),
    "key, nested": (lambda state: {"net": {"state_dict": state}}, lambda s: s["net"]["state_dict"], ["--key", "net"], ""),
    "prefix": (
        lambda state: {**prefixed(state, "model."), **prefixed({name: x.clone() for name, x in state.items()}, "ema_model.")},
        lambda saved: {name[6:]: value for name, value in saved.items() if name.startswith("model.")},
        ["--prefix", "model."],
        "model.",
    ),
    "prefix, that is a layer too": (
        lambda state: prefixed(state, "4."),
        lambda saved: {name[2:]: value for name, value in saved.items()},
        ["--prefix", "4."],
        "4.",
    ),
    "state_dict, prefix": (
        lambda state: {"state_dict": prefixed(state, "a.b."), "step": 1},
        lambda saved: {name[4:]: value for name, value in saved["state_dict"].items()},
        ["--prefix", "a.b."],
        "a.b.",
    ),
}


def flat(value, name=""):
    """Every entry of nested dictionaries."""
    if isinstance(value, dict):
        return {key: entry for inner, one in value.items() for key, entry in flat(one, f"{name}/{inner}").items()}
    return {name: value}


@pytest.mark.parametrize("form", FORMS)
def test_the_unchanged_network_loads_it_and_its_logits_are_divided(world, capsys, form):
    make, weights_of, arguments, prefix = FORMS[form]
    world.save(make(world.network.state_dict()))
    before = world.files()
    assert world.run("--temperature", str(T), *arguments) == 0
    after = world.files()
    assert {name: after[name] for name in before} == before  # the original above all
    assert sorted(after.keys() - before.keys()) == ["after.pt", "after.pt.json"]
    old, saved = torch.load(str(world.folder / "before.pt")), torch.load(str(world.folder / "after.pt"))
    network = build()
    network.load_state_dict(weights_of(saved), strict=True)
    image = images(9, seed=8)
    with torch.no_grad():
        z, found = world.network(image), network.eval()(image)
    assert torch.equal(found.argmax(1), z.argmax(1))
    assert torch.allclose(found.double(), z.double() / T, rtol=1e-5, atol=1e-6)
    # Nothing else is another thing than it was, but for the note.
    old, new = flat(old), flat(saved)
    assert set(new) - set(old) <= {"/meta/dacal/temperature", "/meta/dacal/layers"}
    changed = {name for name, value in old.items() if not (torch.equal(value, new[name]) if torch.is_tensor(value) else
                                                           value == new[name])}  # fmt: skip
    assert {name.rsplit("/", 1)[-1] for name in changed} == {f"{prefix}4.weight", f"{prefix}4.bias"}
    assert len(changed) == 2
    note = json.loads(after["after.pt.json"])
    assert note == {"temperature": T, "layers": ["4"], "taken": "given", "reason": "--temperature"}
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{world.folder / 'after.pt'}: T = 1.7 in 4" in out
    assert not world.worked  # a temperature that is given needs no source


@pytest.mark.parametrize("form", FORMS)
def test_folding_a_second_time_is_an_error_before_any_work(world, capsys, form):
    make, _, arguments, _ = FORMS[form]
    world.save(make(world.network.state_dict()))
    assert world.run("--temperature", "2", *arguments) == 0
    capsys.readouterr()
    for more in ([], ["--temperature", "3"]):
        message = error_of(world, capsys, *arguments, *more, checkpoint="after.pt", out="again.pt")
        assert "nothing is folded, got T = 2 in them; start from the original weights" in message


def strictly(text):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_the_estimate_is_the_librarys_and_is_folded(world, capsys):
    assert world.run("--seed", "5") == 0
    options = {"source": (images(8, 1), torch.load(str(world.folder / "source.pt"))), "target": images(8, 2)}
    few = images(8, 2), torch.load(str(world.folder / "target.pt"))
    expected = estimate_temperature(
        world.network, labelled_target=few, generator=torch.Generator().manual_seed(5), max_images=64, **options
    )
    assert abs(expected.temperature - 1) > 0.3
    note = strictly((world.folder / "after.pt.json").read_text())
    assert note["temperature"] == pytest.approx(expected.temperature)
    assert (note["taken"], note["abstained"], note["layers"]) == (expected.taken, expected.abstained, ["4"])
    assert note["reason"] == expected.reason
    assert list(note["estimates"]) == list(expected.estimates)
    for name, each in expected.estimates.items():
        for figure in ("temperature", "spread", "accuracy"):
            value = getattr(each, figure)
            assert note["estimates"][name][figure] == (None if math.isnan(value) else pytest.approx(value))
        assert note["estimates"][name]["note"] == each.note
    assert note["estimates"]["transcal"]["spread"] is None
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(expected.estimates)]] == list(expected.estimates)
    assert lines[0].split() == ["estimate", "T", "+-", "log", "T", "accuracy", "on"]
    for line, each in zip(lines[1:], expected.estimates.values()):
        figures = [each.temperature, each.spread, 100 * each.accuracy]
        shown = [math.nan if word == "-" else float(word.rstrip("%")) for word in line.split()[1:4]]
        assert shown == pytest.approx(figures, abs=0.06, nan_ok=True)
        assert line.endswith(f"  {each.note}")
    assert f"taken: T = {expected.temperature:.4g} ({expected.taken}); {expected.reason}" in lines
    assert "nan" not in out
    network = build()
    network.load_state_dict(torch.load(str(world.folder / "after.pt")))
    with torch.no_grad():
        found, z = network.eval()(images()), world.network(images())
    assert torch.allclose(found, z / expected.temperature, rtol=1e-4, atol=1e-5)


def test_without_out_the_estimates_are_printed_and_nothing_is_written(world, capsys):
    before = world.files()
    assert world.run(out=None) == 0
    after = world.files()
    assert after.pop("worked") == b""
    assert after == before
    alone, _ = capsys.readouterr()
    assert world.run() == 0
    with_out, _ = capsys.readouterr()
    assert with_out.startswith(alone)
    assert alone.splitlines()[-1].startswith("taken: T = ")
    # A network that is folded already may be looked at, too.
    assert world.run(checkpoint="after.pt", out=None) == 0


def test_where_it_abstains_the_weights_are_as_they_were(world, capsys, monkeypatch):
    def abstaining(*_, **options):
        return estimate_temperature(*_, **options)._replace(temperature=1.0, taken="none", reason="why", abstained=True)

    monkeypatch.setattr(command, "estimate_temperature", abstaining)
    assert world.run() == 0
    saved = torch.load(str(world.folder / "after.pt"))
    assert all(torch.equal(saved[name], value) for name, value in world.network.state_dict().items())
    note = json.loads((world.folder / "after.pt.json").read_text())
    assert (note["temperature"], note["taken"], note["abstained"], note["reason"]) == (1.0, "none", True, "why")
    assert "after.pt: T = 1, all weights are as they were" in capsys.readouterr().out


def test_what_the_set_up_file_and_the_options_say_reaches_the_estimate(world, monkeypatch):
    more = """
        class Packed(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.aside, self.last = network_(), nn.Conv2d(3, 2, 1), nn.Conv2d(4, 4, 1)
            def forward(self, image):
                return {"out": self.last(self.body(image)), "aux": self.aside(image)}

        network_, network = network, Packed
        logits_of = lambda out: out["out"]
        layer = "last"
        typical = 1.5
        ignore_index = 200
        value_range = (0.0, 1.0)
    """
    world.set_up(more)
    torch.manual_seed(0)
    state = command.read_setup(world.folder / "setup.py").network().state_dict()
    world.save(state)
    given = {}

    def spy(network, **options):
        given.update(options, training=network.training)
        return estimate_temperature(network, **options)

    monkeypatch.setattr(command, "estimate_temperature", spy)
    assert world.run("--max-images", "5", "--batch-size", "3", "--seed", "9", "--device", "cpu") == 0
    assert given["logits_of"]({"out": 1}) == 1
    names = ("layer", "typical", "ignore_index", "value_range", "max_images", "batch_size", "training")
    assert [given[name] for name in names] == ["last", 1.5, 200, (0.0, 1.0), 5, 3, False]
    assert given["device"] == torch.device("cpu")
    assert given["generator"].initial_seed() == 9
    assert torch.equal(given["target"], images(8, 2))
    assert torch.equal(given["source"][0], images(8, 1))
    assert torch.equal(given["labelled_target"][1], torch.load(str(world.folder / "target.pt")))
    saved = torch.load(str(world.folder / "after.pt"))
    changed = {name for name, value in state.items() if not torch.equal(saved[name], value)}
    assert changed == {"last.weight", "last.bias"}
    assert json.loads((world.folder / "after.pt.json").read_text())["layers"] == ["last"]
    assert folded_temperature(saved) == pytest.approx(json.loads((world.folder / "after.pt.json").read_text())["temperature"])


def test_the_estimate_is_of_the_weights_as_they_are_saved(world, monkeypatch):
    """Before it, the fold is tried: nothing of that may be left."""
    seen = []

    def spy(network, **options):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return estimate_temperature(network, **options)

    monkeypatch.setattr(command, "estimate_temperature", spy)
    assert world.run() == 0
    assert all(torch.equal(value, seen[0][name]) for name, value in world.network.state_dict().items())


def test_loaders_will_do_for_tensors(world):
    more = """
        from torch.utils.data import DataLoader, TensorDataset

        whole_source, whole_target = source, target

        def source():
            return DataLoader(TensorDataset(*whole_source()), batch_size=3)

        def target():
            for image in whole_target().split(2):
                yield image, "labels that nobody looks at"
    """
    world.set_up(more)
    assert world.run() == 0


def test_a_set_up_file_may_import_what_lies_beside_it_wherever_the_command_runs(world, tmp_path_factory):
    """As a process, like its users."""
    (world.folder / "lies_beside_it.py").write_text("from torch import nn\nOUTPUTS = 4\n")
    world.set_up("from lies_beside_it import OUTPUTS\n")
    words = [sys.executable, "-m", "dacal_addon", "calibrate", "before.pt", "setup.py", "--out", "new/one/after.pt"]
    paths = [word if "." not in word or "_" in word else str(world.folder / word) for word in words[:6]]
    # From another folder; that of this checkout has to be named then.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [*paths, *words[6:], "--temperature", "2"], capture_output=True, text=True, cwd=str(elsewhere), env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (elsewhere / "new" / "one").iterdir()) == ["after.pt", "after.pt.json"]


# Misfits


@pytest.mark.parametrize("name", ["network", "source", "target"])
@pytest.mark.parametrize("value", [None, "3"])
def test_a_set_up_file_without_a_part_is_named(world, capsys, name, value):
    world.set_up(f"del {name}\n" if value is None else f"{name} = {value}\n")
    message = error_of(world, capsys)
    assert f"setup.py to define network(), source(), target(), labelled_target(), got no function {name}; see" in message
    assert "`dacal calibrate --help`" in message


@pytest.mark.parametrize("name", ["labelled_target", "logits_of"])
def test_a_further_part_that_is_no_function_is_named(world, capsys, name):
    world.set_up(f"{name} = 3\n")
    assert f"got no function {name}; see" in error_of(world, capsys)


def test_a_network_that_is_none_is_named(world, capsys):
    world.set_up("def network():\n    return dict()\n")
    message = error_of(world, capsys)
    assert "expected network() to return a network, got dict; return the network itself, a torch.nn.Module" in message


CHECKPOINTS = {
    "a wrong key": (
        lambda state: {"net": state, "ema": state, "step": 3},
        ["--key", "model"],
        "expected --key model to name a state dict, got dictionaries 'net', 'ema'; pass one of these",
    ),
    "a key of something else": (
        lambda state: {"net": state, "step": 3},
        ["--key", "step"],
        "expected --key step to name a state dict, got dictionaries 'net'; pass one of these",
    ),
    "a key where there is none": (
        lambda state: state,
        ["--key", "model"],
        "got dictionaries of no name; leave it out: the file is a state dict itself",
    ),
    "no key": (
        lambda state: {"net": state, "ema": state, "step": 3},
        [],
        "with 0.weight of shape (6, 3, 3, 3), got no 0.weight; say where the state dict is: --key net or ema",
    ),
    "no prefix": (
        lambda state: {"state_dict": {**prefixed(state, "model."), **prefixed(state, "ema_model.")}},
        [],
        "got no 0.weight; say what the names in the checkpoint begin with: --prefix ema_model. or model.",
    ),
    "a wrong prefix": (
        lambda state: prefixed(state, "model."),
        ["--prefix", "net."],
        "got no net.0.weight; say what the names in the checkpoint begin with: --prefix model.",
    ),
    "a prefix too many": (
        lambda state: state,
        ["--prefix", "model."],
        "got no model.0.weight; build the network whose weights",
    ),
    "half a prefix": (lambda state: prefixed(state, "model."), ["--prefix", "model"], "; say what the names in the checkpoint"),
    "another network": (
        lambda state: {**state, "4.weight": torch.zeros(7, 6, 1, 1)},
        [],
        "expected the weights of network(), with 4.weight of shape (4, 6, 1, 1), got 4.weight of shape (7, 6, 1, 1); build the",
    ),
    "a larger network": (
        lambda state: {**state, "5.weight": torch.zeros(7, 6)},
        [],
        "with 5.weight of shape none, got 5.weight of shape (7, 6); build the network whose weights were saved",
    ),
    "a number among the weights": (lambda state: {**state, "epoch": 3}, [], "with epoch of shape none, got epoch of shape"),
    "a list": (lambda state: [state], [], "expected a checkpoint that is a dictionary, got list; save network.state_dict()"),
    "a tensor": (lambda state: torch.ones(3), [], "expected a checkpoint that is a dictionary, got float32 (3,); save"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_told_with_what_to_do(world, capsys, case):
    make, arguments, message = CHECKPOINTS[case]
    world.save(make(world.network.state_dict()))
    assert message in error_of(world, capsys, *arguments)


def test_a_file_that_is_missing_is_named(world, capsys):
    folder = world.folder
    expected = "expected CHECKPOINT to be a file, got {}, which does not exist; check the path"
    assert expected.format(folder / "nothing.pt") in error_of(world, capsys, checkpoint="nothing.pt")
    expected = "expected SETUP to be a file, got {}, which does not exist; check the path"
    assert expected.format(folder / "nothing.py") in error_of(world, capsys, setup="nothing.py")
    (folder / "after.pt").write_bytes(b"an old one")
    assert "which does not exist" in error_of(world, capsys, checkpoint="nothing.pt")
    (folder / "folder").mkdir()
    assert f"got {folder / 'folder'}, a folder; check the path" in error_of(world, capsys, checkpoint="folder")


@pytest.mark.parametrize("case", ["empty", "text", "cut"])
def test_a_file_that_is_no_checkpoint_is_named(world, capsys, case):
    path = world.folder / "before.pt"
    path.write_bytes({"empty": b"", "text": b"hello", "cut": path.read_bytes()[:900]}[case])
    message = error_of(world, capsys)
    assert f"expected tensors and plain values that torch.load reads, got {path}, of which it says " in message
    assert message.endswith("; check that it is a checkpoint, and whole\n")


def only_loads_weights(path):
    try:
        torch.load(str(path))
    except Exception:
        return True
    return False


def test_a_checkpoint_with_other_objects_says_how_to_allow_them(world, capsys):
    world.save({"state_dict": world.network.state_dict(), "options": argparse.Namespace(rate=0.1)})
    if not only_loads_weights(world.folder / "before.pt"):  # torch < 2.6
        assert world.run("--temperature", "2") == 0
        return
    message = error_of(world, capsys)
    assert f"got {world.folder / 'before.pt'}, with Python objects among them; save the state dict alone" in message
    world.set_up("import argparse\ntorch.serialization.add_safe_globals([argparse.Namespace])\n")
    try:
        assert world.run("--temperature", "2") == 0
        saved = torch.load(str(world.folder / "after.pt"))
    finally:
        torch.serialization.clear_safe_globals()
    assert saved["options"].rate == 0.1


def test_out_must_be_a_file_that_can_be_written_and_another_one(world, capsys):
    expected = (
        "expected --out to be another file than the checkpoint, got {}; name a new file, and keep the original to train on"
    )
    assert expected.format(world.folder / "before.pt") in error_of(world, capsys, out="before.pt")
    (world.folder / "link.pt").symlink_to(world.folder / "before.pt")
    assert expected.format(world.folder / "link.pt") in error_of(world, capsys, out="link.pt")
    (world.folder / "folder").mkdir()
    expected = "expected --out to be a file, got {0}, a folder; name a file in it, for example {0}/calibrated.pth"
    assert expected.format(world.folder / "folder") in error_of(world, capsys, out="folder")
    message = error_of(world, capsys, out="setup.py/after.pt")
    assert f"expected --out {world.folder / 'setup.py/after.pt'} to be writable, got " in message
    (world.folder / "taken.pt.json").mkdir()
    assert world.run("--temperature", "2", out="taken.pt") == 1
    assert f"expected --out {world.folder / 'taken.pt'} to be writable, got Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "-1", "nan", "inf"])
def test_a_temperature_that_is_none_is_refused(world, capsys, temperature):
    assert "expected a finite temperature > 0, got " in error_of(world, capsys, f"--temperature={temperature}")


def test_a_temperature_without_out_is_refused(world, capsys):
    message = error_of(world, capsys, "--temperature", "2", out=None)
    assert "expected --out beside --temperature, got none; say with --out where to write, or leave --temperature out" in message


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_here_is_named(world, capsys, device):
    message = error_of(world, capsys, "--device", device)
    assert f"expected --device to be here, got {device!r}; leave it out for the CPU" in message


FOLDS = {
    "no last layer": (
        """
        class Unknown(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = network_()
            def forward(self, image):
                return self.body(image)
        network_, network = network, Unknown
        """,
        'say which with layer="...", one of "body.4" (Conv2d with 4 outputs)',
    ),
    "a layer of no such name": ("layer = 'head'\n", 'say which with layer="..."'),
    "a layer that is not the last": ("layer = '0'\n", "expected logits that are those before, divided by T"),
    "a softmax behind it": (
        """
        class Probable(nn.Module):
            def __init__(self):
                super().__init__()
                self.classifier = network_()
            def forward(self, image):
                return self.classifier(image).softmax(1)
        network_, network = network, Probable
        """,
        "expected logits that are those before, divided by T",
    ),
    "weight norm": (
        """
        def plain():
            return nn.Sequential(nn.Conv2d(3, 6, 3), nn.utils.weight_norm(nn.Conv2d(6, 4, 1)))
        network = plain
        """,
        "a layer with weight norm has to be made plain before it is saved",
    ),
    "half precision": (
        """
        class Half(nn.Module):
            def __init__(self):
                super().__init__()
                self.classifier = nn.Conv2d(3, 4, 1).half()
            def forward(self, image):
                return nn.functional.conv2d(image, self.classifier.weight.float())
        network = Half
        """,
        "fold before converting: half precision rounds the weights anew",
    ),
    "no target image": ("def target():\n    return []\n", "calibrate: expected target(): images (N, K, *spatial), or an iter"),
    "no images at all": ("def target():\n    return 3\n", "or an iterable of batches of them, got int; pass tensors, or"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_cannot_be_folded_is_named_before_any_work(world, capsys, case):
    more, message = FOLDS[case]
    world.set_up(more)
    world.save(command.read_setup(world.folder / "setup.py").network().state_dict())
    assert message in error_of(world, capsys)


def test_what_the_estimate_refuses_is_one_line_too(world, capsys):
    world.set_up("def source():\n    return images(8, 1)\n")
    message = error_of(world, capsys)
    assert message.startswith(
        "dacal calibrate: estimate_temperature: expected source: a pair (image (N, K, *spatial), label (N, *spatial))"
    )
    world.set_up("ignore_index = 1\ndef source():\n    return images(8, 1), torch.ones(8, 12, 16).long()\n")
    assert "source labels that are classes, got none; check labels and ignore_index" in error_of(world, capsys)


@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "FileNotFoundError", "KeyError"])
@pytest.mark.parametrize("part", ["network", "source", "target", "labelled_target"])
def test_errors_of_the_set_up_files_own_keep_their_traceback(world, kind, part):
    world.set_up(f"def {part}():\n    raise {kind}('mine')\n")
    path = list(sys.path)
    with pytest.raises(Exception, match="mine") as caught:
        world.run()
    assert type(caught.value).__name__ == kind
    assert sys.path == path
    world.set_up("raise ValueError('mine')\n")
    with pytest.raises(ValueError, match="mine"):
        world.run()
    assert not (world.folder / "after.pt").exists()


# The help


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as done:
        main([*words, "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_the_help_shows_a_set_up_file_that_is_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, "calibrate")
    assert all(len(line) < 80 for line in text.splitlines())
    options = {f"--{name.replace('_', '-')}" for name in command.CalibrateOptions._fields[2:]}
    assert all(option in text for option in options)
    assert cli.CALIBRATE in text
    assert text.endswith(cli.SETUP_EXAMPLE)
    code = textwrap.dedent("".join(line + "\n" for line in cli.SETUP_EXAMPLE.splitlines() if not line[:1].strip()))
    mine = types.ModuleType("mine")
    mine.build = lambda num_classes: nn.Conv2d(3, num_classes, 1)
    mine.held_out_loader, mine.target_loader = "the source's".upper, "the target's".upper
    monkeypatch.setitem(sys.modules, "mine", mine)
    (tmp_path / "setup.py").write_text(code)
    found = command.read_setup(tmp_path / "setup.py")
    assert found.network().out_channels == 19
    assert (found.source(), found.target()) == ("THE SOURCE'S", "THE TARGET'S")
    assert found.logits_of({"out": 1}) == 1
    assert (found.layer, found.typical, found.ignore_index, found.value_range) == ("head.classifier", 1.0, 255, (0.0, 1.0))
    # Every name that a set-up file may define is shown.
    assert all(f"\n{name} = " in code or f"\ndef {name}(" in code for name in command.Setup._fields)


def test_the_command_is_listed(capsys):
    assert "calibrate" in help_of(capsys)
