"""What the integrations know that is no host's, and needs none: options, listeners, heads that are taught, checkpoints."""

import contextlib
import logging
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dacal_addon.integrations
from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler
from dacal_addon.integrations import checkpoint
from dacal_addon.integrations.calibration import Calibration
from dacal_addon.integrations.criterion import TaughtHeads, window_like
from dacal_addon.integrations.doubts import Run, doubts, learning_iterations
from dacal_addon.integrations.listening import Call, FirstCall, shadowed, unshadowed
from dacal_addon.integrations.options import HostOptions, parse
from dacal_addon.learners import LEARNERS, BilevelCalibrationStep, SkipKind, TemperatureFit
from dacal_addon.learners.skips import waiting

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_all_files_but_those_named_after_it_can_be_imported_without_a_library():
    names = {module.name for module in pkgutil.iter_modules(dacal_addon.integrations.__path__)}
    named_after = {"mmengine", "mmseg", "torchmetrics"}
    imports = "; ".join(f"import dacal_addon.integrations.{name}" for name in sorted(names - named_after))
    code = f"import sys; {imports}; print('mmseg' in sys.modules, 'mmcv' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert output.split() == ["False", "False"]
    assert {"listening", "criterion", "calibration"} | named_after <= names


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"lables": "soft"}, ValueError, r"uda\.dacal: expected keys among labels, learner, .*, got 'lables'; mend"),
        ({"labels": "calibrated"}, ValueError, "labels to be one of 'soft', 'hard'"),
        ({"learner": "fitted"}, ValueError, "learner to be one of 'fit', 'bilevel'"),
        ({"engine": "unroll"}, ValueError, "engine to be one of"),
        ({"judged_set": "all"}, ValueError, "judged_set to be one of 'source_and_target_pixels', "),
        ({"outer_set": "source_pixels"}, ValueError, "expected keys among .* judged_set, .*, got 'outer_set'"),
        ({"outer_loss": "entropy"}, ValueError, "outer_loss to be one of 'host', 'cross_entropy', "),
        ({"clip_norm": "5"}, ValueError, "clip_norm: a number, got '5'"),
        ({"clip_norm": 0}, ValueError, "clip_norm > 0, the host's max_norm"),
        ({"base": torch.nn.Module}, ValueError, r"base: 'module\.Class' or 'Class', got <class"),
        ({"logits_of": True}, ValueError, "logits_of: an index or a key, got True"),
        ({"every": -1}, ValueError, "a whole number every >= 0, got -1"),
        ({"every": 1.5}, ValueError, "a whole number every >= 0, got 1.5"),
        ({"warmup_iters": "3000"}, ValueError, "a whole number warmup_iters"),
        ({"meta_lr": "3e-4"}, ValueError, "meta_lr: a number, got '3e-4'"),
        ({"meta_lr": -1.0}, ValueError, "meta_lr >= 0"),
        ({"max_ratio": True}, ValueError, "max_ratio: a number, got True"),
        ({"restore_teacher": "yes"}, ValueError, "restore_teacher: True or False"),
        ("soft", TypeError, "expected a dict, got str"),
    ],
)
def test_a_mistake_in_the_config_is_named(config, error, message):
    with pytest.raises(error, match=message):
        parse(config)


def test_the_defaults_suit_the_hosts_runs():
    assert parse({}) == HostOptions()
    assert not HostOptions().off
    assert HostOptions(every=0).off is False
    assert (HostOptions().learner, HostOptions().every) == ("bilevel", 4)
    fit, bilevel = parse({"learner": "fit"}), parse({"learner": "bilevel", "meta_lr": None, "warmup_iters": None})
    assert bilevel == HostOptions()
    assert (fit.warmup, fit.learning_rate) == (0, 2e-3)
    assert (bilevel.warmup, bilevel.learning_rate) == (3000, 3e-4)
    assert bilevel.warmup < 40_000 / 10
    own = parse({"learner": "bilevel", "meta_lr": 0.0, "warmup_iters": 0})
    assert (own.warmup, own.learning_rate) == (0, 0.0)


def test_every_window_of_the_label_is_found_and_nothing_else():
    label = torch.arange(2 * 6 * 7).view(2, 1, 6, 7)
    soft = label.double().repeat(1, 3, 1, 1)
    for y0, y1, x0, x1 in ((0, 6, 0, 7), (0, 1, 0, 1), (2, 5, 3, 7), (5, 6, 6, 7), (1, 4, 0, 2)):
        part = label[:, :, y0:y1, x0:x1].squeeze(1)
        assert torch.equal(window_like(part, label, soft)[:, 0].long(), part)
    for stranger in (label.clone()[:, 0], label[:1, 0], label[:, 0, ::2, ::2], label[:, 0].transpose(1, 2).contiguous()):
        with pytest.raises(ValueError, match="expected the head to be taught the label it is given"):
            window_like(stranger, label, soft)


def test_lessons_end_also_after_an_error():
    heads = TaughtHeads([])
    criterion = heads.criterion(lambda *args, **options: "host")
    label = torch.zeros(1, 1, 2, 2).long()
    for context in (lambda: heads.soft(label, torch.ones(1, 2, 2, 2)), lambda: heads.judged(lambda *args: "judge")):
        with contextlib.suppress(ZeroDivisionError), context():
            assert criterion(torch.zeros(1, 2, 2, 2), label[:, 0]) != "host"
            raise ZeroDivisionError
        assert criterion(torch.zeros(1, 2, 2, 2), label[:, 0]) == "host"


def test_a_shadow_covers_an_attribute_of_the_instance_too():
    class Owner:
        pass

    owner = Owner()
    owner.name = "own"
    with contextlib.suppress(ZeroDivisionError), shadowed(owner, "name", lambda name: name + " shadowed"):
        assert owner.name == "own shadowed"
        raise ZeroDivisionError
    assert vars(owner) == {"name": "own"}


def test_a_shadow_can_be_lifted_for_a_while():
    class Owner:
        def name(self):
            return "class"

    owner = Owner()
    with shadowed(owner, "name", lambda name: lambda: "shadow"):
        with contextlib.suppress(ZeroDivisionError), unshadowed(owner, "name"):
            assert owner.name() == "class"
            raise ZeroDivisionError
        assert owner.name() == "shadow"


def forward_train(stage, img, *more, img_metas=None, **rest):
    return stage, img, more, img_metas, rest


def test_a_call_is_made_again_as_it_was_made():
    call = Call.of(forward_train, 1, "image", "more", img_metas="metas", levels=2)
    assert call() == (1, "image", ("more",), "metas", {"levels": 2})
    assert call.argument("levels") == 2
    assert call.changed(img="other", levels=3, weight=4)() == (1, "other", ("more",), "metas", {"levels": 3, "weight": 4})
    assert call() == (1, "image", ("more",), "metas", {"levels": 2})  # unchanged itself
    assert Call.of(forward_train, 1, img="image").changed(img_metas="metas")() == (1, "image", (), "metas", {})
    with pytest.raises(TypeError, match=r"the host's forward_train to be called with label, got \(stage, img, more, "):
        call.argument("label")
    strict = Call.of(lambda img, metas: None, 1, 2)
    with pytest.raises(
        TypeError, match=r"<lambda> to take label, got \(img, metas\) for \(img, metas\); give it mmseg's names"
    ):
        strict.changed(label=3)


def test_the_first_call_is_remembered_and_no_other():
    heard = FirstCall(lambda call, returned: (call.argument("img"), returned))
    listener = heard(lambda img: img + 1)
    assert heard.call is None
    assert [listener(1), listener(5)] == [2, 6]
    assert heard.kept == (1, 2)


def test_heads_that_never_ask_are_noticed():
    heads, label, soft = TaughtHeads([]), torch.zeros(1, 1, 2, 2).long(), torch.ones(1, 2, 2, 2)
    criterion = heads.criterion(lambda *args, **options: "host")
    with heads.soft(label, soft):
        criterion(torch.zeros(1, 2, 2, 2), label[:, 0])
    with pytest.raises(
        RuntimeError, match=r"heads that ask their loss_decode\.cls_criterion for the loss, got a pass"
    ), heads.soft(label, soft):
        pass


@pytest.mark.parametrize("learn", sorted(LEARNERS))
def test_a_learners_state_survives_as_plain_tensors(learn):
    def made():
        net = MetaTemperatureNet(4, **LEARNERS[learn].defaults.net_options)
        student = torch.nn.Conv2d(3, 4, 1)
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        sgd = torch.optim.SGD(student.parameters(), lr=0.1)
        labeler = SoftPseudoLabeler(net, weight="none")
        return LEARNERS[learn].for_loop(labeler, student=student, optimizer=sgd, meta_optimizer=adam, warmup=0)

    g = torch.Generator().manual_seed(0)
    image, label = torch.rand(3, 3, 8, 8, generator=g), torch.randint(0, 4, (3, 8, 8), generator=g)
    teacher = torch.nn.Conv2d(3, 4, 1)
    straight = made()
    for _ in range(3):
        straight(image, label, image, teacher=teacher)
    flat = checkpoint.flatten(straight)
    assert all(type(value) is torch.Tensor and "." not in name.split(".")[0] for name, value in flat.items())
    assert {"generator", "iteration", "temperature_net.last.weight", "meta_optimizer.0.step"} <= set(flat)
    resumed = made()
    resumed.generator.manual_seed(99)
    checkpoint.restore(flat, resumed)
    again = checkpoint.flatten(resumed)
    assert flat.keys() == again.keys()
    assert all(torch.equal(flat[name], again[name]) for name in flat)
    assert resumed.iteration == 3
    assert resumed.meta_optimizer.param_groups[0]["lr"] == 0.01
    flat["iteration"] += 5  # what was saved is a copy
    assert straight.iteration == 3


def test_the_learners_own_defaults_are_the_hosts():
    for learn, kind in (("fit", TemperatureFit), ("bilevel", BilevelCalibrationStep)):
        assert HostOptions(learner=learn).learning_rate == kind.defaults.learning_rate
        assert HostOptions().judged_set is None


def a_run(**known):
    return Run(**{"iterations": 40_000, "ignored_rows": 135, "height": 512, **known})


@pytest.mark.parametrize(
    ("config", "run", "messages"),
    [
        ({}, a_run(), []),
        ({"learner": "fit", "every": 1}, a_run(), []),
        ({"every": 0}, a_run(iterations=10), []),  # T is to stay: nothing is amiss
        ({"learner": "fit"}, a_run(iterations=10), []),  # it has no warm-up
        ({}, a_run(iterations=None), []),
        ({}, a_run(iterations=3001), []),
        (
            {},
            a_run(iterations=3000),
            [r"never learn: warmup_iters=3000, the default, and the run has 3000 .* warmup_iters=300,"],
        ),
        (
            {"warmup_iters": 50},
            a_run(iterations=50),
            [r"never learn: warmup_iters=50, and the run has 50 iterations; .*every=0"],
        ),
        ({"meta_lr": 0}, a_run(), ["never learn: meta_lr=0; leave it out"]),
        ({"labels": "hard"}, a_run(), ["nothing is taught them: labels='hard'; .* every=0 to save the time"]),
        ({}, a_run(height=136), []),
        ({}, a_run(height=135), ["no pseudo-label ever has a weight: .* leave out 135 rows of crops of 135; lower them"]),
        ({"learner": "fit", "clip_norm": 5}, a_run(), ["^clip_norm= of no effect: they are the meta-step's"]),
        ({"learner": "fit", "clip_norm": 5, "engine": "higher"}, a_run(), ["^engine= and clip_norm= of no effect"]),
        ({"clip_norm": 5, "engine": "higher"}, a_run(), []),
        ({"labels": "hard", "meta_lr": 0}, a_run(height=99), ["a weight", "meta_lr=0", "labels='hard'"]),
    ],
)
def test_settings_that_cannot_work_are_doubted_and_no_others(config, run, messages):
    found = doubts(parse(config), run)
    assert len(found) == len(messages)
    for one, message in zip(found, messages):
        assert re.search(message, one), one
        assert "; " in one  # and what to do


@pytest.mark.parametrize(("warmup", "every", "iterations"), [(3000, 4, 40_000), (0, 1, 7), (2, 3, 3), (2, 3, 9), (5, 2, 5)])
def test_the_iterations_at_which_temperatures_may_learn_are_counted(warmup, every, iterations):
    counted = sum(waiting(i, warmup=warmup, every=every) is None for i in range(iterations))
    assert learning_iterations(HostOptions(warmup_iters=warmup, every=every), iterations) == counted


def test_doubts_are_warnings_of_the_hosts_log_once(caplog):
    given = {"student": torch.nn.Conv2d(3, 4, 1), "heads": TaughtHeads([]), "num_classes": 4, "threshold": 0.9}
    calibration = Calibration(parse({}), **given, ignore_top=3, ignore_bottom=5, logger=logging.getLogger("mmseg"))
    with caplog.at_level("INFO", logger="mmseg"):
        for _ in range(3):
            calibration.doubt(torch.zeros(1, 3, 8, 16), iterations=100)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    rows, never = (record.getMessage() for record in caplog.records)
    assert rows.startswith("dacal: no pseudo-label ever has a weight: ")
    assert "leave out 8 rows of crops of 8" in rows
    assert never.startswith("dacal: temperatures never learn: ")


class Datasets:
    """mmcv's `Config`, as far as the patches' configs use it: remembers which data set was asked for."""

    def __init__(self, asked):
        self.asked = asked
        self.data = self

    def fromfile(self, path):
        self.asked.append(path)
        return self

    def to_dict(self):
        return {"train": {"target": {}}}


@pytest.mark.parametrize(("host", "seed", "ending"), [("daformer", 0, "json"), ("hrda", 1, "json"), ("mic", 2, "py")])
def test_the_patches_experiments_say_their_data_set_and_seed(host, seed, ending, tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q"], cwd=str(tmp_path), check=True)
    subprocess.run(["git", "apply", str(EXAMPLES / host / "dacal.patch")], cwd=str(tmp_path), check=True)
    page = (EXAMPLES / host / "README.md").read_text()
    names = []
    for path in sorted(tmp_path.rglob("dacal/*.py")):
        asked, config = [], {}
        monkeypatch.setitem(sys.modules, "mmcv", SimpleNamespace(Config=Datasets(asked)))
        exec(path.read_text(), config)
        assert (config["seed"], config["name"]) == (seed, f"dacal_{path.stem}_{host}_s{seed}")
        # Of another seed the name says that one.
        exec(path.read_text().replace(f"seed = {seed}\n", "seed = 7\n"), config)
        assert config["name"].endswith("_s7")
        if asked:  # gta2cs has the host's own data set, and its name
            source, target, crop = re.search(r"/uda_(\w+)_to_(\w+?)_(\d+x\d+)\.py$", asked[0]).groups()
            # By the rule of the hosts' experiments.py.
            assert config["name_dataset"] == f"{source}2{target}" + ("" if crop == "512x512" else f"_{crop}")
        names.append(path.stem)
    assert names == ["cs2acdc", "gta2cs", "synthia2cs"]
    assert f"`dacal_gta2cs_{host}_s{seed}`" in page
    assert re.search(rf"^    RUN=\d+_\d+_dacal_gta2cs_{host}_s{seed}_\w+\n    CONFIG=\S+/\$RUN\.{ending}\n", page, re.MULTILINE)


def test_the_hosts_page_shows_warnings_as_they_are():
    page = (EXAMPLES / "mmseg/README.md").read_text()
    shown = re.findall(r"^\| `([^`]*(?:never learn|ever has a weight|of no effect|taught them)[^`]*)` \|", page, re.MULTILINE)
    assert len(shown) == 5
    said = doubts(parse({}), a_run(iterations=2000)) + doubts(parse({"meta_lr": 0, "labels": "hard"}), a_run())
    said += doubts(parse({}), a_run(height=128)) + doubts(
        parse({"learner": "fit", "engine": "higher", "clip_norm": 5}), a_run()
    )
    assert len(said) == 5
    for one in shown:
        assert any(each.startswith(one) for each in said), one


def test_the_log_that_the_page_shows_has_names_that_are_logged():
    page = (EXAMPLES / "mmseg/README.md").read_text()
    section = page[page.index("## What the log shows") : page.index("## Checkpoints")]
    names = set(re.findall(r"\bdacal\.(\w+): -?\d", section))
    logged = {"temperature_mean", "temperature_min", "temperature_max", "outer_loss", "hypergradient_log10"}
    assert logged <= names <= logged | {f"skipped_{kind.value}" for kind in SkipKind}
    assert f"dacal: no meta-step ({waiting(0, warmup=2, every=4)})\n" in section
