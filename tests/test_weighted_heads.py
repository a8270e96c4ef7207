"""Pixel weights and soft labels in heads that have no way to pass them, against losses computed by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dacal_addon.integrations.criterion import soft_label_loss
from dacal_addon.integrations.segmentor_options import SegmentorOptions, parse
from dacal_addon.integrations.weighted_heads import WeightedHeads, hard_label_of, losses_of
from dacal_addon.pseudo_labels import one_hot


def drawn(seed=0, n=2, c=4, h=5, w=6):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    label = torch.randint(0, c, (n, h, w), generator=g)
    label[:, 0] = 255
    weight = torch.rand(n, h, w, generator=g, dtype=torch.float64)
    return logits, label, weight


def by_hand(logits, label, weight, class_weight, avg_non_ignore):
    """Pixel by pixel, as mmsegmentation 1.x documents its mean."""
    total, divisor = 0.0, 0.0
    for n, y, x in itertools.product(*map(range, label.shape)):
        c = int(label[n, y, x])
        if c == 255:
            divisor += 0.0 if avg_non_ignore or class_weight is not None else 1.0
            continue
        of_class = 1.0 if class_weight is None else float(class_weight[c])
        p = torch.softmax(logits[n, :, y, x], 0)[c]
        total -= float(p.log()) * of_class * float(weight[n, y, x])
        divisor += of_class
    return total / divisor


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_is_over_what_mmsegmentation_averages_over(avg_non_ignore, weighted):
    logits, label, weight = drawn()
    class_weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64) if weighted else None
    y = one_hot(label, 4).double()
    found = soft_label_loss(logits, y, weight, class_weight=class_weight, avg_non_ignore=avg_non_ignore, ignore_index=255)
    assert float(found) == pytest.approx(by_hand(logits, label, weight, class_weight, avg_non_ignore), rel=1e-6)


def test_without_a_say_the_mean_is_over_all_pixels_whatever_the_classes_weigh():
    # As the mmseg of DAFormer, HRDA and MIC, which passes no avg_non_ignore.
    logits, label, weight = drawn()
    class_weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    known = F.cross_entropy(logits, label, weight=class_weight, ignore_index=255, reduction="none") * weight
    found = soft_label_loss(logits, one_hot(label, 4).double(), weight.float(), class_weight=class_weight)
    assert float(found) == pytest.approx(float(known.sum() / label.numel()), rel=1e-6)


def test_a_batch_without_a_known_pixel_costs_nothing():
    logits, _, weight = drawn()
    for avg_non_ignore, class_weight in itertools.product((False, True), (None, torch.ones(4, dtype=torch.float64))):
        y = torch.zeros_like(logits)
        found = soft_label_loss(logits, y, weight, class_weight=class_weight, avg_non_ignore=avg_non_ignore)
        assert float(found) == 0.0


class CrossEntropy(nn.Module):
    """mmsegmentation's loss, as far as heads see it."""

    def __init__(self, *, use_sigmoid=False, loss_weight=1.0):
        super().__init__()
        self.use_sigmoid, self.loss_weight = use_sigmoid, loss_weight
        self.cls_criterion = self.sigmoid if use_sigmoid else self.softmax

    @staticmethod
    def softmax(logits, label, weight=None, *, avg_non_ignore):
        loss = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
        return (loss if weight is None else loss * weight).mean()

    @staticmethod
    def sigmoid(logits, label, weight=None, *, avg_non_ignore):
        known = label != 255
        loss = F.binary_cross_entropy_with_logits(logits[:, 1], (label == 1).to(logits.dtype), reduction="none") * known
        return (loss if weight is None else loss * weight).mean()

    def forward(self, logits, label, weight=None):
        return self.loss_weight * self.cls_criterion(logits, label, weight, avg_non_ignore=False)


class Overlap(nn.Module):
    """A loss without a criterion, which takes no weights."""

    def forward(self, logits, label):
        return 1 - torch.softmax(logits, 1)[:, 1][label == 1].mean()


class Sampled(nn.Module):
    """A head whose loss is given other labels than those of the whole image."""

    def __init__(self):
        super().__init__()
        self.loss_decode = CrossEntropy()


def segmentor(loss=None):
    whole = nn.Module()
    whole.decode_head = nn.Module()
    whole.decode_head.loss_decode = nn.ModuleList([CrossEntropy(loss_weight=2.0), Overlap()]) if loss is None else loss
    whole.auxiliary_head = nn.ModuleList([Sampled(), nn.Module()])
    whole.auxiliary_head[1].loss_decode = CrossEntropy(use_sigmoid=True)
    return whole


def test_every_loss_of_every_head_learns_what_it_can():
    whole = segmentor()
    heads = WeightedHeads(whole)
    ce, overlap, sampled, sigmoid = losses_of(whole)
    logits, label, weight = drawn()
    label = label.clamp(max=1) + 254 * (label == 255)
    soft = torch.softmax(torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 1)
    soft = soft * (label != 255).unsqueeze(1)
    points, known = label[:, 1:3].reshape(2, 12), label != 255
    few = logits[:, :, 1:3].reshape(2, 4, 12)
    before = [ce(logits, label), overlap(logits, label), sampled(few, points), sigmoid(logits, label)]
    with heads.listening():
        assert [ce(logits, label), overlap(logits, label), sampled(few, points), sigmoid(logits, label)] == before
        with heads.lesson(label.clone(), weight, soft_label=soft):
            found = [ce(logits, label), overlap(logits, label), sampled(few, points), sigmoid(logits, label)]
            # A head's own weights, such as a sampler's, come on top.
            halved = ce(logits, label, torch.full_like(weight, 0.5))
        with heads.lesson(label.clone(), weight):
            hard = ce(logits, label)
    mean = weight[known].mean()
    taught = -(soft * torch.log_softmax(logits, 1)).sum(1) * weight
    assert float(found[0]) == pytest.approx(2.0 * float(taught.mean()), rel=1e-6)
    assert float(halved) == pytest.approx(float(taught.mean()), rel=1e-6)
    assert float(found[1]) == pytest.approx(float(before[1] * mean))
    assert float(found[2]) == pytest.approx(float(before[2] * mean))
    weighed = F.binary_cross_entropy_with_logits(logits[:, 1], (label == 1).double(), reduction="none") * known * weight
    assert float(found[3]) == pytest.approx(float(weighed.mean()))
    nll = F.cross_entropy(logits, label, ignore_index=255, reduction="none") * weight
    assert float(hard) == pytest.approx(2.0 * float(nll.mean()))
    assert [ce(logits, label), overlap(logits, label), sampled(few, points), sigmoid(logits, label)] == before


def test_the_judge_takes_the_place_of_softmax_criteria_alone():
    whole = segmentor()
    heads = WeightedHeads(whole)
    ce, _, _, sigmoid = losses_of(whole)
    logits, label, weight = drawn()
    label = label.clamp(max=1) + 254 * (label == 255)
    seen = []

    def judge(logits, label, weight, *, ignore_index):
        seen.append((label, weight, ignore_index))
        return logits.sum()

    with heads.listening(), heads.lesson(label, weight, judge=judge):
        assert float(ce(logits, label)) == pytest.approx(2.0 * float(logits.sum()))
        binary = sigmoid(logits, label)
    assert [(bool(torch.equal(a, label)), bool(torch.equal(b, weight)), c) for a, b, c in seen] == [(True, True, 255)]
    with heads.listening(), heads.lesson(label, weight):
        assert float(sigmoid(logits, label)) == float(binary)


def test_soft_labels_that_no_head_learns_are_an_error_and_nothing_stays_behind():
    whole = segmentor(Overlap())
    heads = WeightedHeads(whole)
    logits, label, weight = drawn()
    failing = pytest.raises(RuntimeError, match=r"expected a head that teaches .*learner=None")
    with heads.listening(), failing, heads.lesson(label, weight, soft_label=torch.softmax(logits, 1)):
        losses_of(whole)[0](logits, label.clamp(max=1))
    assert "forward" not in vars(losses_of(whole)[0])
    assert heads._lesson is None


def test_a_head_that_classifies_no_pixels_is_refused():
    whole = nn.Module()
    whole.decode_head = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match=r"DACal: expected a decode_head with loss_decode, .* got Conv2d; choose a head"):
        WeightedHeads(whole)


def test_a_hard_label_is_unknown_only_where_nothing_is_known():
    soft = torch.tensor([[0.0, 0.4, 0.0], [0.0, 0.6, 1e-9]]).view(1, 2, 1, 3)
    assert hard_label_of(soft, ignore_index=7).tolist() == [[[7, 1, 1]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"thresold": 0.9}, r"keys among learner, threshold, .* got 'thresold'; mend or remove it"),
        ({"learner": "fitt"}, r"learner to be one of 'fit', 'bilevel', got 'fitt'"),
        ({"warmup": 3}, r"a learner, whose option warmup is, got learner=None; name one, or remove the option"),
        ({"learner": "fit", "engine": "forward"}, r"learner='bilevel', whose option engine is, got 'fit'"),
        ({"learner": "bilevel", "engine": "fast"}, r"engine to be one of"),
        ({"learner": "fit", "judged_set": "all"}, r"judged_set to be one of"),
        ({"learner": "fit", "every": 0}, r"a whole number every >= 1, got 0"),
        ({"learner": "fit", "meta_lr": -1.0}, r"meta_lr >= 0, got -1.0"),
        ({"threshold": 1.5}, r"threshold in \[0, 1\], got 1.5"),
        ({"weight": "all"}, r"weight to be one of"),
        ({"ignore_top": -1}, r"a whole number ignore_top >= 0"),
        ({"teacher": {"momentum": 0.1}}, r"teacher: a dict with a type"),
    ],
)
def test_a_wrong_option_is_named(given, message):
    with pytest.raises(ValueError, match=f"^model.dacal: expected {message}"):
        parse(given)


def test_options_must_be_a_dict_and_have_defaults():
    with pytest.raises(TypeError, match=r"model\.dacal: expected a dict, got float"):
        parse(0.9)
    assert parse({}) == SegmentorOptions()
    assert parse({"learner": "fit"}).learning_rate == 2e-3
    assert parse({"learner": "bilevel", "meta_lr": 0.0}).learning_rate == 0.0
