"""What the integrations know that is no host's, and needs none: options, listeners, heads that are taught, checkpoints."""

import contextlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import dacal_addon.integrations
from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler
from dacal_addon.integrations import checkpoint
from dacal_addon.integrations.criterion import TaughtHeads, window_like
from dacal_addon.integrations.listening import Call, FirstCall, shadowed, unshadowed
from dacal_addon.integrations.options import HostOptions, parse
from dacal_addon.learners import LEARNERS, BilevelCalibrationStep, TemperatureFit


def test_all_files_but_those_named_after_it_can_be_imported_without_a_library():
    names = {module.name for module in pkgutil.iter_modules(dacal_addon.integrations.__path__)}
    imports = "; ".join(f"import dacal_addon.integrations.{name}" for name in sorted(names - {"mmseg", "torchmetrics"}))
    code = f"import sys; {imports}; print('mmseg' in sys.modules, 'mmcv' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert output.split() == ["False", "False"]
    assert {"listening", "criterion", "calibration", "mmseg", "torchmetrics"} <= names


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"lables": "soft"}, ValueError, r"uda\.dacal: expected keys among labels, learn, .*, got 'lables'; mend or remove it"),
        ({"labels": "calibrated"}, ValueError, "labels to be one of 'soft', 'hard'"),
        ({"learn": "fitted"}, ValueError, "learn to be one of 'fit', 'bilevel'"),
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
    assert (HostOptions().learn, HostOptions().every) == ("bilevel", 4)
    fit, bilevel = parse({"learn": "fit"}), parse({"learn": "bilevel", "meta_lr": None, "warmup_iters": None})
    assert bilevel == HostOptions()
    assert (fit.warmup, fit.learning_rate) == (0, 2e-3)
    assert (bilevel.warmup, bilevel.learning_rate) == (3000, 3e-4)
    assert bilevel.warmup < 40_000 / 10
    own = parse({"learn": "bilevel", "meta_lr": 0.0, "warmup_iters": 0})
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
        assert HostOptions(learn=learn).learning_rate == kind.defaults.learning_rate
        assert HostOptions().judged_set is None
