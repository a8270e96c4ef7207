"""`CalibrationStats` as a metric of torchmetrics: its figures are the statistics', wherever torchmetrics takes the counts."""

import copy
import doctest
import os
import pickle
import tempfile

import pytest
import torch
from oracles import predictions

from dacal_addon.metrics import CalibrationStats

REASON = "install the extra `torchmetrics` (not to be had for Python 3.8 and torch 1.7.1)"
torchmetrics = pytest.importorskip("torchmetrics", reason=REASON)
module = pytest.importorskip("dacal_addon.integrations.torchmetrics", reason=REASON)
CalibrationMetric = module.CalibrationMetric
OPTIONS = {"input": "logits", "ignore_index": (0, 255), "classwise": True}


@pytest.fixture(scope="module")
def batches():
    z, target = predictions(3, (6, 5, 8, 9), dtype=torch.float32)
    return [(z[part], target[part]) for part in (slice(0, 1), slice(1, 4), slice(4, 6))]


@pytest.fixture(scope="module")
def figures(batches):
    stats = CalibrationStats(5, **OPTIONS)
    for batch in batches:
        stats.update(*batch)
    return stats.compute()


def test_its_example_holds():
    assert doctest.testmod(module).attempted > 2
    assert doctest.testmod(module).failed == 0


def test_all_figures_and_one(batches, figures):
    everything, one = (CalibrationMetric(5, metric=metric, **OPTIONS) for metric in (None, "miou"))
    for batch in batches:
        everything.update(*batch)
        one.update(*batch)
    assert {name: float(value) for name, value in everything.compute().items()} == pytest.approx(figures, abs=1e-12)
    assert float(one.compute()) == pytest.approx(figures["miou"], abs=1e-12)
    assert everything.statistics().class_pixels().sum() == everything.statistics().pixels
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert float(copied.compute()) == float(one.compute())
    one.reset()
    one.update(*batches[1])
    stats = CalibrationStats(5, **OPTIONS)
    stats.update(*batches[1])
    assert float(one.compute()) == stats.miou()


def test_forward_gives_the_batch_and_keeps_the_sum(batches, figures):
    metric = CalibrationMetric(5, metric="ece", **OPTIONS)
    for batch in batches:
        stats = CalibrationStats(5, **OPTIONS)
        stats.update(*batch)
        assert float(metric(*batch)) == pytest.approx(stats.ece(), abs=1e-12)
    assert float(metric.compute()) == pytest.approx(figures["ece"], abs=1e-12)


def test_a_collection_counts_once(batches, figures, monkeypatch):
    metrics = {name: CalibrationMetric(5, metric=name, **OPTIONS) for name in ("ece", "miou", "nll")}
    metrics["other"] = CalibrationMetric(5, input="logits", metric=("accuracy",))
    together = torchmetrics.MetricCollection(metrics)
    for batch in batches:
        together.update(*batch)
    groups = {frozenset(group) for group in together.compute_groups.values()}
    assert groups == {frozenset(["ece", "miou", "nll"]), frozenset(["other"])}
    found = {name: float(value) for name, value in together.compute().items()}
    assert found.pop("accuracy") != figures["accuracy"]  # 0 counts there
    assert found == pytest.approx({name: figures[name] for name in ("ece", "miou", "nll")}, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"ignore_index": 255}, {"ignore_index": (0, 255)}),
        ({"ignore_index": 255}, {"ignore_index": (254, 255)}),
        ({}, {"channels_last": True}),
    ],
)
def test_other_settings_count_for_themselves_though_the_first_batch_is_the_same(options, others):
    """A class that is ignored need not occur in it; only the digest tells the metrics apart."""
    metrics = {str(one): CalibrationMetric(5, input="logits", metric="miou", **one) for one in (options, others)}
    together = torchmetrics.MetricCollection(metrics)
    generator = torch.Generator().manual_seed(0)
    batches = [  # in the first one, no score says where the channels are
        (torch.ones(1, 5, 5, 5), torch.randint(1, 5, (1, 5, 5), generator=generator)),
        (torch.randn(1, 5, 5, 5, generator=generator), torch.randint(0, 5, (1, 5, 5), generator=generator)),
    ]
    expected = {str(one): CalibrationStats(5, input="logits", **one) for one in (options, others)}
    for batch in batches:
        together.update(*batch)
        for stats in expected.values():
            stats.update(*batch)
    assert len(together.compute_groups) == 2
    found = {name: float(value) for name, value in together.compute().items()}
    assert found == pytest.approx({name: stats.miou() for name, stats in expected.items()}, abs=1e-12)


def test_statistics_are_a_copy(batches, figures):
    metric = CalibrationMetric(5, metric=None, **OPTIONS)
    metric.update(*batches[0])
    first = metric.statistics()
    pixels, before = first.pixels, first.compute()
    for batch in batches[1:]:
        metric.update(*batch)
    assert (first.pixels, first.compute()) == (pixels, before)
    first.update(*batches[1])
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(figures, abs=1e-12)
    second = metric.statistics()
    metric.reset()
    metric.update(*batches[0])
    assert second.compute() == pytest.approx(figures, abs=1e-12)


def test_the_state_dict_has_the_counts_when_it_is_asked_for(batches, figures):
    saved, loaded = (CalibrationMetric(5, metric="ks", **OPTIONS) for _ in range(2))
    saved.persistent(True)
    loaded.persistent(True)
    for batch in batches:
        saved.update(*batch)
    loaded.load_state_dict(saved.state_dict())
    loaded.update(*batches[0])
    loaded.update(*batches[1])
    loaded.update(*batches[2])
    assert float(loaded.compute()) == pytest.approx(figures["ks"], abs=1e-12)  # twice the same counts
    assert loaded.statistics().images == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "iou"}, ValueError, "CalibrationMetric: expected metric to be one of 'accuracy'"),
        ({"metric": "classwise_ece"}, ValueError, "got 'classwise_ece'"),  # not counted
        ({"per_image": True}, ValueError, r"expected no per_image, got per_image=True; use CalibrationStats and its sync\(\)"),
        ({"device": "cpu"}, ValueError, r"expected no device, got device='cpu'; use to\(device\)"),
        ({"n_bin": 3}, ValueError, "n_bin"),
    ],
)
def test_what_it_cannot_do(options, error, message):
    with pytest.raises(error, match=message):
        CalibrationMetric(5, input="logits", **options)


def worker(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        z, target = predictions(3, (3, 5, 8, 9), dtype=torch.float32)
        whole = CalibrationStats(5, **OPTIONS)
        whole.update(z, target)
        metric = CalibrationMetric(5, metric=None, **OPTIONS)
        for i in ([0], [1, 2])[rank]:
            metric.update(z[i : i + 1], target[i : i + 1])
        for _ in range(2):  # what is computed is everybody's, what is kept is one's own
            found = {name: float(value) for name, value in metric.compute().items()}
            assert found == pytest.approx(whole.compute(), abs=1e-12)
            metric.update(z[:0], target[:0])
        assert metric.statistics().images == 1 + rank
    finally:
        torch.distributed.destroy_process_group()


def test_processes_compute_the_figures_of_all_images():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (os.path.join(folder, "store"),), nprocs=2)
