"""`DACalDACS` on a stand-in with the hosts' interface; `test_upstream.py` has the hosts themselves."""

import copy
import gc
import importlib
import math
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dacal_addon.calibrate import Estimate
from dacal_addon.calibrate.estimate import UNKNOWN_SPREAD
from dacal_addon.calibrate.estimators import TYPICAL, TYPICAL_SPREAD
from dacal_addon.integrations.criterion import TaughtHeads, soft_label_loss
from dacal_addon.learners import SkipKind, bilevel

KINDS = {
    "daformer": {},
    "hrda": {"kind": "hrda"},
    "mic, target": {"kind": "hrda", "mask_mode": "separatetrgaug"},
    "mic, both": {"mask_mode": "separate"},
    "mic, source": {"mask_mode": "separatesrc"},
    "mic, own teacher": {"mask_mode": "separatetrg", "own_teacher": True},
}
FORKS = ("gta2csDACS", "PiPa", "SiamSeg")
IN_FORKS = "mmseg.models.uda.dacs_infer."
META = [{"img_norm_cfg": {"mean": [100.0, 110.0, 120.0], "std": [50.0, 55.0, 60.0]}}] * 2


@pytest.fixture(scope="module")
def host():
    """The stand-in's DACS and our subclass of it."""
    if "mmseg" in sys.modules:  # pragma: no cover
        pytest.fail("another mmseg is loaded")
    sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
    try:
        from mmseg.models import UDA

        import dacal_addon.integrations.mmseg  # noqa: F401

        yield UDA.classes
    finally:
        sys.path.remove(str(Path(__file__).parent / "stand_in"))
        for name in [name for name in sys.modules if name.split(".")[0] == "mmseg" or name.endswith("integrations.mmseg")]:
            del sys.modules[name]


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def batch(number, images=2, **extra):
    g = torch.Generator().manual_seed(number)
    label = torch.randint(0, 4, (images, 1, 4, 4), generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    label[:, :, :2, :2] = 255
    both = torch.randn(2, images, 3, 16, 16, generator=g)
    return {
        "img": both[0],
        "img_metas": META,
        "gt_semantic_seg": label,
        "target_img": both[1],
        "target_img_metas": META,
        **extra,
    }


AT_ONCE = {"warmup_iters": 0, "every": 1}
"""Most tests have a few iterations, and temperatures are to learn at each of them."""


def made(host, name="DACalDACS", *, dacal=None, **cfg):
    seed(0)
    model = host[name](**cfg, **({} if dacal is None else {"dacal": {**AT_ONCE, **dacal}}))
    groups = [
        {"params": list(model.model.backbone.parameters()), "lr": 0.01, "weight_decay": 0.1},
        {"params": list(model.model.decode_head.parameters()), "lr": 0.02},
    ]
    return model, torch.optim.AdamW(groups)


def train(model, optimizer, iterations=3, first=0, **extra):
    logs = []
    for i in range(first, first + iterations):
        logs.append(model.train_step(batch(i, **extra), optimizer)["log_vars"])
    return logs


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("dacal.")}


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("learn", "every"), [("fit", 0), ("fit", 1), ("bilevel", 1)])
def test_with_hard_labels_every_number_is_the_hosts(host, kind, learn, every):
    # With every=1 the temperatures learn beside it, and leave nothing behind in the networks or in random states.
    plain, optimizer = made(host, "DACS", **KINDS[kind])
    expected = train(plain, optimizer), state(plain), random_states()
    ours, optimizer = made(host, dacal={"labels": "hard", "learner": learn, "every": every}, **KINDS[kind])
    logs = train(ours, optimizer)
    own = [{name: value for name, value in log.items() if not name.startswith("dacal.")} for log in logs]
    assert own == expected[0]
    assert same(state(ours), expected[1])
    assert random_states() == expected[2]
    learned = {"fit": "dacal.fit_loss", "bilevel": "dacal.outer_loss"}
    assert all([name for name in learned.values() if name in log] == [learned[learn]] for log in logs) if every else own == logs
    assert all(math.isfinite(log[learned[learn]]) for log in logs if every)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_soft_labels_reach_the_student_in_the_mixed_and_the_masked_pass(host, kind, learn):
    ours, optimizer = made(host, dacal={"learner": learn, "every": 0}, **KINDS[kind])
    heard = listen(ours)
    (log,) = train(ours, optimizer, 1)
    plain, optimizer = made(host, "DACS", **KINDS[kind])
    (hard,) = train(plain, optimizer, 1)
    assert log["decode.loss_seg"] == hard["decode.loss_seg"]
    assert log["mix.decode.loss_seg"] != hard["mix.decode.loss_seg"]
    share = 0.9 if "kind" in KINDS[kind] else 1.0
    mixed = heard["passes"][1]
    q = torch.softmax(heard["teacher"][0].double(), 1)  # every=0: T is 1
    mask = heard["masks"][0]
    soft = torch.where(mask, one_hot(batch(0)["gt_semantic_seg"][:, 0]), q)
    assert log["mix.decode.loss_seg"] == pytest.approx(share * soft_loss(mixed, 0, soft), rel=1e-5)
    if "kind" in KINDS[kind]:
        assert log["mix.decode.hr.loss_seg"] == pytest.approx(0.1 * soft_loss(mixed, 1, window(soft, mixed["box"])), rel=1e-5)
    if "mask_mode" not in KINDS[kind]:
        return
    masked = heard["passes"][2]
    if kind == "mic, both":
        soft = torch.stack([one_hot(batch(0)["gt_semantic_seg"][:1, 0])[0], q[0]])
    elif kind == "mic, source":
        soft = one_hot(batch(0)["gt_semantic_seg"][:, 0])
    elif kind == "mic, own teacher":
        soft = torch.softmax(heard["own_teacher"][0].double(), 1)
    else:
        soft = q
    assert log["masked.decode.loss_seg"] == pytest.approx(share * soft_loss(masked, 0, soft), rel=1e-5)


@pytest.mark.parametrize("kind", ["daformer", "hrda", "mic, target", "mic, both", "mic, own teacher"])
@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_every_pass_has_the_hosts_weights(host, kind, learn):
    every = 1 if learn == "fit" else 0  # the meta-step's passes would be heard, too
    valid = torch.ones(2, 1, 16, 16)
    valid[:, :, :, :3] = 0
    passes = []
    for name, dacal in (("DACS", None), ("DACalDACS", {"learner": learn, "every": every})):
        model, optimizer = made(host, name, dacal=dacal, **KINDS[kind])
        heard = listen(model)
        train(model, optimizer, 1, valid_pseudo_mask=valid)
        passes.append(heard["passes"])
    assert len(passes[0]) == len(passes[1]) >= 2
    for hosts, own in zip(*passes):
        assert len(hosts["weights"]) == len(own["weights"])
        assert all(torch.equal(weight, expected) for weight, expected in zip(own["weights"], hosts["weights"]))
    assert 0 < float(passes[0][1]["weights"][0].mean()) < 1


@pytest.mark.parametrize("kind", ["daformer", "hrda", "mic, own teacher"])
def test_the_fit_is_a_step_on_blends_of_the_target_as_the_teacher_sees_them(host, kind):
    ours, optimizer = made(host, dacal={"learner": "fit"}, **KINDS[kind])
    valid = torch.ones(3, 1, 16, 16)
    valid[:, :, :, :3] = 0
    train(ours, optimizer, 1, images=3, valid_pseudo_mask=valid)
    net = copy.deepcopy(ours._dacal.learner.temperature_net)
    adam = torch.optim.Adam(net.parameters())
    adam.load_state_dict(copy.deepcopy(ours._dacal.learner.meta_optimizer.state_dict()))
    adam.param_groups[0]["lr"] = 2e-3
    heard = listen(ours)
    (log,) = train(ours, optimizer, 1, first=1, images=3, valid_pseudo_mask=valid)
    g = torch.Generator().manual_seed(0)
    _, shift = (int(torch.randint(1, 3, (1,), generator=g)) for _ in range(2))
    pseudo = heard["teacher"][0].argmax(1)
    pseudo[:, :1] = 255
    pseudo[:, :, :3] = 255
    label = torch.where(pseudo == pseudo.roll(shift, 0), torch.full_like(pseudo, 255), pseudo)
    assert (label != 255).sum() > 20
    image = batch(1, images=3)["target_img"]
    with torch.no_grad():
        z = ours.ema_model.encode_decode(0.65 * image + 0.35 * image.roll(shift, 0), META)
    # Weighted to the class shares of the pixels that are not ignored; a mean weighted by these is torch's own.
    share = torch.tensor([float((pseudo == c).sum()) / max(1, int((label == c).sum())) for c in range(z.shape[1])])
    loss = F.cross_entropy(z / net(z), label, weight=share, ignore_index=255)
    adam.zero_grad()
    loss.backward()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    adam.step()
    assert log["dacal.fit_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for own, expected, start in zip(ours._dacal.learner.temperature_net.parameters(), net.parameters(), before):
        assert torch.allclose(own, expected, atol=1e-6)
        assert not torch.allclose(own, start, atol=1e-4)
        assert own.grad is None


def test_the_fits_own_pass_leaves_nothing_behind(host):
    found = {}

    def disturb(module, *_):
        module.calls = getattr(module, "calls", 0) + 1
        module.draws = torch.rand(1).item(), np.random.rand(), random.random()

    for name, dacal in (("DACS", None), ("DACalDACS", {"labels": "hard", "learner": "fit"})):
        model, optimizer = made(host, name, dacal=dacal, kind="hrda")
        model.ema_model.backbone.register_forward_hook(disturb)
        head, pictures = model.ema_model.decode_head, []
        head.debug = True
        head.register_forward_hook(lambda module, *_, pictures=pictures: pictures.append(module.debug))
        train(model, optimizer, 3)
        backbone = model.ema_model.backbone
        modes = [module.training for module in model.ema_model.modules()]
        found[name] = random_states(), backbone.calls, backbone.draws, modes, head.debug, sum(pictures)
        found[name + " state"] = state(model)
    assert found["DACalDACS"] == found["DACS"]
    assert len(pictures) == 2 * sum(pictures) == 6  # the fit ran
    assert same(found["DACalDACS state"], found["DACS state"])


def test_a_single_target_image_is_refused_where_it_would_be_blended(host):
    message = (
        r"DACalDACS: expected batches of at least 2 target images to blend, got 1; "
        r"use data\.samples_per_gpu >= 2 or uda\.dacal\.learner='bilevel'"
    )
    for dacal in ({}, {"labels": "hard"}, {"warmup_iters": 5}, {"every": 4}):
        ours, optimizer = made(host, dacal={"learner": "fit", **dacal})
        with pytest.raises(ValueError, match=message):
            train(ours, optimizer, 1, images=1)
    for dacal in ({"learner": "fit", "every": 0}, {"learner": "bilevel"}, {}):
        ours, optimizer = made(host, dacal=dacal)
        train(ours, optimizer, 1, images=1)


def test_without_two_labels_that_differ_nothing_is_fitted(host, caplog):
    ours, optimizer = made(host, dacal={"learner": "fit"})
    train(ours, optimizer, 1)
    before = copy.deepcopy(ours._dacal.learner.temperature_net.state_dict())
    with torch.no_grad():
        ours.ema_model.decode_head.conv_seg.bias[0] += 1000.0  # also with what the EMA leaves of it
    with caplog.at_level("INFO", logger="mmseg"):
        (log,) = train(ours, optimizer, 1, first=1)
    assert log["dacal.skipped_unjudged"] == 1.0
    assert "dacal.fit_loss" not in log
    assert same(ours._dacal.learner.temperature_net.state_dict(), before)
    assert caplog.records[0].getMessage().startswith("dacal: no fit (no pixel of the judged set has a label")


@pytest.mark.parametrize("kind", ["daformer", "mic, own teacher"])
@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_nothing_of_an_iteration_outlives_it(host, kind, learn, monkeypatch):
    """Not even until the garbage collector comes: an iteration holds logits, labels and images of the size of the batch."""
    integration, alive = sys.modules["dacal_addon.integrations.mmseg"], []

    class Noted(integration.DacsIteration):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(integration, "DacsIteration", Noted)
    ours, optimizer = made(host, dacal={"learner": learn}, **KINDS[kind])
    train(ours, optimizer, 1)
    gc.disable()
    try:
        train(ours, optimizer, 2, first=1)
        assert [each() for each in alive[1:]] == [None, None]
    finally:
        gc.enable()


def listen(model):
    """What the host's parts were given and returned, noted at another place than the integration listens."""
    heard = {"passes": [], "teacher": [], "own_teacher": [], "masks": []}
    student, head = model.model, model.model.decode_head
    student.register_forward_hook(lambda *args: None)
    heads = [("teacher", model.ema_model)]
    if model.mic is not None and model.mic.teacher is not None:
        heads.append(("own_teacher", model.mic.teacher.ema_model))
    for name, network in heads:
        generate = network.generate_pseudo_label
        network.generate_pseudo_label = lambda img, metas, generate=generate, name=name: note(heard[name], generate(img, metas))
    losses = head.losses

    def noted_losses(logits, label, weight):
        if label.shape[-1] == 16:
            heard["passes"].append({"logits": [], "weights": [], "box": getattr(head, "hr_crop_box", None)})
        full = F.interpolate(logits.detach().double(), size=label.shape[2:], mode="bilinear", align_corners=False)
        heard["passes"][-1]["logits"].append(full)
        heard["passes"][-1]["weights"].append(torch.ones(()) if weight is None else weight.double())
        return losses(logits, label, weight)

    head.losses = noted_losses
    module = sys.modules["mmseg.models.uda.dacs"]
    masks = module.get_class_masks

    def noted_masks(labels):
        module.get_class_masks = masks
        result = masks(labels)
        heard["masks"].append(torch.cat(result) > 0)
        return result

    module.get_class_masks = noted_masks
    return heard


def note(where, value):
    where.append(value.detach())
    return value


def one_hot(label):
    return torch.stack([(label == k).double() for k in range(4)], 1)


def window(x, box):
    return x[..., box[0] : box[1], box[2] : box[3]]


def soft_loss(noted, index, soft):
    log_p = torch.log_softmax(noted["logits"][index], 1)
    return float((-(soft * log_p).sum(1) * noted["weights"][index]).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["higher", "finite_difference", "auto"])
def test_the_virtual_step_descends_the_hosts_own_mixed_loss(host, kind, engine, monkeypatch):
    # With a meta learning rate of 0 the host then trains on the same labels: its mixed loss is the inner loss, dropout,
    # crops, class weights and all.
    results = []
    hypergradient = bilevel.hypergradient
    monkeypatch.setattr(bilevel, "hypergradient", lambda *a, **k: note_result(results, hypergradient(*a, **k)))
    loss = {"class_weight": [1.0, 2.0, 0.5, 1.5], "loss_weight": 0.7}
    dacal = {"learner": "bilevel", "meta_lr": 0.0, "engine": engine, "share_pass": False}
    ours, optimizer = made(host, dacal=dacal, loss=loss, **KINDS[kind])
    logs = train(ours, optimizer, 2)
    for log, result in zip(logs, results):
        total = sum(value for name, value in log.items() if name.startswith("mix.") and "loss" in name)
        assert float(result.inner_loss) == pytest.approx(total, rel=1e-6)
        assert result.grads[-1].abs().max() > 0
    assert len(results) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["higher", "finite_difference", "auto"])
def test_a_shared_pass_trains_as_one_of_the_hosts_own(host, kind, engine):
    # With a meta learning rate of 0 both have the same labels.
    found = {}
    for share in (True, False):
        dacal = {"learner": "bilevel", "meta_lr": 0.0, "engine": engine, "share_pass": share}
        ours, optimizer = made(host, dacal=dacal, **KINDS[kind])
        passes = []
        if engine != "higher":  # which refuses hooks
            ours.model.backbone.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        found[share] = train(ours, optimizer, 3), state(ours), random_states(), len(passes)
    assert found[True][0] == found[False][0]
    assert same(found[True][1], found[False][1])
    assert found[True][2] == found[False][2]
    if engine != "higher":
        own = 2 if KINDS[kind].get("kind") == "hrda" else 1  # HRDA's pass is one of the whole and one of the detail
        assert found[False][3] - found[True][3] == 3 * own


def test_labels_of_a_shared_pass_are_those_before_its_meta_step(host):
    logs = {}
    for name, dacal in (("T = 1", {"every": 0}), ("shared", {}), ("own", {"share_pass": False})):
        ours, optimizer = made(host, dacal={"learner": "bilevel", "meta_lr": 0.1, **dacal})
        (logs[name],) = train(ours, optimizer, 1)
    assert logs["shared"]["mix.decode.loss_seg"] == logs["T = 1"]["mix.decode.loss_seg"] != logs["own"]["mix.decode.loss_seg"]
    assert logs["shared"]["dacal.temperature_mean"] == logs["own"]["dacal.temperature_mean"] != 1.0


@pytest.mark.parametrize("what", ["a scaled loss", "one loss of two", "the features"])
def test_a_host_that_descends_anything_else_of_a_shared_pass_is_refused(host, monkeypatch, what):
    descend = {
        "a scaled loss": lambda losses: (0.5 * losses["decode.loss_seg"] + losses["decode.hr.loss_seg"]).backward(),
        "one loss of two": lambda losses: losses["decode.loss_seg"].backward(),
        "the features": lambda losses: sum(value.sum() for value in losses["features"]).backward(),
    }[what]
    ours, optimizer = made(host, dacal={"learner": "bilevel"}, kind="hrda")
    plain = ours._descend
    monkeypatch.setattr(ours, "_descend", lambda losses, prefix, log: (descend if prefix == "mix." else plain)(
        losses, *(() if prefix == "mix." else (prefix, log))
    ))  # fmt: skip
    with pytest.raises(RuntimeError, match=r"expected the host to descend .* share_pass=False"):
        train(ours, optimizer, 1)
    ours, optimizer = made(host, dacal={"learner": "bilevel", "share_pass": False}, kind="hrda")
    monkeypatch.setattr(ours, "_descend", lambda losses, prefix, log: descend(losses) if prefix == "mix." else None)
    train(ours, optimizer, 1)


def test_hard_labels_and_pictures_have_a_pass_of_the_hosts_own(host):
    passes = []
    for dacal, debug in (({"labels": "hard"}, False), ({}, True), ({}, False)):
        ours, optimizer = made(host, dacal={"learner": "bilevel", "engine": "finite_difference", **dacal})
        ours.model.decode_head.debug = debug
        heard = listen(ours)
        train(ours, optimizer, 1)
        passes.append(len(heard["passes"]))
    assert passes[0] == passes[1] == passes[2] + 1


def note_result(results, result):
    results.append(result)
    return result


def test_the_engines_agree_on_the_temperatures(host):
    nets = {}
    for engine in ("higher", "finite_difference"):
        ours, optimizer = made(host, dacal={"learner": "bilevel", "engine": engine, "meta_lr": 0.01}, kind="hrda")
        train(ours, optimizer, 3)
        nets[engine] = ours._dacal.learner.temperature_net.last.bias.detach()
    assert nets["higher"].item() == pytest.approx(nets["finite_difference"].item(), rel=1e-2)  # ReLUs
    assert nets["higher"].item() != 0.0


def test_the_outer_loss_is_the_hosts_on_the_complementary_mix(host):
    ours, optimizer = made(host, dacal={"labels": "hard", "learner": "bilevel", "meta_lr": 0.0})
    for group in optimizer.param_groups:
        group.update(lr=0.0)  # the virtual step goes nowhere
    ours.model.decode_head.dropout.p = 0.0
    heard = listen(ours)
    valid = torch.ones(2, 1, 16, 16)
    valid[:, :, :, :3] = 0
    (log,) = train(ours, optimizer, 1, valid_pseudo_mask=valid)
    b = batch(0)
    mask, z = heard["masks"][0], heard["teacher"][0]
    weight = (torch.softmax(z, 1).amax(1) >= 0.3).float().mean() * torch.ones(2, 16, 16) * valid[:, 0]
    weight[:, :1] = 0
    pseudo = z.argmax(1).masked_fill(weight == 0, 255)
    image = torch.where(mask, b["target_img"], b["img"])  # the complementary mix
    label = torch.where(mask[:, 0], pseudo, b["gt_semantic_seg"][:, 0])
    weight = torch.where(mask[:, 0], weight, torch.ones(()))
    ours.model.eval()
    ours.model.backbone[1].train()
    logits = ours.model.encode_decode(image, None)
    expected = (F.cross_entropy(logits, label, ignore_index=255, reduction="none") * weight).mean()
    assert log["dacal.outer_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_gap_can_be_part_of_the_outer_loss(host):
    losses = []
    for outer_loss in ("host", "cross_entropy_and_gap"):
        ours, optimizer = made(host, dacal={"labels": "hard", "learner": "bilevel", "outer_loss": outer_loss})
        losses.append(train(ours, optimizer, 1)[0]["dacal.outer_loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_a_resumed_run_goes_on_to_the_bit(host, learn):
    dacal = {"learner": learn, "every": 2, "warmup_iters": 1, "meta_lr": 0.01, "restore_teacher": True}
    dacal["judged_set"] = {"fit": None, "bilevel": "target_blends"}[learn]  # it draws, as the fit does
    straight, optimizer = made(host, dacal=dacal, kind="hrda")
    train(straight, optimizer, 4, images=3)
    saved = {name: value.clone() for name, value in straight.state_dict().items()}
    saved_optimizer = copy.deepcopy(optimizer.state_dict())
    resumed, other = made(host, dacal=dacal, kind="hrda")
    seed(5)
    expected = train(straight, optimizer, 8, first=4, images=3)
    resumed.load_state_dict(saved)
    other.load_state_dict(saved_optimizer)
    assert resumed.local_iter == 4
    for module in resumed.ema_model.modules():  # upstream switches the teacher's dropout off at the first iteration
        if isinstance(module, torch.nn.Dropout2d):
            module.training = False
    seed(5)
    assert train(resumed, other, 8, first=4, images=3) == expected
    assert same(dict(resumed.state_dict()), dict(straight.state_dict()))


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_by_default_a_resumed_run_loses_what_upstream_loses(host, learn):
    ours, optimizer = made(host, dacal={"learner": learn, "meta_lr": 0.01})
    train(ours, optimizer, 2)
    resumed, _ = made(host, dacal={"learner": learn, "meta_lr": 0.01})
    resumed.load_state_dict(ours.state_dict())
    assert resumed.local_iter == 0
    assert resumed._dacal.learner.iteration == 2
    assert same(resumed._dacal.learner.temperature_net.state_dict(), ours._dacal.learner.temperature_net.state_dict())


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_checkpoints_of_the_host_are_taken_and_ours_by_it(host, caplog, learn):
    plain, optimizer = made(host, "DACS")
    train(plain, optimizer, 1)
    ours, _ = made(host, dacal={"learner": learn})
    with caplog.at_level("WARNING", logger="mmseg"):
        ours.load_state_dict(plain.state_dict())
    assert "no state of DACalDACS" in caplog.text
    off, _ = made(host, dacal={"labels": "hard", "every": 0})
    off.load_state_dict(ours.state_dict())
    assert not [name for name in off.state_dict() if name.startswith("dacal.")]
    assert len(list(ours.parameters())) == len(list(plain.parameters()))  # the host's optimizer sees none of ours


def test_a_checkpoint_of_another_net_is_refused_and_nothing_changed(host):
    ours, optimizer = made(host, dacal={"learner": "fit"})
    train(ours, optimizer, 1)
    wide, _ = made(host, dacal={"learner": "fit", "hidden_channels": 20})
    bilevel, _ = made(host, dacal={"learner": "bilevel"})
    for one, other, name in (
        (ours, wide, "TemperatureFit"),
        (ours, bilevel, "TemperatureFit"),
        (bilevel, ours, "HostCalibrationStep"),
    ):
        before = copy.deepcopy(one._dacal.state_dict())
        message = rf"{name}: expected the state of a temperature net with .*weight of shape .*; resume with the learner, "
        with pytest.raises(ValueError, match=message):
            one.load_state_dict(other.state_dict())
        assert same(one._dacal.state_dict(), before)
    for missing in ("iteration", "local_iter", "generator"):
        flat = ours._dacal.state_dict()
        before = copy.deepcopy(flat)
        del flat[missing]
        with pytest.raises(ValueError, match=rf"expected .*, got .*|{missing}"):
            ours._dacal.load_state_dict(flat)
        assert same(ours._dacal.state_dict(), before)


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_a_checkpoint_of_an_old_torch_gives_the_steps_as_this_one_counts_them(host, learn):
    ours, optimizer = made(host, dacal={"learner": learn})
    train(ours, optimizer, 2)
    for kind in (torch.int64, torch.float32):  # torch < 1.12 counts in whole numbers
        flat = {name: value.to(kind) if name.endswith(".step") else value for name, value in ours._dacal.state_dict().items()}
        again, _ = made(host, dacal={"learner": learn})
        again._dacal.load_state_dict(flat)
        one, other = (model._dacal.learner.meta_optimizer.state_dict()["state"][0]["step"] for model in (ours, again))
        assert type(one) is type(other)
        assert one == other == 2
        assert not isinstance(one, torch.Tensor) or one.dtype == other.dtype


@pytest.mark.parametrize(("learn", "step"), [("fit", "fit"), ("bilevel", "meta-step")])
def test_the_log_says_what_was_skipped_and_why(host, caplog, learn, step):
    ours, optimizer = made(host, dacal={"learner": learn, "warmup_iters": 2, "every": 2})
    with caplog.at_level("INFO", logger="mmseg"):
        logs = train(ours, optimizer, 6)
    # Every name at every iteration: mmcv's log goes on to show the last values of a name that is gone.
    names = {f"dacal.skipped_{kind.value}" for kind in SkipKind}
    assert all(names == {name for name in log if "skipped" in name} for log in logs)
    skipped = [[name for name in names if log[name]] for log in logs]
    assert skipped == [["dacal.skipped_warmup"]] * 2 + [[], ["dacal.skipped_every"]] * 2
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"dacal: no {step} (warm-up: iteration 1 of 2)"),
        ("INFO", f"dacal: {step}s begin"),
    ]
    assert logs[0]["dacal.temperature_mean"] == 1.0
    assert logs[-1]["dacal.temperature_min"] <= logs[-1]["dacal.temperature_mean"] <= logs[-1]["dacal.temperature_max"]


def test_settings_that_cannot_work_are_said_at_the_first_iteration(host, caplog):
    ours, optimizer = made(host, dacal={"warmup_iters": 3000})
    ours.max_iters = 2000  # as the hosts' class takes it from the config
    with caplog.at_level("INFO", logger="mmseg"):
        train(ours, optimizer, 2)
    first, *others = caplog.records
    assert (first.levelname, len(others)) == ("WARNING", 1)  # the other: that this is the warm-up
    assert "dacal: temperatures never learn: warmup_iters=3000, and the run has 2000 iterations" in first.getMessage()


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_what_is_not_finite_is_skipped_with_a_warning(host, learn, caplog):
    ours, optimizer = made(host, dacal={"learner": learn})
    train(ours, optimizer, 1)
    before = ours._dacal.learner.temperature_net.last.bias.clone()
    bad = batch(1)
    bad["target_img"][:] = math.nan
    with caplog.at_level("INFO", logger="mmseg"):
        log = ours.train_step(bad, optimizer)["log_vars"]
        ours.train_step(bad, optimizer)
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once, while the reason stays the same
    assert "the teacher's logits are not finite" in caplog.text
    assert log["dacal.skipped_not_finite"] == 1.0
    assert not {"dacal.outer_loss", "dacal.fit_loss"} & set(log)
    assert torch.equal(ours._dacal.learner.temperature_net.last.bias, before)


def test_blends_on_which_the_teacher_overflows_are_skipped(host):
    ours, optimizer = made(host, dacal={"learner": "fit"})
    train(ours, optimizer, 1)
    before, calls = copy.deepcopy(ours._dacal.learner.temperature_net.state_dict()), []

    def overflow_on_blends(module, inputs, logits):
        calls.append(module)
        return logits if len(calls) == 1 else logits * math.inf

    ours.ema_model.decode_head.register_forward_hook(overflow_on_blends)
    (log,) = train(ours, optimizer, 1, first=1)
    assert len(calls) == 2
    assert log["dacal.skipped_not_finite"] == 1.0
    assert "dacal.fit_loss" not in log
    assert same(ours._dacal.learner.temperature_net.state_dict(), before)


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_temperature_maps_lie_beside_the_hosts_pictures_and_cost_no_run(host, tmp_path, monkeypatch, caplog, learn):
    pytest.importorskip("matplotlib")
    for folder in ("class_mix_debug", "debug"):
        work = tmp_path / folder
        (work / folder).mkdir(parents=True)
        ours, optimizer = made(host, dacal={"learner": learn}, work_dir=str(work))
        ours.debug_img_interval = 2
        train(ours, optimizer, 3)
        assert sorted(path.name for path in (work / folder).iterdir()) == ["000001_temperature.png", "000003_temperature.png"]
    from dacal_addon import plots

    monkeypatch.setattr(plots, "save", lambda *a: 1 / 0)
    ours.debug_img_interval = 1
    train(ours, optimizer, 1)
    assert "no temperature map: ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("engine", ["higher", "finite_difference", "auto"])
def test_debug_pictures_of_the_host_are_not_made_by_the_meta_step(host, engine):
    pictures = sys.modules["mmseg.models.segmentors"].pictures
    made_by = {}
    for name, dacal in (("DACS", None), ("DACalDACS", {"learner": "bilevel", "engine": engine})):
        model, optimizer = made(host, name, dacal=dacal)
        model.model.decode_head.debug = True
        pictures.clear()
        train(model, optimizer, 2)
        made_by[name] = len(pictures)
        assert model.model.decode_head.debug
    assert made_by["DACalDACS"] == made_by["DACS"] == 4


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_nothing_is_left_on_the_host_also_after_an_error(host, learn):
    ours, optimizer = made(host, dacal={"learner": learn}, mask_mode="separatetrg", own_teacher=True)
    module = sys.modules["mmseg.models.uda.dacs"]
    before = module.get_class_masks, module.cross_entropy if hasattr(module, "cross_entropy") else None
    bad = batch(0)
    bad["gt_semantic_seg"] = bad["gt_semantic_seg"][:, :, :8]
    with pytest.raises((RuntimeError, ValueError)):
        ours.train_step(bad, optimizer)
    train(ours, optimizer, 1)
    assert module.get_class_masks is before[0]
    for network in (ours.model, ours.ema_model, ours.mic.teacher.ema_model):
        assert "forward_train" not in vars(network)
        assert "encode_decode" not in vars(network)
    assert ours.model.decode_head.loss_decode.cls_criterion.__name__ == "cross_entropy"


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_a_host_with_another_order_of_calls_is_refused(host, learn):
    ours, optimizer = made(host, dacal={"learner": learn})
    module = sys.modules["mmseg.models.uda.dacs"]
    ours.forward_train = lambda **b: type(ours).forward_train(ours, **b)
    kept = module.DACS.forward_train
    module.DACS.forward_train = lambda self, *args: {}
    try:
        with pytest.raises(RuntimeError, match=r"DACalDACS: expected DACS\.forward_train to call the student after"):
            ours.train_step(batch(0), optimizer)
    finally:
        module.DACS.forward_train = kept


def test_what_upstream_does_not_support_is_refused(host, monkeypatch):
    with pytest.raises(ValueError, match="expected a host that trains on target images, got source_only=True"):
        made(host, dacal={}, source_only=True)
    with pytest.raises(ValueError, match="CrossEntropyLoss with sigmoid or mask"):
        made(host, dacal={}, loss={"use_sigmoid": True})
    made(host, dacal={"labels": "hard", "every": 0}, loss={"use_sigmoid": True})
    for learn in ("bilevel", "fit"):
        ours, optimizer = made(host, dacal={"learner": learn})
        ours.model.decode_head.fp16_enabled = True
        with pytest.raises(RuntimeError, match="expected float32 training, got fp16"):
            train(ours, optimizer, 1)
        ours.model.decode_head.fp16_enabled = False
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_world_size", lambda: 4)
            with pytest.raises(RuntimeError, match="expected one process, got 4 processes"):
                train(ours, optimizer, 1)
    bilevel, _ = made(host, dacal={"learner": "bilevel", "warmup_iters": 5})
    for kind in (torch.optim.LBFGS, torch.optim.Rprop):
        with pytest.raises((ValueError, TypeError), match="hypergradient"):
            train(bilevel, kind(bilevel.model.parameters()), 1)
    # The fit takes no virtual step, so that any optimizer will do.
    assert ours._dacal.options.learner == "fit"
    train(ours, torch.optim.Rprop(ours.model.parameters()), 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("avg_factor", [None, 7.0])
def test_one_hot_labels_give_the_hosts_number(host, reduction, avg_factor):
    if avg_factor and reduction == "sum":
        return
    cross_entropy = sys.modules["mmseg.models.segmentors"].cross_entropy
    g = torch.Generator().manual_seed(0)
    logits, label = torch.randn(2, 4, 5, 6, generator=g).double(), torch.randint(0, 4, (2, 5, 6), generator=g)
    label[0, :2] = 255
    weight, class_weight = torch.rand(2, 5, 6, generator=g).double(), torch.rand(4, generator=g).double()
    options = {"class_weight": class_weight, "reduction": reduction, "avg_factor": avg_factor, "ignore_index": 255}
    expected = cross_entropy(logits, label, weight.double(), **options)
    soft = soft_label_loss(logits, one_hot(label), weight, **options)
    assert soft.numpy() == pytest.approx(expected.numpy(), rel=1e-6)


def test_without_a_weight_nothing_is_learned(host):
    for learn in ("fit", "bilevel"):
        ours, optimizer = made(host, dacal={"learner": learn})
        valid = torch.zeros(2, 1, 16, 16)
        (log,) = train(ours, optimizer, 1, valid_pseudo_mask=valid)
        assert log["dacal.skipped_unweighted"] == 1.0
        assert math.isfinite(log["mix.decode.loss_seg"])


def test_by_default_the_learners_own_judged_set_is_used_and_another_can_be_named(host):
    losses = {}
    for learn in ("fit", "bilevel"):
        for judged_set in (None, "differing_blends", "source_and_target_pixels", "source_pixels"):
            ours, optimizer = made(host, dacal={"learner": learn, "judged_set": judged_set})
            (log,) = train(ours, optimizer, 1)
            losses[learn, judged_set] = log[{"fit": "dacal.fit_loss", "bilevel": "dacal.outer_loss"}[learn]]
    assert losses["fit", None] == losses["fit", "differing_blends"] != losses["fit", "source_pixels"]
    assert losses["bilevel", None] == losses["bilevel", "source_and_target_pixels"] != losses["bilevel", "differing_blends"]
    ours, optimizer = made(host, dacal={"learner": "fit", "judged_set": "source_pixels"})
    train(ours, optimizer, 1, images=1)
    ours, optimizer = made(host, dacal={"learner": "bilevel", "judged_set": "target_blends"})
    with pytest.raises(ValueError, match=r"at least 2 target images .* or uda\.dacal\.judged_set='source_and_target_pixels'"):
        train(ours, optimizer, 1, images=1)


def test_the_learner_is_there_before_the_optimizer(host):
    # Hosts load a checkpoint before they build theirs.
    ours, optimizer = made(host, dacal={"learner": "bilevel"})
    train(ours, optimizer, 2)
    resumed, other = made(host, dacal={"learner": "bilevel"})
    assert resumed._dacal.learner.optimizer is None
    resumed.load_state_dict(ours.state_dict())
    assert resumed._dacal.learner.iteration == 2
    train(resumed, other, 1)
    assert resumed._dacal.learner.optimizer is other


def test_the_virtual_step_clips_as_the_host_says(host):
    ours, optimizer = made(host, dacal={"learner": "bilevel", "clip_norm": 5})
    assert ours._dacal.learner.clip_norm == 5
    losses = {}
    for clip_norm in (None, 1e6, 1e-3):
        ours, _ = made(host, dacal={"learner": "bilevel", "clip_norm": clip_norm})
        sgd = torch.optim.SGD(ours.model.parameters(), lr=0.5)
        losses[clip_norm] = train(ours, sgd, 1)[0]["dacal.outer_loss"]
    assert losses[None] == losses[1e6] != losses[1e-3]
    fit, _ = made(host, dacal={"learner": "fit", "clip_norm": 5})  # of no matter
    train(fit, optimizer, 1)


@pytest.mark.parametrize("restore", [True, False])
def test_a_resumed_teacher_keeps_no_graph(host, restore):
    # Upstream detaches the teachers at iteration 0, which a resumed run does not have.
    for learn in ("fit", "bilevel"):
        cfg = {"dacal": {"learner": learn, "restore_teacher": restore}, **KINDS["mic, own teacher"]}
        ours, optimizer = made(host, **cfg)
        train(ours, optimizer, 1)
        resumed, other = made(host, **cfg)
        assert all(parameter.requires_grad for parameter in resumed.ema_model.parameters())
        resumed.load_state_dict(ours.state_dict())
        graphs = []
        for network in (resumed.ema_model, resumed.mic.teacher.ema_model):
            network.decode_head.register_forward_hook(lambda module, inputs, logits, own=graphs: own.append(logits.grad_fn))
        train(resumed, other, 1, first=1)
        assert len(graphs) == (3 if learn == "fit" else 2)
        assert not any(graphs)
        for network in (resumed.ema_model, resumed.mic.teacher.ema_model):
            assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(parameter.requires_grad for parameter in resumed.model.parameters())


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_on_padding_the_hosts_weights_decide_and_nothing_else(host, learn, monkeypatch):
    # A fork may give its padding a weight: it is then taught what the host's hard label would be there, a soft one.
    module = sys.modules["mmseg.models.uda.dacs"]
    plain = module.mixed

    def weight_everywhere(mask, source, target):
        return torch.ones_like(target) if target.dim() == 3 else plain(mask, source, target)

    monkeypatch.setattr(module, "mixed", weight_everywhere)
    valid, logs, lessons = torch.ones(2, 1, 16, 16), [], []
    valid[:, :, :, :3] = 0
    soft = TaughtHeads.soft
    monkeypatch.setattr(TaughtHeads, "soft", lambda self, hard, label: soft(self, hard, note(lessons, label)))
    for extra in ({}, {"valid_pseudo_mask": valid}):
        ours, optimizer = made(host, dacal={"learner": learn, "every": 0})
        logs += train(ours, optimizer, 1, **extra)
    assert logs[0]["mix.decode.loss_seg"] == logs[1]["mix.decode.loss_seg"]
    assert torch.equal(*lessons)


def test_by_default_it_is_the_papers_step_at_every_fourth_iteration_after_a_warm_up(host):
    seed(0)
    learner = host["DACalDACS"](dacal={})._dacal.learner
    assert isinstance(learner, bilevel.BilevelCalibrationStep)
    assert (learner.warmup, learner.every) == (3000, 4)
    assert learner.meta_optimizer.param_groups[0]["lr"] == 3e-4
    # Without the helper, which has temperatures learn at once.
    ours = host["DACalDACS"](dacal={"warmup_iters": 2})
    logs = train(ours, torch.optim.AdamW(ours.model.parameters(), lr=0.01), 8)
    assert [i for i, log in enumerate(logs) if "dacal.outer_loss" in log] == [2, 6]
    assert [log["dacal.skipped_warmup"] for log in logs] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert [log["dacal.skipped_every"] for log in logs] == [0, 0, 0, 1, 1, 1, 0, 1]


def test_the_hosts_own_class_is_one_that_stands_in_the_code(host):
    module = sys.modules["dacal_addon.integrations.mmseg"]
    ours, _ = made(host, dacal={})
    assert type(ours) is module.DACalDACS
    assert module.DACalDACS.__mro__[1:3] == (module.Calibrated, host["DACS"])
    named, _ = made(host, dacal={"base": "mmseg.models.uda.dacs.DACS"})
    assert type(named) is module.DACalDACS
    off, _ = made(host, dacal={"labels": "hard", "every": 0})
    assert type(copy.deepcopy(off)) is module.DACalDACS


@pytest.fixture
def forks(host):
    __import__("mmseg.models.uda.dacs_infer")
    return host


def fork_batch(number):
    return batch(number, night_img=torch.zeros(2, 3, 16, 16))


def trained_fork(host, name, iterations=3, dacal=None, change=None, **cfg):
    seed(0)
    options = {} if dacal is None else {"dacal": {"base": IN_FORKS + name, **AT_ONCE, **dacal}}
    model = host[name if dacal is None else "DACalDACS"](**options, **cfg)
    if change is not None:
        change(model)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.01)
    return model, [model.train_step(fork_batch(i), optimizer)["log_vars"] for i in range(iterations)]


@pytest.mark.parametrize("name", FORKS)
@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_forks_learn_soft_labels_and_lose_nothing(forks, name, learn):
    plain, expected = trained_fork(forks, name)
    kept = random_states()
    hard, logs = trained_fork(forks, name, dacal={"learner": learn, "labels": "hard"})
    assert isinstance(hard, forks[name])
    assert [{k: v for k, v in log.items() if not k.startswith("dacal.")} for log in logs] == expected
    assert same(state(hard), state(plain))
    assert random_states() == kept
    soft, logs = trained_fork(forks, name, dacal={"learner": learn, "meta_lr": 0.01})
    assert logs[0]["decode.loss_seg"] == expected[0]["decode.loss_seg"]
    assert logs[0]["mix.decode.loss_seg"] != expected[0]["mix.decode.loss_seg"]
    assert not any(value for log in logs for kind, value in log.items() if "skipped" in kind)
    assert logs[-1]["dacal.temperature_mean"] != 1.0
    other, _ = trained_fork(forks, name, dacal={"learner": learn}, iterations=0)
    assert type(other) is type(soft)  # one class for all
    other.load_state_dict(soft.state_dict())
    assert other._dacal.learner.iteration == 3


@pytest.mark.parametrize("engine", ["higher", "finite_difference"])
@pytest.mark.parametrize("name", FORKS)
def test_the_virtual_step_enters_a_forks_student_as_the_fork_does(forks, name, engine, monkeypatch):
    results = []
    hypergradient = bilevel.hypergradient
    monkeypatch.setattr(bilevel, "hypergradient", lambda *a, **k: note_result(results, hypergradient(*a, **k)))
    if (name, engine) == ("PiPa", "higher"):
        return  # which knows no way in
    _, logs = trained_fork(forks, name, dacal={"learner": "bilevel", "meta_lr": 0.0, "engine": engine})
    for log, result in zip(logs, results):
        assert float(result.inner_loss) == pytest.approx(log["mix.decode.loss_seg"], rel=1e-6)
    assert len(results) == 3


def test_a_forks_teacher_is_asked_about_blends_as_the_fork_asks_it(forks, monkeypatch):
    levels = []
    kind = sys.modules["mmseg.models.segmentors"].LevelsEncoderDecoder
    asked = kind.encode_decode

    def encode_decode(self, img, img_metas, upscale_pred=True, levels=None, own=levels):
        own.append(levels)
        return asked(self, img, img_metas, upscale_pred, levels)

    monkeypatch.setattr(kind, "encode_decode", encode_decode)
    trained_fork(forks, "gta2csDACS", dacal={"learner": "fit"}, iterations=2)
    assert levels == [1, 1, 1, 1]


def test_blends_are_made_of_what_a_forks_teacher_sees(forks):
    asked = []

    def change(model):
        network, labels = model.ema_model, model.teacher_labels
        model.teacher_labels = lambda img, metas: labels(0.5 * img, metas)
        network.backbone.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[0]))

    trained_fork(forks, "Fork", dacal={"learner": "fit"}, iterations=1, change=change)
    seen, blends = asked
    assert torch.equal(seen, 0.5 * fork_batch(0)["target_img"])
    assert torch.allclose(blends, 0.65 * seen + 0.35 * seen.flip(0))


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_further_passes_of_a_fork_keep_its_labels(forks, learn):
    further = {"soft": [], "hard": []}
    for labels, losses in further.items():

        def change(model, losses=losses):
            first = model.mixed_losses

            def mixed_losses(*arguments):
                answer = first(*arguments)
                losses.append(first(*arguments)["decode.loss_seg"].item())
                return answer

            model.mixed_losses = mixed_losses

        _, logs = trained_fork(forks, "Fork", dacal={"labels": labels, "learner": learn}, iterations=1, change=change)
        assert logs[0]["mix.decode.loss_seg"] != losses[0]  # other dropout
    assert further["soft"] == further["hard"]


def test_the_meta_step_keeps_nothing_of_an_iteration(host):
    ours, optimizer = made(host, dacal={"learner": "bilevel"})
    train(ours, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"HostCalibrationStep: expected the host's call of its student, got none"):
        ours._dacal.learner.loss_on_mixed(ours.model, None, None, None)


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_iterations_without_learning_are_counted(host, learn):
    ours, optimizer = made(host, dacal={"learner": learn, "every": 0})
    train(ours, optimizer, 2)
    assert ours._dacal.learner.iteration == int(ours.state_dict()["dacal.iteration"]) == 2


def answering(way):
    """Change what the networks of a fork answer; the fork's own labels stay as they are."""

    def change(model):
        network = model.ema_model
        encode_decode = network.encode_decode
        network.encode_decode = lambda img, metas: way(encode_decode(img, metas))
        labels = model._labels
        model._labels = lambda answer, img: labels(answer if isinstance(answer, torch.Tensor) else first_logits(answer), img)

    return change


def first_logits(answer):
    values = list(answer.values()) if isinstance(answer, dict) else list(answer)
    return next(value for value in values if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[1] == 4)


ANSWERS = {
    "logits": lambda z: z,
    "tuple": lambda z: (z, torch.zeros(2, 6, 8, 8)),
    "list": lambda z: [None, torch.zeros(2, 6, 8, 8), z],
    "dictionary": lambda z: {"aux": None, "out": z},
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_the_teachers_logits_are_found(forks, answer, caplog, learn):
    _, expected = trained_fork(forks, "Fork", dacal={"learner": learn})
    with caplog.at_level("INFO", logger="mmseg"):
        _, logs = trained_fork(forks, "Fork", dacal={"learner": learn}, change=answering(ANSWERS[answer]))
    assert logs == expected
    said = [record.getMessage() for record in caplog.records if "entry" in record.getMessage()]
    begins = {
        "logits": [],
        "tuple": ["entry 0 of the tuple of 0: float32 (2, 4, 16, 16), 1: float32 (2, 6, 8, 8)"],
        "list": ["entry 2 of the list of 0: NoneType, 1: float32 (2, 6, 8, 8), 2: float32 (2, 4, 16, 16)"],
        "dictionary": ["entry 'out' of the dict of 'aux': NoneType, 'out': float32 (2, 4, 16, 16)"],
    }
    assert said == [f"dacal: the teacher's logits are {what}" for what in begins[answer]]


def test_small_logits_are_interpolated(forks):
    def small(z):
        return F.interpolate(z, size=(8, 8), mode="bilinear", align_corners=False)

    def small_and_back(z):
        return F.interpolate(small(z), size=z.shape[2:], mode="bilinear", align_corners=False)

    for learn in ("fit", "bilevel"):
        logs = [
            trained_fork(forks, "Fork", dacal={"learner": learn}, change=answering(way))[1] for way in (small, small_and_back)
        ]
        assert logs[0] == logs[1]


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_where_several_entries_could_be_logits_one_must_be_named(forks, learn):
    def two(z):
        return {"main": z, "aux": z * 0}

    message = (
        r"uda\.dacal: expected the teacher's encode_decode to return logits \(N, 4, h, w\), alone or as one entry, "
        r"got dict of 'main': float32 .*; say which entry is meant, for example uda\.dacal\.logits_of='main'"
    )
    own = {"learner": learn}
    with pytest.raises(TypeError, match=message):
        trained_fork(forks, "Fork", dacal=own, change=answering(two), iterations=1)
    _, expected = trained_fork(forks, "Fork", dacal=own)
    _, logs = trained_fork(forks, "Fork", dacal={**own, "logits_of": "main"}, change=answering(two))
    assert logs == expected
    with pytest.raises(TypeError, match="got no entry 'out' in the dict of 'main'"):
        trained_fork(forks, "Fork", dacal={**own, "logits_of": "out"}, change=answering(two), iterations=1)
    with pytest.raises(TypeError, match=r"got float32 \(2, 6, 8, 8\) as entry 1 of the tuple"):
        trained_fork(forks, "Fork", dacal={**own, "logits_of": 1}, change=answering(ANSWERS["tuple"]), iterations=1)


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_what_is_not_understood_fails_at_the_first_iteration_with_what_was_found(forks, monkeypatch, learn):
    def refused(message, error=TypeError, name="Fork", dacal=None, **options):
        with pytest.raises(error, match=message):
            trained_fork(forks, name, dacal={"learner": learn, "warmup_iters": 5, **(dacal or {})}, iterations=1, **options)

    def with_features_alone(z):
        return {"features": torch.zeros(2, 64, 4, 4), "aux": None}

    def ask(model):  # the fork itself has its labels from elsewhere
        model.teacher_labels = lambda img, metas: (
            model.ema_model.encode_decode(img, metas),
            torch.zeros(2, 16, 16).long(),
            torch.ones(2, 16, 16),
        )[1:]

    def change(model):
        answering(with_features_alone)(model)
        ask(model)

    refused("got dict of 'features': float32 .*; mend the teacher's encode_decode", change=change)

    def without_encode_decode(model):
        model.get_ema_model = lambda: torch.nn.Linear(1, 1)

    refused(
        r"expected a teacher \(get_ema_model\(\)\) with a method encode_decode .*, got Linear", change=without_encode_decode
    )

    def own_loss(model):
        model.model.decode_head.losses = lambda logits, label, weight: {"loss_seg": logits.mean()}

    refused("heads that ask their loss_decode.cls_criterion .* in which none did", RuntimeError, change=own_loss)

    def other_names(model):
        forward_train = model.model.forward_train
        model.model.forward_train = lambda x, metas, y, w=None, return_feat=False: forward_train(x, metas, y, w, return_feat)

    refused(r"to be called with gt_semantic_seg, got \(x, metas, y, w, return_feat\)", change=other_names)
    by_higher = {"learner": "bilevel", "engine": "higher"}
    message = r"forward_train begins with img, img_metas .*, got forward_train\(stage, img, .*; choose engine='auto'"
    refused(message, ValueError, name="PiPa", dacal=by_higher)

    def without_weight(model):
        model.mixed_losses = lambda img, metas, label, weight: model.model.forward_train(img, metas, label)
        forward_train = model.model.forward_train
        model.model.forward_train = lambda img, img_metas, gt_semantic_seg, return_feat=False: forward_train(
            img, img_metas, gt_semantic_seg, return_feat=return_feat
        )

    refused("to take seg_weight, got ", dacal={"learner": "bilevel"}, change=without_weight)
    module = sys.modules["mmseg.models.uda.dacs_infer"]
    masks = module.get_class_masks
    monkeypatch.setattr(module, "get_class_masks", lambda label: [torch.cat(masks(label))])
    refused(r"get_class_masks to return a list of 2 masks \(1, 1, 16, 16\), got list of int64 \(2, 1, 16, 16\)", ValueError)
    monkeypatch.delattr(module, "get_class_masks")
    refused("expected a host that draws its masks with get_class_masks, a name in its module, got DACalFork without")


def test_settings_that_a_host_lacks_are_named(forks, monkeypatch):
    message = "a host or a teacher with the attribute pseudo_threshold, got DACalFork without"
    with monkeypatch.context() as patch:
        patch.setattr(forks["Fork"], "make_teacher", lambda fork: setattr(fork, "ema_model", fork.model))
        with pytest.raises(TypeError, match=message):
            trained_fork(forks, "Fork", dacal={}, iterations=0)
    monkeypatch.delattr(forks["Fork"], "get_ema_model")
    message = r"a host with a method get_ema_model that returns its teacher, got DACalFork without; .*uda\.dacal\.base"
    with pytest.raises(TypeError, match=message):
        trained_fork(forks, "Fork", dacal={}, iterations=0)


def test_a_threshold_of_none_gives_every_label_a_weight(forks, monkeypatch):
    def change(model):
        teacher = model.ema_model
        teacher.labels = lambda img, metas: (teacher.ema_model.encode_decode(img, metas).argmax(1), torch.ones(2, 16, 16))

    teacher = sys.modules["mmseg.models.uda.teacher"].Teacher
    made_teacher = teacher.__init__
    monkeypatch.setattr(teacher, "__init__", lambda self, model: made_teacher(self, model, threshold=None))
    model, logs = trained_fork(forks, "SiamSeg", dacal={"learner": "fit"}, change=change)
    assert model._dacal.labeler.weight == "none"
    assert "dacal.fit_loss" in logs[0]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("gta2csDACSS", r"uda\.dacal: expected base: a class in the registry UDA, got 'gta2csDACSS'; name it with its module"),
        ("mmseg.models.uda.dacs_infer.DACS", r"an importable 'module\.Class', got 'mmseg\.models\.uda\.dacs_infer\.DACS' \("),
        ("mmseg.models.uda.nowhere.DACS", r"an importable 'module\.Class', got .*nowhere"),
        ("mmseg.models.uda.dacs_infer.pseudo_labels", "expected base: a class in the registry"),
    ],
)
def test_a_base_that_is_none_is_named(forks, base, message):
    with pytest.raises(ValueError, match=message):
        forks["DACalDACS"](dacal={"base": base})


def test_a_base_can_be_named_as_the_registry_has_it(forks):
    seed(0)
    model = forks["DACalDACS"](dacal={"base": "gta2csDACS"})
    assert isinstance(model, forks["gta2csDACS"])
    assert type(model) is type(forks["DACalDACS"](dacal={"base": IN_FORKS + "gta2csDACS"}))


def test_a_fork_needs_no_dacs_of_the_hosts():
    # As in CoDA, whose mmseg/models/uda has no dacs.py.
    code = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["mmseg.models.uda.dacs"] = None
import dacal_addon.integrations.mmseg
from mmseg.models import UDA
model = UDA.get("DACalDACS")(dacal={"base": "mmseg.models.uda.dacs_infer.gta2csDACS"})
print(type(model).__name__, sys.modules["mmseg.models.uda.dacs"])
try:
    UDA.get("DACalDACS")(dacal={})
except ValueError as error:
    print(error)
"""
    stand_in = str(Path(__file__).parent / "stand_in")
    output = subprocess.run([sys.executable, "-c", code, stand_in], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert output.splitlines() == [
        "DACalgta2csDACS None",
        "uda.dacal: expected base: the host's class, since mmseg.models.uda.dacs has no DACS, got none; "
        "name it, for example base='mmseg.models.uda.dacs_infer.gta2csDACS'",
    ]


EXAMPLES = Path(__file__).parent.parent / "examples/mmseg"
TAUGHT = {
    "the host's": ({"type": "DACS"}, "hard"),
    "another": (None, "hard"),
    "ours, hard": ({"type": "DACalDACS", "dacal": {"labels": "hard"}}, "hard"),
    "ours": ({"type": "DACalDACS", "dacal": {"learner": "fit"}}, "soft"),
    "ours, soft": ({"type": "DACalDACS", "dacal": {"labels": "soft"}}, "soft"),
    "ours, without options": ({"type": "DACalDACS"}, "soft"),
}


class Shown:
    """What `examples/mmseg/calibrate.py` reads images with, without a data set of the hosts."""

    def __init__(self, first, images, student=None):
        self.dataset = SimpleNamespace(ignore_index=255, img_dir="nowhere")
        self.image = [batch(first + i, images=1)["img"] for i in range(images)]
        self.student = student

    def __len__(self):
        return len(self.image)

    def __iter__(self):
        """Labels are drawn from the student's softmax(z / 2)."""
        g = torch.Generator().manual_seed(0)
        for x in self.image:
            if self.student is None:
                yield (x,)
            else:
                with torch.no_grad():
                    p = (self.student.encode_decode(x, None) / 2).softmax(1)
                yield x, torch.multinomial(p[0].flatten(1).t(), 1, generator=g).view(1, *x.shape[2:])

    def names(self):
        return [f"{i}.png" for i in range(len(self))]


class Tool:
    """`examples/mmseg/calibrate.py`, and a trained student of the stand-in."""

    def __init__(self, module, folder):
        self.module, self.folder, self.options, self.said = module, folder, {}, {"shadows": 1.7, "blends": 0.8}
        seed(0)
        self.student = sys.modules["mmseg.models.segmentors"].EncoderDecoder(4).eval()
        self.student.decode_head.conv_seg.weight.data *= 20
        self.student.test_cfg = SimpleNamespace(mode="whole")
        self.student.whole_inference = lambda img, metas, rescale: self.student.encode_decode(img, metas)
        own = self.student.state_dict()
        self.state = {f"{part}.{name}": value.clone() for part in ("model", "ema_model") for name, value in own.items()}
        torch.save({"state_dict": self.state, "meta": {"iter": 3}}, str(folder / "before.pth"))

    def run(self, uda, *arguments):
        self.uda = uda
        where = ["config.json", str(self.folder / "before.pth"), "--out", str(self.folder / "after.pth")]
        self.module.main([*where, *arguments])
        return torch.load(str(self.folder / "after.pth"))


@pytest.fixture
def tool(host, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    module = importlib.import_module("calibrate")
    tool = Tool(module, tmp_path)

    def sets_of(config, options):
        few = Shown(60, options.labelled, tool.student) if options.labelled else None
        return module.Sets(Shown(20, 4, tool.student), Shown(40, 4), few)

    monkeypatch.setattr(module, "prepare", lambda: torch.device("cpu"))
    monkeypatch.setattr(module, "read_config", lambda path: {} if tool.uda is None else {"uda": tool.uda})
    monkeypatch.setattr(module, "build_student", lambda config, state: (tool.student, "model."))
    monkeypatch.setattr(module, "sets_of", sets_of)
    estimators = {name: lambda material, name=name: Estimate(name, tool.said[name]) for name in tool.said}
    monkeypatch.setattr(sys.modules["dacal_addon.calibrate.estimate"], "ESTIMATORS", estimators)
    yield tool
    for name in {"calibrate", "loading"} - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", TAUGHT)
def test_of_a_trained_checkpoint_the_tool_takes_what_is_typical_of_hard_labels_and_1_of_soft_ones(tool, name, capsys):
    uda, labels = TAUGHT[name]
    t = {"hard": TYPICAL, "soft": 1.0}[labels]
    assert tool.module.typical_for({} if uda is None else {"uda": uda}) == t
    saved = tool.run(uda)
    changed = {key for key, value in tool.state.items() if not torch.equal(saved["state_dict"][key], value)}
    layer = "model.decode_head.conv_seg"
    note, output = saved["meta"]["dacal"], capsys.readouterr().out
    assert saved["meta"]["iter"] == 3
    assert note["temperature"] == t
    assert {each: numbers["temperature"] for each, numbers in note["estimates"].items()} == {"typical": t, **tool.said}
    for each in ("typical", "shadows", "blends"):
        assert re.search(rf"^{each} +\d\.\d", output, re.MULTILINE)
    assert "the network has been trained on these source images" in output
    if labels == "hard":
        assert (note["taken"], note["abstained"]) == ("typical", False)
        assert changed == {f"{layer}.weight", f"{layer}.bias"}
        assert all(torch.equal(saved["state_dict"][key], tool.state[key] / TYPICAL) for key in changed)
        reason = "what students of hard labels typically need; shadows (1.70) and blends (0.80) beside it"
        assert f"taken: T = {TYPICAL:g} (typical); {reason}\n" in output
        assert f"after.pth: T = {TYPICAL:g} in {layer}\n" in output
    else:
        assert (note["taken"], note["abstained"]) == ("none", True)
        assert not changed
        assert "taken: T = 1 (none); T = 1: nothing is known of networks of this kind\n" in output
        assert "after.pth: T = 1, all weights are as they were\n" in output


def test_the_tool_abstains_where_shadows_and_blends_deny_overconfidence(tool, capsys):
    tool.said.update(shadows=0.7)
    saved = tool.run({"type": "DACS"})
    assert all(torch.equal(saved["state_dict"][key], value) for key, value in tool.state.items())
    reason = "abstains, T = 1: by shadows (0.70) and blends (0.80) the network is not overconfident"
    assert saved["meta"]["dacal"]["reason"] == reason
    assert f"taken: T = 1 (none); {reason}\n" in capsys.readouterr().out


def test_the_hosts_page_says_what_is_typical():
    page = (EXAMPLES / "README.md").read_text()
    assert f"the temperature that students of hard labels typically need, {TYPICAL:g}, unless" in page


@pytest.mark.parametrize("name", ["the host's", "ours, hard", "ours"])
def test_with_labels_the_tool_weighs_them_and_what_it_would_take_without(tool, name, capsys):
    uda, labels = TAUGHT[name]
    note = tool.run(uda, "--labelled", "3")["meta"]["dacal"]
    found = note["estimates"]["labelled"]
    prior, spread = {"hard": (TYPICAL, TYPICAL_SPREAD), "soft": (1.0, UNKNOWN_SPREAD)}[labels]
    share = spread**2 / (spread**2 + found["spread"] ** 2)
    assert 1.7 < found["temperature"] < 2.3
    assert note["temperature"] == pytest.approx(found["temperature"] ** share * prior ** (1 - share))
    assert (note["taken"], note["labelled_target"]) == ("labelled and prior", ["0.png", "1.png", "2.png"])
    output = capsys.readouterr().out
    assert "labels of 3 images, which no test should count: 0.png, 1.png, 2.png\n" in output
    assert f"by precision the labels count {share:.0%}\n" in output
