"""Held-out source images in the target's look as a judged set: which, in what look, and that they are asked in evaluation mode.

The hypergradient is compared with differences of what a host would do: a real step in training mode, then a look at the shadows
in evaluation mode, both of copies.
"""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import ENGINES, OPTIMIZERS, TOLERANCE, Student, assert_same, distance, randn, snapshot, with_history
from torch import nn

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, TemperatureFit, soft_cross_entropy
from dacal_addon.learners import JudgedBatch, ShadowSet, SkipKind
from dacal_addon.learners.judged_sets import DomainBatch
from dacal_addon.losses import OUTER_LOSSES
from dacal_addon.mixing import class_mask, mix
from dacal_addon.shadows import LOOKS

CLASSES = 4
AS_THEY_ARE = {"looks": {"none": lambda image, reference, **_: image}, "blur": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def held_out(n=6, size=(8, 10), dtype=torch.float64):
    """Images that tell their labels: the first channel is the class, the second one the number of the image."""
    g = generator(1)
    label = torch.randint(0, CLASSES, (n, *size), generator=g)
    label[:, 0, 0] = 255
    number = torch.arange(n).view(n, 1, 1).expand_as(label)
    noise = torch.rand(n, *size, generator=g, dtype=torch.float64)
    return torch.stack([label.double(), number.double(), noise], 1).to(dtype), label


def domains(n=2, size=(8, 8), dtype=torch.float64):
    g = generator(2)
    source_label = torch.randint(0, CLASSES, (n, *size), generator=g)
    source_label[:, 0] = 255
    return {
        "source_image": torch.rand(n, 3, *size, generator=g, dtype=torch.float64).to(dtype),
        "source_label": source_label,
        "target_image": (2 + torch.rand(n, 3, *size, generator=g, dtype=torch.float64)).to(dtype),
    }


def batch(**options):
    source_image, source_label, target_image = domains(**options).values()
    weight = torch.ones_like(source_label, dtype=target_image.dtype)
    mask = class_mask(source_label, generator=generator(3))
    return DomainBatch(source_image, source_label, target_image, source_label.clamp(max=3), weight, mask, 255)


# Which images


@pytest.mark.parametrize("count", [1, 4, 6, 9])
def test_each_image_is_another_one_of_those_held_out_with_its_own_label(count):
    image, label = held_out()
    judged = ShadowSet(image, label, count=count, **AS_THEY_ARE)
    times = torch.zeros(6)
    for seed in range(60):
        found = judged(batch(), generator=generator(seed))
        numbers = found.image[:, 1, 0, 0].long()
        assert len(numbers) == len(numbers.unique()) == min(count, 6)
        assert torch.equal(found.image, image[numbers])
        assert torch.equal(found.label, label[numbers])
        assert torch.equal(found.label, found.image[:, 0].long())
        assert bool((found.weight == 1).all())
        assert found.weight.shape == found.label.shape
        assert found.evaluation
        times[numbers] += 1
    expected = 60 * min(count, 6) / 6
    assert bool((times - expected).abs().max() <= 4 * math.sqrt(expected * (1 - min(count, 6) / 6)))


def test_pixels_that_are_ignored_stay_ignored_and_no_other_is():
    _, label = held_out()
    found = ShadowSet(*held_out(), count=6)(batch(), generator=generator())
    assert int((found.label == 255).sum()) == int((label == 255).sum()) == 6


# In what look


def statistics(image):
    return torch.cat([image.mean((2, 3)), image.var((2, 3), unbiased=False).sqrt()], 1)


def test_they_have_the_colours_of_the_batchs_target_images_and_their_own_shapes():
    options = {"looks": {"colour": LOOKS["colour"]}, "blur": 0.0, "strength": (1.0, 1.0)}
    image = held_out()[0] + 0.1 * randn(6, 3, 8, 10)  # no flat channel
    known = statistics(batch(n=3).target_image)
    references = set()
    for seed in range(20):
        found = ShadowSet(image, held_out()[1], count=6, **options)(batch(n=3), generator=generator(seed))
        apart = (statistics(found.image)[:, None] - known).abs().max(2)[0]
        assert float(apart.min(1)[0].max()) < 1e-9
        references.update(apart.argmin(1).tolist())
        own = (found.image - found.image.mean((2, 3), keepdim=True)).flatten(2)
        shape = (image - image.mean((2, 3), keepdim=True)).flatten(2)
        likeness = (F.normalize(own, dim=2)[:, None] * F.normalize(shape, dim=2)).sum(3).min(2)[0]
        which = likeness.argmax(1)
        assert float(likeness.max(1)[0].min()) > 1 - 1e-9
        assert torch.equal(found.label, held_out()[1][which])
    assert references == {0, 1, 2}


def test_the_strength_is_drawn_uniformly_once_a_call():
    seen = []

    def look(image, reference, *, strength, generator):
        seen.append(strength)
        return image

    judged, g = ShadowSet(*held_out(), count=3, strength=(0.5, 1.5), looks={"note": look}), generator()
    seen.clear()  # of the trial at construction
    for _ in range(300):
        judged(batch(), generator=g)
    drawn = torch.tensor(seen).view(300, 3)
    assert torch.equal(drawn, drawn[:, :1].expand(300, 3))
    # Kolmogorov and Smirnov's bound of 1 in 1000.
    order = drawn[:, 0].sort()[0] - 0.5
    assert float((order - torch.linspace(0, 1, 300)).abs().max()) < 1.95 / math.sqrt(300)
    del seen[:]
    ShadowSet(*held_out(), strength=(2.0, 2.0), looks={"note": look})(batch(), generator=g)
    assert set(seen) == {2.0}


def test_the_looks_options_are_handed_on():
    image, label = held_out()
    plain = ShadowSet(image, label, count=6, strength=(0.0, 0.0))(batch(), generator=generator())
    assert torch.allclose(plain.image, image[plain.image[:, 1, 0, 0].round().long()], atol=1e-9)
    blurred = ShadowSet(image, label, count=6, strength=(1.0, 1.0), looks=AS_THEY_ARE["looks"], blur=1.0)
    found = blurred(batch(), generator=generator())
    assert all(float((found.image[i] - image).abs().flatten(1).max(1)[0].min()) > 0.1 for i in range(6))
    narrow = ShadowSet(image, label, count=6, value_range=(0.5, 1.25))(batch(), generator=generator()).image
    assert (float(narrow.min()), float(narrow.max())) == (0.5, 1.25)


def test_the_generators_state_decides_and_no_other_random_state_is_touched():
    judged = ShadowSet(*held_out(), count=3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    g = generator(4)
    first, second = (judged(batch(), generator=g) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    torch.manual_seed(99)
    g, other = generator(4), ShadowSet(*held_out(), count=3)
    for found, again in ((first, other(batch(), generator=g)), (second, other.draw(batch().target_image, generator=g))):
        assert all(torch.equal(a, b) for a, b in zip(found[:3], again[:3]))
    assert not torch.equal(first.image, second.image)


@pytest.mark.parametrize("own", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(8, 10), (4, 5), (16, 9)])
def test_targets_may_have_another_kind_and_size(own, kind, size):
    image, label = held_out()
    image = image + 0.1 * randn(6, 3, 8, 10)  # of a flat channel the phases are rounding
    options = {"count": 3, "value_range": (-1.0, 4.0)}
    exact = ShadowSet(image, label, **options)(batch(size=size), generator=generator(5))
    found = ShadowSet(image.to(own), label, **options)(batch(size=size, dtype=kind), generator=generator(5))
    assert found.image.dtype == kind
    assert found.image.shape == (3, 3, 8, 10)
    assert torch.equal(found.label, exact.label)
    atol = {torch.float16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}
    assert torch.allclose(found.image.double(), exact.image, rtol=0, atol=max(atol[own], atol[kind]))
    # A mean over millions of pixels does not overflow.
    assert found.weight.dtype in (torch.float32, torch.float64)


def test_a_batch_with_a_held_out_image_is_refused_before_anything_is_drawn():
    image, label = held_out(size=(8, 8))
    judged, g = ShadowSet(image, label), generator(6)
    state = g.get_state()
    trained = batch()
    trained.source_label[1] = label[4]
    message = "ShadowSet: expected held-out images that the student does not train on, got a training batch whose image 1 has"
    with pytest.raises(ValueError, match=message):
        judged(trained, generator=g)
    assert torch.equal(g.get_state(), state)
    trained.source_label[1, 3, 3] = (trained.source_label[1, 3, 3] + 1) % CLASSES
    judged(trained, generator=g)
    flat = label.clamp(min=3, max=3)
    trained.source_label[1] = 3
    ShadowSet(image, flat)(trained, generator=g)
    # What is ignored is the learner's to say.
    flat[:, 0], trained.source_label[1, 0] = 254, 254
    ShadowSet(image, flat)(trained._replace(ignore_index=254), generator=g)
    with pytest.raises(ValueError, match=message):
        ShadowSet(image, flat)(trained, generator=g)


IMAGE, LABEL = held_out()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"image": IMAGE[0]}, ValueError, r"label: an int64 tensor \(3, 10\)"),
        ({"image": [1]}, TypeError, r"image: a floating tensor \(N, K, \*spatial\), got list"),
        ({"label": LABEL[1:]}, ValueError, r"label: an int64 tensor \(6, 8, 10\)"),
        ({"label": LABEL.int()}, ValueError, r"label: an int64 tensor .* got int32 .*convert it"),
        ({"image": IMAGE[:0], "label": LABEL[:0]}, ValueError, "at least one held-out image, got none; keep some back"),
        ({"count": 0}, ValueError, "a whole number count >= 1, got 0"),
        ({"strength": (1.5, 0.5)}, ValueError, r"strength: \(low, high\), 0 <= low <= high, got \(1.5, 0.5\); pass"),
        ({"strength": (-0.5, 0.5)}, ValueError, r"0 <= low <= high, got \(-0.5, 0.5\)"),
        ({"strength": (0.0, math.nan)}, ValueError, r"0 <= low <= high, got \(0.0, nan\)"),
        ({"strength": (0.0, math.inf)}, ValueError, r"0 <= low <= high, got \(0.0, inf\)"),
        ({"strength": 1.0}, ValueError, "0 <= low <= high, got 1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(change, kind, message):
    given = {"image": IMAGE, "label": LABEL, **change}
    with pytest.raises(kind, match=f"ShadowSet: expected .*{message}"):
        ShadowSet(given.pop("image"), given.pop("label"), **given)


# In the bilevel step


class Kept(torch.optim.SGD):
    """Notes the gradient and moves nothing."""

    def step(self):
        self.grads = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def student_of(mode):
    """With statistics of its own; in training, or partly so: the norm evaluates, as in many hosts."""
    student = Student()
    torch.manual_seed(10)  # dropout is part of the history
    optimizer = with_history(OPTIMIZERS["momentum"], student)
    student.train()
    if mode == "mixed":
        student.norm.eval()
    return student, optimizer


def temperature_net():
    net = MetaTemperatureNet(CLASSES, hidden_channels=4, generator=generator(6)).double()
    with torch.no_grad():
        net.last.weight.copy_(0.1 * randn(1, 4, 1, 1, seed=7))
    return net


LOGITS = 3 * randn(2, CLASSES, 8, 8, seed=3)
JUDGED = ShadowSet(*held_out(size=(8, 8)), count=3)


def step_of(student, optimizer, net, **options):
    return BilevelCalibrationStep(
        student,
        SoftPseudoLabeler(net, weight="none"),
        optimizer=optimizer,
        meta_optimizer=Kept(net.parameters(), lr=1.0),
        warmup=0,
        **{"judged_set": JUDGED, **options},
    )


def call(step, **options):
    torch.manual_seed(11)
    mask = class_mask(domains()["source_label"], generator=generator(3))
    return step(**domains(), teacher_logits=LOGITS, mask=mask, generator=generator(8), **options)


def by_hand(student, optimizer, net, outer_loss):
    """The outer loss after one real step of copies, with the temperature net as it is: in training, then in evaluation mode."""
    twin, taken = copy.deepcopy((student, optimizer))
    data, mask = domains(), class_mask(domains()["source_label"], generator=generator(3))
    with torch.no_grad():
        soft_label = torch.softmax(LOGITS / net(LOGITS), 1)
    mixed = mix(mask, data["source_label"], soft_label)
    buffers = [buffer.clone() for buffer in twin.buffers()]
    taken.zero_grad()
    torch.manual_seed(11)
    soft_cross_entropy(twin(mix(mask, data["source_image"], data["target_image"])), mixed).backward()
    taken.step()
    for buffer, value in zip(twin.buffers(), buffers):  # all passes begin with the live ones
        buffer.copy_(value)
    judged = JUDGED.draw(data["target_image"], generator=generator(8))
    with torch.no_grad():
        return float(OUTER_LOSSES[outer_loss](twin.eval()(judged.image), judged.label, judged.weight))


def by_differences(student, optimizer, net, outer_loss, h=1e-5):
    grads = []
    for parameter in net.parameters():
        grad = torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            own = float(parameter.detach().flatten()[i])
            ends = []
            for shift in (h, -h):
                parameter.data.view(-1)[i] = own + shift
                ends.append(by_hand(student, optimizer, net, outer_loss))
            parameter.data.view(-1)[i] = own
            grad.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
        grads.append(grad)
    return grads


@pytest.fixture(scope="module", params=[(m, o) for m in ("training", "mixed") for o in ("cross_entropy", "calibration_gap")])
def case(request):
    """Mode of the student, outer loss, and the hypergradient by differences, which takes a while."""
    mode, outer_loss = request.param
    student, optimizer = student_of(mode)
    return mode, outer_loss, by_differences(student, optimizer, temperature_net(), outer_loss)


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_the_hypergradient_is_of_a_step_in_training_judged_in_evaluation_mode(case, engine):
    mode, outer_loss, oracle = case
    student, optimizer = student_of(mode)
    net = temperature_net()
    before = snapshot(student, optimizer, net)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    step = step_of(student, optimizer, net, engine=engine, outer_loss=outer_loss)
    result = call(step)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(torch.from_numpy(np.frombuffer(before["torch"][2], np.uint8).copy()))
    assert_same(before, snapshot(student, optimizer, net))
    assert result.skipped is None
    assert distance(step.meta_optimizer.grads, oracle) < 1e-5
    assert result.outer_loss_after == pytest.approx(by_hand(student, optimizer, net, outer_loss), rel=1e-9)
    judged = JUDGED.draw(domains()["target_image"], generator=generator(8))
    with torch.no_grad():
        live = OUTER_LOSSES[outer_loss](copy.deepcopy(student).eval()(judged.image), judged.label, judged.weight)
    assert result.outer_loss_before == pytest.approx(float(live), rel=1e-9)


@pytest.mark.parametrize("mode", ["training", "mixed"])
def test_all_engines_find_the_same(mode):
    found = {}
    for engine in ENGINES:
        student, optimizer = student_of(mode)
        step = step_of(student, optimizer, temperature_net(), engine=engine, outer_loss="calibration_gap")
        call(step)
        found[engine] = step.meta_optimizer.grads
    for engine in ENGINES[1:]:
        assert distance(found[engine], found["higher"]) < TOLERANCE[engine]


MODES = []


class Telling(Student):
    """Notes for every pass whether it sees the shadows, and the modes of norm and dropout."""

    def forward(self, image):
        MODES.append((len(image) == JUDGED.count, self.training, self.norm.training, self.dropout.training))
        return super().forward(image)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_judged_set_that_does_not_say_so_is_asked_in_the_students_own_mode(engine):
    student, optimizer = student_of("mixed")
    step = step_of(student, optimizer, temperature_net(), engine=engine)
    step.judged_set = lambda batch, *, generator: JUDGED(batch, generator=generator)._replace(evaluation=False)
    result = call(step)
    judged = JUDGED.draw(domains()["target_image"], generator=generator(8))
    losses = []
    for twin in (copy.deepcopy(student), copy.deepcopy(student).eval()):
        torch.manual_seed(11)  # for dropout
        with torch.no_grad():
            losses.append(float(F.cross_entropy(twin(judged.image), judged.label, ignore_index=255)))
    assert result.outer_loss_before == pytest.approx(losses[0], rel=1e-9)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_student_trains_in_every_inner_pass_and_evaluates_in_every_outer_one(engine, backward):
    student = Telling()
    optimizer = OPTIMIZERS["Adam"](list(student.parameters()))
    step = step_of(student, optimizer, temperature_net(), engine=engine)
    del MODES[:]
    call(step, backward=backward)
    assert set(MODES) == {(True, False, False, False), (False, True, True, True)}
    assert sum(shadows for shadows, *_ in MODES) == 2
    assert all(module.training for module in student.modules())


@pytest.mark.parametrize("engine", ENGINES)
def test_with_backward_the_statistics_are_those_of_the_mixed_images_alone(engine):
    """The pass over the shadows must leave no trace in the running statistics that the host's pass leaves behind."""
    student, optimizer = student_of("training")
    twin, data = copy.deepcopy(student), domains()
    call(step_of(student, optimizer, temperature_net(), engine=engine), backward=True)
    torch.manual_seed(11)
    twin(mix(class_mask(data["source_label"], generator=generator(3)), data["source_image"], data["target_image"]))
    assert float((twin.norm.running_mean - Student().norm.running_mean).abs().max()) > 0
    assert all(torch.equal(own, theirs) for own, theirs in zip(student.buffers(), twin.buffers()))
    assert all(module.training for module in student.modules())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_fails_leaves_every_mode_as_it_was(engine):
    def outer_loss(logits, label, weight, *, ignore_index):
        raise KeyError("host bug")

    student, optimizer = student_of("mixed")
    net = temperature_net()
    before = snapshot(student, optimizer, net)
    with pytest.raises(KeyError, match="host bug"):
        step_of(student, optimizer, net, engine=engine, outer_loss=outer_loss)(
            **domains(), teacher_logits=LOGITS, generator=generator()
        )
    assert_same(before, snapshot(student, optimizer, net))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_student_that_fails_in_evaluation_leaves_every_mode_as_it_was(engine):
    class Failing(Student):
        def forward(self, image):
            if not self.training:
                raise KeyError("no evaluation")
            return super().forward(image)

    student, net = Failing(), temperature_net()
    student.norm.eval()
    optimizer = OPTIMIZERS["SGD"](list(student.parameters()))
    before = snapshot(student, optimizer, net)
    with pytest.raises((KeyError, ValueError), match="no evaluation"):  # the latter of "higher"
        step_of(student, optimizer, net, engine=engine)(**domains(), teacher_logits=LOGITS, generator=generator())
    assert_same(before, snapshot(student, optimizer, net))


@pytest.mark.parametrize("ignore_index", [255, -1])
def test_pixels_that_are_ignored_are_not_judged(ignore_index):
    image, label = held_out(size=(8, 8))
    label = label.masked_fill(label == 255, ignore_index)
    label[:, 2:5] = ignore_index
    data = domains()
    data["source_label"] = data["source_label"].masked_fill(data["source_label"] == 255, ignore_index)
    student, optimizer = student_of("training")
    judged = ShadowSet(image, label, count=6, **AS_THEY_ARE)
    step = step_of(student, optimizer, temperature_net(), judged_set=judged, ignore_index=ignore_index)
    result = step(**data, teacher_logits=LOGITS, generator=generator())
    with torch.no_grad():
        expected = F.cross_entropy(copy.deepcopy(student).eval()(image), label, ignore_index=ignore_index)
    assert result.outer_loss_before == pytest.approx(float(expected), rel=1e-9)


def test_a_learner_refuses_a_held_out_image_at_its_first_call_though_it_warms_up():
    image, label = held_out(size=(8, 8))
    label[0] = domains()["source_label"][0]
    student, optimizer = student_of("training")
    net = temperature_net()
    step = step_of(student, optimizer, net, judged_set=ShadowSet(image, label))
    step.warmup = 9
    before = snapshot(student, optimizer, net)
    with pytest.raises(ValueError, match="ShadowSet: expected held-out images"):
        step(**domains(), teacher_logits=LOGITS, generator=generator())
    assert_same(before, snapshot(student, optimizer, net))
    assert step.iteration == 0


# In the fit


class OneTemperature(nn.Module):
    """The same everywhere."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, logits):
        return self.log.exp() * torch.ones_like(logits[:, :1])


def fit_of(net, judged_set):
    labeler = SoftPseudoLabeler(net, weight="none")
    return TemperatureFit(labeler, meta_optimizer=Kept(net.parameters(), lr=1.0), judged_set=judged_set)


@pytest.mark.parametrize("of", ["module", "function"])
@pytest.mark.parametrize("evaluation", [True, False])
@pytest.mark.parametrize("mode", ["training", "mixed", "evaluation"])
def test_the_fit_asks_the_teacher_in_evaluation_mode_where_the_judged_set_says_so(mode, evaluation, of):
    """Of a function nothing is known: it is asked as it is."""
    teacher = student_of("mixed" if mode == "mixed" else "training")[0]
    teacher = teacher.eval() if mode == "evaluation" else teacher
    before = copy.deepcopy(teacher.state_dict()), [module.training for module in teacher.modules()], torch.get_rng_state()
    asked = teacher if of == "module" else lambda image: teacher(image)

    def judged_set(batch, *, generator):
        return JUDGED(batch, generator=generator)._replace(evaluation=evaluation)

    net, data = OneTemperature(), domains()
    fit = fit_of(net, judged_set)
    result = fit(**data, teacher_logits=LOGITS, teacher=asked, mask=class_mask(data["source_label"], generator=generator(3)),
                 generator=generator(8))  # fmt: skip
    assert [module.training for module in teacher.modules()] == before[1]
    if of == "module":
        assert all(torch.equal(value, before[0][name]) for name, value in teacher.state_dict().items())
        assert torch.equal(torch.get_rng_state(), before[2])

    twin = copy.deepcopy(teacher)
    twin.load_state_dict(before[0])
    torch.set_rng_state(before[2])
    judged = JUDGED.draw(data["target_image"], generator=generator(8))
    with torch.no_grad():
        z = (twin.eval() if evaluation and of == "module" else twin)(judged.image)
    # Each class counts as it does among the pseudo-labels.
    counted, everywhere = judged.label[judged.label != 255].tolist(), LOGITS.argmax(1).flatten().tolist()
    weight = torch.tensor([everywhere.count(c) / counted.count(c) for c in counted], dtype=torch.float64)
    scaled = (z.permute(0, 2, 3, 1)[judged.label != 255] / net.log.exp()).log_softmax(1)
    losses = -scaled.gather(1, torch.tensor(counted)[:, None])[:, 0]
    expected = (weight / weight.mean() * losses).mean()
    expected.backward()
    assert result.skipped is None
    assert result.outer_loss_before == pytest.approx(float(expected.detach()), rel=1e-9)
    assert distance(fit.meta_optimizer.grads, [net.log.grad]) < 1e-9


def test_the_fit_puts_modes_back_when_the_teacher_fails():
    class Failing(Student):
        def forward(self, image):
            raise KeyError("broken") if len(image) == JUDGED.count else ArithmeticError

    teacher, net = Failing().train(), OneTemperature()
    teacher.norm.eval()
    modes = [module.training for module in teacher.modules()]
    with pytest.raises(KeyError, match="broken"):
        fit_of(net, JUDGED)(**domains(), teacher_logits=LOGITS, teacher=teacher, generator=generator())
    assert [module.training for module in teacher.modules()] == modes


def test_the_fit_skips_where_no_pixel_is_judged():
    image, label = held_out(size=(8, 8))
    judged = ShadowSet(image, torch.full_like(label, 255))
    result = fit_of(OneTemperature(), judged)(
        **domains(), teacher_logits=LOGITS, teacher=Student().eval(), generator=generator()
    )
    assert result.skipped.kind is SkipKind.UNJUDGED


def test_a_judged_batch_is_asked_as_the_network_is_where_nothing_is_said():
    assert JudgedBatch(IMAGE, LABEL, LABEL.double()).evaluation is False


@pytest.mark.parametrize("option", [{"blur": 7.0}, {"value_range": (1.0, 0.0)}, {"looks": {}}])
def test_what_shadows_refuse_is_refused_at_once(option):
    with pytest.raises(ValueError, match="shadows: expected "):
        ShadowSet(*held_out(), **option)


# Volumes


def test_volumes_are_judged_in_the_look_of_volumes():
    image, label = torch.rand(5, 1, 4, 8, 10, generator=generator()), torch.randint(0, 3, (5, 4, 8, 10), generator=generator(1))
    label[:, 0] = 0
    judged = ShadowSet(image, label, count=np.int64(3), strength=(1.0, 1.0), blur=0.0)
    target = 4 + 2 * torch.rand(1, 1, 4, 8, 12, generator=generator(2))
    weight, mask = torch.ones(1, 4, 8, 12), torch.ones(1, 1, 4, 8, 12).bool()
    other = torch.randint(0, 3, (1, 4, 8, 12), generator=generator(3))
    found = judged(DomainBatch(target, other, target, other, weight, mask, (0, 255)), generator=generator(4))
    assert found.image.shape == (3, 1, 4, 8, 10)
    assert torch.allclose(found.image.mean((1, 2, 3, 4)), target.mean().expand(3), atol=1e-4)
    assert all(any(torch.equal(x, y) for y in label) for x in found.label)
    mixed = DomainBatch(image[:2], label[:2], image[:2], label[:2], torch.ones(2, 4, 8, 10), label[:2, None] > 0, (0, 255))
    with pytest.raises(ValueError, match="a training batch whose image 0 has the label map of a held-out one"):
        judged(mixed, generator=generator(4))
