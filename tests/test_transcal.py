"""TransCal: the temperature where nothing shifts, the right way where the target looks like what goes wrong, and its parts.

An image of `world` is hard or easy, which its brightness shows; the network is as sure of hard ones and errs there more often.
"""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

import dacal_addon.calibrate.transcal as module
from dacal_addon.calibrate import Material, Pictures, fitted_temperature
from dacal_addon.calibrate.pixels import Pixels
from dacal_addon.calibrate.scaling import BOUNDS
from dacal_addon.calibrate.transcal import error_on_target, odds_of_target, transcal

WRONG = {"hard": 0.4, "easy": 0.05}
SURE = 4.0  # the difference of the two logits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Sure(nn.Module):
    """Says class 0, and always as surely; its features are the image."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Conv2d(1, 2, 1)
        nn.init.zeros_(self.classifier.weight)
        self.classifier.bias.data = torch.tensor([SURE, 0.0])

    def forward(self, image):
        return self.classifier(image)


def world(seed, share_hard, *, n=80, size=12):
    g = generator(seed)
    hard = torch.zeros(n, dtype=torch.bool)
    hard[: round(share_hard * n)] = True
    rate = torch.where(hard, torch.tensor(WRONG["hard"]), torch.tensor(WRONG["easy"])).view(n, 1, 1)
    wrong = torch.rand(n, size, size, generator=g) < rate
    image = hard.float().view(n, 1, 1, 1) + 0.5 * torch.randn(n, 1, size, size, generator=g)
    return image, wrong.long()


def material(student, source, target, **options):
    return Material(
        student.eval(),
        source=Pictures(*map(tuple, source)),
        target=Pictures(tuple(target[0])),
        **{"generator": generator(), "pixels": 1 << 20, **options},
    )


def temperature_of(accuracy):
    """Of two classes whose logits are `SURE` apart: sigmoid(SURE / T) = accuracy."""
    return SURE / math.log(accuracy / (1 - accuracy))


def accuracy_of(label):
    return 1 - float(label.double().mean())


class Scaled(nn.Module):
    """Gives `k` times the calibrated logits of images of one-hot labels in noise."""

    def __init__(self, k):
        super().__init__()
        self.classifier = nn.Conv2d(4, 4, 1, bias=False)
        self.classifier.weight.data = 2.0 * k * torch.eye(4).view(4, 4, 1, 1)

    def forward(self, image):
        return self.classifier(image)


def noisy(seed, n=24, size=16):
    g = generator(seed)
    label = torch.randint(0, 4, (n, size, size), generator=g)
    return 2.0 * nn.functional.one_hot(label, 4).permute(0, 3, 1, 2) + torch.randn(n, 4, size, size, generator=g), label


@pytest.mark.parametrize("k", [1.2, 2.0, 3.0])
def test_where_nothing_shifts_it_finds_the_temperature(k):
    found = transcal(material(Scaled(k), noisy(0), noisy(1)))
    image, label = noisy(1)
    assert found.temperature == pytest.approx(fitted_temperature(Scaled(k)(image), label), rel=0.05)
    assert found.accuracy == pytest.approx(float((image.argmax(1) == label).double().mean()), abs=0.01)
    confidence = (Scaled(k)(image).double() / found.temperature).softmax(1).max(1)[0].mean()
    assert float(confidence.detach()) == pytest.approx(found.accuracy, abs=1e-3)
    assert (found.name, found.covered) == ("transcal", True)
    assert math.isnan(found.spread)
    assert 0 <= float(re.fullmatch(r"weights to the power (\d\.\d\d)", found.note).group(1)) <= 1


def test_a_network_that_is_not_sure_enough_gets_its_bound():
    assert transcal(material(Scaled(0.5), noisy(0), noisy(1))).temperature == pytest.approx(1.0, abs=1e-6)


class Constant(Sure):
    def __init__(self, sure):
        super().__init__()
        self.classifier.bias.data = torch.tensor([sure, 0.0])


def test_it_stays_within_its_bounds(monkeypatch):
    image, label = world(0, 0.5)
    label = (torch.rand(label.shape, generator=generator(2)) < 0.45).long()
    assert transcal(material(Constant(8.0), (image, label), (image, label))).temperature == pytest.approx(BOUNDS[1])
    flawless = transcal(material(Constant(3.0), (image, 0 * label), (image, label)))
    assert flawless.temperature == pytest.approx(1.0, abs=1e-6)
    assert flawless.accuracy == pytest.approx(1.0, abs=1e-3)
    for error in (-0.1, 1.1):
        monkeypatch.setattr(module, "error_on_target", lambda *_, error=error: error)
        assert transcal(material(Constant(3.0), (image, label), (image, label))).accuracy == float(error < 0)


@pytest.mark.parametrize(("of_source", "of_target"), [(0.2, 0.6), (0.1, 0.8), (0.6, 0.2), (0.8, 0.1)])
def test_it_goes_the_way_that_the_errors_of_similar_images_go(of_source, of_target):
    """Not all the way: the power of the weights is found along with T, and that search starts at 2 and a half."""
    source, target = world(0, of_source), world(1, of_target)
    plain, truth = temperature_of(accuracy_of(source[1])), temperature_of(accuracy_of(target[1]))
    found = transcal(material(Sure(), source, target))
    if of_target > of_source:
        assert 1.04 * plain < found.temperature < truth
        assert found.accuracy < accuracy_of(source[1]) - 0.01
    else:
        assert truth < found.temperature < plain / 1.04
        assert found.accuracy > accuracy_of(source[1]) + 0.01
    # What it finds is where confidence and estimated accuracy meet.
    assert found.temperature == pytest.approx(temperature_of(found.accuracy), rel=0.01)


@pytest.mark.parametrize(("sure", "power"), [(6.0, 0.0), (2.0, 1.0)])
def test_the_power_of_the_weights_ends_between_none_and_all(sure, power):
    """A network that is much too sure at the T of the start asks for a small error, and the other way round."""
    found = transcal(material(Constant(sure), world(0, 0.1), world(1, 0.8)))
    assert found.note == f"weights to the power {power:.2f}"


def test_it_does_not_look_at_labels_of_the_target():
    source, target = world(0, 0.3, n=40), world(1, 0.6, n=40)
    given = material(Sure(), source, target)
    given.target = Pictures(tuple(target[0]), tuple(1 - target[1]))
    assert transcal(given) == pytest.approx(transcal(material(Sure(), source, target)), nan_ok=True)


def test_source_images_count_by_their_judged_pixels(monkeypatch):
    """48 pixels of each are looked at: of hard images those are all that are judged, of easy ones a third."""
    source, target = world(0, 0.5, n=60), world(1, 0.5, n=60)
    source[1][:30, :, 4:] = 255
    seen = []

    def spy(correct, said, weight, mass):
        seen.append(mass)
        return error_on_target(correct, said, weight, mass)

    monkeypatch.setattr(module, "error_on_target", spy)
    transcal(material(Sure(), source, target, pixels=48))
    mass = seen[0].reshape(60, 48)
    assert mass.sum() == pytest.approx(1.0)
    assert mass[:30] == pytest.approx(0.25 / 30 / 48)
    assert mass[30:] == pytest.approx(0.75 / 30 / 48)


def test_target_images_count_by_their_size():
    """Flat images, of which the large ones are less clear; 36 pixels of each are looked at."""
    clear, dim = torch.zeros(20, 4, 6, 6), torch.zeros(20, 4, 18, 18)
    clear[:, 0], dim[:, 0] = 4.0, 1.5
    given = material(Scaled(2.0), noisy(0), (clear,), pixels=36)
    given.target = Pictures((*clear, *dim))
    found = transcal(given)
    confidence = [float((4.0 * x[0, :, 0, 0].double() / found.temperature).softmax(0)[0]) for x in (clear, dim)]
    assert confidence[0] - confidence[1] > 0.1
    assert 0.1 * confidence[0] + 0.9 * confidence[1] == pytest.approx(found.accuracy, abs=1e-3)


def test_the_same_material_gives_the_same_estimate_and_touches_no_random_state():
    source, target = world(0, 0.3, n=20), world(1, 0.6, n=20)
    student = Sure()
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = transcal(material(student, source, target, pixels=50))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numpy_state
    torch.manual_seed(4)
    again = transcal(material(student, source, target, pixels=50))
    assert again._replace(spread=0.0) == first._replace(spread=0.0)


# How much a source image looks like the target's


def seen(features, image, images):
    some = torch.zeros(1)
    return Pixels(some, some, some, some, images, features.float(), image)


def test_the_odds_are_logistic_regressions_mean_over_an_image():
    """Against scikit-learn's, whose C is the penalty of the sum of losses."""
    g = generator(4)
    image = torch.tensor([0] * 40 + [1] * 80 + [2] * 10 + [3] * 70)  # of several sizes
    features = torch.randn(200, 3, generator=g) * torch.tensor([1.0, 50.0, 0.01]) + torch.tensor([0.0, 3000.0, -5.0])
    others = torch.randn(350, 3, generator=g) * torch.tensor([1.0, 50.0, 0.01]) + torch.tensor([1.0, 2950.0, -5.0])
    features[image == 2, 0] += 2
    both = torch.cat([features, others]).double().numpy()
    scaled = (both - both.mean(0)) / both.std(0)
    domain = np.repeat([0, 1], [200, 350])
    model = LogisticRegression(C=1 / (2 * len(both) * 1e-3), tol=1e-10, max_iter=10_000).fit(scaled, domain)
    odds = np.exp(model.decision_function(scaled[:200]))
    expected = [odds[(image == i).numpy()].mean() for i in range(4)]
    found = odds_of_target(seen(features, image, 4), seen(others, torch.zeros(350).long(), 1))
    assert found == pytest.approx(expected, rel=1e-3)
    assert max(expected) / min(expected) > 3


def test_a_feature_without_bounds_does_not_leave_one_image_alone():
    features = torch.cat([torch.zeros(500, 1), torch.full((1, 1), 1e6)])
    others = torch.cat([torch.zeros(400, 1), torch.full((100, 1), 1e5)])
    image = torch.cat([torch.zeros(500), torch.ones(1)]).long()
    odds = odds_of_target(seen(features, image, 3), seen(others, torch.zeros(500).long(), 1))
    assert odds[1] == pytest.approx(math.exp(20))
    assert 0.1 < odds[0] < 10
    assert odds[2] == 0  # an image of which nothing is known


# The estimate of the error


def by_the_paper(correct, said, weight, mass):
    """With numpy's covariances; probabilities as frequency weights, so that degrees of freedom do not matter."""
    w = weight / np.average(weight, weights=mass)
    risk = w * (1 - correct)

    def covariance(a, b):
        return np.cov(np.stack([a, b]), aweights=mass, ddof=0)

    both = covariance(risk, w)
    first = risk - both[0, 1] / both[1, 1] * (w - 1)
    both = covariance(first, correct)
    second = first - both[0, 1] / both[1, 1] * (correct - np.average(said, weights=mass))
    return np.average(second, weights=mass)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), pixels=st.integers(5, 200), scale=st.floats(1e-6, 1e6))
def test_the_error_is_that_of_the_papers_formulas_whatever_the_scale_of_the_odds(seed, pixels, scale):
    g = np.random.default_rng(seed)
    correct = (g.random(pixels) < 0.7).astype(float)
    correct[:2] = 0.0, 1.0
    said, weight, mass = g.random(pixels), scale * g.lognormal(size=pixels), g.random(pixels) + 0.1
    mass /= mass.sum()
    expected = by_the_paper(correct, said, weight, mass)
    assert error_on_target(correct, said, weight, mass) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_with_the_true_odds_the_error_is_the_targets():
    """Of the source a tenth is hard, of the target 0.7: hard pixels are 7 times as frequent there, easy ones a third."""
    g = np.random.default_rng(0)
    hard = g.random(400_000) < 0.1
    correct = (g.random(len(hard)) >= np.where(hard, WRONG["hard"], WRONG["easy"])).astype(float)
    weight, mass = np.where(hard, 0.7 / 0.1, 0.3 / 0.9), np.full(len(hard), 1 / len(hard))
    truth = 0.7 * WRONG["hard"] + 0.3 * WRONG["easy"]
    said = np.full(len(hard), correct.mean())
    assert error_on_target(correct, said, weight, mass) == pytest.approx(truth, abs=0.005)
    assert error_on_target(correct, said, np.ones(len(hard)), mass) == pytest.approx(1 - correct.mean(), rel=1e-9)


def test_pixels_that_are_all_right_or_all_alike_have_an_error_too():
    ones, mass = np.ones(4), np.full(4, 0.25)
    weight = np.array([1.0, 2.0, 3.0, 4.0])
    assert error_on_target(ones, 0.9 * ones, weight, mass) == pytest.approx(0.0, abs=1e-9)
    assert error_on_target(0 * ones, 0 * ones, ones, mass) == pytest.approx(1.0, abs=1e-9)
