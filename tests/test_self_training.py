"""The front door: how many lines a loop changes, on networks of many kinds; that it holds no logic of its own; its fold."""

import copy
import difflib
import io

import pytest
import torch
import torch.nn.functional as F
from dummy_learner import TowardsTwo
from torch import nn

from dacal_addon import (
    BilevelCalibrationStep,
    DACal,
    MetaTemperatureNet,
    SkipKind,
    SoftPseudoLabeler,
    TemperatureFit,
)
from dacal_addon.learners import LEARNERS
from dacal_addon.mixing import class_mask, mix

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
