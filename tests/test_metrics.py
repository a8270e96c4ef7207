"""The metrics against definitions computed pixel by pixel in float64, and what the class promises about its counts."""

import copy
import importlib.util
import io
import math
import pickle

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import flat, predictions, top
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, log_loss

from dacal_addon import metrics
from dacal_addon.metrics import CalibrationStats, backends, boundary_mask

seeds = st.integers(0, 10**6)
NEEDS_COMPILE = pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile needs torch >= 2.0")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EXACT = ["ece", "mce", "nll", "brier", "accuracy", "miou", "mean_confidence"]
ORDERED = ["ks", "smece", "aurc"]


@pytest.fixture(autouse=True, scope="module", params=["torch", "numba"] if importlib.util.find_spec("numba") else ["torch"])
def _judged_by(request):
    """Everything here is true of whatever judges the pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_WORTH_LOADING", 0 if request.param == "numba" else math.inf)
        yield


def counted(z, target, region=None, **options):
    stats = CalibrationStats(z.shape[1], input="logits", **options)
    stats.update(z, target, region)
    return stats


def two_class(confidences):
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p]).view(1, 2, 1, -1)


def as_input(z, kind):
    return {"logits": z, "probs": torch.softmax(z.double(), 1), "log_probs": torch.log_softmax(z.double(), 1)}[kind]


def figures(stats):
    values = [getattr(stats, name)() for name in EXACT + ORDERED]
    return [*values, stats.ece(binning="mass"), stats.ece(norm="l2", debias=True)]


# Definitions


@settings(max_examples=40, deadline=None)
@given(
    seeds,
    st.integers(1, 30),
    st.integers(2, 150),
    st.sampled_from(DTYPES),
    st.sampled_from(["logits", "probs", "log_probs"]),
    st.sampled_from([(30,), (5, 6), (2, 3, 5)]),
)
def test_everything_exact_equals_brute_force(seed, n_bins, classes, dtype, kind, size):
    z, target = predictions(seed, (2, classes, *size), dtype=dtype)
    p, y = flat(z, target)
    stats = CalibrationStats(classes, input=kind, n_bins=n_bins, classwise=True)
    stats.update(as_input(z, kind), target)
    for norm, debias in (("l1", False), ("l2", False), ("l2", True), ("max", False)):
        expected = oracles.width_ece(p, y, n_bins, norm=norm, debias=debias)
        assert stats.ece(norm=norm, debias=debias) == pytest.approx(expected, abs=1e-9)
    assert stats.mce() == stats.ece(norm="max")
    by_class = oracles.classwise(p, y, n_bins)
    assert stats.classwise_ece(None).numpy() == pytest.approx(by_class, abs=1e-9)
    assert stats.classwise_ece() == pytest.approx(by_class.mean(), abs=1e-9)
    assert stats.classwise_ece("prevalence") == pytest.approx(by_class[y].mean(), abs=1e-9)
    assert stats.brier() == pytest.approx(oracles.brier(p, y), abs=1e-9)
    assert stats.nll() == pytest.approx(log_loss(y, p, labels=range(classes)), abs=1e-9)
    assert stats.mean_confidence() == pytest.approx(p.max(1).mean(), abs=1e-9)
    predicted = z.double().argmax(1).numpy()[target.numpy() != 255]
    assert stats.accuracy() == pytest.approx(accuracy_score(y, predicted), abs=1e-12)
    assert stats.miou() == pytest.approx(jaccard_score(y, predicted, average="macro", zero_division=0), abs=1e-12)
    assert (stats.confusion().numpy() == confusion_matrix(y, predicted, labels=range(classes))).all()
    assert stats.pixels == len(y)
    assert stats.ignored_pixels == target.numel() - len(y)
    assert stats.class_pixels().tolist() == np.bincount(y, minlength=classes).tolist()
    of_class = [p.max(1)[predicted == c].mean() if (predicted == c).any() else math.nan for c in range(classes)]
    assert stats.predicted_confidence().numpy() == pytest.approx(of_class, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("saturated", [False, True])
def test_what_needs_an_order_is_within_a_cell_of_the_definition(saturated):
    """Also with a third of the confidences equal to 1 in float32, where equal steps of confidence would not tell them apart."""
    z, target = predictions(1, (1, 5, 300, 400), sharpness=3.0, ignored=0.1)
    if saturated:
        z[:, 0, :150] += 21
    p, y = flat(z.float(), target)
    confidence, right = top(p, y)
    stats = counted(z.float(), target, classwise=True)
    assert not saturated or 0.2 < (confidence.astype(np.float32) == 1).mean() < 0.5
    assert stats.ks() == pytest.approx(oracles.ks(confidence, right), rel=1e-3)
    assert stats.aurc() == pytest.approx(oracles.aurc(confidence, right), rel=1e-3)
    assert stats.ece(binning="mass") == pytest.approx(oracles.mass_ece(confidence, right), rel=1e-3)
    assert stats.ece(binning="mass", norm="l2") == pytest.approx(oracles.mass_ece(confidence, right, norm="l2"), rel=1e-3)
    some = slice(None, None, 40)
    few = CalibrationStats(5, input="probs")
    few.update(p[some].T.reshape(1, 5, 1, -1), y[some].reshape(1, 1, -1))
    expected = oracles.smooth_ece(confidence[some], right[some], points=600)
    assert few.smece() == pytest.approx(expected, rel=2e-3)
    expected = oracles.classwise(p, y, error=oracles.mass_ece)
    assert stats.classwise_ece(None, binning="mass").numpy() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("classes", "sharpness", "fine_bins", "cell"), [(19, 3.0, 4096, 5e-4), (150, 0.3, 4096, 5e-4), (150, 0.3, 65536, 2e-4)]
)
def test_small_errors_of_calibrated_predictions(classes, sharpness, fine_bins, cell):
    """Labels drawn from the probabilities: what is left is sampling noise, at confidences down to 1 / C, in a few cells."""
    z, _ = predictions(3, (1, classes, 200, 300), sharpness=sharpness)
    p = torch.softmax(z[0].flatten(1).T, 1)
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1)).view(1, 200, 300)
    stats = counted(z, y, fine_bins=fine_bins)
    confidence, right = top(*flat(z, y))
    assert stats.ks() == pytest.approx(oracles.ks(confidence, right), abs=cell)
    assert stats.ece(binning="mass") == pytest.approx(oracles.mass_ece(confidence, right), abs=cell)
    assert stats.aurc() == pytest.approx(oracles.aurc(confidence, right), abs=cell)


def test_equal_confidences_are_in_no_order():
    """AURC is the mean over all orders; equal-mass bins share them, so that a permutation changes nothing."""
    confidence = np.repeat([0.95, 0.7, 0.55], [4, 7, 3])
    right = np.array([1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0])
    stats = []
    for order in (np.arange(14), np.random.default_rng(1).permutation(14)):
        one = CalibrationStats(2, input="probs", n_bins=4)
        one.update(two_class(confidence[order]), (1 - right[order]).reshape(1, 1, -1))
        stats.append(one)
    assert stats[0].ece(binning="mass") == pytest.approx(stats[1].ece(binning="mass"), abs=1e-12)
    assert stats[0].aurc() == pytest.approx(stats[1].aurc(), abs=1e-12)
    assert stats[0].aurc() == pytest.approx(oracles.aurc(confidence, right, draws=20_000), abs=1e-3)
    # 3.5 pixels a bin: 3 x 0.55 (1 right) and half a pixel of 0.7, of which 4/7 are right; and so on.
    gaps = [1 + 0.5 * 4 / 7 - 1.65 - 0.35, 3.5 * (4 / 7 - 0.7), 3 * (4 / 7 - 0.7) + 0.5 * (0.75 - 0.95), 3.5 * (0.75 - 0.95)]
    assert stats[0].ece(binning="mass") == pytest.approx(sum(map(abs, gaps)) / 14, abs=1e-12)


def test_equal_scores_are_predicted_as_argmax_does():
    z = torch.zeros(1, 3, 1, 4)
    z[0, 1:, 0, 2:] = 1.0
    stats = counted(z, torch.tensor([[[0, 1, 1, 2]]]))
    assert stats.confusion().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_bins_are_closed_on_the_right():
    x = two_class([0.5, 0.6, 0.75, 1.0])
    table = metrics.reliability(x, torch.zeros(1, 1, 4).long(), input="probs", n_bins=4)
    assert table.pixels.tolist() == [0, 1, 2, 1]
    assert (table.lower.tolist(), table.upper.tolist()) == ([0, 0.25, 0.5, 0.75], [0.25, 0.5, 0.75, 1])


def test_every_edge_belongs_to_the_lower_bin():
    """Also where k / n times n is more than k in float64, as 14 / 25 x 25 is."""
    for n_bins in range(2, 60):
        k = np.arange(-(-n_bins // 2), n_bins + 1)  # the larger of two probabilities
        table = metrics.reliability(two_class(k / n_bins), torch.zeros(1, 1, len(k)).long(), input="probs", n_bins=n_bins)
        assert table.pixels[k - 1].tolist() == [1] * len(k), n_bins


@pytest.mark.parametrize("classes", range(2, 16))
def test_a_confidence_on_an_edge_stays_there_however_it_is_computed(classes):
    """Equal logits have confidence 1 / C, an edge of 15 bins for C = 3, 5, 15, up to rounding."""
    z = torch.full((1, classes, 1, 1), 0.1)
    for n_bins in (classes, 15):
        table = metrics.reliability(z, torch.zeros(1, 1, 1).long(), input="logits", n_bins=n_bins)
        assert int(table.pixels.argmax()) == math.ceil(round(n_bins / classes, 9)) - 1


def test_the_diagram_equals_scikit_learns():
    z, target = predictions(5, shape=(3, 4, 30, 30))
    confidence, right = top(*flat(z, target))
    table = metrics.reliability(z, target, input="logits", n_bins=10)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    filled = table.pixels > 0
    assert table.accuracy[filled].numpy() == pytest.approx(accuracy, abs=1e-12)
    assert table.confidence[filled].numpy() == pytest.approx(mean, abs=1e-12)
    assert torch.isnan(table.accuracy[~filled]).all()


def test_tables_of_equal_mass_and_of_one_class():
    z, target = predictions(5, shape=(3, 4, 60, 60))
    p, y = flat(z, target)
    stats = counted(z, target, n_bins=5, classwise=True)
    table = stats.reliability(binning="mass")
    assert table.pixels.numpy() == pytest.approx(len(y) / 5)
    assert table.upper[:-1].numpy() == pytest.approx(np.quantile(p.max(1), [0.2, 0.4, 0.6, 0.8]), abs=2e-3)
    assert (table.lower[1:] == table.upper[:-1]).all()
    table = stats.reliability(of_class=2)
    inside = list(oracles.width_members(p[:, 2], 5))
    assert table.pixels.tolist() == [int(x.sum()) for x in inside]
    assert table.accuracy.numpy() == pytest.approx([(y[x] == 2).mean() for x in inside], abs=1e-12)
    assert table.confidence.numpy() == pytest.approx([p[x, 2].mean() for x in inside], abs=1e-12)


def test_known_values():
    x, target = two_class([0.9, 0.9, 0.6, 0.6]), torch.tensor([[[0, 1, 0, 0]]])
    assert metrics.ece(x, target, input="probs") == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert metrics.ece(x, target, input="probs", norm="l2") == pytest.approx(0.4)
    # The bin at 0.9 is half right: variance 1/4 over one degree of freedom.
    assert metrics.ece(x, target, input="probs", norm="l2", debias=True) == pytest.approx(
        math.sqrt(0.5 * (0.16 - 0.25) + 0.5 * 0.16)
    )
    assert metrics.nll(x, target, input="probs") == pytest.approx(-(np.log(0.9) + np.log(0.1) + 2 * np.log(0.6)) / 4)
    assert metrics.brier(x, target, input="probs") == pytest.approx((0.02 + 1.62 + 2 * 0.32) / 4)
    assert metrics.miou(x, target, input="probs") == pytest.approx((3 / 4 + 0) / 2)
    assert metrics.accuracy(x, target, input="probs") == 3 / 4
    assert metrics.mean_confidence(x, target, input="probs") == pytest.approx(3 / 4)
    assert metrics.ks(x, target, input="probs") == pytest.approx(0.2)
    assert metrics.aurc(x, target, input="probs") == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


@pytest.mark.parametrize("gap", [0.3, 0.02, 0.001])
def test_smece_of_one_confidence_is_its_gap(gap):
    stats = CalibrationStats(2, input="top1")
    right = np.arange(10_000) < round(10_000 * (0.6 - gap))
    stats.update((np.full((1, 1, 10_000), 0.6), np.zeros((1, 1, 10_000), int)), np.where(right, 0, 1).reshape(1, 1, -1))
    assert stats.smece() == pytest.approx(gap, rel=1e-3)


def test_a_true_class_of_probability_zero_costs_infinitely_much():
    assert metrics.nll(two_class([1.0]), torch.ones(1, 1, 1).long(), input="probs") == math.inf
    # but not where it is ignored
    x, target = two_class([1.0, 0.5]), torch.tensor([[[255, 1]]])
    assert metrics.nll(x, target, input="probs") == pytest.approx(math.log(2))


def test_nothing_valid_gives_nan():
    z, target = predictions()
    stats = counted(z, torch.full_like(target, 255), classwise=True, per_image=True)
    assert all(math.isnan(value) for value in figures(stats))
    assert math.isnan(stats.classwise_ece())
    assert torch.isnan(stats.classwise_ece(None)).all()
    assert math.isnan(stats.ece(reduce="image_mean"))
    assert math.isnan(stats.bootstrap("accuracy", replicates=3).low)
    assert (stats.pixels, stats.images) == (0, 3)
    assert stats.reliability(binning="mass").pixels.tolist() == [0.0] * 15


def test_the_functions_options_are_the_methods():
    """Without options: `test_metrics_catalogue`."""
    z, target = predictions(3, (3, 4, 9, 11))
    stats = counted(z, target, n_bins=7, classwise=True, per_image=True)
    options = {"input": "logits", "n_bins": 7}
    assert metrics.ece(z, target, binning="mass", norm="l2", **options) == pytest.approx(
        stats.ece(binning="mass", norm="l2"), abs=1e-12
    )
    assert metrics.ece(z, target, reduce="image_mean", **options) == pytest.approx(stats.ece(reduce="image_mean"), abs=1e-12)
    assert metrics.mce(z, target, **options) == pytest.approx(stats.mce(), abs=1e-12)
    assert metrics.classwise_ece(z, target, average="prevalence", **options) == pytest.approx(
        stats.classwise_ece("prevalence"), abs=1e-12
    )


# Counts: any split, order, layout, precision


@settings(max_examples=30, deadline=None)
@given(seeds, st.data())
def test_batches_their_order_and_merges_do_not_matter(seed, data):
    z, target = predictions(seed, (7, 5, 4, 6), dtype=data.draw(st.sampled_from(DTYPES)))
    options = {"classwise": True, "per_image": True}
    whole = counted(z, target, **options)
    order = data.draw(st.permutations(range(7)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 6))))
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, 7]):
        chosen = list(order[begin:end])
        parts.append(counted(z[chosen], target[chosen], **options))
    while len(parts) > 1:  # any tree of merges
        one = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(one)
    got, expected = parts[0].state_dict()["totals"], whole.state_dict()["totals"]
    for name, value in expected.items():
        if value.dtype == torch.int64:
            assert torch.equal(got[name], value), name
        else:
            assert got[name].numpy() == pytest.approx(value.numpy(), abs=1e-9), name
    assert figures(parts[0]) == pytest.approx(figures(whole), abs=1e-9)
    assert parts[0].ece(reduce="image_mean") == pytest.approx(whole.ece(reduce="image_mean"), abs=1e-9)


def test_pieces_cover_every_shape(monkeypatch):
    """Images larger and smaller than a piece, rows wider than one, and a single pixel."""
    from dacal_addon.metrics import pixels

    for shape in [
        (3, 4, 50, 70),
        (9, 4, 7, 11),
        (2, 4, 1, 5000),
        (2, 4, 5000, 1),
        (1, 4, 1, 1),
        (0, 4, 5, 5),
        (2, 4, 0, 3),
        (2, 4, 3, 0),
        (5, 4, 90),
        (2, 4, 600),
        (2, 4, 3, 20, 30),
        (7, 4, 5, 2, 3),
        (2, 4, 3, 2, 5, 300),
    ]:
        n, size = shape[0], shape[2:]
        whole = predictions(2, (max(1, n), shape[1], *(max(1, extent) for extent in size)))
        z, target = (x[:n][(..., *(slice(extent) for extent in size))] for x in whole)
        monkeypatch.setitem(pixels._ELEMENTS, "cpu", 10**6)
        expected = counted(z, target, classwise=True)
        monkeypatch.setitem(pixels._ELEMENTS, "cpu", 1)  # 256 pixels
        got = counted(z, target, classwise=True)
        assert (got.pixels, got.images) == (int((target != 255).sum()), shape[0])
        assert figures(got) == pytest.approx(figures(expected), abs=1e-9, nan_ok=True)


def test_channels_last():
    z, target = predictions(4, (3, 4, 7, 9), dtype=torch.float32)
    stats = CalibrationStats(4, input="logits", channels_last=True)
    for x in (z.permute(0, 2, 3, 1), z.permute(0, 2, 3, 1).contiguous(), z.permute(0, 2, 3, 1).numpy()):
        stats.reset()
        stats.update(x, target)
        assert figures(stats) == pytest.approx(figures(counted(z, target)), abs=1e-12)
    assert metrics.miou(x, target, input="logits", channels_last=True) == stats.miou()


LAYOUTS = {
    "channels last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "a slice": lambda z: torch.cat([z, z], 3)[..., : z.shape[3]],
    "every second": lambda z: torch.repeat_interleave(z, 2, 3)[..., ::2],
    "transposed": lambda z: z.transpose(2, 3).contiguous().transpose(2, 3),
    "numpy": lambda z: z.numpy(),
    "numpy, backwards": lambda z: z.flip(2).numpy()[:, :, ::-1],
    "numpy, big-endian": lambda z: z.numpy().astype(">f4"),
    "with a graph": lambda z: z.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    z, target = predictions(4, (3, 4, 40, 50), dtype=torch.float32)
    before = copy.deepcopy(LAYOUTS[layout](z))
    given_ = LAYOUTS[layout](z)
    stats = counted(given_, target.numpy().astype("uint16") if "numpy" in layout else target.to(torch.uint8))
    assert figures(stats) == pytest.approx(figures(counted(z, target)), abs=1e-12)
    assert (
        np.asarray(before.detach() if isinstance(before, torch.Tensor) else before)
        == np.asarray(given_.detach() if isinstance(given_, torch.Tensor) else given_)
    ).all()


def test_a_file_mapped_read_only(tmp_path):
    z, target = predictions(4, (1, 4, 40, 50), dtype=torch.float16)
    np.save(tmp_path / "z.npy", z.numpy())
    stats = counted(np.load(tmp_path / "z.npy", mmap_mode="r"), target)
    assert figures(stats) == figures(counted(z, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["probs", "log_probs"])
def test_rounded_probabilities_are_accepted(dtype, kind):
    z, target = predictions(0, (2, 150, 20, 20), dtype=torch.float32)
    x = (torch.softmax(z, 1) if kind == "probs" else torch.log_softmax(z, 1)).to(dtype)
    assert metrics.ece(x, target, input=kind) == pytest.approx(metrics.ece(z, target, input="logits"), abs=0.02)


def test_more_pixels_than_float32_can_count():
    """2^25 + pixels of confidence 0.7 and accuracy 0.7: a count in float32 sticks at 2^24."""
    n = (1 << 25) + 4
    x = torch.tensor([0.7, 0.3], dtype=torch.float64).log().view(1, 2, 1, 1).expand(1, 2, 4, n // 4)
    target = (torch.arange(n) % 10 >= 7).to(torch.uint8).view(1, 4, n // 4)
    stats = CalibrationStats(2, input="log_probs")
    stats.update(x, target)
    assert stats.pixels == n
    right = int((target == 0).sum())
    assert stats.ece() == pytest.approx(abs(right / n - 0.7), abs=1e-9)
    assert stats.accuracy() == right / n
    in_float32 = torch.zeros(1).scatter_add_(0, torch.zeros(n, dtype=torch.int64), torch.ones(n))
    assert float(in_float32) == 1 << 24


def test_many_pixels_of_one_batch_are_summed_in_parts():
    """Two million equal confidences in a single sum are off by 5e-11 of it here, and 268 million by 3e-8."""
    n = 1 << 21
    x = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 4, n // 4)
    stats = CalibrationStats(3, input="logits", classwise=True)
    stats.update(x, torch.zeros(1, 1, 1).long().expand(1, 4, n // 4))
    p = torch.softmax(x[0, :, 0, 0], 0).tolist()
    assert stats.mean_confidence() == pytest.approx(p[0], rel=1.2e-11)
    assert float(stats.predicted_confidence()[0]) == pytest.approx(p[0], rel=1.2e-11)
    tables = [stats.reliability(of_class=c) for c in range(3)]
    assert [float(table.confidence[table.pixels > 0]) for table in tables] == pytest.approx(p, rel=1.2e-11)


@NEEDS_COMPILE  # and the dispatch mode too
def test_nothing_large_is_made():
    """No operation on 19 x 512 x 1024 logits returns more than a few pieces."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
                largest[0] = max(largest[0], result.numel())
            return result

    z, target = torch.randn(2, 19, 512, 1024), torch.zeros(2, 512, 1024, dtype=torch.uint8)
    for x in (z, z.half(), z.contiguous(memory_format=torch.channels_last), z[..., 1:]):
        inputs = {tensor.untyped_storage().data_ptr() for tensor in (x, target)}
        with Watch():
            counted(x, target[..., : x.shape[3]])
    assert 0 < largest[0] <= 850_000


def test_what_is_ignored_may_be_anything():
    z, target = predictions(7)
    expected = figures(counted(z, target))
    spoilt = z.clone()
    for value in (math.nan, math.inf, -math.inf):
        spoilt[(target == 255).unsqueeze(1).expand_as(z)] = value
        assert figures(counted(spoilt, target)) == expected
    region = target != 255
    everywhere = torch.where(region, target, torch.full_like(target, 99))
    assert figures(counted(spoilt, everywhere, region)) == expected
    p = torch.softmax(z, 1)
    p[(target == 255).unsqueeze(1).expand_as(z)] = math.nan
    stats = CalibrationStats(4, input="probs")
    stats.update(p, target)
    assert figures(stats) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sets(st.sampled_from([0, 1, 3, 4, -1, 255]), min_size=1))
def test_ignored_labels_do_not_count_and_ignored_classes_are_in_no_mean(seed, ignored):
    z, target = predictions(seed, (2, 5, 6, 7), ignored=0.0)
    target[0, :2, :2] = next(iter(ignored))
    stats = counted(z, target, ignore_index=tuple(sorted(ignored)), classwise=True, per_image=True)
    valid = ~torch.tensor(np.isin(target.numpy(), list(ignored)))
    p, y = flat(z, torch.where(valid, target, torch.full_like(target, 255)))
    assert (stats.pixels, stats.ignored_pixels) == (len(y), target.numel() - len(y))
    assert stats.accuracy() == pytest.approx((p.argmax(1) == y).mean(), abs=1e-12)
    assert stats.nll() == pytest.approx(log_loss(y, p, labels=range(5)), abs=1e-9)
    classes = [c for c in range(5) if c not in ignored]
    assert stats.ignored_classes == tuple(sorted(set(range(5)) & ignored))
    own = [((p.argmax(1) == c) & (y == c)).sum() / ((p.argmax(1) == c) | (y == c)).sum() for c in classes]
    assert stats.iou()[classes].numpy() == pytest.approx(own, abs=1e-12)
    assert torch.isnan(stats.iou()[list(stats.ignored_classes)]).all()
    assert stats.miou() == pytest.approx(np.mean(own), abs=1e-12)
    assert stats.bootstrap("miou", replicates=2).estimate == stats.miou()
    errors = oracles.classwise(p, y)
    assert stats.classwise_ece(None)[classes].numpy() == pytest.approx(errors[classes], abs=1e-9)
    assert torch.isnan(stats.classwise_ece(None)[list(stats.ignored_classes)]).all()
    assert stats.classwise_ece() == pytest.approx(errors[classes].mean(), abs=1e-9)
    assert stats.classwise_ece("prevalence") == pytest.approx(errors[y].mean(), abs=1e-9)


def test_255_may_be_a_class():
    target = torch.arange(300).view(1, 15, 20)
    with pytest.warns(UserWarning, match="255 is a class here, of 300, and counts; pass ignore_index"):
        stats = CalibrationStats(300, input="logits", per_image=True)
    stats.update(torch.zeros(1, 300, 15, 20), target)
    assert (stats.pixels, stats.ignored_pixels, stats.ignore_index) == (300, 0, ())
    assert int(stats.confusion()[255].sum()) == 1
    assert stats.bootstrap(lambda one: one.pixels, replicates=2).low == 300
    for said in (-1, 255):  # and no warning
        assert counted(torch.zeros(1, 300, 15, 20), target, ignore_index=said).pixels == 300 - (said == 255)
    assert CalibrationStats(255, input="logits").ignore_index == (255,)
    with pytest.warns(UserWarning, match="255 is a class"):
        CalibrationStats(255, input="logits", reduce_zero_label=True)


def test_labels_from_one_on():
    """As in ADE20K's files: 0 is nothing, k is class k - 1, and 255 stays what it is."""
    z, target = predictions(7, (2, 4, 9, 8))
    raw = torch.where(target == 255, target, target + 1)
    raw[0, 0] = 0
    target[0, 0] = 255
    for ignored in (None, (255, 3), 0):
        shift = torch.where(raw == 255, torch.zeros_like(raw), raw) if ignored == 0 else raw
        stats = counted(z, shift.to(torch.uint8), ignore_index=ignored, reduce_zero_label=True)
        expected = counted(z, target)
        if ignored == (255, 3):
            expected = counted(z, target, ignore_index=(255, 2))
        assert figures(stats) == figures(expected)
        assert (stats.ignored_classes, stats.ignored_pixels) == (expected.ignored_classes, expected.ignored_pixels)
        assert torch.equal(stats.confusion(), expected.confusion())
    with pytest.raises(ValueError, match=r"target: classes 1..4 or ignore_index=255, got the value 5"):
        counted(z, torch.full_like(raw, 5), reduce_zero_label=True)


def test_one_sigmoid_channel_is_a_softmax_of_two():
    g = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(3, 1, 4, 5, 6, generator=g, dtype=torch.float64)
    target = torch.randint(0, 2, (3, 4, 5, 6), generator=g)
    target[0, 0] = 255
    p, y = torch.sigmoid(z[:, 0])[target != 255].numpy(), target[target != 255].numpy()
    for kind, x in (("logits", z), ("probs", torch.sigmoid(z))):
        stats = CalibrationStats(2, input=kind, one_channel=True, classwise=True)
        stats.update(x, target)
        assert stats.nll() == pytest.approx(-np.where(y == 1, np.log(p), np.log(1 - p)).mean(), abs=1e-12)
        assert stats.brier() == pytest.approx(2 * ((p - y) ** 2).mean(), abs=1e-12)
        assert stats.accuracy() == ((p > 0.5) == y).mean()
        assert stats.iou()[1] == ((p > 0.5) & (y == 1)).sum() / ((p > 0.5) | (y == 1)).sum()
        assert stats.classwise_ece(None)[1] == pytest.approx(oracles.binned(p, y, oracles.width_members(p, 15)), abs=1e-12)
        assert metrics.ece(x, target, input=kind, one_channel=True) == stats.ece()
    last = CalibrationStats(2, input="logits", one_channel=True, channels_last=True)
    last.update(z.permute(0, 2, 3, 4, 1), target)
    assert figures(last) == figures(counted(torch.cat([torch.zeros_like(z), z], 1), target))


def test_one_channel_in_half_precision_is_exact():
    p = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(0)).bfloat16().sigmoid()
    target = torch.randint(0, 2, (2, 16, 24), generator=torch.Generator().manual_seed(1))
    stats = CalibrationStats(2, input="probs", one_channel=True)
    stats.update(p, target)
    right = torch.where(target == 1, p[:, 0].double(), 1 - p[:, 0].double())
    assert stats.brier() == pytest.approx(float((2 * (1 - right) ** 2).mean()), abs=1e-12)
    assert stats.nll() == pytest.approx(float(-right.log().mean()), abs=1e-12)


def test_masked_classes_have_probability_zero():
    """Logits of -infinity: as if there were no such class, and infinitely bad where it is the label."""
    z, target = predictions(5, (2, 6, 7, 8))
    z[:, 4:] = -math.inf
    without = torch.where((target == 4) | (target == 5), torch.full_like(target, 255), target)
    stats, expected = counted(z, without), counted(z[:, :4], without)
    assert [stats.ece(), stats.nll(), stats.brier(), stats.ks()] == pytest.approx(
        [expected.ece(), expected.nll(), expected.brier(), expected.ks()], abs=1e-12
    )
    assert counted(z, target).nll() == math.inf
    p, y = flat(z, target)
    assert counted(z, target).brier() == pytest.approx(oracles.brier(p, y), abs=1e-12)
    huge = torch.full((1, 3, 1, 1), 3e38)  # whose sum is infinite
    assert counted(huge, torch.zeros(1, 1, 1).long()).mean_confidence() == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(9,), (8, 12), (4, 6, 8)])
def test_scores_of_another_resolution(size, dtype):
    """Linear interpolation with the corners' edges aligned, written out: half of a pixel is outside at either end."""
    small = tuple(-(-extent // 2) for extent in size)
    z, _ = predictions(2, (3, 4, *small), dtype=dtype)
    _, target = predictions(3, (3, 4, *size))
    large = z.double() if dtype == torch.float64 else z.float().double()
    for axis, (have, want) in enumerate(zip(small, size), 2):
        at = np.clip((np.arange(want) + 0.5) * have / want - 0.5, 0, None)
        low = np.minimum(at.astype(int), have - 1)
        high = np.minimum(low + 1, have - 1)
        share = torch.tensor(at - low).view(-1, *[1] * (large.dim() - axis - 1))
        large = large.index_select(axis, torch.tensor(low)) * (1 - share) + large.index_select(axis, torch.tensor(high)) * share
    for per_image in (False, True):
        stats = CalibrationStats(4, input="logits", per_image=per_image)
        stats.update(z, target, interpolate=True)
        assert stats.nll() == pytest.approx(counted(large, target).nll(), rel=1e-9 if dtype == torch.float64 else 1e-6)
        assert (stats.images, stats.pixels) == (3, int((target != 255).sum()))
    p = CalibrationStats(4, input="probs")
    p.update(torch.softmax(z.double(), 1), target, interpolate=True)
    assert 0 < abs(p.brier() - stats.brier()) < 0.5
    if len(size) == 2:
        with pytest.raises(ValueError, match=r"height and width are swapped in one of them: x.transpose\(-1, -2\)"):
            stats.update(large.transpose(-1, -2), target, interpolate=True)


def test_a_masked_class_stays_masked_when_logits_are_interpolated():
    logits = torch.tensor([[2.0, 0.0, 5.0]]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    masked = logits.clone()
    masked[:, 2, :, 0] = -math.inf  # next to finite ones, and under the weight 0
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    stats = CalibrationStats(3, input="logits")
    stats.update(masked, target, interpolate=True)
    alone = 1 / (1 + math.exp(-2.0))  # of the two classes that are left
    all_three = math.exp(5) / (math.exp(5) + math.exp(2) + 1)
    assert stats.mean_confidence() == pytest.approx((3 * alone + all_three) / 4, abs=1e-6)


def test_rounded_probabilities_are_normalised_on_request():
    z, target = predictions(4, (2, 19, 20, 30), sharpness=1.0)
    rounded = torch.softmax(z, 1).bfloat16().float()
    assert 1.2e-3 < float((rounded.sum(1) - 1).abs().max()) < 0.1
    stats = CalibrationStats(19, input="probs")
    with pytest.raises(
        ValueError, match=r"sums off by up to 0.0\d+; if rounding did that \(bfloat16 leaves 1e-2\), pass normalize"
    ):
        stats.update(rounded, target)
    for scale in (1.0, 255.0):  # or 8-bit scores
        stats.reset()
        stats.update(scale * rounded, target, normalize=True)
        p, y = flat(rounded.double().log(), target)
        assert stats.ece() == pytest.approx(oracles.width_ece(p, y), abs=1e-9)
        assert stats.brier() == pytest.approx(oracles.brier(p, y), abs=1e-9)
    rounded[0, :, 3, 3], target[0, 3, 3] = 0.0, 1
    for value, named in ((0.0, "only zeros"), (math.inf, "infinity")):
        rounded[0, 2, 3, 3] = value
        with pytest.raises(ValueError, match=f"got {named}; neither can be divided by its sum"):
            stats.update(rounded, target, normalize=True)
    rounded[0, 2, 3, 3] = math.nan
    with pytest.raises(ValueError, match=r"got NaN in image 0 at \(3, 3\); look for a division by zero"):
        stats.update(rounded, target, normalize=True)


@pytest.mark.parametrize("kind", ["logits", "probs", "log_probs", "top1"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_found_where_it_is(kind, value):
    """The first in the order of the arrays, of those that count, whatever the pieces are that are judged at once."""
    z, target = predictions(4, (3, 5, 6, 70), dtype=torch.float32, ignored=0.1)
    stats = CalibrationStats(5, input=kind)
    p = z.softmax(1)
    x = {"logits": z, "probs": p, "log_probs": p.log(), "top1": p.amax(1)}[kind].clone()
    region = torch.ones(target.shape, dtype=torch.bool)
    for image, row, column in ((2, 0, 0), (1, 5, 3), (1, 2, 69), (1, 2, 68), (0, 4, 4), (0, 3, 3)):
        target[image, row, column] = 1
        x[(image, row, column) if kind == "top1" else (image, 3, row, column)] = value
    target[0, 3, 3], region[0, 4, 4] = 255, False
    given = (x, target) if kind == "top1" else x
    named = "NaN" if value != value else "infinity"
    told = rf"got {named} in image 1 at \(2, 68\); "
    if named == "infinity" and kind != "logits":
        told = "got inf; divide" if kind == "top1" else "got sums off by up to inf"
    with pytest.raises(ValueError, match=told):
        stats.update(given, target, region)
    assert stats.pixels == 0
    one = (x[1:2], target[1:2]) if kind == "top1" else x[1:2]
    with pytest.raises(ValueError, match=told.replace(" in image 1", "")):
        stats.update(one, target[1:2])


def test_logarithms_are_no_probabilities_that_could_be_normalised():
    """Divided by their sum, which is negative too, they are in 0..1 and sum to 1, and the most probable class is the least."""
    z, target = predictions(4, (2, 5, 6, 7), sharpness=1.0)
    log_p = torch.log_softmax(z, 1)
    stats = CalibrationStats(5, input="probs")
    with pytest.raises(ValueError, match=r"got a value of -\d+.*; pass input='log_probs' if they are logarithms"):
        stats.update(log_p, target, normalize=True)
    mixed = torch.softmax(z, 1)
    mixed[1, 2, 3, 4], target[1, 3, 4] = -0.25, 0
    with pytest.raises(ValueError, match=r"got a value of -0\.25; pass input='logits' if they are logits"):
        stats.update(mixed, target, normalize=True)
    assert stats.pixels == 0
    target[1, 3, 4] = 255  # where it does not count
    stats.update(mixed, target, normalize=True)
    assert stats.pixels == int((target != 255).sum())


def test_only_confidence_and_class():
    z, target = predictions(8, (2, 4, 30, 40))
    expected = counted(z, target, per_image=True)
    confidence, prediction = torch.softmax(z, 1).max(1)
    stats = CalibrationStats(4, input="top1", per_image=True)
    for i in range(2):
        stats.update((confidence[i : i + 1], prediction[i : i + 1].numpy()), target[i : i + 1])
    for name in ["ece", "mce", "accuracy", "miou", "mean_confidence", *ORDERED]:
        assert getattr(stats, name)() == pytest.approx(getattr(expected, name)(), abs=1e-12)
    assert stats.ece(reduce="image_mean") == pytest.approx(expected.ece(reduce="image_mean"), abs=1e-12)
    for name in ("nll", "brier"):
        with pytest.raises(RuntimeError, match=rf"{name}: expected the probability of every class, got input='top1'"):
            getattr(stats, name)()


@NEEDS_COMPILE
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on loading its compiler
@pytest.mark.parametrize("kind", ["logits", "probs", "log_probs"])
def test_compiled_is_the_same(kind):
    z, target = predictions(9, (2, 5, 150, 200), dtype=torch.float32)
    target[0, :10], z[0, 1, :5] = 255, math.nan
    expected, stats = (CalibrationStats(5, input=kind, backend=backend) for backend in ("torch", "compile"))
    for one in (expected, stats):
        one.update(as_input(z, kind), target)
    assert figures(stats) == pytest.approx(figures(expected), abs=1e-9)
    with pytest.raises(ValueError, match=r"finite|sum to 1"):
        stats.update(as_input(z, kind), torch.zeros_like(target))


# Images


def test_image_mean_and_bootstrap():
    z, target = predictions(10, (6, 3, 8, 9))
    target[4] = 255  # no valid pixel
    stats = counted(z, target, per_image=True)
    own = [metrics.ece(z[i : i + 1], target[i : i + 1], input="logits") for i in range(6) if i != 4]
    assert stats.ece(reduce="image_mean") == pytest.approx(np.mean(own), abs=1e-12)
    result = stats.bootstrap("ece", norm="l2", replicates=60, level=0.8, generator=torch.Generator().manual_seed(3))
    picks, generator = [], torch.Generator().manual_seed(3)
    for rows in (50, 10):
        picks += torch.randint(6, (rows, 6), generator=generator).tolist()
    expected = [metrics.ece(z[pick], target[pick], input="logits", norm="l2") for pick in picks]
    assert result.samples.numpy() == pytest.approx(expected, abs=1e-9)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(expected, [0.1, 0.9])))
    assert result.estimate == stats.ece(norm="l2")


EVERY = [*EXACT, *ORDERED]


@settings(max_examples=8, deadline=None)
@given(seeds, st.sampled_from([255, (0, 255)]))
def test_one_resample_for_all_metrics_equals_statistics_of_the_drawn_images(seed, ignore_index):
    z, target = predictions(seed, (5, 4, 6, 7))
    target[1] = 255  # no valid pixel
    stats = counted(z, target, per_image=True, ignore_index=ignore_index)
    together = stats.bootstrap(EVERY, replicates=4, level=0.5, generator=torch.Generator().manual_seed(seed))
    assert list(together) == EVERY
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(5, (4, 5), generator=generator).tolist()
    drawn = [counted(z[pick], target[pick], ignore_index=ignore_index) for pick in picks]
    for name, found in together.items():
        expected = [getattr(one, name)() for one in drawn]
        assert found.samples.numpy() == pytest.approx(expected, abs=1e-12, nan_ok=True), name
        assert found.estimate == getattr(stats, name)()
        alone = stats.bootstrap(name, replicates=4, level=0.5, generator=torch.Generator().manual_seed(seed))
        assert alone[:3] == found[:3]
    for options in ({"binning": "mass"}, {"norm": "l2", "debias": True}):
        found = stats.bootstrap("ece", replicates=4, generator=torch.Generator().manual_seed(seed), **options).samples
        assert found.numpy() == pytest.approx([one.ece(**options) for one in drawn], abs=1e-12, nan_ok=True)


def test_a_function_gets_statistics_of_the_drawn_images():
    """With all that they have: the sum of what it returns tells them apart."""
    z, target = predictions(6, (5, 4, 6, 7))
    stats = counted(z, target, per_image=True, classwise=True)

    def everything(one):
        predicted = one.predicted_confidence()
        parts = [
            torch.tensor(
                [one.images, one.pixels, one.ignored_pixels, one.smece(), one.ece(binning="mass")], dtype=torch.float64
            ),
            one.confusion().double().flatten(),
            torch.where(torch.isnan(predicted), torch.zeros_like(predicted), predicted),
            one.selective([0.4, 0.9]).share,
            one.reliability().pixels.double(),
        ]
        row = torch.cat(parts)
        return float(row @ torch.rand(len(row), generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    found = stats.bootstrap(everything, replicates=6, generator=torch.Generator().manual_seed(2))
    picks = torch.randint(5, (6, 5), generator=torch.Generator().manual_seed(2)).tolist()
    expected = [everything(counted(z[pick], target[pick])) for pick in picks]
    assert found.samples.numpy() == pytest.approx(expected, rel=1e-12)
    assert found.estimate == everything(stats)


def test_ece_needs_no_confusion_matrix_and_pairs_are_kept_where_they_occur(monkeypatch):
    from dacal_addon.metrics.bootstrap import CountsOfImages

    z, target = predictions(6, (3, 400, 6, 7))
    stats = counted(z, target, per_image=True, ignore_index=255)
    assert len(pickle.dumps(stats._images)) / 3 < 20_000  # 400 x 400 counts would take 1.3 MB
    expected = [stats.bootstrap(name, replicates=5).high for name in ("ece", "ks")]
    monkeypatch.setattr(CountsOfImages, "overlap", property(lambda self: 1 / 0))
    assert [stats.bootstrap(name, replicates=5).high for name in ("ece", "ks")] == expected
    with pytest.raises(ZeroDivisionError):
        stats.bootstrap("miou", replicates=5)


def test_the_same_seed_pairs_two_networks():
    """A network that is wrong in one pixel more of each image is worse by just that in every draw."""
    z, target = predictions(6, (8, 4, 6, 7), ignored=0.0)
    worse = z.clone()
    worse[:, :, 0, 0] = 0.0
    for i in range(8):
        z[i, :, 0, 0], worse[i, int(target[i, 0, 0] + 1) % 4, 0, 0] = 0.0, 5.0
        z[i, target[i, 0, 0], 0, 0] = 5.0
    one, other = (counted(x, target, per_image=True).bootstrap("accuracy", replicates=30) for x in (z, worse))
    assert (one.samples - other.samples).numpy() == pytest.approx(np.full(30, 1 / 42), abs=1e-12)
    assert float(one.samples.std()) > 1e-3


def test_an_interval_in_one_line(capsys):
    z, target = predictions(6, (4, 3, 6, 7))
    found = counted(z, target, per_image=True).bootstrap("ece", replicates=60, progress=True)
    assert str(found) == repr(found) == f"{found.estimate:.4f} [{found.low:.4f}, {found.high:.4f}]"
    assert "resampling images" in capsys.readouterr().err
    counted(z, target, per_image=True).bootstrap("ece", replicates=60)
    assert capsys.readouterr().err == ""


def test_the_interval_is_as_wide_as_the_images_differ():
    """Accuracies of 0 and 1, an image each: the standard deviation of their mean is 0.5 / sqrt(64)."""
    n = 64
    z = torch.zeros(n, 2, 4, 4)
    z[:, 0] = 1
    stats = counted(z, (torch.arange(n) % 2).view(n, 1, 1).expand(n, 4, 4), per_image=True)
    for metric in ("accuracy", lambda one: one.accuracy()):
        state = torch.random.get_rng_state()
        result = stats.bootstrap(metric, replicates=2000)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert float(result.samples.std()) == pytest.approx(0.0625, rel=0.06)
        assert (result.low, result.high) == pytest.approx((0.5 - 1.96 * 0.0625, 0.5 + 1.96 * 0.0625), abs=0.02)
    same = counted(z, torch.zeros(n, 4, 4).long(), per_image=True).bootstrap("nll", replicates=20)
    assert same.low == pytest.approx(same.high, abs=1e-12)


# Beside the figures


def test_what_is_left_above_a_confidence():
    z, target = predictions(9, (2, 5, 30, 40))
    stats = counted(z, target)
    confidence, right = top(*flat(z, target))
    thresholds = [0.0, 0.3, 0.5, 0.9, 0.99, 1.0]
    table = stats.selective(thresholds)
    share = [(confidence >= t).mean() for t in thresholds]
    accuracy = [right[confidence >= t].mean() if (confidence >= t).any() else math.nan for t in thresholds]
    assert table.threshold.tolist() == thresholds
    assert table.share.numpy() == pytest.approx(share, abs=1e-3)
    assert table.accuracy.numpy() == pytest.approx(accuracy, abs=3e-3, nan_ok=True)
    assert float(table.share[0]) == 1
    assert float(table.accuracy[0]) == stats.accuracy()
    at = CalibrationStats(2, input="probs")
    at.update(two_class([0.6] * 3 + [0.9]), torch.tensor([[[0, 1, 0, 0]]]))
    table = at.selective([0.6, 0.6001, 0.9, 0.9001])  # a pixel with the very confidence is in
    assert table.share.tolist() == [1, 0.25, 0.25, 0]
    assert table.accuracy.numpy() == pytest.approx([0.75, 1, 1, math.nan], nan_ok=True)
    empty = CalibrationStats(2, input="probs").selective([0.5])
    assert math.isnan(empty.share)
    assert math.isnan(empty.accuracy)


def test_remarks_have_the_numbers():
    target = torch.zeros(1, 10, 100).long()
    target[0, 0, :50] = 9
    stats = counted(torch.zeros(1, 12, 10, 100), target, ignore_index=(3, 255))
    (found,) = stats.remarks()
    assert found == "9 of 11 classes have no target pixel: 1, 2, 4, 5, 6 and 4 more."
    target[0, 2:4], target[0, 4, :1] = 255, 3
    stats.reset()
    stats.update(torch.zeros(1, 12, 10, 100), target)
    names = [f"class {chr(97 + c)}" for c in range(12)]
    found = stats.remarks(names)
    assert found[0] == "9 of 11 classes have no target pixel: class b, class c, class e, class f, class g and 4 more."
    assert found[1] == "20.1 % of the pixels are ignored (201 of 1,000; labels 3, 255)."
    target[0, 4, 0] = 0
    stats.reset()
    stats.update(torch.zeros(1, 12, 10, 100), target)
    assert len(stats.remarks()) == 1  # 20 % it may be
    region = torch.zeros(1, 10, 100, dtype=torch.bool)
    region[0, 3:5] = True  # 100 of 200 are ignored there; what is outside is not
    stats.reset()
    stats.update(torch.zeros(1, 12, 10, 100), target, region)
    assert stats.ignored_pixels == 100
    assert stats.remarks()[1] == "50.0 % of the pixels are ignored (100 of 200; labels 3, 255)."
    assert counted(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])).remarks() == []
    pair = torch.full((1, 1, 4), 0.9), torch.zeros(1, 1, 4).long()
    for options, named in (({"ignore_index": (7, 0)}, "7, 0"), ({"ignore_index": 9}, "0, 9"), ({}, "0, 255")):
        stats = CalibrationStats(4, input="top1", reduce_zero_label=True, **options)
        stats.update(pair, torch.tensor([[[0, 1, 0, 3]]]))
        assert stats.remarks()[1] == f"50.0 % of the pixels are ignored (2 of 4; labels {named})."
    with pytest.warns(UserWarning, match="255 is a class here"):
        stats = CalibrationStats(300, input="top1", reduce_zero_label=True)
    stats.update(pair, torch.tensor([[[0, 1, 0, 3]]]))
    assert stats.remarks()[1] == "50.0 % of the pixels are ignored (2 of 4; labels 0)."
    assert CalibrationStats(3, input="logits").remarks() == []


def test_whole_numbers_may_be_numpys():
    z, target = predictions(3)
    options = {"n_bins": np.int64(7), "fine_bins": np.int32(512), "ignore_index": (np.int64(255), np.uint8(1))}
    stats = CalibrationStats(np.int64(4), input="logits", per_image=np.bool_(True), **options)
    stats.update(z, target)
    expected = counted(z, target, n_bins=7, fine_bins=512, ignore_index=(255, 1), per_image=True)
    assert figures(stats) == figures(expected)
    assert stats.state_dict()["settings"] == expected.state_dict()["settings"]
    assert stats.bootstrap("ks", replicates=np.int64(5)).low == expected.bootstrap("ks", replicates=5).low
    assert (boundary_mask(target, np.int64(1)) == boundary_mask(target, 1)).all()


# State


def test_state_survives_saving_and_forgets_on_reset():
    z, target = predictions(11)
    for per_image in (False, True):
        stats = counted(z, target, classwise=True, per_image=per_image)
        file = io.BytesIO()
        torch.save(stats.state_dict(), file)
        file.seek(0)
        other = CalibrationStats(4, input="logits", classwise=True, per_image=per_image)
        other.update(z[:1], target[:1])
        other.load_state_dict(torch.load(file))
        for one in (stats, other, copy.deepcopy(stats)):
            one.update(z[1:], target[1:])
        expected = counted(torch.cat([z, z[1:]]), torch.cat([target, target[1:]]), classwise=True, per_image=per_image)
        for one in (stats, other):
            assert figures(one) == pytest.approx(figures(expected), abs=1e-12)
            assert one.images == 5
        other.reset()
        assert (other.pixels, other.images) == (0, 0)
        other.update(z, target)
        assert figures(other) == pytest.approx(figures(counted(z, target)), abs=1e-12)
        with pytest.raises(ValueError, match=r"load_state_dict: expected counts for .*'n_bins': 7.* got for .*'n_bins': 15"):
            CalibrationStats(4, input="logits", n_bins=7).load_state_dict(stats.state_dict())


BAD = {
    "nan": (
        lambda z, y: (_put(z, math.nan), y),
        ValueError,
        r"update: expected x: logits below infinity, .* got NaN( in image 1)? at \(2, 2\); look",
    ),
    "inf": (lambda z, y: (_put(z, math.inf), y), ValueError, "got infinity"),
    "-inf": (lambda z, y: (_all_masked(z), y), ValueError, r"finite, got only -infinity( in image 1)? at \(2, 2\)"),
    "classes last": (
        lambda z, y: (z.permute(0, 2, 3, 1), y),
        ValueError,
        r"the classes are last: x.permute\(0, 3, 1, 2\), or construct with channels_last=True",
    ),
    "one channel": (lambda z, y: (z[:, :1], y), ValueError, "of one sigmoid channel say num_classes=2, one_channel=True"),
    "one image": (
        lambda z, y: (z[0], y[0]),
        ValueError,
        r"to a single image: x\[None\] and target\[None\]",
    ),
    "one label": (lambda z, y: (z[:1], y[0]), ValueError, r"a leading dimension to a single image: target\[None\]"),
    "fewer labels": (lambda z, y: (z, y[:2]), ValueError, "as many labels as images"),
    "half the size": (
        lambda z, y: (z[..., ::2, ::2], y),
        ValueError,
        r"interpolate=True, or F.interpolate the logits \(not the label\) to the label's size",
    ),
    "half the size, log_probs": (lambda z, y: (z[..., ::2, ::2], y), ValueError, "what they are made of, the logits"),
    "swapped": (lambda z, y: (z.transpose(2, 3), y), ValueError, r"swapped in one of them: x.transpose\(-1, -2\)"),
    "multi-label": (
        lambda z, y: (z, (z > 0).long()),
        ValueError,
        r"target.argmax\(1\); not for multi-label outputs, .* with num_classes=2, one_channel=True",
    ),
    "multi-label probs": (lambda z, y: (torch.sigmoid(z), y), ValueError, "not for multi-label outputs, .* one_channel=True"),
    "dictionary": (lambda z, y: ({"out": z, "aux": z}, y), TypeError, r"x\['out'\]"),
    "heads": (lambda z, y: ((z, z), y), TypeError, r"x\[0\]"),
    "stray": (lambda z, y: (z, _put(y, 4)), ValueError, r"target: classes 0..3 or ignore_index=255, got the value 4; map"),
    "negative": (lambda z, y: (z, _put(y, -1)), ValueError, "the value -1"),
    "huge": (lambda z, y: (z, _put(y, 2**40)), ValueError, f"the value {2**40}"),
    "float target": (lambda z, y: (z, y.double()), TypeError, r"target: an integer array \(N, \*spatial\), got float64"),
    "bool target": (lambda z, y: (z, y > 0), TypeError, "got bool"),
    "channel": (lambda z, y: (z, y.unsqueeze(1)), ValueError, r"got int64 \(3, 1, 5, 6\); .*squeeze\(1\)"),
    "other size": (
        lambda z, y: (z, y.transpose(1, 2)),
        ValueError,
        r"shape \(3, 5, 6\) for x of shape \(3, 4, 5, 6\), got .*6, 5",
    ),
    "other classes": (lambda z, y: (z[:, :3], y), ValueError, r"with C = 4, got float64 \(3, 3, 5, 6\)"),
    "integers": (lambda z, y: (z.long(), y), ValueError, "a floating array .* got int64"),
    "list": (lambda z, y: (z.tolist(), y), TypeError, "x: a torch tensor or numpy array, got list"),
    "masked": (lambda z, y: (np.ma.masked_array(z.numpy()), y), TypeError, "x: a plain array, got a masked array"),
    "objects": (lambda z, y: (np.empty((3, 4, 5, 6), object), y), TypeError, "x: numbers, got object"),
    "region": (lambda z, y: (z, y, y), ValueError, r"region: a bool array \(3, 5, 6\), got int64"),
    "probs": (lambda z, y: (z, y), ValueError, "sum to 1 over C, got a value of -.*pass input='logits'"),
    "log_probs": (lambda z, y: (z, y), ValueError, "log_probs whose probabilities are >= 0 and sum to 1"),
    "negative probs": (lambda z, y: (_shifted(torch.softmax(z, 1)), y), ValueError, "got a value of -0.2"),
    "nan probs": (lambda z, y: (_put(torch.softmax(z, 1), math.nan), y), ValueError, "got NaN"),
    "top1 scale": (lambda z, y: ((y * 2.0, y), y), ValueError, r"confidences in 0..1, got .*; divide 8-bit values by 255"),
    "top1 rounding": (
        lambda z, y: ((torch.full(y.shape, 1.00001, dtype=torch.float64), y), y),
        ValueError,
        r"got 1.00001; .*clamp\(0, 1\)",
    ),
    "top1 class": (lambda z, y: ((y * 0.0, y * 0 + 7), y), ValueError, "predicted classes 0..3, got the value 7"),
    "top1 kinds": (lambda z, y: ((y, y), y), ValueError, r"x: a pair \(confidence, predicted class\)"),
    "top1 alone": (lambda z, y: (z, y), TypeError, "a pair .* got float64"),
}


def _put(x, value):
    x = x.clone()
    x[(1,) + (2,) * (x.dim() - 1)] = value
    return x


def _all_masked(z):
    z = z.clone()
    z[1, :, 2, 2] = -math.inf
    return z


def _shifted(p):
    """Sums of 1 with a negative probability."""
    p = p.clone()
    p[1, 0, 2, 2], p[1, 1, 2, 2], p[1, 2:, 2, 2] = -0.2, 1.2, 0.0
    return p


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("everything", [False, True])
def test_errors_come_before_anything_is_counted(case, everything):
    spoil, error, message = BAD[case]
    kind = "top1" if "top1" in case else "log_probs" if "log_probs" in case else "probs" if "probs" in case else "logits"
    z, target = predictions(12, ignored=0.0)
    stats = CalibrationStats(4, input=kind, per_image=everything, classwise=everything and kind != "top1")
    good = torch.softmax(z, 1).max(1) if kind == "top1" else as_input(z, kind)
    stats.update(tuple(good) if kind == "top1" else good, target)
    before, pixels = figures_or_none(stats), stats.pixels
    with pytest.raises(error, match=message):
        stats.update(*spoil(z, target))
    assert (figures_or_none(stats), stats.pixels, stats.images) == (before, pixels, 3)


def figures_or_none(stats):
    return None if stats.input == "top1" else figures(stats)


def _update(classes, shape, input="logits", size=None, interpolate=False, normalize=False, **options):
    stats = CalibrationStats(classes, input=input, **options)
    x, target = predictions(0, shape)
    target = target if size is None else torch.zeros(shape[0], *size).long()
    stats.update(x, target, interpolate=interpolate, normalize=normalize)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: CalibrationStats(1, input="probs"),
            ValueError,
            "num_classes: 2..4096, .* got 1; .*one_channel=True",
        ),
        (lambda: CalibrationStats(4, input="logit"), ValueError, "input to be one of 'logits', 'probs', 'log_probs', 'top1'"),
        (lambda: CalibrationStats(4, input="probs", n_bins=0), ValueError, "n_bins in 1..10000, got 0"),
        (lambda: CalibrationStats(4, input="probs", fine_bins=1000), ValueError, "a power of two from 256 to 65536, got 1000"),
        (lambda: CalibrationStats(4, input="top1", classwise=True), ValueError, "got input='top1'"),
        (lambda: CalibrationStats(4, input="probs").ece(norm="l3"), ValueError, "norm to be one of 'l1'"),
        (lambda: CalibrationStats(4, input="probs").ece(debias=True), ValueError, "norm='l2' with debias=True, got norm='l1'"),
        (lambda: CalibrationStats(4, input="probs").ece(binning="depth"), ValueError, "binning to be one of 'width'"),
        (lambda: CalibrationStats(4, input="probs").ece(reduce="mean"), ValueError, "reduce to be one of 'pooled'"),
        (lambda: CalibrationStats(4, input="probs").ece(reduce="image_mean"), RuntimeError, "per_image=True"),
        (lambda: CalibrationStats(4, input="probs").classwise_ece(), RuntimeError, "classwise=True"),
        (
            lambda: CalibrationStats(4, input="probs", classwise=True).classwise_ece("micro"),
            ValueError,
            "'macro', 'prevalence'",
        ),
        (
            lambda: CalibrationStats(4, input="probs", classwise=True).reliability(of_class=4),
            ValueError,
            r"of_class in 0..3, got 4",
        ),
        (lambda: CalibrationStats(4, input="probs").bootstrap(), RuntimeError, "bootstrap: expected counts of every image"),
        (lambda: CalibrationStats(4, input="probs", per_image=True).bootstrap(), RuntimeError, "at least one image"),
        (lambda: CalibrationStats(4, input="probs", per_image=True).bootstrap("iou"), ValueError, "metric to be one of"),
        (lambda: CalibrationStats(4, input="probs").merge(CalibrationStats(4, input="logits")), ValueError, "merge: expected"),
        (lambda: CalibrationStats(4, input="probs").merge({}), TypeError, "a CalibrationStats, got dict"),
        (lambda: CalibrationStats(4.0, input="probs"), ValueError, "num_classes in 2..4096, got 4.0"),
        (lambda: counted(*predictions(), per_image=True).bootstrap(3), TypeError, "metric: the name of a method, .* got int"),
        (lambda: counted(*predictions(), per_image=True).bootstrap(lambda s: 0, norm="l2"), TypeError, "into the function"),
        (
            lambda: metrics.ece(*predictions(), input="top1"),
            ValueError,
            "input to be one of 'logits', 'probs', 'log_probs', got",
        ),
        (lambda: metrics.miou(torch.zeros(3), torch.zeros(3).long(), input="logits"), ValueError, r"got float32 \(3,\)"),
        (lambda: boundary_mask(torch.zeros(1, 4, 4).long(), 0), ValueError, "a whole number width >= 1, got 0"),
        (lambda: boundary_mask(torch.zeros(4).long(), 1), ValueError, r"\(N, \*spatial\), got int64 \(4,\)"),
        (
            lambda: CalibrationStats(1, input="logits", one_channel=True),
            ValueError,
            "got 1; .* num_classes=2, one_channel",
        ),
        (
            lambda: CalibrationStats(3, input="logits", one_channel=True),
            ValueError,
            "num_classes=2 with one_channel=True",
        ),
        (lambda: CalibrationStats(2, input="log_probs", one_channel=True), ValueError, "input='logits' or 'probs' with one_"),
        (lambda: CalibrationStats(2, input="top1", channels_last=True), ValueError, "channels_last=False with input='top1'"),
        (lambda: CalibrationStats(2, input="probs", ignore_index=()), ValueError, "ignore_index: a label or several, got none"),
        (
            lambda: _update(2, (3, 2, 4, 5), one_channel=True),
            ValueError,
            "C = 1, got .*; construct with one_channel=False",
        ),
        (
            lambda: _update(2, (3, 5, 4, 5), one_channel=True),
            ValueError,
            "one_channel=False; not for multi-label",
        ),
        (lambda: _update(5, (3, 5, 4, 6), channels_last=True), ValueError, "construct with channels_last=False"),
        (
            lambda: _update(5, (3, 5, 4, 6), input="log_probs", interpolate=True),
            ValueError,
            "'probs' with interpolate=True",
        ),
        (lambda: _update(5, (3, 5, 4, 6), normalize=True), ValueError, "input='probs' with normalize=True, got input='logits'"),
        (lambda: _update(5, (3, 5, 4, 6, 2, 2), size=(8, 8, 8, 8), interpolate=True), ValueError, "one to three spatial"),
        (lambda: counted(*predictions()).selective([]), ValueError, "thresholds: at least one, got none"),
        (lambda: counted(*predictions()).selective([0.5, 1.5]), ValueError, "thresholds in 0..1, got 1.5"),
        (lambda: counted(*predictions()).remarks(["a"]), ValueError, "class_names: 4 of them, got 1"),
        (lambda: counted(*predictions(), per_image=True).bootstrap([]), TypeError, "names or a function"),
        (lambda: counted(*predictions(), per_image=True).bootstrap(["ece", "iou"]), ValueError, "metric to be one of"),
        (lambda: counted(*predictions(), per_image=True).bootstrap(["ece"], norm="l2"), TypeError, "into the function"),
    ],
)
def test_errors_name_expected_got_and_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not hasattr(torch, "inference_mode"), reason="torch.inference_mode needs torch >= 1.9")
def test_counts_of_inference_mode_go_on_outside_of_it():
    z, target = predictions(14)
    expected = counted(z, target, per_image=True)
    with torch.inference_mode():
        stats = counted(z[:1] * 1, target[:1], per_image=True)
    stats.update(z[1:2], target[1:2])
    with torch.inference_mode():
        stats.update(z[2:] * 1, target[2:])
    assert figures(stats) == pytest.approx(figures(expected), abs=1e-12)
    with torch.inference_mode():
        stats.reset()
    stats.update(z, target)
    stats.merge(expected)
    assert stats.bootstrap("accuracy", replicates=3).estimate == expected.accuracy()


def test_an_image_of_few_classes_counts_is_small():
    """What is kept of an image has nothing of the class-wise counts, not even their memory."""
    z, target = predictions(15, (5, 4, 6, 7))
    stats = counted(z, target, classwise=True, per_image=True)
    size = len(pickle.dumps(stats))
    stats.update(z, target)
    assert (len(pickle.dumps(stats)) - size) / 5 < 200_000
    assert counted(z, target, classwise=True)._totals.class_pixels.numel() * 8 > 190_000


@pytest.mark.skipif(not hasattr(torch, "inference_mode"), reason="torch 1.7 has no device beside the CPU for certain")
def test_everything_moves_to_a_device():
    """The device `meta`, which every machine has; figures on a GPU are those of `test_cuda`."""
    z, target = predictions(16)
    stats = counted(z, target, per_image=True, classwise=True)
    assert stats.to("cpu") is stats
    expected = stats.bootstrap("miou", replicates=5).samples
    assert torch.equal(stats.bootstrap("miou", replicates=5).samples, expected)
    moved = copy.deepcopy(stats).to("meta")
    state = moved.state_dict()
    assert {field.device.type for field in (*state["totals"].values(), *moved._images[0])} == {"meta"}
    assert moved.device == torch.device("meta")
    moved.device = torch.device("cpu")
    moved.reset()
    moved.update(z, target)
    assert figures(moved) == figures(stats)


def test_a_copy_of_the_state_is_one():
    z, target = predictions(16)
    stats = counted(z, target, per_image=True)
    state = stats.state_dict()
    before = copy.deepcopy(state)
    other = CalibrationStats(4, input="logits", per_image=True)
    other.load_state_dict(state)
    for one in (stats, other):
        one.update(z, target)
    for part in ("totals", "images"):
        assert all(torch.equal(state[part][name], value) for name, value in before[part].items())


@pytest.mark.parametrize(
    ("part", "name", "change"),
    [
        ("totals", "pixels", lambda x: x[:7]),
        ("totals", "confusion", lambda x: torch.zeros(7, 7).long()),
        ("totals", "correct", lambda x: x.float()),
        ("totals", "nll", lambda x: 1.0),
        ("images", "pixels", lambda x: x[:2]),
        ("images", "pairs", lambda x: x + 1),
        ("images", "cell", lambda x: x + 6143),
        ("images", "pair", lambda x: -x),
    ],
)
def test_foreign_counts_are_not_loaded(part, name, change):
    z, target = predictions(16)
    stats = counted(z, target, per_image=True)
    state = stats.state_dict()
    state[part][name] = change(state[part][name])
    before = figures(stats)
    with pytest.raises(ValueError, match=f"load_state_dict: expected {name}: (int|float|numbers)|pair: int32"):
        stats.load_state_dict(state)
    assert figures(stats) == before


@pytest.mark.parametrize("backend", [None, pytest.param("compile", marks=NEEDS_COMPILE)])
def test_pickling(backend):
    z, target = predictions(17)
    stats = counted(z, target, backend=backend)
    other = pickle.loads(pickle.dumps(stats))
    for one in (stats, other):
        one.update(z, target)
    assert figures(other) == figures(stats)


def test_an_infinite_likelihood_in_a_bootstrap():
    x = two_class([0.75] * 40).reshape(1, 2, 40, 1).permute(2, 1, 0, 3).clone()  # 40 images of a pixel
    x[3, :, 0, 0] = torch.tensor([1.0, 0.0])
    target = torch.zeros(40, 1, 1).long()
    target[3] = 1
    stats = CalibrationStats(2, input="probs", per_image=True)
    stats.update(x, target)
    result = stats.bootstrap("nll", replicates=50)
    assert not torch.isnan(result.samples).any()
    assert 0.4 < float(torch.isinf(result.samples).double().mean()) < 0.9
    assert (result.low, result.high) == (pytest.approx(-math.log(0.75)), math.inf)


# Regions


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4), st.sampled_from([255, 0, -1, (0, 255)]), st.sampled_from([(3,), (3, 4), (2, 3, 2)]))
def test_the_boundary_equals_a_search_of_every_window(seed, width, ignored, size):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (2, *size), generator=g)
    for axis in range(1, target.dim()):
        target = torch.repeat_interleave(target, 3, axis)
    several = ignored if isinstance(ignored, tuple) else (ignored,)
    target[torch.rand(target.shape, generator=g) < 0.2] = several[-1]
    label = target.numpy()
    valid = ~np.isin(label, several)
    expected = np.zeros(label.shape, bool)
    for n, *at in np.argwhere(valid):
        around = (n, *(slice(max(0, i - width), i + width + 1) for i in at))
        expected[(n, *at)] = ((label[around] != label[(n, *at)]) & valid[around]).any()
    assert (boundary_mask(target, width, ignore_index=ignored).numpy() == expected).all()
    assert (boundary_mask(label.astype("int16"), width, ignore_index=ignored).numpy() == expected).all()


def test_only_the_region_counts():
    z, _ = predictions(13, (2, 4, 20, 30))
    target = (torch.arange(30) // 10).expand(2, 20, 30).clone()
    target[:, :3] = 255
    region = boundary_mask(target, 2)
    assert int(region.sum()) == 2 * 17 * 8
    outside = torch.where(region, target, torch.full_like(target, 255))
    stats = counted(z, target, region, classwise=True)
    assert stats.pixels == 2 * 17 * 8
    assert figures(stats) == figures(counted(z, outside))
    assert stats.classwise_ece() == counted(z, outside, classwise=True).classwise_ece()


def test_the_channel_of_one_channels_labels_is_to_be_dropped_and_not_to_be_argmaxed():
    x, label = torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"drop its channel dimension with \.squeeze\(1\)"):
        CalibrationStats(2, input="probs", one_channel=True).update(x, label)
    with pytest.raises(ValueError, match=r"of one-hot labels take target\.argmax\(1\)"):
        CalibrationStats(2, input="probs").update(torch.rand(2, 2, 4, 4), label.expand(2, 2, 4, 4))
