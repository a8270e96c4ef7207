"""`DACalDACS` on a stand-in with the hosts' interface; `test_upstream.py` has the hosts themselves."""

import contextlib
import copy
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dacal_addon.integrations import checkpoint
from dacal_addon.integrations.criterion import Teaching, soft_label_loss, window_like
from dacal_addon.integrations.options import Options, parse
from dacal_addon.integrations.shadows import shadowed

KINDS = {
    "daformer": {},
    "hrda": {"kind": "hrda"},
    "mic, target": {"kind": "hrda", "mask_mode": "separatetrgaug"},
    "mic, both": {"mask_mode": "separate"},
    "mic, source": {"mask_mode": "separatesrc"},
    "mic, own teacher": {"mask_mode": "separatetrg", "own_teacher": True},
}
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


def made(host, name="DACalDACS", *, dacal=None, **cfg):
    seed(0)
    model = host[name](**cfg, **({} if dacal is None else {"dacal": {"warmup_iters": 0, **dacal}}))
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
    ours, optimizer = made(host, dacal={"labels": "hard", "learn": learn, "every": every}, **KINDS[kind])
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
    ours, optimizer = made(host, dacal={"learn": learn, "every": 0}, **KINDS[kind])
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
    for name, dacal in (("DACS", None), ("DACalDACS", {"learn": learn, "every": every})):
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
    ours, optimizer = made(host, dacal={}, **KINDS[kind])
    valid = torch.ones(3, 1, 16, 16)
    valid[:, :, :, :3] = 0
    train(ours, optimizer, 1, images=3, valid_pseudo_mask=valid)
    net = copy.deepcopy(ours._dacal.net)
    adam = torch.optim.Adam(net.parameters())
    adam.load_state_dict(copy.deepcopy(ours._dacal.optimizer.state_dict()))
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
    for own, expected, start in zip(ours._dacal.net.parameters(), net.parameters(), before):
        assert torch.allclose(own, expected, atol=1e-6)
        assert not torch.allclose(own, start, atol=1e-4)
        assert own.grad is None


def test_the_fits_own_pass_is_not_heard_and_leaves_nothing_behind(host, monkeypatch):
    integration = sys.modules["dacal_addon.integrations.mmseg"]
    noted, lists, found = integration._noted, [], {}
    # The integration's own lists of what it has heard: of the teacher, then of the masks, at each iteration.
    monkeypatch.setattr(integration, "_noted", lambda heard, **options: noted(note_result(lists, heard), **options))

    def disturb(module, *_):
        module.calls = getattr(module, "calls", 0) + 1
        module.draws = torch.rand(1).item(), np.random.rand(), random.random()

    for name, dacal in (("DACS", None), ("DACalDACS", {"labels": "hard"})):
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
    assert [len(heard) for heard in lists[::2]] == [1, 1, 1]


def test_a_single_target_image_is_refused_where_it_would_be_blended(host):
    message = (
        r"DACalDACS: expected batches of at least 2 target images to blend, got 1; "
        r"use data\.samples_per_gpu >= 2 or uda\.dacal\.learn='bilevel'"
    )
    for dacal in ({}, {"labels": "hard"}, {"warmup_iters": 5}):
        ours, optimizer = made(host, dacal=dacal)
        with pytest.raises(ValueError, match=message):
            train(ours, optimizer, 1, images=1)
    for dacal in ({"every": 0}, {"learn": "bilevel"}):
        ours, optimizer = made(host, dacal=dacal)
        train(ours, optimizer, 1, images=1)


def test_without_two_labels_that_differ_nothing_is_fitted(host, caplog):
    ours, optimizer = made(host, dacal={})
    train(ours, optimizer, 1)
    before = copy.deepcopy(ours._dacal.net.state_dict())
    with torch.no_grad():
        ours.ema_model.decode_head.conv_seg.bias[0] += 1000.0  # also with what the EMA leaves of it
    with caplog.at_level("INFO", logger="mmseg"):
        (log,) = train(ours, optimizer, 1, first=1)
    assert log["dacal.skipped_unjudged"] == 1.0
    assert "dacal.fit_loss" not in log
    assert same(ours._dacal.net.state_dict(), before)
    assert caplog.records[0].getMessage().startswith("dacal: no fit (no pixel is judged: ")


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
    integration = sys.modules["dacal_addon.integrations.mmseg"]
    results = []
    hypergradient = integration.hypergradient
    monkeypatch.setattr(integration, "hypergradient", lambda *a, **k: note_result(results, hypergradient(*a, **k)))
    loss = {"class_weight": [1.0, 2.0, 0.5, 1.5], "loss_weight": 0.7}
    ours, optimizer = made(host, dacal={"learn": "bilevel", "meta_lr": 0.0, "engine": engine}, loss=loss, **KINDS[kind])
    logs = train(ours, optimizer, 2)
    for log, result in zip(logs, results):
        total = sum(value for name, value in log.items() if name.startswith("mix.") and "loss" in name)
        assert float(result.inner_loss) == pytest.approx(total, rel=1e-6)
        assert result.grads[-1].abs().max() > 0
    assert len(results) == 2


def note_result(results, result):
    results.append(result)
    return result


def test_the_engines_agree_on_the_temperatures(host):
    nets = {}
    for engine in ("higher", "finite_difference"):
        ours, optimizer = made(host, dacal={"learn": "bilevel", "engine": engine, "meta_lr": 0.01}, kind="hrda")
        train(ours, optimizer, 3)
        nets[engine] = ours._dacal.net.last.bias.detach()
    assert nets["higher"].item() == pytest.approx(nets["finite_difference"].item(), rel=1e-2)  # ReLUs
    assert nets["higher"].item() != 0.0


def test_the_outer_loss_is_the_hosts_on_the_complementary_mix(host):
    ours, optimizer = made(host, dacal={"labels": "hard", "learn": "bilevel", "meta_lr": 0.0})
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
        ours, optimizer = made(host, dacal={"labels": "hard", "learn": "bilevel", "outer_loss": outer_loss})
        losses.append(train(ours, optimizer, 1)[0]["dacal.outer_loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_a_resumed_run_goes_on_to_the_bit(host, learn):
    dacal = {"learn": learn, "every": 2, "warmup_iters": 1, "meta_lr": 0.01, "restore_teacher": True}
    dacal["outer_set"] = "target_mixup"  # it draws, as the fit does
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


def test_by_default_a_resumed_run_loses_what_upstream_loses(host):
    ours, optimizer = made(host, dacal={"meta_lr": 0.01})
    train(ours, optimizer, 2)
    resumed, _ = made(host, dacal={"meta_lr": 0.01})
    resumed.load_state_dict(ours.state_dict())
    assert resumed.local_iter == 0
    assert resumed._dacal.iteration == 2
    assert same(resumed._dacal.net.state_dict(), ours._dacal.net.state_dict())


def test_checkpoints_of_the_host_are_taken_and_ours_by_it(host, caplog):
    plain, optimizer = made(host, "DACS")
    train(plain, optimizer, 1)
    ours, _ = made(host, dacal={})
    with caplog.at_level("WARNING", logger="mmseg"):
        ours.load_state_dict(plain.state_dict())
    assert "no state of DACalDACS" in caplog.text
    off, _ = made(host, dacal={"labels": "hard", "every": 0})
    off.load_state_dict(ours.state_dict())
    assert not [name for name in off.state_dict() if name.startswith("dacal.")]
    assert len(list(ours.parameters())) == len(list(plain.parameters()))  # the host's optimizer sees none of ours


def test_a_checkpoint_of_another_net_is_refused_and_nothing_changed(host):
    ours, _ = made(host, dacal={})
    wide, _ = made(host, dacal={"hidden_channels": 20})
    before = ours._dacal.net.state_dict()
    with pytest.raises(ValueError, match=r"uda\.dacal: expected a checkpoint with .*weight of the temperature net"):
        ours.load_state_dict(wide.state_dict())
    assert same(ours._dacal.net.state_dict(), before)
    bilevel, _ = made(host, dacal={"learn": "bilevel"})
    for one, other in ((ours, bilevel), (bilevel, ours)):
        before = one._dacal.net.state_dict()
        with pytest.raises(ValueError, match=r"layers\.0\.weight of the temperature net.*resume with the learn, "):
            one.load_state_dict(other.state_dict())
        assert same(one._dacal.net.state_dict(), before)
    flat = ours._dacal.state_dict()
    del flat["iteration"]
    with pytest.raises(ValueError, match="expected a checkpoint with iteration, got none"):
        checkpoint.restore(flat, ours._dacal.net, ours._dacal.optimizer, {"iteration": 0})


def test_a_checkpoint_of_an_old_torch_gives_the_steps_as_this_one_counts_them(host):
    ours, optimizer = made(host, dacal={})
    train(ours, optimizer, 2)
    for kind in (torch.int64, torch.float32):  # torch < 1.12 counts in whole numbers
        flat = {name: value.to(kind) if name.endswith(".step") else value for name, value in ours._dacal.state_dict().items()}
        again, _ = made(host, dacal={})
        again._dacal.load_state_dict(flat)
        one, other = (model._dacal.optimizer.state_dict()["state"][0]["step"] for model in (ours, again))
        assert type(one) is type(other)
        assert one == other == 2
        assert not isinstance(one, torch.Tensor) or one.dtype == other.dtype


@pytest.mark.parametrize(("learn", "step", "last"), [("fit", "fit", "unjudged"), ("bilevel", "meta-step", "zero")])
def test_the_log_says_what_was_skipped_and_why(host, caplog, learn, step, last):
    ours, optimizer = made(host, dacal={"learn": learn, "warmup_iters": 2, "every": 2})
    with caplog.at_level("INFO", logger="mmseg"):
        logs = train(ours, optimizer, 6)
    # Every name at every iteration: mmcv's log goes on to show the last values of a name that is gone.
    names = {f"dacal.skipped_{why}" for why in ("warmup", "every", "not_finite", last)}
    assert all(names == {name for name in log if "skipped" in name} for log in logs)
    skipped = [[name for name in names if log[name]] for log in logs]
    assert skipped == [["dacal.skipped_warmup"]] * 2 + [[], ["dacal.skipped_every"]] * 2
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"dacal: no {step}",
        f"dacal: {step}s begin",
    ]
    assert logs[0]["dacal.temperature_mean"] == 1.0
    assert logs[-1]["dacal.temperature_min"] <= logs[-1]["dacal.temperature_mean"] <= logs[-1]["dacal.temperature_max"]


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_a_loss_that_is_not_finite_is_skipped(host, learn):
    ours, optimizer = made(host, dacal={"learn": learn})
    train(ours, optimizer, 1)
    before = ours._dacal.net.last.bias.clone()
    bad = batch(1)
    bad["target_img"][:] = math.nan
    log = ours.train_step(bad, optimizer)["log_vars"]
    assert log["dacal.skipped_not_finite"] == 1.0
    assert not {"dacal.outer_loss", "dacal.fit_loss"} & set(log)
    assert torch.equal(ours._dacal.net.last.bias, before)


def test_blends_on_which_the_teacher_overflows_are_skipped(host):
    ours, optimizer = made(host, dacal={})
    train(ours, optimizer, 1)
    before, calls = copy.deepcopy(ours._dacal.net.state_dict()), []

    def overflow_on_blends(module, inputs, logits):
        calls.append(module)
        return logits if len(calls) == 1 else logits * math.inf

    ours.ema_model.decode_head.register_forward_hook(overflow_on_blends)
    (log,) = train(ours, optimizer, 1, first=1)
    assert len(calls) == 2
    assert log["dacal.skipped_not_finite"] == 1.0
    assert "dacal.fit_loss" not in log
    assert same(ours._dacal.net.state_dict(), before)


def test_temperature_maps_lie_beside_the_hosts_pictures_and_cost_no_run(host, tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib")
    for folder in ("class_mix_debug", "debug"):
        work = tmp_path / folder
        (work / folder).mkdir(parents=True)
        ours, optimizer = made(host, dacal={}, work_dir=str(work))
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
    for name, dacal in (("DACS", None), ("DACalDACS", {"learn": "bilevel", "engine": engine})):
        model, optimizer = made(host, name, dacal=dacal)
        model.model.decode_head.debug = True
        pictures.clear()
        train(model, optimizer, 2)
        made_by[name] = len(pictures)
        assert model.model.decode_head.debug
    assert made_by["DACalDACS"] == made_by["DACS"] == 4


@pytest.mark.parametrize("learn", ["fit", "bilevel"])
def test_nothing_is_left_on_the_host_also_after_an_error(host, learn):
    ours, optimizer = made(host, dacal={"learn": learn}, mask_mode="separatetrg", own_teacher=True)
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


def test_a_host_with_another_order_of_calls_is_refused(host):
    ours, optimizer = made(host, dacal={})
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
    ours, optimizer = made(host, dacal={})
    ours.model.decode_head.fp16_enabled = True
    with pytest.raises(RuntimeError, match="expected float32 training, got fp16"):
        train(ours, optimizer, 1)
    ours.model.decode_head.fp16_enabled = False
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 4)
        with pytest.raises(RuntimeError, match="expected one process, got 4 processes"):
            train(ours, optimizer, 1)
    bilevel, _ = made(host, dacal={"learn": "bilevel", "warmup_iters": 5})
    for kind in (torch.optim.LBFGS, torch.optim.Rprop):
        with pytest.raises((ValueError, TypeError), match="hypergradient"):
            train(bilevel, kind(bilevel.model.parameters()), 1)
    # The fit takes no virtual step, so that any optimizer will do.
    train(ours, torch.optim.Rprop(ours.model.parameters()), 1)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"lables": "soft"}, ValueError, r"uda\.dacal: expected keys among labels, learn, .*, got 'lables'; mend or remove it"),
        ({"labels": "calibrated"}, ValueError, "labels to be one of 'soft', 'hard'"),
        ({"learn": "fitted"}, ValueError, "learn to be one of 'fit', 'bilevel'"),
        ({"engine": "unroll"}, ValueError, "engine to be one of"),
        ({"outer_set": "all"}, ValueError, "outer_set to be one of"),
        ({"outer_loss": "brier"}, ValueError, "outer_loss to be one of"),
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
    assert parse({}) == Options()
    assert not Options().off
    assert Options(every=0).off is False
    fit, bilevel = parse({"learn": "fit"}), parse({"learn": "bilevel", "meta_lr": None, "warmup_iters": None})
    assert fit == Options()
    assert (fit.warmup, fit.learning_rate) == (0, 2e-3)
    assert (bilevel.warmup, bilevel.learning_rate) == (3000, 3e-4)
    assert bilevel.warmup < 40_000 / 10
    own = parse({"learn": "bilevel", "meta_lr": 0.0, "warmup_iters": 0})
    assert (own.warmup, own.learning_rate) == (0, 0.0)


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
    teaching = Teaching()
    criterion = teaching.criterion(lambda *args, **options: "host")
    label = torch.zeros(1, 1, 2, 2).long()
    for context in (lambda: teaching.soft(label, torch.ones(1, 2, 2, 2)), lambda: teaching.judged(lambda *args: "judge")):
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
