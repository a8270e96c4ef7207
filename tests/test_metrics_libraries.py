"""Public libraries as oracles where their definitions coincide with ours, and where and why they differ."""

import numpy as np
import pytest
import torch
from oracles import flat, predictions, top, width_ece

from dacal_addon import metrics
from dacal_addon.metrics import CalibrationStats

REASON = "install the extra `oracles` (not to be had for Python 3.8 and torch 1.7.1)"
torchmetrics = pytest.importorskip("torchmetrics.classification", reason=REASON)
netcal = pytest.importorskip("netcal.metrics", reason=REASON)
relplot = pytest.importorskip("relplot", reason=REASON)


@pytest.fixture
def case():
    z, target = predictions(1, (4, 6, 40, 50), ignored=0.2)
    p, y = flat(z, target)
    stats = CalibrationStats(6, input="logits", classwise=True)
    stats.update(z, target)
    return z, target, p, y, stats


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_torchmetrics(case, norm):
    z, target, _, _, stats = case
    other = torchmetrics.MulticlassCalibrationError(6, n_bins=15, norm=norm, ignore_index=255)
    other.update(z, target)
    assert stats.ece(norm=norm) == pytest.approx(float(other.compute()), abs=2e-7)  # in float32


@pytest.mark.parametrize("ignored", [0, 3, 255])
def test_torchmetrics_leaves_an_ignored_class_out_of_its_mean(case, ignored):
    z, target, *_ = case
    target = torch.where(target == 255, torch.full_like(target, ignored), target)
    other = torchmetrics.MulticlassJaccardIndex(num_classes=6, ignore_index=ignored)
    other.update(z, target)
    stats = CalibrationStats(6, input="logits", ignore_index=ignored)
    stats.update(z, target)
    assert stats.miou() == pytest.approx(float(other.compute()), abs=2e-7)  # in float32


def test_torchmetrics_closes_its_bins_on_the_left(case):
    """A confidence of 3/4 is in (1/2, 3/4] here and in [3/4, 1) there: another bin, another error."""
    x = torch.tensor([[0.75, 0.25], [0.9, 0.1]]).T.reshape(1, 2, 1, 2)
    target = torch.tensor([[[1, 0]]])
    other = torchmetrics.MulticlassCalibrationError(2, n_bins=4, norm="l1")
    other.update(x, target)
    assert float(other.compute()) == pytest.approx(abs(0.5 - 0.825))  # both in [0.75, 1)
    assert metrics.ece(x, target, input="probs", n_bins=4) == pytest.approx((0.75 + 0.1) / 2)


def test_torchmetrics_guesses_whether_it_gets_logits():
    """Logits that all lie in 0..1 are taken for probabilities there; nothing is guessed here."""
    z = torch.tensor([[0.9, 0.1]] * 10).T.reshape(1, 2, 1, 10)
    target = torch.zeros(1, 1, 10).long()
    other = torchmetrics.MulticlassCalibrationError(2, n_bins=15)
    other.update(z, target)
    assert float(other.compute()) == pytest.approx(0.1)
    assert metrics.ece(z, target, input="logits") == pytest.approx(1 - 1 / (1 + np.exp(-0.8)))


def test_torchmetrics_counts_in_float32():
    """Ten images of 1024 x 2048: its counts stick at 2^24 = 16.8 million pixels a bin, and its error is ten times off."""
    confidence, wrong_of_1000 = 0.95, 77
    logit = float(np.log(confidence / (1 - confidence)))
    z = torch.tensor([logit, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1024, 2048)
    target = (torch.arange(1024 * 2048) % 1000 < wrong_of_1000).long().view(1, 1024, 2048)
    other = torchmetrics.MulticlassCalibrationError(2, n_bins=15, validate_args=False)
    stats = CalibrationStats(2, input="logits")
    for _ in range(10):
        other.update(z, target)
        stats.update(z, target)
    float32_logit = float(z[0, 0, 0, 0].double())
    expected = abs(float((target == 0).double().mean()) - 1 / (1 + np.exp(-float32_logit)))
    assert expected == pytest.approx(0.027, abs=1e-3)
    assert stats.ece() == pytest.approx(expected, abs=1e-9)
    assert float(other.compute()) < expected / 10  # 0.0 in version 1.9


def test_netcal(case):
    _, _, p, y, stats = case
    assert stats.ece() == pytest.approx(netcal.ECE(15).measure(p, y), abs=1e-9)
    assert stats.mce() == pytest.approx(netcal.MCE(15).measure(p, y), abs=1e-9)


def test_netcal_adaptive_is_not_equal_mass(case):
    """Its ACE is the unweighted mean of the gaps of bins of equal width (Nixon's has bins of equal mass)."""
    _, _, p, y, stats = case
    table = stats.reliability()
    filled = table.pixels > 0
    unweighted = float((table.accuracy - table.confidence)[filled].abs().mean())
    assert netcal.ACE(15).measure(p, y) == pytest.approx(unweighted, abs=1e-9)
    assert abs(stats.ece(binning="mass") - unweighted) > 0.01


def test_relplot_smece(case):
    """Its bandwidth is searched in ten halvings, ours to the end, so that they differ by up to 1e-3."""
    _, _, p, y, stats = case
    confidence, right = top(p, y)
    assert stats.smece() == pytest.approx(relplot.smECE(confidence, right), abs=1.5e-3)
    assert stats.smece() > 0.05


def test_libraries_that_need_flat_pixels_agree_with_the_definition(case):
    """The oracle of all other tests, against theirs."""
    _, _, p, y, _ = case
    assert width_ece(p, y) == pytest.approx(netcal.ECE(15).measure(p, y), abs=1e-12)
