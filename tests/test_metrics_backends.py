"""The sweep in compiled code, and the launch for a GPU, count what torch's operations count.

The tests of test_metrics.py run with the sweep too. Without a GPU the launch runs in triton's interpreter (conftest.py).
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dacal_addon.metrics import CalibrationStats, backends, pixels
from dacal_addon.metrics.pieces import Batch

HAS_NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="the extra fast, which Python 3.8 is tested without")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="triton, which a torch without CUDA does not bring: pip install triton"
)
quiet = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, in which the interpreter computes
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param("numba", marks=needs_numba), pytest.param("triton", marks=[needs_triton, quiet])]
)
KINDS = ("logits", "probs", "log_probs")
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch_of(seed, *, classes=5, size=(2, 7, 9), kind="logits", dtype=torch.float32, sharpness=4.0):
    g = torch.Generator().manual_seed(seed)
    z = sharpness * torch.randn((size[0], classes, *size[1:]), generator=g, dtype=torch.float64)
    x = {"logits": z, "probs": z.softmax(1), "log_probs": z.log_softmax(1)}[kind].to(dtype)
    target = torch.randint(0, classes, size, generator=g)
    target[torch.rand(size, generator=g) < 0.2] = 255
    return x, target


def judged(x, target, backend, region=None, *, classes=None, normalize=False, interpolate=False, **options):
    """What a backend made of a batch, which is moved to the GPU for the launch, where there is one."""
    if backend == "triton":
        x = tuple(part.to(GPU) for part in x) if isinstance(x, tuple) else x.to(GPU)
        target, region = target.to(GPU), None if region is None else region.to(GPU)
    stats = CalibrationStats(classes or x.shape[1], backend=backend, **options)
    stats.update(x, target, region, normalize=normalize, interpolate=interpolate)
    assert stats.judged_by == backend
    return stats


def counts(x, target, backend, region=None, **options):
    return judged(x, target, backend, region, **options)._totals


def assert_same(mine, theirs):
    for name, one, other in zip(mine._fields, mine, theirs):
        if one.dtype == torch.int64:
            assert torch.equal(one, other), name
        else:
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-12, atol=1e-12, err_msg=name)


@each_backend
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(2, 6),
    st.booleans(),
    st.sampled_from([(3,), (1, 1), (2, 33, 40), (1, 4, 5, 6)]),
)
def test_counts_what_torch_counts(backend, seed, kind, dtype, classes, classwise, size):
    x, target = batch_of(seed, classes=classes, size=(2, *size), kind=kind, dtype=dtype)
    if kind != "logits":  # what rounding did is another test's
        x = x.double().exp() if kind == "log_probs" else x.double()
        x = (x / x.sum(1, keepdim=True)).log() if kind == "log_probs" else x / x.sum(1, keepdim=True)
    region = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    options = {"input": kind, "classwise": classwise, "n_bins": 1 + seed % 20}
    assert_same(counts(x, target, backend, region, **options), counts(x, target, "torch", region, **options))


@each_backend
@pytest.mark.parametrize("layout", ["transposed", "every other column", "one for all pixels", "channels last"])
def test_layouts_of_memory(layout, backend):
    x, target = batch_of(1, size=(2, 8, 8))
    if layout == "transposed":
        x, target = x.transpose(-1, -2), target.transpose(-1, -2)
    elif layout == "every other column":
        x, target = x[..., ::2], target[..., ::2]
    elif layout == "one for all pixels":
        x = x[:, :, :1, :1].expand_as(x)
    else:
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert_same(counts(x, target, backend, input="logits"), counts(x.clone(), target, "torch", input="logits"))


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


@each_backend
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (kind, value)
        for kind in KINDS
        for value in (math.nan, math.inf, 7.0, -0.1)
        if kind != "logits" or not math.isfinite(value)
    ],
)
def test_what_is_not_as_declared_is_found_where_it_counts_alone(kind, value, backend):
    x, target = batch_of(3, kind=kind, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    for ignored in (False, True):
        target[1, 3, 4] = 255 if ignored else 0
        found = []
        for name in (backend, "torch"):
            device = GPU if name == "triton" else torch.device("cpu")
            stats = CalibrationStats(5, input=kind, backend=name)
            try:
                stats.update(x.to(device), target.to(device))
                found.append(stats.pixels)
            except ValueError as error:
                assert stats.pixels == 0
                found.append(str(error))
        assert found[0] == found[1]
        assert isinstance(found[0], int) == ignored


@each_backend
@pytest.mark.parametrize("classes", [2, 300])
def test_masked_classes_and_a_true_class_without_probability(classes, backend):
    x, target = batch_of(4, classes=classes, size=(1, 4, 8))
    x[:, 0] = -math.inf
    options = {"input": "logits", "ignore_index": 255 if classes < 255 else -1}
    target = target.masked_fill(target == 255, options["ignore_index"])
    assert_same(counts(x, target, backend, **options), counts(x, target, "torch", **options))
    assert counts(x, torch.zeros_like(target), backend, **options).nll == math.inf


@each_backend
def test_of_equal_scores_the_first_class_is_predicted(backend):
    x, target = batch_of(13)
    x = x.round().clamp(-1, 1)
    mine = counts(x, target, backend, input="logits", classwise=True)
    assert_same(mine, counts(x, target, "torch", input="logits", classwise=True))
    valid = target != 255
    pair = 5 * target[valid] + torch.from_numpy(x.numpy().argmax(1))[valid]  # numpy's is the first one
    assert torch.equal(mine.confusion.flatten(), torch.bincount(pair, minlength=25))


@each_backend
def test_stray_labels_are_named(backend):
    x, target = batch_of(5)
    for stray in (-1, 5, 1000):
        target[0, 0, 0] = stray
        with pytest.raises(ValueError, match=f"got the value {stray}"):
            counts(x, target, backend, input="logits")


@needs_numba
def test_the_polynomials():
    import numba

    from dacal_addon.metrics import fused

    exp, log2 = (numba.njit(lambda x, f=f: f(x)) for f in (fused._exp, fused._log2))
    inputs = np.concatenate([np.linspace(-699, 699, 4001), np.linspace(-1, 1, 4001), [0.0, -0.0]])
    assert max(abs(exp(x) / math.exp(x) - 1) for x in inputs) < 4e-14
    assert max(abs(exp(x) / math.exp(x) - 1) for x in inputs if abs(x) <= 1) < 2e-15
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
    with pytest.raises(ValueError, match="backend to be one of 'numba', 'triton', 'torch', 'compile', got 'cuda'"):
        CalibrationStats(5, input="logits", backend="cuda")
    monkeypatch.setattr(backends, "_has_numba", lambda: False)
    with pytest.raises(RuntimeError, match=r"expected numba .*, got none; pip install 'dacal-addon\[fast\]'"):
        CalibrationStats(5, input="logits", backend="numba")
    assert backends.backend_for(Batch(x, target, None), None) == "torch"
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"expected triton >= 3\.2 .*, got none; use a torch built for CUDA"):
        CalibrationStats(5, input="logits", backend="triton")


def test_counts_of_several_backends_merge():
    x, target = batch_of(7)
    both = [CalibrationStats(5, input="logits", backend=name) for name in (None, "torch")]
    for one in both:
        one.update(x, target)
    both[0].merge(both[1])
    assert both[0].pixels == 2 * both[1].pixels
    assert both[0].nll() == pytest.approx(both[1].nll(), rel=1e-12)


# What the launch alone does


@needs_triton
@quiet
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("each", [False, True])
def test_a_launch_a_batch(copies, each, monkeypatch):
    from dacal_addon.metrics import triton_kernel

    launches = []
    once = triton_kernel._launch_
    monkeypatch.setattr(triton_kernel, "_launch_", lambda *given: launches.append(1) or once(*given))
    monkeypatch.setattr(triton_kernel, "_COPIES", copies)
    x, target = batch_of(8, classes=4, size=(3, 21, 30))
    region = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    target[1] = 255
    options = {"input": "logits", "classwise": True, "per_image": each}
    mine, theirs = (judged(x, target, backend, region, **options) for backend in ("triton", "torch"))
    assert len(launches) == 1
    assert_same(mine._totals, theirs._totals)
    assert len(mine._images) == len(theirs._images) == (3 if each else 0)
    for one, other in zip(mine._images, theirs._images):
        assert_same(one, other)
    monkeypatch.setattr(triton_kernel, "_MOST_BYTES", 1)  # counts of several images at once are too many
    assert_same(judged(x, target, "triton", region, **options)._totals, theirs._totals)
    assert len(launches) == (4 if each else 2)


@needs_triton
@quiet
def test_sums_do_not_depend_on_the_order_of_programs(monkeypatch):
    from dacal_addon.metrics import triton_kernel

    x, target = batch_of(9, size=(1, 40, 41))
    found = []
    for programs in (1, 2, 7):
        monkeypatch.setattr(triton_kernel, "_programs", lambda device, programs=programs: programs)
        found.append(counts(x, target, "triton", input="logits", classwise=True))
    for other in found[1:]:
        for name in ("confidence", "predicted_confidence", "class_confidence"):
            assert torch.equal(getattr(found[0], name), getattr(other, name))
        assert_same(found[0], other)


@needs_triton
@quiet
def test_sums_of_coarse_shares_have_no_bias(monkeypatch):
    """A batch of many pixels leaves fewer bits to each: rounding must go both ways."""
    from dacal_addon.metrics import triton_kernel

    x, target = batch_of(14, size=(1, 40, 41))
    exact = counts(x, target, "torch", input="logits", classwise=True)
    monkeypatch.setattr(triton_kernel, "_MOST_BITS", 20)
    mine = counts(x, target, "triton", input="logits", classwise=True)
    for name, roundings in (("confidence", 1300), ("predicted_confidence", 1300), ("class_confidence", 6500)):
        off = abs(float(getattr(mine, name).sum() - getattr(exact, name).sum())) * 2**20
        assert off < 6 * math.sqrt(roundings / 12)  # six standard deviations of as many roundings


@needs_triton
@quiet
@pytest.mark.parametrize(
    "options",
    [
        {"input": "probs", "classes": 2, "one_channel": True},
        {"input": "logits", "classes": 2, "one_channel": True, "per_image": True},
        {"input": "probs", "normalize": True},
        {"input": "logits", "interpolate": True},
        {"input": "logits", "reduce_zero_label": True, "ignore_index": (3, 255)},
        {"input": "logits", "channels_last": True, "classes": 5},
        {"input": "logits", "ignore_index": (0, 2, 255), "fine_bins": 256, "n_bins": 7},
    ],
)
def test_every_option(options):
    x, target = batch_of(10, kind=options["input"], dtype=torch.float16)
    if options.get("one_channel"):
        x, target = x[:, 1:2], target.clamp(max=1).masked_fill(target == 255, 255)
    if options.get("normalize"):
        x = 3 * x
    if options.get("interpolate"):
        x = x[..., ::2, ::3]
    if options.get("channels_last"):
        x = x.movedim(1, -1)
    mine, theirs = (judged(x, target.int(), backend, classwise=True, **options) for backend in ("triton", "torch"))
    assert mine.pixels > 20
    assert_same(mine._totals, theirs._totals)
    assert mine._settings == theirs._settings


@needs_triton
@quiet
def test_pairs_of_confidence_and_class():
    x, target = batch_of(11, kind="probs", dtype=torch.float64)
    confidence, predicted = x.max(1)
    predicted[target == 255] = -7  # what does not count may be anything
    confidence[target == 255] = math.nan
    options = {"input": "top1", "classes": 5, "per_image": True}
    mine, theirs = (judged((confidence, predicted.int()), target, backend, **options) for backend in ("triton", "torch"))
    assert_same(mine._totals, theirs._totals)
    for wrong in ((confidence + 1, predicted), (confidence, predicted + 5)):
        with pytest.raises(ValueError, match="update: expected x: "):
            judged(wrong, target, "triton", **options)


@needs_triton
@quiet
def test_no_image_and_no_pixel_that_counts():
    x, target = batch_of(12)
    stats = judged(x[:0], target[:0], "triton", input="logits", per_image=True)
    assert (stats.images, stats.pixels, len(stats._images)) == (0, 0, 0)
    stats = judged(x, torch.full_like(target, 255), "triton", input="logits", per_image=True)
    assert (stats.images, stats.pixels, stats.ignored_pixels) == (2, 0, target.numel())


@needs_triton
def test_a_gpu_on_which_the_kernel_does_not_work_is_told_of(monkeypatch):
    from dacal_addon.metrics import triton_kernel

    def broken(*given):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_kernel, "_on", broken)
    triton_kernel.works.cache_clear()
    with pytest.warns(UserWarning, match=r"does not work here \(Failed to find C compiler\); torch's operations judge"):
        assert not triton_kernel.works(GPU)
    triton_kernel.works.cache_clear()
    monkeypatch.undo()
    launch = triton_kernel.launch_
    monkeypatch.setattr(
        triton_kernel, "launch_", lambda totals, *rest, **each: (launch(totals, *rest, **each), totals.nll.add_(1e-3))
    )
    with pytest.warns(UserWarning, match="counts other nll than torch; torch's operations judge"):
        assert not triton_kernel.works(GPU)
    triton_kernel.works.cache_clear()
    monkeypatch.undo()
    assert triton_kernel.works(GPU)
    triton_kernel.works.cache_clear()


_COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dacal_addon.metrics.triton_kernel import _count

usual = dict(kind=0, allowed=1e-3, one_channel=False, normalize=False, reduced=False, in_region=False, ignored_count=1,
             each=False, classwise=False, uniform=2055.0, fine=4096, copies=16, block=256)
kinds = {**dict.fromkeys(("predicted", "label", "ignored", "counts"), "*i64"), "scores": "*fp16", "region": "*u8",
         "losses": "*fp64", "scale": "fp32"}
usual.update(images=1, label_s=1, scores_s=1)  # whole numbers that are 1 are compiled in
several = ((80, dict(classwise=True)), (90, dict(kind=1, normalize=True, in_region=True, one_channel=True, region_s=1)),
           (90, dict(kind=2, reduced=True, each=True, pixels=1, scores_c=1)), (90, dict(kind=3, predicted_s=1)))
kinds.update(pixels="i64", scores_n="i64", scores_c="i64")  # as those from 2^31 on
for capability, other in several:
    constants = {**usual, **other}
    constants.pop("images") if constants["each"] else None
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in _count.arg_names}
    source = ASTSource(fn=_count, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    text = made.asm["ptx"]
    assert made.asm["cubin"]
    assert "add.u64" in text and "add.f32" not in text and "add.rn.f32" not in text, other
print("compiled")
"""


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    """The interpreter takes more than the compiler does: other kinds of constants, annotations."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("TRITON_INTERPRET", None)
    (tmp_path / "ahead.py").write_text(_COMPILE)
    run = subprocess.run([sys.executable, str(tmp_path / "ahead.py")], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "compiled", run.stderr
