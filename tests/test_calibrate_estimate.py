"""Estimates of the temperature: networks that are calibrated but for a known factor, the rules, and what is left untouched.

In `world` an image has a channel for each class, which is higher by `SIGNAL` where that is the label, in noise of variance 1:
then SIGNAL * image are calibrated logits. Labels are the same in squares of pixels, as things have a size.
"""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dacal_addon import two_channels
from dacal_addon.calibrate import ESTIMATORS, Estimate, Material, Pictures, estimate_temperature, estimators, fitted_temperature
from dacal_addon.calibrate.estimate import CLEARLY, UNKNOWN_SPREAD, Choice, with_labels, without_labels
from dacal_addon.calibrate.estimators import (
    IMAGE_SPREAD,
    IMAGE_SPREAD_COUNTS,
    TYPICAL,
    TYPICAL_SPREAD,
    labelled,
    pooled_spread,
    typical_of,
)
from dacal_addon.calibrate.pictures import unlabelled
from dacal_addon.calibrate.scaling import fitted, matched
from dacal_addon.calibrate.shadow_regression import predicted
from dacal_addon.learners.networks import Outputs

CLASSES, SIGNAL = 4, 2.0
BY_LIKELIHOOD = ("source", "blends", "mixed_blends", "shadow_fit")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def world(seed, *, n=24, size=(16, 24), scale=1.0, shift=0.0, side=4):
    """Images and labels; `scale` and `shift` are another domain's contrast and brightness."""
    g = generator(seed)
    h, w = size
    label = torch.randint(0, CLASSES, (n, h // side, w // side), generator=g)
    label = label.repeat_interleave(side, 1).repeat_interleave(side, 2)
    image = SIGNAL * F.one_hot(label, CLASSES).permute(0, 3, 1, 2) + torch.randn(n, CLASSES, h, w, generator=g)
    return scale * image.float() + shift, label


class Net(nn.Module):
    """Gives `k` times the calibrated logits of `world`, through a layer that is the last one, a norm and dropout before."""

    def __init__(self, k=1.0):
        super().__init__()
        self.norm = nn.BatchNorm2d(CLASSES, affine=False)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Conv2d(CLASSES, CLASSES, 1, bias=False)
        self.classifier.weight.data = SIGNAL * k * torch.eye(CLASSES).view(CLASSES, CLASSES, 1, 1)

    def forward(self, x):
        return self.classifier(self.dropout(self.norm(x)))


def material(student, source, target, few=None, **options):
    pictures = {"source": Pictures(*map(tuple, source)), "target": Pictures(tuple(target[0]))}
    if few is not None:
        pictures["labelled_target"] = Pictures(*map(tuple, few))
    return Material(student, **pictures, **{"generator": generator(), "pixels": 384, **options})


@pytest.mark.parametrize("k", [0.5, 1.0, 1.8])
def test_between_equal_domains_the_factor_is_found(k):
    given = material(Net(k).eval(), world(0), world(1), world(2))
    truth = fitted_temperature(Net(k).eval()(world(3, n=100)[0]), world(3, n=100)[1])
    assert math.isclose(truth, k, rel_tol=0.03)
    for name, estimator in {**ESTIMATORS, "labelled": labelled}.items():
        found = estimator(given)
        assert found.name == name
        if name == "transcal":  # never below 1
            assert math.isclose(found.temperature, max(1.0, k), rel_tol=0.08), found
            continue
        if name in ("source", "labelled", "doc", "atc"):
            assert math.isclose(found.temperature, k, rel_tol=0.08), found
        elif name == "shadows":
            assert math.isclose(found.temperature, k, rel_tol=0.15), found
            assert found.covered
        if name != "source" and "blends" not in name and name != "shadow_fit":
            assert math.isclose(found.accuracy, 0.81, abs_tol=0.03), found
        assert 0 < found.spread < 0.3


def test_where_contrast_differs_shadows_find_it_and_source_does_not():
    """The target's logits are `scale` times too large as well, and no less often right."""
    k, scale = 0.8, 2.0
    given = material(Net(k).eval(), world(0), world(1, scale=scale, shift=3.0))
    truth = fitted_temperature(Net(k).eval()(world(3, n=100, scale=scale)[0]), world(3, n=100)[1])
    assert math.isclose(truth, k * scale, rel_tol=0.03)
    found = {name: ESTIMATORS[name](given).temperature for name in ("source", "shadows", "shadow_fit")}
    assert math.isclose(found["source"], k, rel_tol=0.08)
    assert math.isclose(found["shadows"], k * scale, rel_tol=0.15)
    assert math.isclose(found["shadow_fit"], k * scale, rel_tol=0.25)


def test_logits_that_are_scaled_scale_every_estimate_by_likelihood():
    """Pseudo-labels, pairs and shadows do not depend on the scale, so the temperature must follow it exactly."""
    once, thrice = (material(Net(k).eval(), world(0), world(1, scale=1.4)) for k in (1.0, 3.0))
    for name in ("source", "blends", "shadow_fit"):
        first, second = ESTIMATORS[name](once), ESTIMATORS[name](thrice)
        assert math.isclose(second.temperature, 3 * first.temperature, rel_tol=1e-3), name
        assert math.isclose(second.accuracy, first.accuracy, rel_tol=1e-9)
        assert math.isclose(second.spread, first.spread, rel_tol=0.05)


def seen_by_fit(monkeypatch, name, given):
    """The pixels that an estimator fits on."""
    seen = []

    def spy(z, label, mass):
        seen.append((z, label, mass))
        return fitted(z, label, mass)

    monkeypatch.setattr(estimators, "fitted", spy)
    ESTIMATORS[name](given)
    return seen[0]


def test_blends_are_judged_where_labels_differ_with_the_targets_class_shares(monkeypatch):
    image, label = world(1, n=6)
    rare = label == 3
    image = torch.where((rare & (torch.rand(label.shape, generator=generator()) < 0.8)).unsqueeze(1), image.roll(1, 1), image)
    student = Net(5.0).eval()
    given = material(student, world(0), (image, label), batch_size=6)
    _, judged, mass = seen_by_fit(monkeypatch, "blends", given)
    shares = torch.bincount(judged, weights=mass) / mass.sum()
    own = torch.bincount(student(image).argmax(1).flatten()).double()
    assert torch.allclose(shares, own / own.sum(), atol=1e-6)
    assert float(shares[3]) < 0.1
    assert float((torch.bincount(judged).double() / len(judged))[3]) > 1.2 * float(shares[3])


def test_the_two_rules_of_blends_label_as_they_say(monkeypatch):
    p = torch.tensor([[0.40, 0.35, 0.25], [0.01, 0.98, 0.01]])
    image = p.log().view(2, 3, 1, 1).expand(2, 3, 4, 4)
    given = material(lambda x: x, (image, torch.zeros(2, 4, 4).long()), (image, None))
    for name, labels in (("blends", [0] * 16 + [1] * 16), ("mixed_blends", [1] * 32)):
        z, judged, _ = seen_by_fit(monkeypatch, name, given)
        assert sorted(judged.tolist()) == labels
        blended = 0.65 * p.log() + 0.35 * p.log().flip(0)
        assert torch.allclose(z.unique(dim=0), blended[blended[:, 0].argsort()], atol=1e-5)


def test_both_rules_of_blends_see_the_same_pairs(monkeypatch):
    given = material(Net(2.0).eval(), world(0), world(1))
    first, second = (seen_by_fit(monkeypatch, name, given) for name in ("blends", "mixed_blends"))
    assert torch.equal(first[0], second[0])
    assert 0 < float((first[1] == second[1]).double().mean()) < 1


def test_blends_without_pairs_or_differing_labels_have_no_estimate():
    image, label = world(0, n=2)
    for target, note in [
        ((image[:1],), "no two target images of one size to blend"),
        ((torch.stack([image[0], image[0]]),), "no pixel is judged: the pseudo-labels of blended images are all the same"),
    ]:
        found = ESTIMATORS["blends"](material(Net().eval(), (image, label), target))
        assert math.isnan(found.temperature)
        assert found.note == note


def test_doc_and_atc_are_what_their_papers_say():
    """With all pixels looked at, against a few lines of numpy."""
    source, target = world(0), world(1, scale=0.7)
    student = Net(1.5).eval()
    given = material(student, source, target, pixels=1 << 20)
    with torch.no_grad():
        z, z_target = (student(x).double().permute(0, 2, 3, 1).flatten(0, 2) for x in (source[0], target[0]))
    right = (z.argmax(1) == source[1].flatten()).double().mean()
    lost = z.softmax(1).max(1)[0].mean() - z_target.softmax(1).max(1)[0].mean()
    doc = ESTIMATORS["doc"](given)
    assert doc.accuracy == pytest.approx(float(right - lost), abs=1e-6)
    scores, scores_target = ((x.softmax(1) * x.log_softmax(1)).sum(1) for x in (z, z_target))
    threshold = scores.sort()[0][round(float(1 - right) * len(scores))]
    atc = ESTIMATORS["atc"](given)
    assert atc.accuracy == pytest.approx(float((scores_target >= threshold).double().mean()), abs=1e-3)
    for found in (doc, atc):
        confidence = (z_target / found.temperature).softmax(1).max(1)[0].mean()
        assert found.accuracy == pytest.approx(float(confidence), abs=1e-4)


def test_the_regression_is_ridge_regression():
    g = np.random.default_rng(0)
    places, truth, place = g.normal(size=(3, 12, 3)), g.normal(size=(3, 12)), g.normal(size=(3, 3))
    said, error = predicted(places, truth, place, ridge=0.2)
    for b in range(3):
        mean, spread = places[b].mean(0), places[b].std(0)
        x = np.concatenate([(places[b] - mean) / spread, math.sqrt(0.2 * 12) * np.eye(3)])
        y = np.concatenate([truth[b] - truth[b].mean(), np.zeros(3)])
        slopes = np.linalg.lstsq(x, y, rcond=None)[0]
        assert said[b] == pytest.approx(truth[b].mean() + (place[b] - mean) / spread @ slopes)
        if b == 0:
            assert error == pytest.approx(math.sqrt(((y - x @ slopes)[:12] ** 2).sum() / 8))
    same = np.concatenate([places, np.ones((3, 12, 1))], 2)  # what is the same of all domains says nothing
    assert predicted(same, truth, np.concatenate([place, 9 * np.ones((3, 1))], 1), ridge=0.2)[0] == pytest.approx(said)


def test_a_target_that_no_shadow_resembles_is_outside():
    image, label = world(1)
    # Every channel has the contrast it had, but all of them are the same but for a little.
    alike = image.mean(1, keepdim=True) * 2 + 0.05 * image
    found = ESTIMATORS["shadows"](material(Net().eval(), world(0), (alike, label)))
    assert not found.covered
    assert "of their farthest" in found.note


# The rules

BY = "what students of hard labels typically need"
DENIED = "abstains, T = 1: by shadows ({}) and blends ({}) the network is not overconfident"


def estimates(**temperatures):
    found = {name: Estimate(name, t, note="no pair") for name, t in temperatures.items()}
    return {"typical": typical_of(TYPICAL), **found}


@pytest.mark.parametrize(
    ("shadows", "blends", "temperature", "reason"),
    [
        (1.5, 1.2, TYPICAL, f"{BY}; shadows (1.50) and blends (1.20) beside it"),
        (0.5, 1.2, TYPICAL, f"{BY}; shadows (0.50) and blends (1.20) beside it"),
        (0.95, 0.95, TYPICAL, f"{BY}; shadows (0.95) and blends (0.95) beside it"),
        (0.8, 0.7, 1.0, DENIED.format("0.80", "0.70")),
        (0.8, math.nan, TYPICAL, f"{BY}; shadows (0.80) beside it"),
        (math.nan, math.nan, TYPICAL, BY),
    ],
)  # fmt: skip
def test_without_labels_the_typical_one_is_taken_unless_both_deny_it(shadows, blends, temperature, reason):
    assert 1.05 < CLEARLY < 1.2
    found = without_labels(estimates(shadows=shadows, blends=blends, source=9.0))
    assert found == (temperature, "typical" if temperature == TYPICAL else "none", reason, temperature == 1.0)


def test_outside_of_the_shadows_they_have_no_say():
    given = estimates(shadows=0.5, blends=0.4)
    assert without_labels(given).abstained
    given["shadows"] = given["shadows"]._replace(covered=False)
    assert without_labels(given)[:2] == (TYPICAL, "typical")


def test_where_nothing_is_typical_nothing_is_taken():
    nothing = Choice(1.0, "none", "T = 1: nothing is known of networks of this kind", True)
    assert without_labels({}) == without_labels({"typical": typical_of(1.0), "shadows": Estimate("shadows", 2.0)}) == nothing
    own = estimate_temperature(Net(2.0), typical=1.7, estimators={}, **SMALL)
    assert (own.temperature, own.taken, own.reason) == (1.7, "typical", "what was said to be typical")
    none = estimate_temperature(Net(2.0), typical=1.0, estimators={}, **SMALL)
    assert (none.temperature, none.abstained) == (1.0, True)


@pytest.mark.parametrize(("abstained", "prior_spread"), [(False, TYPICAL_SPREAD), (True, UNKNOWN_SPREAD)])
def test_labels_and_prior_are_weighted_by_precision(abstained, prior_spread):
    prior = Choice(2.0, "typical", "why", abstained)
    for spread in (0.05, 0.2, 1.0):
        own, other = spread**-2, prior_spread**-2
        expected = math.exp((own * math.log(0.8) + other * math.log(2.0)) / (own + other))
        found = with_labels(prior, Estimate("labelled", 0.8, spread=spread))
        assert found.temperature == pytest.approx(expected)
        assert f"count {own / (own + other):.0%}" in found.reason
        assert "why" in found.reason
    nothing = with_labels(prior, Estimate("labelled", math.nan, note="no pixel is judged"))
    assert nothing == (2.0, "typical", "why; the labelled images say nothing (no pixel is judged)", abstained)


def test_one_image_changes_little_and_ten_decide():
    def share(k, bootstrap):
        return 1 / (1 + (pooled_spread(bootstrap, k) / TYPICAL_SPREAD) ** 2)

    assert share(1, math.nan) < 0.2
    assert share(10, IMAGE_SPREAD / math.sqrt(10)) > 0.6
    assert share(20, IMAGE_SPREAD / math.sqrt(20)) > 0.75
    assert share(2, 0.0) < share(3, 0.0) < share(10, 0.0)  # two images that agree by chance are not believed
    assert share(2, 0.0) < 0.6
    assert pooled_spread(0.2, 5) == pytest.approx(
        math.sqrt((4 * 0.04 * 25 / 4 + IMAGE_SPREAD_COUNTS * IMAGE_SPREAD**2) / (4 + IMAGE_SPREAD_COUNTS) / 5)
    )


def test_few_labels_lead_to_the_truth_where_shadows_are_wrong():
    """Noise that the source does not have: no shadow shows it, the labels do."""
    k = 1.5
    source = world(0)
    image, label = world(1, n=20)
    target = image + 1.5 * torch.randn(image.shape, generator=generator(5))
    truth = fitted_temperature(Net(k).eval()(target), label)
    options = {"source": source, "target": target, "pixels": 384}
    without = estimate_temperature(Net(k), **options)
    error = {0: abs(math.log(without.temperature / truth))}
    for count in (1, 10):
        found = estimate_temperature(Net(k), labelled_target=(target[:count], label[:count]), **options)
        assert found.taken == "labelled and prior"
        error[count] = abs(math.log(found.temperature / truth))
        assert found.estimates["shadows"] == without.estimates["shadows"]
    assert error[0] > 0.3
    assert error[10] < 0.5 * error[0]
    assert error[10] < error[1] < error[0] + 0.02


def test_images_without_a_judged_pixel_do_not_count_as_labelled():
    image, label = world(2, n=3)
    label[1:] = 255
    found = labelled(material(Net(2.0).eval(), world(0), world(1), (image, label)))
    alone = labelled(material(Net(2.0).eval(), world(0), world(1), (image[:1], label[:1])))
    assert found.spread == alone.spread == IMAGE_SPREAD
    assert found.note == "maximum likelihood on 1 labelled target image"
    image, label = world(2, n=4)
    label[1::2] = 255
    found = labelled(material(Net(2.0).eval(), world(0), world(1), (image, label), pixels=1 << 20))
    alone = labelled(material(Net(2.0).eval(), world(0), world(1), (image[::2], label[::2]), pixels=1 << 20))
    assert found.spread == pytest.approx(alone.spread)
    assert found.temperature == pytest.approx(alone.temperature)
    nothing = labelled(material(Net().eval(), world(0), world(1), (image[1::2], label[1::2])))
    assert math.isnan(nothing.temperature)
    with pytest.raises(ValueError, match=r"labelled: expected labelled target images, got none; pass labelled_target"):
        labelled(material(Net().eval(), world(0), world(1)))


# What goes in and out


SMALL = {"source": world(0, n=6), "target": world(1, n=6)[0], "pixels": 64}


def same(first, second):
    return all(
        one == pytest.approx(other, nan_ok=True) if isinstance(one, float) else one == other
        for name in first.estimates
        for one, other in zip(first.estimates[name], second.estimates[name])
    )


def test_the_network_and_the_random_states_are_left_as_they_were():
    student = Net(2.0).train()
    student.dropout.eval()
    hooks = []
    student.classifier.register_forward_hook(lambda *_: hooks.append(1))
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    parameters = [parameter.requires_grad for parameter in student.parameters()]
    result = estimate_temperature(student, labelled_target=world(2, n=2), **SMALL)
    assert hooks  # the host's own still run
    assert student.training
    assert not student.dropout.training
    assert len(student.classifier._forward_pre_hooks) == 0
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in student.parameters()] == parameters
    assert all(parameter.grad is None for parameter in student.parameters())
    assert same(result, estimate_temperature(student.eval(), labelled_target=world(2, n=2), **SMALL))


def test_a_network_that_raises_is_left_as_it_was():
    student = Net().train()
    student.norm.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        estimate_temperature(student, **SMALL)
    assert student.training
    assert len(student.classifier._forward_pre_hooks) == 0


def test_no_estimator_changes_another_and_the_seed_decides():
    full = estimate_temperature(Net(2.0), **SMALL)
    for name in ESTIMATORS:
        alone = estimate_temperature(Net(2.0), estimators={name: ESTIMATORS[name]}, **SMALL)
        assert list(alone.estimates) == ["typical", name]
        assert same(alone, full)
    assert list(full.estimates) == ["typical", *ESTIMATORS]
    other = estimate_temperature(Net(2.0), generator=generator(1), **SMALL)
    assert other.estimates["shadow_fit"] != full.estimates["shadow_fit"]
    own = estimate_temperature(Net(), estimators={"own": lambda given: Estimate("own", 3.0)}, **SMALL)
    assert own.estimates["own"].temperature == 3.0
    assert own.taken == "typical"


def test_batches_are_the_same_as_tensors():
    (image, label), target = SMALL["source"], SMALL["target"]
    batches = estimate_temperature(
        Net(2.0),
        source=zip(image.split(4), label.split(4)),
        target=[(part, "name") for part in target.split(2)],
        labelled_target=[world(2, n=2)],
        pixels=64,
    )
    assert same(batches, estimate_temperature(Net(2.0), labelled_target=world(2, n=2), **SMALL))


def test_images_may_differ_in_size_and_labels_may_be_missing():
    wide, tall = world(0, n=3, size=(8, 24)), world(1, n=3, size=(24, 16))
    wide[1][:, :4] = 255
    result = estimate_temperature(Net(2.0), source=[wide, tall], target=[tall[0], wide[0]], pixels=64)
    assert all(math.isfinite(each.temperature) for each in result.estimates.values())


def test_at_most_so_many_images_are_looked_at():
    seen = []

    def student(x):
        seen.append(len(x))
        return SIGNAL * x

    estimate_temperature(student, estimators={"source": ESTIMATORS["source"]}, max_images=5, **SMALL)
    assert sum(seen) == 5
    kept = [unlabelled("f", "target", torch.arange(50.0).view(50, 1, 1, 1), limit=5, generator=generator(i)) for i in (0, 1)]
    first, second = ([float(x) for x in pictures.image] for pictures in kept)
    assert first == sorted(set(first)) != list(range(5))  # at random, in their order
    assert first != second
    loader = ((image[None], label[None]) for image, label in zip(*world(0, n=9)))
    estimate_temperature(
        student, source=loader, target=SMALL["target"], estimators={"source": ESTIMATORS["source"]}, max_images=5
    )
    assert len(list(loader)) == 4


def test_logits_and_features_may_be_anywhere_and_smaller():
    class Structured(Net):
        def forward(self, x):
            x = F.avg_pool2d(self.norm(x), 2)
            return {"out": self.classifier(x), "features": x}

    outputs = {"logits_of": lambda out: out["out"]}
    by_layer = estimate_temperature(Structured(2.0), **outputs, **SMALL)
    by_output = estimate_temperature(Structured(2.0), features_of=lambda out: out["features"], **outputs, **SMALL)
    named = estimate_temperature(Structured(2.0), layer="classifier", **outputs, **SMALL)
    assert same(by_layer, by_output)
    assert same(by_layer, named)
    by_logits = estimate_temperature(lambda x: Structured(2.0).eval()(x), **outputs, **SMALL)
    assert by_logits.estimates["shadows"] != by_layer.estimates["shadows"]
    assert by_logits.estimates["blends"] == by_layer.estimates["blends"]
    with pytest.raises(
        TypeError, match=r"estimate_temperature: expected a network that returns logits .* logits_of=lambda out"
    ):
        estimate_temperature(Structured(), **SMALL)
    with pytest.raises(ValueError, match="expected layer to name modules of Structured, got 'head'"):
        estimate_temperature(Structured(), layer="head", **outputs, **SMALL)


def test_features_are_what_the_last_layer_is_given():
    given = material(Net(2.0).eval(), world(0), world(1))
    source, found = world(0)[0], given.seen("source")
    assert found.features.shape[1] == CLASSES
    rows = {tuple(row) for row in (source / math.sqrt(1 + 1e-5)).permute(0, 2, 3, 1).flatten(0, 2).numpy().round(4).tolist()}
    assert {tuple(row) for row in found.features.numpy().round(4).tolist()} <= rows
    other = material(Net(2.0).eval(), world(0), world(1), outputs=Outputs(features_of=lambda z: 7 * z))
    assert float(other.seen("source").features.abs().mean()) > 9 * float(found.features.abs().mean())


def test_a_network_may_take_images_one_by_one_or_in_windows():
    class OneByOne(Net):
        def forward(self, x):
            return torch.cat([super(OneByOne, self).forward(one) for one in x.split(1)])

    class Windows(Net):
        def forward(self, x):
            parts = [super(Windows, self).forward(part) for one in x.split(1) for part in one.split(8, 3)]
            return torch.cat([torch.cat(parts[i : i + 3], 3) for i in range(0, len(parts), 3)])

    options = {**SMALL, "batch_size": 4}  # of six images: the last batch is another size
    whole = estimate_temperature(Net(2.0), **options)
    for kind in (OneByOne, Windows):
        assert same(estimate_temperature(kind(2.0), **options), whole)

    class Few(Net):  # fewer calls than images, by a layer that is used for something else as well
        def forward(self, x):
            self.classifier(x[:1])
            return super().forward(x)

    assert all(math.isfinite(each.temperature) for each in estimate_temperature(Few(2.0), **options).estimates.values())


IMAGE, LABEL = SMALL["source"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"source": IMAGE}, TypeError, "expected source: a pair .image .N, K, .spatial., label .N, .spatial.., or"),
        ({"source": [IMAGE]}, TypeError, "expected source: a pair .* got float32 .*; pair the images"),
        ({"source": []}, ValueError, "expected source: .*got no image; pass at least one .has the iterator been used up"),
        ({"target": 3}, TypeError, "expected target: images .N, K, .spatial., or an iterable of batches of them, got int"),
        ({"source": (IMAGE, LABEL[:, :5])}, ValueError, r"label of source: an int64 tensor \(6, 16, 24\)"),
        ({"source": (IMAGE, LABEL + 50)}, ValueError, "label: classes 0..3 or ignore_index=255, got the"),
        ({"source": (IMAGE, 255 + 0 * LABEL)}, ValueError, "source labels that are classes, got none"),
        ({"typical": 0.0}, ValueError, "expected typical in 0.05..20, got 0.0"),
        ({"max_images": 0}, ValueError, "expected a whole number max_images >= 1, got 0"),
        ({"student": lambda x: x * math.nan}, ValueError, "expected finite logits, got NaN or inf among them"),
        ({"student": lambda x: x.abs() / 0}, ValueError, "expected finite logits, got NaN or inf among them"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(change, kind, message):
    arguments = {"student": Net(), **SMALL, **change}
    with pytest.raises(kind, match=f"estimate_temperature: .*{message}"):
        estimate_temperature(arguments.pop("student"), **arguments)


def test_a_class_masked_out_is_allowed():
    def masked(x):
        return torch.cat([SIGNAL * x, torch.full_like(x[:, :1], -math.inf)], 1)

    found, plain = (estimate_temperature(student, **SMALL) for student in (masked, lambda x: SIGNAL * x))
    for name in ("source", "blends", "shadow_fit"):
        assert found.estimates[name].temperature == pytest.approx(plain.estimates[name].temperature, rel=1e-4)


def test_matching_is_with_the_targets_own_weights():
    """Images of which many pixels are judged count more, though as many of each are looked at."""
    z = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    both = matched(z, 0.8, torch.tensor([9.0, 1.0]).double())
    assert both > matched(z, 0.8, torch.tensor([1.0, 1.0]).double())


# Volumes, one channel, several ignored labels


class Volumes(nn.Module):
    """`Net` of volumes."""

    def __init__(self, k):
        super().__init__()
        self.classifier = nn.Conv3d(CLASSES, CLASSES, 1, bias=False)
        self.classifier.weight.data = SIGNAL * k * torch.eye(CLASSES).view(CLASSES, CLASSES, 1, 1, 1)

    def forward(self, x):
        return self.classifier(x)


def test_of_volumes_all_is_estimated_that_is_of_pictures():
    """Their voxels in another order of dimensions; what looks at neighbours is another thing."""

    def as_volumes(domain):
        return tuple(x.reshape(*x.shape[:-2], 4, 4, 24) for x in domain)

    class Flat(Net):
        def forward(self, x):
            return self.classifier(x)

    flat = material(Flat(2.0), world(0), world(1), world(2))
    given = material(Volumes(2.0), as_volumes(world(0)), as_volumes(world(1)), as_volumes(world(2)))
    alike = [ESTIMATORS[name] for name in ("source", "blends", "mixed_blends", "doc", "atc", "transcal")]
    for estimator in (*alike, labelled):
        found, expected = estimator(given), estimator(flat)
        assert found[1:4] == pytest.approx(expected[1:4], rel=1e-5, nan_ok=True)
        assert found.note == expected.note
    for name in ("shadows", "shadow_fit"):
        assert ESTIMATORS[name](given).temperature == pytest.approx(2.0, rel=0.15)
    assert torch.equal(given.seen("source").features, flat.seen("source").features)  # the input of a Conv3d


def test_one_sigmoid_channel_is_declared_and_estimated_as_two():
    image = torch.randn(12, 1, 16, 24, generator=generator())
    label = (torch.rand(12, 16, 24, generator=generator(1)) < (2 * image[:, 0]).sigmoid()).long()

    def one(x):
        return 6 * x

    domains = {"source": (image, label), "target": image, "labelled_target": (image, label)}
    found = estimate_temperature(one, logits_of=two_channels, **domains)
    assert same(found, estimate_temperature(lambda x: torch.cat([0 * x, one(x)], 1), **domains))
    assert found.estimates["labelled"].temperature == pytest.approx(3, rel=0.1)
    with pytest.raises(ValueError, match=r"estimate_temperature: .* got float32 \(4, 1, 16, 24\); .*logits_of=two_channels"):
        estimate_temperature(one, **domains)


def test_several_ignored_labels_are_as_one_and_255_classes_need_a_word():
    image, label = world(0, n=6)
    marked = label.clone()
    marked[:, :4], label[:, :4], marked[:, 4:8], label[:, 4:8] = 9, 255, 255, 255
    options = {"target": world(1, n=6)[0]}
    found = estimate_temperature(Net(2.0), source=(image, marked), ignore_index=(9, 255), **options)
    assert same(found, estimate_temperature(Net(2.0), source=(image, label), **options))

    def many(x):
        return torch.cat([SIGNAL * x, torch.full((len(x), 296, *x.shape[2:]), -9.0)], 1)

    with pytest.raises(ValueError, match="estimate_temperature: expected ignore_index to be given with 300 classes"):
        estimate_temperature(many, source=(image, label), **options)
    assert estimate_temperature(many, source=(image, label), ignore_index=255, estimators={}, **options).temperature == TYPICAL


def test_counts_may_be_numpys():
    options = {"max_images": np.int64(4), "batch_size": np.int32(2), "pixels": np.int64(100), "ignore_index": np.int64(255)}
    plain = {name: int(value) for name, value in options.items()}
    assert same(estimate_temperature(Net(2.0), **{**SMALL, **options}), estimate_temperature(Net(2.0), **{**SMALL, **plain}))
