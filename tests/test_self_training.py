"""The front door: how many lines a loop changes, on networks of many kinds; that it holds no logic of its own; its fold."""

import copy
import difflib
import io
import math

import pytest
import torch
import torch.nn.functional as F
from dummy_learner import TowardsTwo
from problems import ENGINES
from torch import nn

from dacal_addon import (
    BilevelCalibrationStep,
    DACal,
    MetaTemperatureNet,
    SkipKind,
    SoftPseudoLabeler,
    TemperatureFit,
    hypergradient,
    mixed_views_loss,
    soft_cross_entropy,
    two_channels,
)
from dacal_addon.learners import LEARNERS
from dacal_addon.mixing import class_mask, cut_mask, mix

CLASSES = 5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Plain(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, stride, stride=stride), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, image):
        return self.head(self.body(image))


class Quarter(Plain):
    def __init__(self):
        super().__init__(stride=4)


class Dictionary(Plain):
    def forward(self, image):
        return {"aux": image, "out": super().forward(image)}


def segformer():
    transformers = pytest.importorskip("transformers")
    if not transformers.utils.is_torch_available():
        pytest.skip("this transformers does not work with this torch")
    config = transformers.SegformerConfig(
        num_labels=CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )
    return transformers.SegformerForSemanticSegmentation(config)


# Network, and where its logits are: what the user's own loop knows anyway, and one line of the wrap.
NETWORKS = {
    "plain": (Plain, None),
    "quarter resolution": (Quarter, None),
    "dictionary": (Dictionary, lambda out: out["out"]),
    "segformer": (segformer, lambda out: out.logits),
}

LOOP = """
for source_image, source_label, target_image in loader:
    loss = F.cross_entropy(logits(student, source_image), source_label, ignore_index=255)
    with torch.no_grad():
        label = logits(teacher, target_image).argmax(1)
    mask = class_mask(source_label, generator=masks)
    mixed_image, mixed_label = mix(mask, source_image, target_image), mix(mask, source_label, label)
    loss = loss + F.cross_entropy(logits(student, mixed_image), mixed_label, ignore_index=255)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update(teacher, student)
saved = {"student": student.state_dict()}
"""

WRAPPED = """
from dacal_addon import DACal, soft_cross_entropy
dacal = DACal(student, teacher, optimizer, num_classes=CLASSES, logits_of=logits_of, threshold=0.2, **options)
dacal.load_state_dict(saved["dacal"]) if saved else None
for source_image, source_label, target_image in loader:
    loss = F.cross_entropy(logits(student, source_image), source_label, ignore_index=255)
    mixed = dacal(source_image, source_label, target_image)
    loss = loss + soft_cross_entropy(logits(student, mixed.image), mixed.soft_label, mixed.weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update(teacher, student)
saved = {"student": student.state_dict(), "dacal": dacal.state_dict()}
"""
# What the user's own script saves and restores of the rest.
OWN = ("student", "teacher", "optimizer")


def batches(n, first=0, size=32):
    for i in range(first, first + n):
        g = generator(i)
        label = torch.randint(0, CLASSES, (2, size, size), generator=g)
        label[:, :2] = 255
        yield torch.rand(2, 3, size, size, generator=g), label, torch.rand(2, 3, size, size, generator=g)


def setting(network, logits_of, **options):
    """What a user's script has before the loop."""
    torch.manual_seed(0)
    student = network()
    teacher = copy.deepcopy(student)

    def logits(net, image):
        output = net(image)
        z = output if logits_of is None else logits_of(output)
        return F.interpolate(z, size=image.shape[-2:], mode="bilinear", align_corners=False)

    def update(teacher, student):
        with torch.no_grad():
            for mine, other in zip(teacher.parameters(), student.parameters()):
                mine.mul_(0.9).add_(other, alpha=0.1)

    return {
        "student": student,
        "teacher": teacher,
        "optimizer": torch.optim.AdamW(student.parameters(), lr=1e-3),
        "loader": list(batches(4)),
        "saved": {},
        "masks": generator(),
        "options": options,
        **{name: globals()[name] for name in ("F", "torch", "CLASSES", "class_mask", "mix")},
        **{"logits": logits, "logits_of": logits_of, "update": update},
    }


def test_the_wrap_changes_at_most_eight_lines():
    changes = difflib.ndiff(LOOP.strip().splitlines(), WRAPPED.strip().splitlines())
    assert len([line for line in changes if line.startswith("+ ")]) <= 8


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_wrapped_loop_learns_and_resumes_exactly(network, learner):
    exec(LOOP, setting(*NETWORKS[network]))  # as it was before
    options = {"learner": learner, "warmup": 1, "every": 2}
    whole = setting(*NETWORKS[network], **options)
    torch.manual_seed(1)
    exec(WRAPPED, whole)
    net = whole["dacal"].learner.temperature_net
    assert whole["dacal"].learner.iteration == 4
    assert float(net.last.weight.detach().abs().sum()) > 0

    first = setting(*NETWORKS[network], **options)
    torch.manual_seed(1)
    first["loader"] = first["loader"][:2]
    exec(WRAPPED, first)
    file = io.BytesIO()
    torch.save({**{name: first[name].state_dict() for name in OWN}, "dacal": first["saved"]["dacal"]}, file)
    file.seek(0)
    random_state = torch.get_rng_state()
    second = setting(*NETWORKS[network], **options)
    second.update(loader=list(batches(2, first=2)), saved=torch.load(file))
    for name in OWN:
        second[name].load_state_dict(second["saved"][name])
    torch.set_rng_state(random_state)
    exec(WRAPPED, second)
    resumed = second["dacal"].learner
    assert resumed.iteration == 4
    for own, expected in zip(resumed.temperature_net.parameters(), net.parameters()):
        assert torch.equal(own, expected)
    for own, expected in zip(second["student"].parameters(), whole["student"].parameters()):
        assert torch.equal(own, expected)


def test_it_holds_no_logic_of_its_own():
    """The same from the parts."""
    options = {"threshold": 0.2, "ignore_top": 3, "weight": "threshold"}
    scene = setting(Plain, None)
    source_image, source_label, target_image = scene["loader"][0]
    student, teacher = scene["student"], scene["teacher"]
    teacher.body[2], teacher.head.weight.data = nn.Identity(), 9 * teacher.head.weight.data  # labels of all classes
    view, valid = target_image.flip(1), torch.ones(2, 32, 32).bool()
    valid[:, :, -4:] = False
    dacal = DACal(student, teacher, None, num_classes=CLASSES, learner="fit", **options)
    mixed = dacal(source_image, source_label, target_image, teacher_image=view, valid=valid)

    net = MetaTemperatureNet(CLASSES)
    labeler = SoftPseudoLabeler(net, **options)
    fit = TemperatureFit(labeler, meta_optimizer=torch.optim.Adam(net.parameters(), lr=2e-3))
    with torch.no_grad():
        logits = teacher(view)
    g = generator()
    mask = class_mask(source_label, generator=g)
    learned = fit(source_image, source_label, view, logits, teacher=teacher, mask=mask, valid=valid, generator=g)
    with torch.no_grad():
        labels = labeler(logits, valid=valid)
    assert repr(mixed.learned) == repr(learned)
    assert learned.skipped is None
    assert torch.equal(mixed.mask, mask)
    assert torch.equal(mixed.image, mix(mask, source_image, target_image))
    assert torch.equal(mixed.soft_label, mix(mask, source_label, labels.soft_label))
    assert torch.equal(mixed.weight, mix(mask, torch.ones(2, 32, 32), labels.weight))
    assert all(torch.equal(*pair) for pair in zip(mixed.labels, labels))
    assert float(mixed.labels.temperature.max()) > 1.0 or float(mixed.labels.temperature.min()) < 1.0


def own_mixes(learner, **options):
    """A loop that cuts target images into each other, and what of it a learner is told."""
    scene = setting(Plain, None)
    source_image, source_label, target_image = scene["loader"][0]
    scene["teacher"].head.weight.data *= 9
    logits, valid = scene["teacher"](target_image).detach(), torch.ones(2, 32, 32).bool()
    valid[:, :, -4:] = False
    boxes = [cut_mask((2, 32, 32), generator=generator(i), share=(0.3, 0.4)) for i in range(2)]
    views = torch.cat([mix(box, view.flip(0), view) for box, view in zip(boxes, (target_image, 0.5 * target_image))])

    def own_loss(f, label):
        return mixed_views_loss(f(views), label(logits, valid=valid), boxes)

    dacal = DACal(scene["student"], scene["teacher"], scene["optimizer"], num_classes=CLASSES, learner=learner, **options)
    call = {"valid": valid, "own_loss": own_loss}
    return scene, dacal, (source_image, source_label, target_image, logits), call


@pytest.mark.parametrize("engine", ENGINES)
def test_the_bilevel_step_looks_ahead_along_the_loops_own_loss(engine):
    """Against `hypergradient` with closures of its own; a graph that the loop holds stays good."""
    options = {"warmup": 0, "weight": "none", "judged_set": "source_pixels", "engine": engine}
    scene, dacal, batch, call = own_mixes("bilevel", **options)
    student, net = scene["student"], dacal.learner.temperature_net
    mask = class_mask(batch[1], generator=generator())
    image, label = mix(~mask, batch[0], batch[2]), batch[1].masked_fill(mask[:, 0], 255)
    expected = hypergradient(
        student,
        lambda f: call["own_loss"](f, lambda logits, valid: SoftPseudoLabeler(net, weight="none")(logits, valid=valid)),
        lambda f: F.cross_entropy(f(image), label, ignore_index=255),
        list(net.parameters()),
        optimizer=scene["optimizer"],
        engine=engine,
    )
    norm = math.sqrt(sum(float(grad.pow(2).sum()) for grad in expected.grads))
    held = student(batch[0]).sum()
    before = copy.deepcopy(student.state_dict())
    learned = dacal.learn(*batch, mask=mask, **call)
    assert learned.skipped is None
    assert learned.hypergradient_norm == pytest.approx(norm, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    held.backward()
    assert all(parameter.grad is None for parameter in net.parameters())

    _, without, _, _ = own_mixes("bilevel", **options)
    other = without.learn(*batch, mask=mask, valid=call["valid"])  # of source images mixed into target images
    assert other.hypergradient_norm != pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("learner", [None, "fit", "bilevel"])
def test_a_loop_that_mixes_by_itself_gets_labels_and_learning(learner):
    options = {} if learner is None else {"warmup": 0}
    scene, dacal, batch, call = own_mixes(learner, weight="threshold", threshold=0.5, **options)
    for _ in range(2):
        learned = dacal.learn(*batch, **call)
    logits, valid = batch[3], call["valid"]
    labels = dacal.label(logits, valid=valid)
    assert not labels.soft_label.requires_grad
    assert float(labels.soft_label.masked_select(~valid.unsqueeze(1)).abs().max()) == 0.0
    if learner is None:
        assert learned.skipped.kind is SkipKind.HARD_LABELS
        assert torch.equal(labels.soft_label.argmax(1)[valid], logits.argmax(1)[valid])
        assert torch.equal(labels.soft_label.amax(1)[valid], torch.ones(int(valid.sum())))
    else:
        assert learned.skipped is None
        expected = torch.softmax(logits / labels.temperature, 1).masked_fill(~valid.unsqueeze(1), 0.0)
        assert torch.allclose(labels.soft_label, expected)
        assert float((labels.temperature - 1).abs().max()) > 1e-5
    assert torch.equal(labels.weight > 0, (logits.softmax(1).amax(1) >= 0.5) & valid)
    call["own_loss"](scene["student"], dacal.label).backward()
    net = [] if learner is None else dacal.learner.temperature_net.parameters()
    assert all(parameter.grad is None for parameter in net)


def test_a_temperature_net_with_statistics_labels_alike_in_all_passes():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(CLASSES), nn.Conv2d(CLASSES, 1, 1)

        def forward(self, logits):
            return self.last(self.norm(logits)).clamp(-1, 1).exp()

    torch.manual_seed(0)
    net = Normed()
    options = {"temperature_net": net, "warmup": 0, "weight": "none"}
    _, dacal, batch, call = own_mixes("bilevel", **options)
    assert dacal.learn(*batch, **call).skipped is None
    assert int(net.norm.num_batches_tracked) == 1  # that of the step's own labels


def test_an_own_loss_is_not_for_backward():
    _, dacal, batch, call = own_mixes("bilevel", warmup=0)
    with pytest.raises(ValueError, match="BilevelCalibrationStep: expected backward or own_loss, got both; do the backward"):
        dacal.learner(*batch, backward=True, **call)
    assert dacal.learner.iteration == 0
    with pytest.raises(ValueError, match=r"DACal.label: expected logits: .* with C = 5, got float32 \(2, 4, 32, 32\)"):
        dacal.label(batch[3][:, :4])


def test_a_learner_of_somebody_elses_needs_one_file():
    scene = setting(Quarter, None, learner=TowardsTwo)
    exec(WRAPPED, scene)
    assert float(scene["mixed"].labels.temperature.mean()) > 1.05
    assert scene["mixed"].learned.skipped is None


@pytest.mark.parametrize("learner", [None, "fit"])
def test_an_ignored_class_is_nowhere_in_what_is_taught(learner):
    scene = setting(Plain, None)
    source_image, source_label, target_image = scene["loader"][0]
    scene["teacher"].head.bias.data[0] += 100.0
    dacal = DACal(scene["student"], scene["teacher"], num_classes=CLASSES, learner=learner, threshold=0.2, ignore_index=0)
    mixed = dacal(source_image, source_label.masked_fill(source_label == 255, 0), target_image)
    assert learner is None or mixed.learned.skipped is None
    assert float(mixed.soft_label[:, 0].abs().max()) == 0.0
    unlabelled = (mixed.soft_label.sum(1) == 0) & mixed.mask[:, 0]
    assert torch.equal(unlabelled, mixed.mask[:, 0] & ((source_label == 0) | (source_label == 255)))


def test_the_optimizer_may_come_later():
    scene = setting(Plain, None)
    dacal = DACal(scene["student"], scene["teacher"], None, num_classes=CLASSES, learner="bilevel", warmup=0, threshold=0.2)
    with pytest.raises(RuntimeError, match="expected the student's optimizer, got none; tell it before the first call: "):
        dacal(*scene["loader"][0])
    dacal.learner.use_optimizer(scene["optimizer"])
    assert dacal(*scene["loader"][0]).learned.skipped is None
    assert type(dacal.learner) is BilevelCalibrationStep


def test_a_batch_that_cannot_be_used_is_said_and_still_mixed():
    scene = setting(Plain, None)
    dacal = DACal(scene["student"], scene["teacher"], None, num_classes=CLASSES, learner="fit", threshold=1.0)
    mixed = dacal(*scene["loader"][0])
    assert mixed.learned.skipped.kind is SkipKind.UNWEIGHTED
    assert float(mixed.weight[mixed.mask[:, 0]].min()) == 1.0
    assert float(mixed.weight[~mixed.mask[:, 0]].max()) == 0.0


def test_mistakes_are_named():
    scene = setting(Plain, None)
    with pytest.raises(ValueError, match="DACal: expected learner to be one of 'fit', 'bilevel', got 'fitted'"):
        DACal(scene["student"], scene["teacher"], None, num_classes=CLASSES, learner="fitted")
    for learner, name in ((None, "DACal"), ("fit", "MetaTemperatureNet")):
        dacal = DACal(scene["student"], scene["teacher"], num_classes=CLASSES + 1, learner=learner)
        with pytest.raises(ValueError, match=rf"{name}: expected logits: a floating tensor .* with C = 6"):
            dacal(*scene["loader"][0])
    with pytest.raises(
        ValueError, match="expected a learner, whose option every is, got learner=None; name one of 'fit', 'bilevel'"
    ):
        DACal(scene["student"], scene["teacher"], num_classes=CLASSES, every=2)
    with pytest.raises(TypeError, match="got dict of 'aux': "):
        DACal(Dictionary(), Dictionary(), None, num_classes=CLASSES)(*scene["loader"][0])


@pytest.mark.parametrize("learner", [None, "fit"])
def test_a_batch_that_is_refused_has_asked_nobody(learner):
    scene = setting(Plain, None)
    source_image, source_label, target_image = scene["loader"][0]
    scene["teacher"].train()
    dacal = DACal(scene["student"], scene["teacher"], None, num_classes=CLASSES, learner=learner)
    before = copy.deepcopy(scene["teacher"].state_dict()), dacal.generator.get_state()
    for wrong in ({"mask": torch.ones(2, 1, 31, 32).bool()}, {"teacher_image": target_image[..., :-1]}):
        with pytest.raises(ValueError, match=r"expected (mask: a bool|source and target)"):
            dacal(source_image, source_label, target_image, **wrong)
    with pytest.raises(ValueError, match=r"convert it with \.long"):
        dacal(source_image, source_label.float(), target_image)
    assert all(torch.equal(value, before[0][name]) for name, value in scene["teacher"].state_dict().items())
    assert torch.equal(dacal.generator.get_state(), before[1])


def test_without_a_learner_labels_are_hard_and_training_resumes_exactly():
    whole = setting(Plain, None)
    exec(WRAPPED, whole)
    mixed = whole["mixed"]
    assert mixed.learned.skipped.kind is SkipKind.HARD_LABELS
    taught, target = mixed.soft_label, ~mixed.mask[:, 0]
    assert set(taught.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(taught.argmax(1)[target], mixed.labels.pseudo_label[target])
    assert 0 < float(mixed.labels.soft_label.max()) < 1
    state = whole["saved"]["dacal"]
    again, other = (DACal(whole["student"], whole["teacher"], num_classes=CLASSES) for _ in range(2))
    again.load_state_dict(state)
    masks = [dacal(*whole["loader"][0]).mask for dacal in (whole["dacal"], again, other)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    fit = DACal(whole["student"], whole["teacher"], num_classes=CLASSES, learner="fit")
    with pytest.raises(ValueError, match="expected a state without a learner, got that of TemperatureFit"):
        again.load_state_dict(fit.state_dict())
    with pytest.raises(ValueError, match="expected the state of a TemperatureFit, got one of hard labels"):
        fit.load_state_dict(state)


@pytest.mark.parametrize("network", ["plain", "dictionary"])
def test_the_end_of_training_is_one_temperature_that_changes_no_prediction(network):
    scene = setting(*NETWORKS[network])
    student, logits = scene["student"], scene["logits"]
    student.head.weight.data *= 20
    images = torch.cat([batch[0] for batch in scene["loader"]])
    labels = torch.randint(0, CLASSES, (len(images), 32, 32), generator=generator())  # nothing it could know
    dacal = DACal(student, scene["teacher"], num_classes=CLASSES, logits_of=scene["logits_of"])
    student.eval()
    before = logits(student, images)
    options = {"layer": "head", "max_images": 8}
    found = dacal.calibrate(source=(images, labels), target=images, labelled_target=(images, labels), **options)
    assert found.temperature > 1.5
    assert torch.allclose(logits(student, images), before / found.temperature, atol=1e-5)
    with pytest.raises(ValueError, match="expected weights into which nothing is folded"):
        dacal.calibrate(source=(images, labels), target=images, **options)


# Volumes and one sigmoid channel


class Volume(nn.Module):
    """Of a half resolution, with BatchNorm."""

    def __init__(self, outputs=3):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv3d(1, 6, 3, stride=2, padding=1), nn.BatchNorm3d(6), nn.ReLU())
            self.classifier = nn.Conv3d(6, outputs, 1)

    def forward(self, image):
        return self.classifier(self.body(image))


class One(nn.Module):
    """One sigmoid channel."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.classifier = nn.Conv2d(6, 1, 1)

    def forward(self, image):
        return self.classifier(self.body(image))


class AsTwo(One):
    """The same network with the two channels of a softmax."""

    def forward(self, image):
        z = super().forward(image)
        return torch.cat([torch.zeros_like(z), z], 1)


def scans(n, classes, size, seed=0):
    """Images whose brightness tells the label, but for the 255 of the first row."""
    g = generator(seed)
    label = torch.randint(0, classes, (n, *(side // 4 for side in size)), generator=g)
    for axis in range(1, len(size) + 1):
        label = label.repeat_interleave(4, axis)
    image = label[:, None] + 0.7 * torch.randn(n, 1, *size, generator=g)
    label[..., 0] = 255
    return image, label


def trained(network, size, *, classes, logits_of=None, steps=12, given=(), **options):
    """A user's loop: source loss, mixed loss, an EMA teacher; returns its DACal, and what was seen in the last iteration."""
    student = network()
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    dacal = DACal(
        student, teacher, optimizer, num_classes=classes, logits_of=logits_of, threshold=0.4, generator=generator(1), **options
    )
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    losses = []

    def logits(image):
        z = student(image)
        return F.interpolate(z if logits_of is None else logits_of(z), size=size, mode=mode, align_corners=False)

    for i in range(steps):
        source, label = scans(2, classes, size, seed=2 * i)
        target = scans(2, classes, size, seed=2 * i + 1)[0] * 0.8
        mixed = dacal(source, label, target, **{name: make(label) for name, make in dict(given).items()})
        loss = F.cross_entropy(logits(source), label, ignore_index=255)
        loss = loss + soft_cross_entropy(logits(mixed.image), mixed.soft_label, mixed.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, other in zip(teacher.parameters(), student.parameters()):
                mine.mul_(0.7).add_(other, alpha=0.3)
        losses.append(loss.item())
    return dacal, mixed, losses


@pytest.mark.parametrize("learner", [None, "fit", "bilevel"])
def test_a_loop_over_volumes_ends_calibrated(learner):
    size = (4, 8, 12)
    given = {"mask": lambda label: cut_mask(label.shape, generator=generator(5))}
    options = {} if learner is None else {"learner": learner, "warmup": 4, "spatial_dims": 3}
    dacal, mixed, _ = trained(Volume, size, classes=3, given=given, steps=20, **options)
    assert mixed.mask.shape == (2, 1, *size)
    assert 0 < float(mixed.weight.mean()) <= 1
    known = mixed.soft_label.sum(1)
    assert torch.allclose(known[known > 0], torch.ones(()))
    if learner is not None:
        assert mixed.learned.skipped is None
        assert float(mixed.labels.temperature.std()) > 0
    student = dacal.student.eval()
    (image, label), target = scans(6, 3, size, seed=99), scans(6, 3, size, seed=98)[0]
    before = student(image).detach()
    right = F.interpolate(before, size=size, mode="trilinear", align_corners=False).argmax(1) == label
    assert float(right[label != 255].float().mean()) > 0.6  # by chance a third
    found = dacal.calibrate(source=(image, label), target=target, labelled_target=(image, label), max_images=6)
    assert found.temperature != 1
    assert torch.allclose(student(image), before / found.temperature, atol=1e-5)
    for name, estimate in found.estimates.items():
        assert math.isfinite(estimate.temperature), name


@pytest.mark.parametrize("learner", [None, "fit", "bilevel"])
def test_one_sigmoid_channel_is_trained_and_calibrated_as_two(learner):
    options = {} if learner is None else {"learner": learner, "warmup": 2}
    found = []
    for network, logits_of in ((One, two_channels), (AsTwo, None)):
        dacal, mixed, losses = trained(network, (8, 12), classes=2, logits_of=logits_of, steps=6, **options)
        assert learner is None or mixed.learned.skipped is None
        (image, label), target = scans(6, 2, (8, 12), seed=99), scans(6, 2, (8, 12), seed=98)[0]
        student = dacal.student.eval()
        before = student(image).detach()
        estimate = dacal.calibrate(source=(image, label), target=target, labelled_target=(image, label))
        assert estimate.temperature != 1
        assert torch.allclose(student(image), before / estimate.temperature, atol=1e-5)
        found.append((losses, repr(estimate), before[:, -1:]))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("learner", [None, "fit"])
def test_several_ignored_classes_are_nowhere_in_what_is_taught(learner):
    scene = setting(Plain, None)
    source_image, source_label, target_image = scene["loader"][0]
    scene["teacher"].head.bias.data[[0, 3]] += 100.0
    dacal = DACal(
        scene["student"], scene["teacher"], num_classes=CLASSES, learner=learner, threshold=0.2, ignore_index=(0, 3, 255)
    )
    mixed = dacal(source_image, source_label, target_image)
    assert learner is None or mixed.learned.skipped is None
    assert float(mixed.soft_label[:, [0, 3]].abs().max()) == 0.0
    unlabelled, ignored = mixed.soft_label.sum(1) == 0, (source_label == 0) | (source_label == 3) | (source_label == 255)
    assert not bool((mixed.mask[:, 0] & ignored).any())  # never pasted
    assert not bool(unlabelled.any())


def test_class_255_is_not_dropped_in_silence():
    student = nn.Conv2d(3, 300, 1)
    with pytest.raises(
        ValueError, match=r"DACal: expected ignore_index to be given with 300 classes, .* pass ignore_index=255"
    ):
        DACal(student, student, num_classes=300)
    assert DACal(student, student, num_classes=300, ignore_index=-1).ignore_index == -1
    assert DACal(student, student, num_classes=255).ignore_index == 255


def test_one_channel_is_told_how_to_be_declared():
    student = One()
    with pytest.raises(ValueError, match=r"DACal: expected num_classes >= 2, got 1; .*logits_of=two_channels"):
        DACal(student, student, num_classes=1)
    image, label = scans(2, 2, (8, 8))
    with pytest.raises(ValueError, match=r"DACal: .*got float32 \(2, 1, 8, 8\); .*logits_of=two_channels"):
        DACal(student, student, num_classes=2)(image, label, image)
