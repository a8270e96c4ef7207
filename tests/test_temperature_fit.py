"""Temperatures fitted on blends, against scipy's minimum and a second computation of what is judged."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn

from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler, TemperatureFit
from dacal_addon.learners import SkipKind
from dacal_addon.learners.judged_sets import differing_blends


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


IMAGE = torch.rand(2, 3, 9, 11, generator=generator(1), dtype=torch.float64)


class OneTemperature(nn.Module):
    """The same everywhere, and a note of what it was given."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, logits, features=None):
        self.features = features
        return self.log.exp() * torch.ones_like(logits[:, :1])


class Teacher(nn.Module):
    """Logits that a blend makes wrong now and then; BatchNorm and dropout leave traces if they are not wiped."""

    def __init__(self, *, with_features=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv, self.norm, self.dropout = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=1.0), nn.Dropout(0.1)
            self.with_features = with_features
            self.double()(IMAGE)  # for the statistics

    def forward(self, image):
        features = self.norm(self.conv(image))
        logits = 6 * self.dropout(features)
        return (logits, features) if self.with_features else logits


def fit_of(net, optimizer, **options):
    return TemperatureFit(SoftPseudoLabeler(net, weight="none"), meta_optimizer=optimizer, **options)


def step(fit, teacher, label, *, image=IMAGE, logits=None, valid=None, **options):
    """One call whose pseudo-labels are `label`; the source, of which the fit sees nothing, is the same images."""
    if logits is None:
        logits = 50.0 * torch.stack([(label == c).to(image.dtype) for c in range(4)], 1)
    valid = label != 255 if valid is None else valid
    source = torch.zeros(valid.shape, dtype=torch.int64)
    return fit(image, source, image, logits, teacher=teacher, valid=valid, generator=generator(), **options)


def labels_of(teacher):
    return copy.deepcopy(teacher).eval()(IMAGE).argmax(1)


def likelihood(z, y):
    return F.cross_entropy(z, y, reduction="none")


def squares(z, y):
    return (torch.softmax(z, 1) - F.one_hot(y, z.shape[1])).pow(2).sum(1)


@pytest.mark.parametrize(("options", "of"), [({}, likelihood), ({"outer_loss": "brier"}, squares)])
def test_one_temperature_comes_to_the_minimum_that_scipy_finds(options, of):
    teacher = Teacher().eval()
    label = labels_of(teacher)
    label[1, 0] = 255  # the host's own ignored row
    with torch.no_grad():
        z = teacher(0.65 * IMAGE + 0.35 * IMAGE[[1, 0]])  # of two images, each meets the other
    judged = (label != 255) & (label[[1, 0]] != 255) & (label != label[[1, 0]])
    z, y = z.permute(0, 2, 3, 1)[judged], label[judged]
    # Each class counts as if it had its share of all pixels that are not ignored.
    everywhere = label[label != 255].tolist()
    weight = torch.tensor([everywhere.count(c) / y.tolist().count(c) for c in y.tolist()], dtype=torch.float64)
    weight = weight / weight.mean()
    assert float(weight.max()) > 1.1

    def cost(t):
        return float((weight * of(z / t, y)).mean())

    best = minimize_scalar(cost, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-8})
    assert abs(best.x - 1) > 0.1

    net = OneTemperature()
    fit = fit_of(net, torch.optim.Adam([net.log], lr=0.05), **options)
    losses = [step(fit, teacher, label).outer_loss_before for _ in range(400)]
    assert losses[0] == pytest.approx(cost(1.0))
    assert losses[-1] == pytest.approx(best.fun, rel=1e-6)
    assert float(net.log.detach().exp()) == pytest.approx(best.x, rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_nothing_behind_but_the_nets_parameters(training):
    teacher = Teacher().train(training)
    before, state = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    net = MetaTemperatureNet(4).double()
    untouched = copy.deepcopy(net.state_dict())
    step(fit_of(net, torch.optim.Adam(net.parameters(), lr=1e-2)), teacher, labels_of(teacher))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training == training
    assert all(parameter.grad is None for module in (teacher, net) for parameter in module.parameters())
    assert any(not torch.equal(value, untouched[name]) for name, value in net.state_dict().items())


def test_hands_the_teachers_features_on():
    teacher, net = Teacher(with_features=True).eval(), OneTemperature()
    label = labels_of(Teacher().eval())
    options = {"logits_of": lambda out: out[0], "features_of": lambda out: out[1]}
    fit = fit_of(net, torch.optim.SGD([net.log], lr=0.1), judged_set=partial(differing_blends, share=0.8), **options)
    step(fit, teacher, label)
    assert torch.equal(net.features, teacher(0.8 * IMAGE + (1 - 0.8) * IMAGE[[1, 0]])[1])


def test_without_a_pair_of_different_labels_nothing_moves():
    teacher, net = Teacher(), OneTemperature()
    optimizer = torch.optim.Adam([net.log], lr=0.1)
    fit = fit_of(net, optimizer)
    step(fit, teacher, labels_of(teacher))  # gives Adam a momentum
    moved = float(net.log.detach())
    assert moved != 0
    result = step(fit, teacher, torch.full((2, 9, 11), 3))
    assert result.skipped.kind is SkipKind.UNJUDGED
    assert math.isnan(result.outer_loss_before)
    assert float(net.log.detach()) == moved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_do_not_spoil_the_net(bad):
    net = MetaTemperatureNet(4).double()
    fit = fit_of(net, torch.optim.Adam(net.parameters(), lr=0.1))
    label = labels_of(Teacher())
    untouched = copy.deepcopy(net.state_dict())

    def teacher(image):
        logits = Teacher()(image).detach()
        logits[0, 2, 4, 5] = bad
        return logits

    label = label.fill_(0).index_fill_(0, torch.tensor([1]), 1)
    result = step(fit, teacher, label)
    assert result.skipped.kind is SkipKind.NOT_FINITE
    assert str(result.skipped).startswith("the loss on the judged set is not finite: " if math.isnan(bad) else "the ")
    skipped = fit(IMAGE, label, IMAGE, teacher=teacher, generator=generator()).skipped
    assert skipped == (SkipKind.NOT_FINITE, "the teacher's logits are not finite")
    assert all(torch.equal(value, untouched[name]) for name, value in net.state_dict().items())


def test_a_class_masked_out_counts_as_one_that_nobody_expects():
    def fitted(far):
        net = MetaTemperatureNet(4).double()
        fit = fit_of(net, torch.optim.SGD(net.parameters(), lr=0.1))

        def teacher(image):
            logits = Teacher().eval()(image).detach()
            logits[:, 3] = far
            return logits

        results = [step(fit, teacher, None, logits=teacher(IMAGE), valid=torch.ones(2, 9, 11).bool()) for _ in range(3)]
        assert all(result.skipped is None for result in results)
        return torch.stack([parameter.detach().norm() for parameter in net.parameters()])

    assert torch.allclose(fitted(-math.inf), fitted(-5e3), rtol=1e-12)


def test_a_teacher_that_raises_leaves_nothing_behind():
    class Broken(Teacher):
        def forward(self, image):
            super().forward(image)
            self.eval()
            torch.rand(1)
            if image is not IMAGE:
                raise ArithmeticError("no blends")
            return image

    teacher, net = Broken().train(), MetaTemperatureNet(4).double()
    before, state = copy.deepcopy([teacher.state_dict(), net.state_dict()]), torch.get_rng_state()
    fit = fit_of(net, torch.optim.Adam(net.parameters(), lr=0.1))
    with pytest.raises(ArithmeticError):
        step(fit, teacher, labels_of(Teacher()))
    after = [teacher.state_dict(), net.state_dict()]
    assert all(torch.equal(value, one[name]) for one, other in zip(before, after) for name, value in other.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training


def test_a_frozen_part_of_the_net_stays_as_it_is():
    net = MetaTemperatureNet(4).double()
    net.last.bias.requires_grad_(False)
    fit = fit_of(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert step(fit, Teacher(), labels_of(Teacher())).skipped is None
    assert float(net.last.bias) == 0
    assert float(net.last.weight.detach().abs().sum()) > 0


def test_an_optimizer_of_the_student_is_refused():
    student, net = nn.Conv2d(3, 4, 1), MetaTemperatureNet(4)
    for parameters in (student.parameters(), [*student.parameters(), *net.parameters()], [net.last.bias]):
        message = (
            "TemperatureFit: expected meta_optimizer to own the trainable parameters of labeler.temperature_net and no others"
        )
        with pytest.raises(ValueError, match=message):
            fit_of(net, torch.optim.SGD(parameters, lr=0.1))


def test_a_batch_without_a_partner_or_a_teacher_is_refused_before_the_net_moves():
    net = MetaTemperatureNet(4).double()
    untouched = copy.deepcopy(net.state_dict())
    label = torch.zeros(2, 9, 11).long()
    for warmup in (0, 9):
        fit = fit_of(net, torch.optim.SGD(net.parameters(), lr=0.1), warmup=warmup)
        with pytest.raises(ValueError, match="target_blends: expected at least 2 target images to blend, got 1; use a larger"):
            step(fit, Teacher(), label[:1], image=IMAGE[:1])
    fit = fit_of(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="TemperatureFit: expected teacher, got its logits alone; pass teacher=teacher"):
        step(fit, None, label)
    with pytest.raises(ValueError, match=r"TemperatureFit: expected backward=False \(it has no student to train\), got True"):
        fit_of(net, torch.optim.SGD(net.parameters(), lr=0.1), warmup=1)(
            IMAGE, label, IMAGE, teacher=Teacher(), backward=True, generator=generator()
        )
    assert all(torch.equal(value, untouched[name]) for name, value in net.state_dict().items())


def test_teaches_a_net_to_doubt_what_blends_get_wrong():
    """Where the teacher is sure it is right and elsewhere it guesses: T must fall there and rise here."""
    sure = torch.zeros(2, 1, 8, 8).bool()
    sure[..., :4] = True

    def teacher(image):
        noise = torch.randn(2, 4, 8, 8, generator=generator(5))
        own = 1.5 * F.one_hot(label, 4).permute(0, 3, 1, 2)
        return torch.where(sure, own * 2 + 0.1 * noise, 2 * noise)

    label = torch.randint(0, 4, (2, 8, 8), generator=generator(2))
    net = MetaTemperatureNet(4)
    fit = fit_of(net, torch.optim.Adam(net.parameters(), lr=1e-2))
    for _ in range(150):
        step(fit, teacher, label, image=IMAGE.float()[..., :8, :8])
    with torch.no_grad():
        temperature = net(teacher(None))
    assert float(temperature[sure].mean()) < 0.7
    assert float(temperature[~sure].mean()) > 1.5
