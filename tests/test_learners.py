"""The contract of all learners: what is true of the two that are here, and of one that somebody adds."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dummy_learner import TowardsTwo
from torch import nn

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, TemperatureFit, two_channels
from dacal_addon.learners import LEARNERS, CalibrationStepResult, SkipKind
from dacal_addon.learners.judged_sets import target_blends
from dacal_addon.losses import cross_entropy

KINDS = [*LEARNERS.values(), TowardsTwo]
TRAINING = [BilevelCalibrationStep]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Network(nn.Module):
    """Logits of a half resolution, with BatchNorm and dropout, in whatever package hosts have."""

    def __init__(self, pack=lambda logits, features: logits, *, stride=2, classes=4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 6, stride, stride=stride), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.1))
            self.head = nn.Conv2d(6, classes, 1)
        self.head.weight.data *= 9
        self.pack = pack

    def forward(self, image):
        features = self.body(image)
        return self.pack(self.head(features), features)


def batch(seed=0, classes=4):
    g = generator(seed)
    source_label = torch.randint(0, classes, (2, 8, 8), generator=g)
    source_label[:, 0] = 255
    return {
        "source_image": torch.rand(2, 3, 8, 8, generator=g),
        "source_label": source_label,
        "target_image": torch.rand(2, 3, 8, 8, generator=g),
    }


def made(kind, *, student=None, net=None, weight="none", threshold=0.3, **options):
    student = Network() if student is None else student
    net = MetaTemperatureNet(4) if net is None else net
    labeler = SoftPseudoLabeler(net, weight=weight, threshold=threshold)
    if kind in TRAINING:
        options = {"engine": "higher", **options}  # exact, also before torch 2.0
    return kind.for_loop(
        labeler,
        student=student,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        meta_optimizer=torch.optim.Adam(net.parameters(), lr=1e-2),
        **{"warmup": 0, **options},
    )


def state(module):
    return copy.deepcopy(module.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_the_temperature_net_and_nothing_else(kind, enabled):
    student, teacher = Network(), Network().eval()
    learner = made(kind, student=student)
    untouched, net = [state(student), state(teacher)], state(learner.temperature_net)
    random_state = torch.get_rng_state()
    with torch.set_grad_enabled(enabled):
        result = learner(**batch(), teacher=teacher)
    assert type(result) is CalibrationStepResult
    assert result.skipped is None
    assert result.hypergradient_norm > 0
    assert result.temperature_min == result.temperature_mean == result.temperature_max == 1.0
    assert all(same(*pair) for pair in zip(untouched, [state(student), state(teacher)]))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not same(net, state(learner.temperature_net))
    networks = (student, teacher, learner.temperature_net)
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())
    assert learner.iteration == 1


@pytest.mark.parametrize("kind", KINDS)
def test_waits_and_says_so_as_data(kind):
    learner = made(kind, warmup=2, every=3)
    skips = [learner(**batch(i), teacher=Network()).skipped for i in range(6)]
    assert [skip and skip.kind for skip in skips] == [SkipKind.WARMUP] * 2 + [None, SkipKind.EVERY, SkipKind.EVERY, None]
    assert f"{skips[0]}" == "warm-up: iteration 1 of 2"


def runs(learner, iterations, teacher):
    return [learner(**batch(i), teacher=teacher) for i in iterations]


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_saves_is_all_that_a_resumed_run_needs(kind):
    options = {"warmup": 1, "every": 2, "judged_set": target_blends}  # which draws, as the mask does
    teacher = Network().eval()
    whole = made(kind, generator=generator(5), **options)
    expected = runs(whole, range(8), teacher)
    first = made(kind, generator=generator(5), **options)
    runs(first, range(4), teacher)
    resumed = made(kind, net=MetaTemperatureNet(4, generator=generator(9)), generator=generator(9), **options)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert repr(runs(resumed, range(4, 8), teacher)) == repr(expected[4:])  # as text, since NaN equals no NaN
    assert same(state(resumed.temperature_net), state(whole.temperature_net))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_something_else_is_refused_before_anything_changes(kind):
    learner, other = made(kind), made(kind, net=MetaTemperatureNet(4, hidden_channels=3))
    learner(**batch(), teacher=Network())
    before = copy.deepcopy(learner.state_dict())
    del before["generator"]
    for wrong, message in (
        (other.state_dict(), r"with last.weight of shape \(1, 16, 1, 1\), got \(1, 3, 1, 1\); resume with"),
        ({"iteration": 3}, f"the result of {kind.__name__}.state_dict"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.load_state_dict(wrong)
    after = learner.state_dict()
    assert same(before["temperature_net"], after["temperature_net"])
    assert repr(before["meta_optimizer"]) == repr(after["meta_optimizer"])


class Output:
    """As transformers' models return it: an object with attributes."""

    def __init__(self, logits):
        self.loss, self.logits = None, logits


PACKS = {
    "dictionary": (lambda z, f: {"aux": 2 * z, "out": z}, lambda out: out["out"]),
    "tuple": (lambda z, f: (z, 2 * z), lambda out: out[0]),
    "object": (lambda z, f: Output(z), lambda out: out.logits),
}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("kind", KINDS)
def test_networks_may_return_what_they_like(kind, pack):
    packed, logits_of = PACKS[pack]
    results = []
    for how, options in ((Network().pack, {}), (packed, {"logits_of": logits_of})):
        learner = made(kind, student=Network(how).eval(), generator=generator(1), **options)
        results.append(learner(**batch(), teacher=Network(how).eval()))
    assert repr(results[0]) == repr(results[1])


@pytest.mark.parametrize(
    ("pack", "error", "message"),
    [
        (
            PACKS["dictionary"][0],
            TypeError,
            r"got dict of 'aux': float32 .*: logits_of=lambda out: out\['aux'\], or out\['out'\]",
        ),
        (PACKS["tuple"][0], TypeError, r"got tuple of 0: float32 .*logits_of=lambda out: out\[0\], or out\[1\]"),
        (PACKS["object"][0], TypeError, r"got Output of 'loss': NoneType, 'logits': .*logits_of=lambda out: out.logits"),
        (lambda z, f: z.argmax(1), ValueError, r"logits: a floating tensor .*, or of a lower resolution, got int64"),
        (lambda z, f: None, TypeError, r"got NoneType; say with logits_of where the logits are"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_returned_instead_of_logits_is_named_with_the_way_to_them(kind, pack, error, message):
    with pytest.raises(error, match=f"{kind.__name__}: expected .*{message}"):
        made(kind)(**batch(), teacher=Network(pack))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_quarter_of_the_resolution_are_interpolated(kind):
    class Upsampled(Network):
        def forward(self, image):
            return F.interpolate(super().forward(image), size=image.shape[-2:], mode="bilinear", align_corners=False)

    results = []
    for network in (Network, Upsampled):
        learner = made(kind, student=network(stride=4).eval(), generator=generator(1))
        results.append(learner(**batch(), teacher=network(stride=4).eval()))
    assert results[0].skipped is None
    assert repr(results[0]) == repr(results[1])
    passed = made(kind, student=Network(stride=4).eval(), generator=generator(1))
    teacher = Network(stride=4).eval()
    small = teacher(batch()["target_image"]).detach()
    assert small.shape[-1] == 2
    assert repr(passed(**batch(), teacher_logits=small, teacher=teacher)) == repr(results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_features_reach_the_temperature_net(kind):
    def first_step(seen):
        net = MetaTemperatureNet(4, feature_channels=6)
        net.last.weight.data.fill_(0.1)
        networks = [Network(lambda z, f: (z, seen * f)).eval() for _ in range(2)]
        outputs = {"logits_of": lambda out: out[0], "features_of": lambda out: out[1]}
        return made(kind, student=networks[0], net=net, **outputs)(**batch(), teacher=networks[1])

    one, other = first_step(1.0), first_step(-1.0)
    assert one.skipped is None
    assert one.temperature_mean != other.temperature_mean


@pytest.mark.parametrize("kind", KINDS)
def test_target_pixels_that_all_have_no_weight_are_reported(kind):
    for options, call in (({"weight": "threshold", "threshold": 1.0}, {}), ({}, {"valid": torch.zeros(2, 8, 8).bool()})):
        learner = made(kind, **options)
        net = state(learner.temperature_net)
        teacher = Network()
        teacher.head.weight.data /= 100
        result = learner(**batch(), teacher=teacher, **call)
        assert result.skipped.kind is SkipKind.UNWEIGHTED
        assert same(net, state(learner.temperature_net))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_not_finite_are_reported(kind):
    for bad in (math.nan, math.inf):
        learner = made(kind)
        logits = torch.zeros(2, 4, 8, 8)
        logits[0, 1, 2, 3] = bad
        assert learner(**batch(), teacher_logits=logits, teacher=Network()).skipped.kind is SkipKind.NOT_FINITE
    masked = Network(lambda z, f: torch.cat([z[:, :3], torch.full_like(z[:, :1], -math.inf)], 1))
    data = batch(classes=3)
    learner = made(kind)
    assert learner(**data, teacher=masked).skipped is None
    assert all(bool(torch.isfinite(p).all()) for p in learner.temperature_net.parameters())


@pytest.mark.skipif(not hasattr(torch, "inference_mode"), reason="torch < 1.9")
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_ran_under_inference_mode(kind):
    teacher = Network().eval()
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits, features = teacher(batch()["target_image"]), teacher.body(batch()["target_image"])
        learner = made(kind, net=MetaTemperatureNet(4, feature_channels=6), student=Network().eval())
        learner.outputs = learner.outputs._replace(features_of=lambda out: torch.zeros(2, 6, 4, 4))
        results.append(
            learner(**batch(), teacher_logits=logits, teacher=teacher, teacher_features=features, generator=generator())
        )
    assert results[0].skipped is None
    assert repr(results[0]) == repr(results[1])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"that can be enabled, got torch\.inference_mode"):
        made(kind)(**batch(), teacher=teacher)


@pytest.mark.parametrize("kind", TRAINING)
def test_a_student_that_does_not_move_is_not_blamed_on_the_labels(kind):
    learner = made(kind)
    learner.optimizer.param_groups[0]["lr"] = 0.0
    skipped = learner(**batch(), teacher=Network()).skipped
    assert skipped.kind is SkipKind.NO_STEP
    assert "learning rate is 0" in str(skipped)


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("warmup", [0, 9])
def test_padding_counts_neither_in_the_loss_nor_in_its_denominator(kind, warmup):
    valid = torch.ones(2, 8, 8).bool()
    valid[:, :, :5] = False
    data, teacher = batch(), Network().eval()
    mask = torch.rand(2, 1, 8, 8, generator=generator(3)) < 0.5
    student = Network().eval()
    learner = made(kind, student=student, warmup=warmup)
    result = learner(**data, teacher=teacher, mask=mask, valid=valid, backward=True)

    def at_8(z):
        return F.interpolate(z, size=(8, 8), mode="bilinear", align_corners=False)

    mixed = torch.where(mask, data["source_image"], data["target_image"])
    log_p = at_8(student(mixed)).log_softmax(1)
    q = at_8(teacher(data["target_image"])).softmax(1)
    total, count = 0.0, 0
    for n, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(8), torch.arange(8)).tolist():
        c = int(data["source_label"][n, y, x])
        if mask[n, 0, y, x] and c != 255:
            total, count = total - float(log_p[n, c, y, x].detach()), count + 1
        elif not mask[n, 0, y, x] and valid[n, y, x]:
            total, count = total - float((q * log_p)[n, :, y, x].sum().detach()), count + 1
    assert result.inner_loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("ignored", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_ignored_class_is_never_taught_nor_judged(kind, ignored):
    """A teacher that is sure of the ignored class everywhere, and a judged set that says so too, have no say."""
    seen = []

    def noting(logits, label, weight=None, *, ignore_index):
        seen.append(label[label != ignore_index].unique().tolist())
        return cross_entropy(logits, label, weight, ignore_index=ignore_index)

    teacher = Network().eval()
    teacher.head.bias.data[ignored] += 100.0
    data = batch()
    data["source_label"][data["source_label"] == 255] = ignored
    learner = made(kind, outer_loss=noting, ignore_index=ignored)
    result = learner(**data, teacher=teacher)
    assert result.skipped is None
    assert all(ignored not in labels for labels in seen)
    if kind in TRAINING:
        learner(**data, teacher=teacher, backward=True)
        gradient = learner.student.head.bias.grad
        assert float(gradient[ignored]) > 0  # nothing asks for the class: its logit can only be pushed down


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_batch_that_does_not_fit_is_found_in_the_warm_up(kind):
    for call, message in (
        ({"valid": torch.ones(2, 8, 8)}, "valid: a bool tensor"),
        ({"mask": torch.ones(2, 8, 8)}, "mask: a bool tensor"),
        ({"teacher_features": torch.ones(2, 3, 4, 4), "teacher_logits": torch.zeros(2, 4, 8, 8)}, "expected features=None"),
        (
            {"teacher_image": torch.ones(2, 3, 8, 9)},
            r"one shape, got source_image \(2, 3, 8, 8\) and teacher_image \(2, 3, 8, 9",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            made(kind, warmup=9)(**batch(), teacher=Network(), **call)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_view_of_the_target_is_what_the_teacher_is_asked_about(kind):
    asked = []

    class Noting(Network):
        def forward(self, image):
            asked.append(image)
            return super().forward(image)

    view = torch.rand(2, 3, 8, 8, generator=generator(4)) + 5
    made(kind)(**batch(), teacher=Noting(), teacher_image=view)
    assert torch.equal(asked[0], view)
    assert all(bool((image >= 5).all()) for image in asked)
    assert (len(asked) == 2) == (kind is TemperatureFit)


@pytest.mark.parametrize("ignored", [0, 2])
def test_the_fit_never_asks_for_an_ignored_class(ignored):
    """A teacher that is sure of it teaches the same temperatures as one that has ruled it out."""
    nets = []
    for far in (100.0, -math.inf):
        teacher = Network(lambda z, f, far=far: z.index_fill(1, torch.tensor([ignored]), far)).eval()
        data = batch()
        data["source_label"][data["source_label"] == 255] = ignored
        learner = made(TemperatureFit, ignore_index=ignored, generator=generator(1))
        for _ in range(3):
            assert learner(**data, teacher=teacher).skipped is None
        nets.append(state(learner.temperature_net))
    assert all(torch.allclose(nets[0][name], nets[1][name]) for name in nets[0])


def test_a_state_of_another_kind_is_refused_whole():
    """Of another learner with a net of the same shape, and of another optimizer: nothing has moved then."""
    fit = made(TemperatureFit)
    fit(**batch(), teacher=Network())
    saved = copy.deepcopy(fit.state_dict())
    step = made(BilevelCalibrationStep)
    with pytest.raises(ValueError, match="expected the state of a BilevelCalibrationStep, got that of a TemperatureFit"):
        step.load_state_dict(saved)
    net = MetaTemperatureNet(4, generator=generator(9))
    other = TemperatureFit(SoftPseudoLabeler(net), meta_optimizer=torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
    untouched = state(net)
    with pytest.raises(ValueError, match=r"expected the state of a SGD of the temperature net, got another one \(its settings"):
        other.load_state_dict(saved)
    assert same(state(net), untouched)
    assert other.meta_optimizer.param_groups[0]["lr"] == 0.5
    assert other.meta_optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_probabilities_is_told_from_an_unsure_one(kind):
    uniform = torch.full((2, 4, 8, 8), 0.25)
    result = made(kind, weight="threshold", threshold=0.9)(**batch(), teacher_logits=uniform, teacher=Network())
    assert "no confidence reaches threshold=0.9" in str(result.skipped)
    assert "probabilities" in str(result.skipped)
    result = made(kind, weight="threshold", threshold=0.9)(**batch(), teacher_logits=4 * uniform, teacher=Network())
    assert "probabilities" not in str(result.skipped)


# Volumes, one channel, several ignored labels


class Pointwise(nn.Module):
    """Each pixel by itself, so that a picture's pixels may as well be a volume's voxels."""

    def __init__(self, dims, outputs=4):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = convolution(3, 6, 1), convolution(6, outputs, 1)
        self.head.weight.data *= 9

    def forward(self, image):
        return self.head(torch.tanh(self.body(image)))


def figures(result):
    return [value for value in result if isinstance(value, float) and not math.isnan(value)]


@pytest.mark.parametrize("spatial", [(64,), (4, 4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_learns_of_voxels_what_it_learns_of_pixels(kind, spatial):
    data = batch()
    shaped = {name: x.reshape(*x.shape[: x.dim() - 2], *spatial) for name, x in data.items()}
    found = []
    for each, dims in ((data, 2), (shaped, len(spatial))):
        teacher, student = Pointwise(dims), Pointwise(dims)
        net = MetaTemperatureNet(4, sees="logits", spatial_dims=dims)
        learner = made(kind, student=student, net=net, generator=generator(1))
        found.append([figures(learner(**each, teacher=teacher)) for _ in range(3)])
        found[-1].append(torch.cat([p.detach().flatten() for p in net.parameters()]).tolist())
    assert len(found[0][0]) > 4
    for one, other in zip(*found):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("spatial", [(8, 8), (4, 4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_sigmoid_channel_is_declared_and_learned_of_as_two(kind, spatial):
    class Two(Pointwise):
        def forward(self, image):
            z = super().forward(image)
            return torch.cat([torch.zeros_like(z), z], 1)

    data = {name: x.reshape(*x.shape[: x.dim() - 2], *spatial) for name, x in batch(classes=2).items()}
    found = []
    for network, options in ((Two, {}), (Pointwise, {"logits_of": two_channels})):
        teacher, student = (network(len(spatial), outputs=1) for _ in range(2))
        net = MetaTemperatureNet(2, spatial_dims=len(spatial))
        learner = made(kind, student=student, net=net, generator=generator(1), **options)
        found.append([repr(learner(**data, teacher=teacher)) for _ in range(3)])
    assert found[0] == found[1]
    assert "skipped=None" in found[0][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_one_channel_that_is_not_declared_is_told_how(kind):
    net, networks = MetaTemperatureNet(2), [Pointwise(2, outputs=1) for _ in range(2)]
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*got float32 .2, 1, 8, 8.; .*logits_of=two_channels"):
        made(kind, net=net, student=networks[0])(**batch(classes=2), teacher=networks[1])
    with pytest.raises(ValueError, match=r"teacher_logits: .*got float32 .2, 1, 8, 8.; .*two_channels"):
        made(kind, net=net)(**batch(classes=2), teacher=networks[1], teacher_logits=torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_several_ignored_labels_are_as_one(kind):
    """And a loss of the host's own is passed one, which stands for all."""
    found, seen = [], []

    def noting(logits, label, weight=None, *, ignore_index):
        seen.append((ignore_index, set(label.unique().tolist())))
        loss = F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")
        return (loss * weight).sum() / (label != ignore_index).sum()

    for ignore_index in (1, (255, 1), [1, 255], (1, 255, 300)):
        data = batch()
        if ignore_index == 1:
            data["source_label"][data["source_label"] == 255] = 1
        for outer_loss in ("cross_entropy", noting):
            learner = made(kind, ignore_index=ignore_index, outer_loss=outer_loss, generator=generator(1))
            found.append(repr([learner(**data, teacher=Network().eval()) for _ in range(2)]))
    assert found[2::2] == found[:1] * 3
    assert found[3::2] == found[1:2] * 3
    for ignored, labels in seen:
        assert ignored in (1, 255, 300)
        assert labels <= {0, 2, 3, ignored}
    assert bool(seen) == (kind is not TowardsTwo)


@pytest.mark.parametrize("kind", KINDS)
def test_class_255_is_not_dropped_in_silence(kind):
    """Of 256 classes it is one; whether it counts has to be said."""
    student, teacher = (Network(classes=256).eval() for _ in range(2))
    with pytest.raises(ValueError, match=r"ignore_index to be given with 256 classes, of which 255 is one, got none; .*-1"):
        made(kind, student=student, net=MetaTemperatureNet(256), warmup=9)(**batch(), teacher=teacher)
    for said in (255, -1):
        learner = made(kind, student=student, net=MetaTemperatureNet(256), ignore_index=said)
        assert learner(**batch(), teacher=teacher).skipped is None
    student, teacher = (Network(classes=255).eval() for _ in range(2))
    assert made(kind, student=student, net=MetaTemperatureNet(255))(**batch(), teacher=teacher).skipped is None


@pytest.mark.parametrize("kind", KINDS)
def test_counts_may_be_numpys(kind):
    learner = made(kind, warmup=np.int64(1), every=np.int32(2), ignore_index=np.int64(255))
    kinds = [getattr(learner(**batch(), teacher=Network().eval()).skipped, "kind", None) for _ in range(3)]
    assert kinds == [SkipKind.WARMUP, None, SkipKind.EVERY]
    assert type(learner.every) is type(learner.ignore_index) is int


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_masked_out_of_a_volume_of_a_quarter_of_the_resolution(kind):
    class Small(Pointwise):
        def forward(self, image):
            return super().forward(image[..., ::2, ::2, ::2]).index_fill(1, torch.tensor([3]), -math.inf)

    data = {name: x.reshape(*x.shape[: x.dim() - 2], 4, 4, 4) for name, x in batch().items()}
    data["source_label"][data["source_label"] == 3] = 255
    net = MetaTemperatureNet(4, sees="logits", kernel_size=3, spatial_dims=3)
    result = made(kind, student=Small(3), net=net)(**data, teacher=Small(3))
    assert result.skipped is None
    assert math.isfinite(result.hypergradient_norm)
