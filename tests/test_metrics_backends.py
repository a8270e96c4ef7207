"""The sweep in compiled code counts what torch's operations count; the tests of test_metrics.py run with it too."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dacal_addon.metrics import CalibrationStats, backends, pixels
from dacal_addon.metrics.pieces import Batch

HAS_NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="the extra fast, which Python 3.8 is tested without")
KINDS = ("logits", "probs", "log_probs")


def batch_of(seed, *, classes=5, size=(2, 7, 9), kind="logits", dtype=torch.float32, sharpness=4.0):
    g = torch.Generator().manual_seed(seed)
    z = sharpness * torch.randn((size[0], classes, *size[1:]), generator=g, dtype=torch.float64)
    x = {"logits": z, "probs": z.softmax(1), "log_probs": z.log_softmax(1)}[kind].to(dtype)
    target = torch.randint(0, classes, size, generator=g)
    target[torch.rand(size, generator=g) < 0.2] = 255
    return x, target


def counts(x, target, backend, region=None, **options):
    stats = CalibrationStats(x.shape[1], backend=backend, **options)
    stats.update(x, target, region)
    assert stats.judged_by == backend
    return stats._totals


def assert_same(mine, theirs):
    for name, one, other in zip(mine._fields, mine, theirs):
        if one.dtype == torch.int64:
            assert torch.equal(one, other), name
        else:
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-12, atol=1e-12, err_msg=name)


@needs_numba
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(2, 6),
    st.booleans(),
    st.sampled_from([(3,), (1, 1), (2, 33, 40), (1, 4, 5, 6)]),
)
def test_the_sweep_counts_what_torch_counts(seed, kind, dtype, classes, classwise, size):
    x, target = batch_of(seed, classes=classes, size=(2, *size), kind=kind, dtype=dtype)
    if kind != "logits":  # what rounding did is another test's
        x = x.double().exp() if kind == "log_probs" else x.double()
        x = (x / x.sum(1, keepdim=True)).log() if kind == "log_probs" else x / x.sum(1, keepdim=True)
    region = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    options = {"input": kind, "classwise": classwise, "n_bins": 1 + seed % 20}
    assert_same(counts(x, target, "numba", region, **options), counts(x, target, "torch", region, **options))


@needs_numba
@pytest.mark.parametrize("layout", ["transposed", "every other column", "one for all pixels", "channels last"])
def test_layouts_of_memory(layout):
    x, target = batch_of(1, size=(2, 8, 8))
    if layout == "transposed":
        x, target = x.transpose(-1, -2), target.transpose(-1, -2)
    elif layout == "every other column":
        x, target = x[..., ::2], target[..., ::2]
    elif layout == "one for all pixels":
        x = x[:, :, :1, :1].expand_as(x)
    else:
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert_same(counts(x, target, "numba", input="logits"), counts(x.clone(), target, "torch", input="logits"))


@needs_numba
@pytest.mark.parametrize("kind", KINDS)
def test_many_pieces_in_several_threads(kind, monkeypatch):
    monkeypatch.setattr(pixels, "_ONE_THREAD", 100)
    x, target = batch_of(2, size=(2, 30, 41), kind=kind, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several, again = (counts(x, target, "numba", input=kind, classwise=True) for _ in range(2))
        torch.set_num_threads(1)
        one = counts(x, target, "numba", input=kind, classwise=True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(several, again))  # whichever thread was first
    assert_same(several, one)
    assert_same(one, counts(x, target, "torch", input=kind, classwise=True))


@needs_numba
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (kind, value)
        for kind in KINDS
        for value in (math.nan, math.inf, 7.0, -0.1)
        if kind != "logits" or not math.isfinite(value)
    ],
)
def test_what_is_not_as_declared_is_found_where_it_counts_alone(kind, value):
    x, target = batch_of(3, kind=kind, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    for ignored in (False, True):
        target[1, 3, 4] = 255 if ignored else 0
        found = []
        for backend in ("numba", "torch"):
            stats = CalibrationStats(5, input=kind, backend=backend)
            try:
                stats.update(x, target)
                found.append(stats.pixels)
            except ValueError as error:
                assert stats.pixels == 0
                found.append(str(error))
        assert found[0] == found[1]
        assert isinstance(found[0], int) == ignored


@needs_numba
@pytest.mark.parametrize("classes", [2, 4097 // 8])
def test_masked_classes_and_a_true_class_without_probability(classes):
    x, target = batch_of(4, classes=classes)
    x[:, 0] = -math.inf
    options = {"input": "logits", "ignore_index": 255 if classes < 255 else -1}
    target = target.masked_fill(target == 255, options["ignore_index"])
    assert_same(counts(x, target, "numba", **options), counts(x, target, "torch", **options))
    assert counts(x, torch.zeros_like(target), "numba", **options).nll == math.inf


@needs_numba
def test_stray_labels_are_named():
    x, target = batch_of(5)
    for stray in (-1, 5, 1000):
        target[0, 0, 0] = stray
        with pytest.raises(ValueError, match=f"got the value {stray}"):
            counts(x, target, "numba", input="logits")


@needs_numba
def test_the_polynomials():
    import numba

    from dacal_addon.metrics import fused

    exp, log2 = (numba.njit(lambda x, f=f: f(x)) for f in (fused._exp, fused._log2))
    inputs = np.concatenate([np.linspace(-699, 699, 4001), np.linspace(-1, 1, 4001), [0.0, -0.0]])
    assert max(abs(exp(x) / math.exp(x) - 1) for x in inputs) < 4e-15
    assert exp(0.0) == 1.0
    assert exp(-math.inf) < 1e-300
    assert math.isnan(exp(math.nan))
    inputs = np.concatenate([2.0 ** np.linspace(-40, 0, 4001), np.linspace(0.4, 1.6, 4001)])
    assert max(abs(log2(x) - math.log2(x)) for x in inputs) < 1e-12


def test_which_one_judges(monkeypatch):
    x, target = batch_of(6)
    stats = CalibrationStats(5, input="logits")
    assert stats.judged_by is None
    stats.update(x, target)
    assert stats.judged_by == "torch"  # few scores are not worth loading the other
    if HAS_NUMBA:
        monkeypatch.setattr(backends, "_WORTH_LOADING", x.numel())
        stats.update(x, target)
        assert stats.judged_by == "numba"
        sure = CalibrationStats(5, input="top1", backend="numba")
        sure.update((torch.ones(target.shape), target.clamp(max=4)), target)
        assert sure.judged_by == "torch"
    with pytest.raises(ValueError, match="backend to be one of 'numba', 'torch', 'compile', got 'cuda'"):
        CalibrationStats(5, input="logits", backend="cuda")
    monkeypatch.setattr(backends, "_has_numba", lambda: False)
    with pytest.raises(RuntimeError, match=r"expected numba .*, got none; pip install 'dacal-addon\[fast\]'"):
        CalibrationStats(5, input="logits", backend="numba")
    assert backends.backend_for(Batch(x, target, None), None) == "torch"


def test_counts_of_several_backends_merge():
    x, target = batch_of(7)
    both = [CalibrationStats(5, input="logits", backend=name) for name in (None, "torch")]
    for one in both:
        one.update(x, target)
    both[0].merge(both[1])
    assert both[0].pixels == 2 * both[1].pixels
    assert both[0].nll() == pytest.approx(both[1].nll(), rel=1e-12)
