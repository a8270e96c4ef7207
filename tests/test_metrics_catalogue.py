"""The catalogue, the methods of `CalibrationStats`, the functions and the bootstrap know the same metrics by the same names."""

import inspect

import pytest
import torch
from oracles import predictions

from dacal_addon import metrics
from dacal_addon.metrics import CalibrationStats, functional
from dacal_addon.metrics.catalogue import CATALOGUE
from dacal_addon.metrics.figures import FIGURES

# What else there is: counting, state, and results that are no single figure.
METHODS = {"update", "merge", "sync", "reset", "to", "state_dict", "load_state_dict"}
METHODS |= {"confusion", "class_pixels", "predicted_confidence", "iou", "reliability", "selective"}
METHODS |= {"compute", "remarks", "bootstrap"}
NAMES = {"Bootstrap", "CalibrationStats", "ReliabilityTable", "ThresholdTable", "boundary_mask", "reliability"}


@pytest.fixture(scope="module")
def case():
    z, target = predictions(7, (3, 4, 9, 11), dtype=torch.float32)
    stats = CalibrationStats(4, input="logits", classwise=True, per_image=True)
    stats.update(z, target)
    return z, target, stats


def test_every_list_of_metrics_is_the_catalogue():
    assert list(CATALOGUE) == [metric.key for metric in CATALOGUE.values()]
    methods = {name for name, _ in inspect.getmembers(CalibrationStats, inspect.isfunction) if not name.startswith("_")}
    assert methods - METHODS == set(CATALOGUE)
    assert set(metrics.__all__) - NAMES == set(CATALOGUE)
    assert set(FIGURES) == {key for key, metric in CATALOGUE.items() if not metric.classwise}
    assert {name for name in vars(functional) if name in CATALOGUE} == set(CATALOGUE)
    assert len(metrics.__all__) == len(set(metrics.__all__))


@pytest.mark.parametrize("key", CATALOGUE)
def test_an_entry_says_what_readers_need(key):
    metric = CATALOGUE[key]
    assert metric.unit in ("%", "nats", "")
    assert metric.name == metric.name.strip() != ""
    assert metric.definition.endswith(".")
    assert sum(metric.name == other.name for other in CATALOGUE.values()) == 1
    assert not metric.interval or not metric.classwise


@pytest.mark.parametrize("key", CATALOGUE)
def test_the_function_is_the_method_and_the_bootstrap_estimates_it(case, key):
    z, target, stats = case
    value, function = getattr(stats, key)(), getattr(metrics, key)
    assert 0 < value < 20
    assert function(z, target, input="logits") == value
    assert function(torch.softmax(z.double(), 1), target, input="probs") == pytest.approx(value, rel=1e-6)
    ignored = torch.where(target == 255, torch.full_like(target, -1), target)
    assert function(z, ignored, input="logits", ignore_index=-1) == value
    if CATALOGUE[key].classwise:
        with pytest.raises(ValueError, match=f"bootstrap: expected metric to be one of .*, got '{key}'"):
            stats.bootstrap(key)
    else:
        assert stats.bootstrap(key, replicates=2).estimate == value


@pytest.mark.parametrize("key", CATALOGUE)
def test_the_catalogue_knows_what_a_metric_needs(case, key):
    z, target, stats = case
    few = CalibrationStats(4, input="logits")
    few.update(z, target)
    top1 = CalibrationStats(4, input="top1")
    top1.update(tuple(torch.softmax(z.double(), 1).max(1)), target)
    for one, refused in ((few, CATALOGUE[key].classwise), (top1, CATALOGUE[key].distribution)):
        assert (key in one.compute()) == (not refused)
        if refused:
            with pytest.raises(RuntimeError, match=r"expected (the probability of every class|counts of every class's)"):
                getattr(one, key)()
        else:
            assert getattr(one, key)() == one.compute()[key] == pytest.approx(getattr(stats, key)(), rel=1e-6)
