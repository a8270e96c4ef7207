"""Self-training in the real mmsegmentation 1.x, on a small segmentor and random images, against losses computed by hand."""

import copy
import doctest
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import mmseg_host
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmseg_host import CE, head, segmentor
from torch import nn

from dacal_addon.calibrate import folded_temperature
from dacal_addon.calibrate.estimators import TYPICAL
from dacal_addon.integrations.criterion import soft_label_loss
from dacal_addon.integrations.segmentor_options import parse
from dacal_addon.learners import bilevel
from dacal_addon.metrics import CalibrationStats
from dacal_addon.mixing import class_mask
from dacal_addon.pseudo_labels import one_hot

REASON = "pip install -r examples/mmengine/requirements.txt, or make upstream-mmengine (not with torch 1.7.1)"
pytest.importorskip("mmengine", reason=REASON)
pytest.importorskip("mmcv", reason=REASON)
# mmengine, mmcv and mmseg warn of each other's age and of settings that are meant here.
pytestmark = pytest.mark.filterwarnings("ignore")
LEARNERS = [None, "fit", "bilevel"]
AT_ONCE = {"warmup": 0, "every": 1}


@pytest.fixture(scope="module", autouse=True)
def ours():
    with mmseg_host.loaded() as module:
        yield module


def generator(seed):
    return torch.Generator().manual_seed(seed)


def label_of(seed, images=2, size=16):
    label = torch.randint(0, 3, (images, size // 4, size // 4), generator=generator(seed))
    label = label.repeat_interleave(4, 1).repeat_interleave(4, 2)
    label[:, :2, :2] = 255
    return label


def packed(seed, images=2, size=16, labels=True):
    """What a loader gives of one domain."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    pixels = torch.randint(0, 256, (images, 3, size, size), generator=generator(seed), dtype=torch.uint8)
    samples = [SegDataSample(metainfo={"ori_shape": (size, size), "img_shape": (size, size)}) for _ in range(images)]
    if labels:
        for sample, label in zip(samples, label_of(seed + 1, images, size)):
            sample.gt_sem_seg = PixelData(data=label.unsqueeze(0))
    return {"inputs": list(pixels), "data_samples": samples}


def both(seed, **options):
    return {"source": packed(seed, **options), "target": packed(seed + 50, labels=False, **options)}


def made(*, weights=0, config=None, **options):
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    torch.manual_seed(weights)
    model = MODELS.build(ConfigDict(copy.deepcopy(config) if config else segmentor(**options))).train()
    with torch.no_grad():  # sure of some pixels
        heads = model.decode_head if isinstance(model.decode_head, nn.ModuleList) else [model.decode_head]
        for each in heads:
            each.conv_seg.weight.mul_(20)
    return model


def optimizer_of(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **options)


def hooked(model, optimizer=None):
    """With the optimizer known, as by the hook."""
    model.self_training().use_optimizer(optimizer or optimizer_of(model), clip_norm=None)
    return model


def losses_on(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model(**data, mode="loss")


def train(model, optimizer, iterations=2, first=0):
    logs = []
    for i in range(first, first + iterations):
        loss, log = model.parse_losses(losses_on(model, both(i)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logs.append({name: float(value) for name, value in log.items()})
    return logs


def state_of(model, ours_too=True):
    return {name: value.clone() for name, value in model.state_dict().items() if ours_too or not name.startswith("dacal.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def listened(model):
    """What the heads' losses are given: (logits, label) in the order of passes, decode head first."""
    heard = {"decode": [], "aux": []}
    for name, each in (("decode", model.decode_head), ("aux", model.auxiliary_head)):

        def noted(logits, samples, name=name, loss_by_feat=each.loss_by_feat):
            label = torch.cat([sample.gt_sem_seg.data for sample in samples])
            full = F.interpolate(logits.detach().double(), size=label.shape[-2:], mode="bilinear", align_corners=False)
            heard[name].append((full, label.clone()))
            return loss_by_feat(logits, samples)

        each.loss_by_feat = noted
    return heard


def teacher_logits(model, image):
    teacher = model.self_training().teacher.module
    assert not any(module.training for module in teacher.modules())
    metas = [{"img_shape": image.shape[2:]}] * len(image)
    with torch.no_grad():
        return teacher.encode_decode(image, metas)


def mean_loss(logits, soft, weight, class_weight=None):
    """mmseg's avg_non_ignore, in float64."""
    of_class = torch.ones(3).double() if class_weight is None else torch.tensor(class_weight).double()
    terms = soft * of_class.view(1, -1, 1, 1)
    return float((-(terms * torch.log_softmax(logits, 1)).sum(1) * weight).sum() / terms.sum())


@pytest.mark.parametrize("learner", LEARNERS)
def test_all_heads_learn_the_mix_with_the_teachers_labels_and_weights(learner):
    weights = [0.5, 1.0, 2.0]
    auxiliary = head(6, 0, loss_decode={**CE, "loss_weight": 0.4})
    options = {} if learner is None else {"learner": learner, "warmup": 9}
    config = segmentor(decode=head(8, 1, loss_decode={**CE, "class_weight": weights}), auxiliary=auxiliary, **options)
    if learner == "bilevel":  # mmseg's own class weights cannot stand ignored pixels, of which the source has some
        config["decode_head"]["loss_decode"].pop("class_weight")
        weights = None
    batch = both(0)
    if weights is not None:
        for sample in batch["source"]["data_samples"]:
            sample.gt_sem_seg.data = sample.gt_sem_seg.data % 3
    model = made(config=config)
    if learner == "bilevel":
        hooked(model)
    heard = listened(model)
    log = losses_on(model, batch)
    data = model.data_preprocessor(copy.deepcopy(batch), True)["inputs"]
    source_label = torch.cat([sample.gt_sem_seg.data for sample in batch["source"]["data_samples"]])
    z = teacher_logits(model, data["target"])
    mask = class_mask(source_label, generator=generator(0), ignore_index=255)
    share = (z.softmax(1).amax(1) >= 0.6).double().mean()
    assert 0.2 < share < 1
    label = torch.where(mask[:, 0], source_label, z.argmax(1))
    weight = torch.where(mask[:, 0], torch.ones_like(share), share)
    soft = one_hot(label, 3).double() if learner is None else torch.where(mask, one_hot(source_label, 3).double(), z.softmax(1))
    for name, scale, of_class in (("decode", 1.0, weights), ("aux", 0.4, None)):
        assert len(heard[name]) == 2
        assert torch.equal(heard[name][0][1], source_label)
        assert torch.equal(heard[name][1][1], label)
        source = mean_loss(heard[name][0][0], one_hot(source_label, 3).double(), 1.0, of_class)
        assert float(log[f"{name}.loss_ce"]) == pytest.approx(scale * source, rel=1e-5)
        mixed = mean_loss(heard[name][1][0], soft, weight, of_class)
        assert float(log[f"mix.{name}.loss_ce"]) == pytest.approx(scale * mixed, rel=1e-5)
    assert float(log["dacal.target_weight"]) == pytest.approx(float(share))
    total, _ = model.parse_losses(log)
    parts = ("decode.loss_ce", "aux.loss_ce", "mix.decode.loss_ce", "mix.aux.loss_ce")
    assert float(total) == pytest.approx(sum(float(log[part]) for part in parts))


@pytest.mark.parametrize("class_weight", [None, [0.5, 1.0, 2.0]])
@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_hot_labels_cost_what_mmseg_says_they_do(class_weight, avg_non_ignore, reduction):
    from mmseg.registry import MODELS

    settings = {"class_weight": class_weight, "avg_non_ignore": avg_non_ignore, "reduction": reduction, "loss_weight": 0.7}
    theirs = MODELS.build({"type": "CrossEntropyLoss", **settings})
    logits = 2 * torch.randn(2, 3, 16, 16, generator=generator(0))
    # mmseg looks up the weight of the ignored class where there are class weights: one that is a class.
    label, ignored = (label_of(1), 255) if class_weight is None else (label_of(1) % 3, 99)
    weight = torch.rand(2, 16, 16, generator=generator(2))
    expected = theirs(logits, label, weight=weight, ignore_index=ignored)
    theirs.cls_criterion = lambda logits, label, weight, **options: soft_label_loss(
        logits, one_hot(label, 3), weight, **options
    )
    assert torch.allclose(theirs(logits, label, weight=weight, ignore_index=ignored), expected, rtol=1e-5)


def test_the_source_losses_and_predictions_are_the_segmentors_own():
    plain, model = made(kind="EncoderDecoder"), made()
    batch = both(0)
    expected = losses_on(plain, batch["source"])
    assert {name: float(value) for name, value in expected.items()} == {
        name: float(value) for name, value in losses_on(model, batch).items() if name in expected
    }
    plain, model = made(kind="EncoderDecoder").eval(), made().eval()
    for each in (plain, model):
        each.seen = each.test_step(packed(3))
    for a, b in zip(plain.seen, model.seen):
        assert torch.equal(a.seg_logits.data, b.seg_logits.data)
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)


def test_losses_that_take_no_weights_count_by_the_mean_weight():
    losses = [dict(CE), {"type": "DiceLoss", "loss_weight": 0.5, "loss_name": "loss_dice"}]
    model = made(decode=head(8, 1, loss_decode=losses))
    heard = listened(model)
    log = losses_on(model, both(0))
    dice = model.decode_head.loss_decode[1]
    share = float(log["dacal.target_weight"])
    logits, label = heard["decode"][1]
    source_label = heard["decode"][0][1]
    mask = class_mask(source_label, generator=generator(0), ignore_index=255)[:, 0]
    known = label != 255
    mean = float(torch.where(mask, 1.0, share)[known].mean())
    assert 0.2 < mean < 0.99
    assert float(log["mix.decode.loss_dice"]) == pytest.approx(
        mean * float(dice(logits.float(), label, ignore_index=255)), rel=1e-4
    )
    assert float(log["decode.loss_dice"]) == pytest.approx(
        float(dice(heard["decode"][0][0].float(), source_label, ignore_index=255)), rel=1e-4
    )


def test_the_samplers_choice_weighs_beside_the_pseudo_labels():
    config = segmentor(decode=head(8, 1, sampler={"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 10}))
    model = made(config=config)
    log = losses_on(model, both(0))
    without = losses_on(made(), both(0))
    assert 0 < float(log["mix.decode.loss_ce"]) < float(without["mix.decode.loss_ce"])
    assert float(log["mix.aux.loss_ce"]) == pytest.approx(float(without["mix.aux.loss_ce"]))


def test_one_sigmoid_channel_learns_hard_labels():
    sigmoid = {"type": "CrossEntropyLoss", "use_sigmoid": True, "avg_non_ignore": True}
    binary = {"num_classes": 2, "out_channels": 1, "loss_decode": sigmoid}
    model = made(config=segmentor(decode=head(8, 1, **binary), auxiliary=head(6, 0, **binary), threshold=0.8))
    heard = listened(model)
    batch = both(0)
    for sample in batch["source"]["data_samples"]:
        label = sample.gt_sem_seg.data
        sample.gt_sem_seg.data = torch.where(label == 2, torch.ones_like(label), label)
    log = losses_on(model, batch)
    z = teacher_logits(model, model.data_preprocessor(copy.deepcopy(batch), True)["inputs"]["target"])[:, 0]
    sure = (torch.sigmoid(z.abs()) >= 0.8).double().mean()
    assert 0 < sure < 1
    assert float(log["dacal.target_weight"]) == pytest.approx(float(sure))
    logits, label = heard["decode"][1]
    source_label = heard["decode"][0][1]
    mask = class_mask(source_label, generator=generator(0), ignore_index=255)[:, 0]
    assert torch.equal(label, torch.where(mask, source_label, (z > 0).long()))
    weight = torch.where(mask, torch.ones_like(sure), sure) * (label != 255)
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], (label == 1).double(), reduction="none") * weight
    assert float(log["mix.decode.loss_ce"]) == pytest.approx(float(loss.sum() / (label != 255).sum()), rel=1e-5)


@pytest.mark.parametrize("learner", LEARNERS)
def test_padding_of_the_target_is_taught_to_nobody(learner):
    options = {} if learner is None else {"learner": learner, **AT_ONCE}
    model = hooked(made(size=(16, 16), **options))
    heard = listened(model)
    batch = both(0)
    batch["target"] = packed(50, size=12, labels=False)
    losses_on(model, batch)
    (_, source_label), (_, label) = heard["decode"][-2:]
    target = ~class_mask(source_label, generator=generator(0), ignore_index=255)[:, 0]
    padded = torch.ones(16, 16, dtype=torch.bool)
    padded[:12, :12] = False
    assert torch.equal((label == 255) & target, target & padded)
    assert (target & padded).sum() > 20


def test_the_teacher_follows_as_daformers_does():
    model = made(norm=True)
    optimizer = optimizer_of(model)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i in range(4):
        if i:
            alpha = min(1 - 1 / (i + 1), 0.999)
            for name, p in model.named_parameters():
                expected[name] = alpha * expected[name] + (1 - alpha) * p.detach()
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        train(model, optimizer, 1, first=i)
        teacher = model.self_training().teacher.module
        for name, p in teacher.named_parameters():
            assert torch.allclose(p, expected[name], atol=1e-6), name
            assert not p.requires_grad
        # BatchNorm's statistics are the student's, of before its passes.
        own = dict(teacher.named_buffers())
        assert all(torch.equal(own[name], value) for name, value in buffers.items() if name in own)


def test_the_student_sees_the_strong_view_and_the_teacher_the_plain_one():
    model = made()
    model.self_training()  # the teacher is a copy, of hooks too
    batch = both(0)
    batch["teacher"] = {"inputs": packed(50, labels=False)["inputs"]}
    batch["target"] = packed(90, labels=False)
    heard = listened(model)
    images = []
    model.backbone.register_forward_pre_hook(lambda module, given: images.append(given[0].clone()))
    losses_on(model, batch)
    data = model.data_preprocessor(copy.deepcopy(batch), True)["inputs"]
    source_label, label = heard["decode"][0][1], heard["decode"][1][1]
    mask = class_mask(source_label, generator=generator(0), ignore_index=255)
    assert torch.equal(label[~mask[:, 0]], teacher_logits(model, data["teacher"]).argmax(1)[~mask[:, 0]])
    assert torch.equal(images[1], torch.where(mask, data["source"], data["target"]))
    assert not torch.equal(data["teacher"], data["target"])


@pytest.mark.parametrize("engine", ["auto", "finite_difference", "higher"])
def test_the_virtual_step_descends_what_the_heads_then_train_on(engine, monkeypatch):
    results = []
    hypergradient = bilevel.hypergradient

    def noted(*args, **options):
        results.append(hypergradient(*args, **options))
        return results[-1]

    monkeypatch.setattr(bilevel, "hypergradient", noted)
    # Without a learning rate the labels stay, and the training's own mixed loss is the inner loss.
    model = made(learner="bilevel", engine=engine, meta_lr=0.0, **AT_ONCE)
    optimizer = optimizer_of(model)
    hooked(model, optimizer)
    logs = train(model, optimizer, 2)
    assert len(results) == 2
    for log, result in zip(logs, results):
        assert log["mix.decode.loss_ce"] + log["mix.aux.loss_ce"] == pytest.approx(float(result.inner_loss), rel=1e-4)
        assert any(grad is not None and float(grad.abs().max()) > 0 for grad in result.grads)
    reference = made(learner="bilevel", engine="auto", meta_lr=0.0, **AT_ONCE)
    optimizer = optimizer_of(reference)
    train(hooked(reference, optimizer), optimizer, 2)
    own, expected = (torch.cat([grad.flatten() for grad in results[i].grads]) for i in (1, 3))
    # Differences cross the kinks of the heads' ReLU.
    assert float((own - expected).norm()) < (0.15 if engine == "finite_difference" else 0.01) * float(expected.norm())


@pytest.mark.parametrize("outer_loss", [None, "brier"])
def test_the_heads_judge_the_complementary_mix(outer_loss, monkeypatch):
    judged = []
    gradient = bilevel.BilevelCalibrationStep.judged_batch

    def noted(self, iteration):
        judged.append(gradient(self, iteration))
        return judged[-1]

    monkeypatch.setattr(bilevel.BilevelCalibrationStep, "judged_batch", noted)
    options = {} if outer_loss is None else {"outer_loss": outer_loss}
    model = made(norm=False, learner="bilevel", **AT_ONCE, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)  # a virtual step that goes nowhere
    hooked(model, optimizer)
    log = losses_on(model, both(0))
    (batch,) = judged
    heard = listened(model)
    model.loss(batch.image, sys.modules[mmseg_host.OURS].samples_of(batch.label))
    expected = 0.0
    for name, scale in (("decode", 1.0), ("aux", 0.4)):
        logits = heard[name][0][0]
        known = batch.label != 255
        if outer_loss is None:
            expected += scale * mean_loss(logits, one_hot(batch.label, 3).double(), batch.weight.double())
        else:
            squared = (logits.softmax(1) - one_hot(batch.label, 3)).pow(2).sum(1)
            expected += scale * float((squared * batch.weight * known).sum() / known.sum())
    assert float(log["dacal.judged"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("learner", LEARNERS)
def test_learning_leaves_the_student_as_its_own_passes_do(learner):
    options = {} if learner is None else {"learner": learner, **AT_ONCE}
    model = made(dropout=0.2, **options)
    optimizer = optimizer_of(model)
    hooked(model, optimizer)
    torch.manual_seed(5)
    np.random.seed(5)
    losses = losses_on(model, both(0))
    drawn = torch.rand(1), np.random.rand()
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = made(dropout=0.2)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = losses_on(plain, both(0))
    assert drawn == (torch.rand(1), np.random.rand())
    assert same(state_of(model, ours_too=False), state_of(plain, ours_too=False))
    assert float(losses["decode.loss_ce"]) == float(expected["decode.loss_ce"])
    if learner is not None:
        net = model.self_training().dacal.learner.temperature_net
        assert any(float(p.detach().abs().sum()) for p in net.last.parameters())


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_resumed_model_goes_on_as_if_nothing_had_been(learner):
    options = {} if learner is None else {"learner": learner, **AT_ONCE, "seed": 3}
    model = made(**options)
    optimizer = optimizer_of(model)
    train(hooked(model, optimizer), optimizer, 2)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, 2, first=2), state_of(model)
    other = made(weights=9, **options)
    rest = other.load_state_dict(saved[0], strict=True)
    assert not rest.missing_keys
    assert same(state_of(other), saved[0])  # also before the first iteration
    optimizer = optimizer_of(other)
    optimizer.load_state_dict(saved[1])
    assert train(hooked(other, optimizer), optimizer, 2, first=2) == expected[0]
    assert same(state_of(other), expected[1])


def test_checkpoints_and_plain_ones_can_stand_for_each_other(tmp_path):
    model = made(learner="fit", **AT_ONCE)
    train(model, optimizer_of(model), 1)
    state = model.state_dict()
    plain = made(kind="EncoderDecoder", weights=8)
    rest = plain.load_state_dict(state, strict=False)
    assert not rest.missing_keys
    assert all(name.startswith("dacal.") for name in rest.unexpected_keys)
    back = made(learner="fit", weights=7)
    back.load_state_dict(plain.state_dict(), strict=True)
    assert same(state_of(back), state_of(plain))
    from mmengine.config import Config
    from mmseg.apis import inference_model, init_model

    torch.save({"state_dict": state, "meta": {}}, tmp_path / "saved.pth")
    pipeline = [{"type": "LoadImageFromNDArray"}, {"type": "PackSegInputs"}]
    config = Config({"model": segmentor(learner="fit"), "test_pipeline": pipeline, "default_scope": "mmseg"})
    loaded = init_model(config, str(tmp_path / "saved.pth"), device="cpu")
    assert loaded._dacal is None
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    found = inference_model(loaded, image)
    plain.cfg = loaded.cfg
    expected = inference_model(plain.eval(), image)
    assert torch.equal(found.seg_logits.data, expected.seg_logits.data)


def test_half_precision_gives_nearly_the_same():
    from mmseg.registry import OPTIM_WRAPPERS

    logs = {}
    for kind in ("OptimWrapper", "HalfOnCpu"):
        for learner in LEARNERS:
            options = {} if learner is None else {"learner": learner, **AT_ONCE}
            model = made(norm=False, **options)
            optimizer = optimizer_of(model)
            hooked(model, optimizer)
            wrapper = OPTIM_WRAPPERS.build({"type": kind, "optimizer": optimizer})
            logs[kind, learner] = [model.train_step(both(i), wrapper) for i in range(2)]
    for learner in LEARNERS:
        for half, full in zip(logs["HalfOnCpu", learner], logs["OptimWrapper", learner]):
            for name in ("decode.loss_ce", "mix.decode.loss_ce", "mix.aux.loss_ce"):
                assert float(half[name]) == pytest.approx(float(full[name]), rel=0.1), (learner, name)
                assert float(half[name]) != float(full[name])
            if learner is not None:
                assert float(half["dacal.skipped_not_finite"]) == 0


def test_a_cascade_is_taught_at_all_its_stages():
    second = {**head(8, 1), "type": "OCRHead", "ocr_channels": 4, "norm_cfg": {"type": "BN"}}
    for name in ("num_convs", "concat_input"):
        second.pop(name)
    stages = {"num_stages": 2, "decode_head": [head(8, 1), second]}
    config = {**segmentor("DACalCascadeEncoderDecoder", auxiliary=head(6, 0)), **stages}
    found = losses_on(made(config=config), both(0))
    doubtful = losses_on(made(config={**config, "dacal": {"threshold": 1.0}}), both(0))
    assert float(found["dacal.target_weight"]) > 0.2 > 0.02 > float(doubtful["dacal.target_weight"])
    for name in ("decode_0.loss_ce", "decode_1.loss_ce", "aux.loss_ce"):
        assert float(doubtful[f"mix.{name}"]) < float(found[f"mix.{name}"])
        assert float(doubtful[name]) == float(found[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dacal": {"lerner": "fit"}}, ValueError, r"model\.dacal: expected keys among learner, .*got 'lerner'"),
        ({"decode_head": head(8, 1, ignore_index=0)}, ValueError, r"heads that ignore one label, got \[0, 255\]"),
        (
            {"decode_head": head(8, 1, loss_decode={"type": "CrossEntropyLoss", "use_sigmoid": True})},
            ValueError,
            r"a decode_head that is taught by softmax, or has one channel, got a sigmoid for each class",
        ),
        ({"dacal": {"teacher": {"type": "Teacherr"}}}, KeyError, r"Teacherr is not in"),
        (
            {"dacal": {"learner": "bilevel"}},
            RuntimeError,
            r"the student's optimizer, for learner='bilevel', got none; add custom_hooks",
        ),
        (
            {
                "dacal": {"learner": "fit"},
                "decode_head": head(8, 1, num_classes=2, out_channels=1, loss_decode={**CE, "use_sigmoid": True}),
            },
            ValueError,
            r"two channels, for soft labels, got one sigmoid channel",
        ),
    ],
)
def test_what_cannot_work_is_named_at_once(change, error, message):
    with pytest.raises(error, match=message):
        losses_on(made(config={**segmentor(), **change}), both(0))


def test_batches_of_one_domain_are_refused():
    message = r"DACalEncoderDecoder: expected batches of both domains, got float32 \(2, 3, 16, 16\); set train_dataloader"
    with pytest.raises(ValueError, match=message):
        losses_on(made(), packed(0))


def test_another_learners_state_is_refused_and_kept():
    model = made(learner="fit", **AT_ONCE)
    train(model, optimizer_of(model), 1)
    other = made()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"a checkpoint of learner=None, got one with temperatures; resume with the learner"):
        other.self_training()
    assert same(state_of(other), state_of(model))
    smaller = made(auxiliary={**head(6, 0), "channels": 4}, learner="fit")
    saved = {name: value for name, value in model.state_dict().items() if name.startswith("dacal.")}
    smaller.load_state_dict(saved, strict=False)
    with pytest.raises(ValueError, match=r"a checkpoint with this model's teacher, got another one"):
        smaller.self_training()


class Given:
    """A data set of mmengine's kind."""

    def __init__(self, images, size=16, labels=True, seed=0):
        self.seed, self.images, self.size, self.labels = seed, images, size, labels
        self.metainfo = {"classes": ("a", "b", "c")}
        self.full = False

    def full_init(self):
        self.full = True

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        if index >= self.images:
            raise IndexError(index)
        both = packed(self.seed + 2 * index, images=1, size=self.size, labels=self.labels)
        return {name: value[0] for name, value in both.items()}


def test_pairs_have_every_source_image_and_a_random_target_one(ours):
    source, target = Given(3), Given(5, labels=False, seed=70)
    pairs = ours.SourceAndTarget(source, target)
    pairs.full_init()
    assert (len(pairs), pairs.metainfo, source.full, target.full) == (3, source.metainfo, True, True)
    np.random.seed(1)
    first = [pairs[i] for i in range(3)] + [pairs[i % 3] for i in range(40)]
    assert all(torch.equal(first[i]["source"]["inputs"], source[i]["inputs"]) for i in range(3))
    drawn = {next(j for j in range(5) if torch.equal(target[j]["inputs"], item["target"]["inputs"])) for item in first}
    assert drawn == set(range(5))
    np.random.seed(1)
    assert torch.equal(pairs[0]["target"]["inputs"], first[0]["target"]["inputs"])
    with pytest.raises(ValueError, match="target: a dataset with images, got none"):
        ours.SourceAndTarget(source, Given(0))


def test_every_epoch_has_other_pairs_also_where_workers_begin_anew(ours):
    from functools import partial

    from mmengine.dataset import pseudo_collate, worker_init_fn

    seeded = partial(worker_init_fn, num_workers=1, rank=0, seed=3)  # as the Runner does
    target = Given(50, labels=False, seed=500)
    loader = torch.utils.data.DataLoader(
        ours.SourceAndTarget(Given(4), target), num_workers=1, worker_init_fn=seeded, collate_fn=pseudo_collate
    )
    torch.manual_seed(0)
    drawn = [[item["target"]["inputs"][0] for item in loader] for _ in range(2)]
    assert not all(torch.equal(a, b) for a, b in zip(*drawn))


def test_strong_transforms_change_what_the_student_sees_alone(ours):
    from mmseg.registry import TRANSFORMS

    target = Given(1, labels=False)
    brighter = {"type": "PhotoMetricDistortion", "brightness_delta": 60}
    item = ours.SourceAndTarget(Given(1), target, strong=[brighter])[0]
    plain = target[0]["inputs"]
    assert torch.equal(item["teacher"]["inputs"], plain)
    np.random.seed(4)
    item = ours.SourceAndTarget(Given(1), target, strong=[brighter])[0]
    np.random.seed(4)
    np.random.randint(1)
    expected = TRANSFORMS.build(brighter)({"img": plain.numpy().transpose(1, 2, 0).copy()})["img"]
    assert np.array_equal(item["target"]["inputs"].numpy().transpose(1, 2, 0), expected)
    with pytest.raises(ValueError, match=r"strong: transforms that leave every pixel in its place, got an image \(16, 16, 3\)"):
        ours.SourceAndTarget(Given(1), target, strong=[{"type": "Resize", "scale": (8, 8)}])[0]


def test_what_would_mix_target_images_unseen_is_refused():
    model = made()
    model.data_preprocessor.inner.batch_augments = lambda inputs, samples: (inputs, samples)
    with pytest.raises(ValueError, match="without batch_augments"):
        losses_on(model, both(0))


def evaluated(metric, images, size, rank=0, ranks=1):
    for i in range(rank, images, ranks):
        z, label = predictions(i % size)
        metric.process({}, [{"seg_logits": {"data": z}, "gt_sem_seg": {"data": label.unsqueeze(0)}}])
    return metric.evaluate(size)


def predictions(i):
    return 3 * torch.randn(3, 8, 8, generator=generator(i)), label_of(i, images=1, size=8)[0]


def expected_figures(images):
    stats = CalibrationStats(3, input="logits", ignore_index=255)
    for i in range(images):
        z, label = predictions(i)
        stats.update(z.unsqueeze(0), label.unsqueeze(0))
    return {f"calibration/{name}": getattr(stats, name)() for name in ("ece", "miou", "nll")}


def test_the_metric_counts_as_the_statistics_do(ours):
    metric = ours.CalibrationMetric(metric=("ece", "miou", "nll"))
    for _ in range(2):  # nothing is left of the first evaluation
        assert evaluated(metric, 5, 5) == pytest.approx(expected_figures(5), rel=1e-12)
    # The sixth is one that a sampler repeats.
    assert evaluated(metric, 6, 5) == pytest.approx(expected_figures(5), rel=1e-12)
    with pytest.raises(RuntimeError, match="images on every rank, got none"):
        metric.evaluate(5)
    for wrong in ("eec", "reset", "classwise_ece"):
        with pytest.raises(ValueError, match=f"CalibrationMetric: expected metric to be one of .*, got '{wrong}'"):
            ours.CalibrationMetric(metric=("ece", wrong))
    # One channel is a sigmoid that mmseg has taken.
    one = ours.CalibrationMetric(metric="ece")
    p, label = torch.rand(1, 8, 8, generator=generator(1)), torch.randint(0, 2, (8, 8), generator=generator(2))
    one.process({}, [{"seg_logits": {"data": p}, "gt_sem_seg": {"data": label}}])
    stats = CalibrationStats(2, input="probs", one_channel=True)
    stats.update(p.unsqueeze(0), label.unsqueeze(0))
    assert one.evaluate(1)["calibration/ece"] == stats.ece()


class FakeRunner:
    def __init__(self, model, **wrapper):
        from mmseg.registry import OPTIM_WRAPPERS

        self.model = model
        self.optim_wrapper = OPTIM_WRAPPERS.build({"type": "OptimWrapper", "optimizer": optimizer_of(model), **wrapper})


def test_the_hook_tells_the_meta_step_how_the_runner_steps(ours):
    model = made(learner="bilevel", **AT_ONCE)
    runner = FakeRunner(model, clip_grad={"max_norm": 0.25})
    ours.DACalHook().before_train(runner)
    learner = model.self_training().dacal.learner
    assert (learner.optimizer, learner.clip_norm) == (runner.optim_wrapper.optimizer, 0.25)
    for wrapper, message in (
        ({"accumulative_counts": 2}, "a step of the optimizer at every iteration, .* got accumulative_counts=2"),
        ({"clip_grad": {"type": "value", "clip_value": 0.1}}, r"clip_grad=dict\(max_norm=\.\.\.\), .* got {'clip_value': 0.1}"),
        ({"clip_grad": {"max_norm": 1.0, "norm_type": 1}}, "of the Euclidean norm"),
    ):
        with pytest.raises(ValueError, match=f"DACalHook: expected {message}|DACalHook: .*{message}"):
            ours.DACalHook().before_train(FakeRunner(made(learner="bilevel"), **wrapper))
        ours.DACalHook().before_train(FakeRunner(made(), **wrapper))  # hard labels do not care
    with pytest.raises(TypeError, match=r"a self-trained segmentor, got EncoderDecoder; set model\.type='DACalEncoderDecoder'"):
        ours.DACalHook().before_train(FakeRunner(made(kind="EncoderDecoder")))
    with pytest.raises(ValueError, match=r"calibrate=dict\(source=\.\.\., target=\.\.\.\), two datasets, got no target"):
        ours.DACalHook(calibrate={"source": None})
    with pytest.raises(ValueError, match=r"a key of calibrate to be one of .*'max_images'.*, got 'max_image'"):
        ours.DACalHook(calibrate={"source": None, "target": None, "max_image": 3})
    sets = {"source": Given(2), "target": Given(2, labels=False)}
    binary = {"num_classes": 2, "out_channels": 1, "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": True}}
    one = made(decode=head(8, 1, **binary), auxiliary=head(6, 0, **binary))
    with pytest.raises(ValueError, match="two channels, to be calibrated, got one"):
        ours.DACalHook(calibrate=sets).before_train(FakeRunner(one))

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    runner = FakeRunner(model)
    runner.model = Wrapped(model)
    from mmengine.registry import MODEL_WRAPPERS

    MODEL_WRAPPERS.register_module(module=Wrapped, force=True)
    with pytest.raises(ValueError, match="a model that is whole on every rank, got Wrapped"):
        ours.DACalHook().before_train(runner)


@pytest.mark.parametrize("learner", [None, "fit"])
def test_after_training_one_temperature_is_folded_into_a_copy(ours, tmp_path, learner):
    options = {} if learner is None else {"learner": learner, **AT_ONCE}
    model = made(**options)
    train(model, optimizer_of(model), 1)
    before, mode = state_of(model), [module.training for module in model.modules()]
    runner = FakeRunner(model)
    runner.work_dir, runner.iter = str(tmp_path), 3
    runner.train_dataloader = SimpleNamespace(dataset=Given(1))
    calibrate = {"source": Given(4), "target": Given(4, labels=False, seed=60), "estimators": {}}
    ours.DACalHook(calibrate=calibrate, filename="folded.pth").after_train(runner)
    saved = torch.load(tmp_path / "folded.pth", weights_only=True)  # nothing but plain things in it
    t = TYPICAL if learner is None else 1.0
    assert folded_temperature(saved) == t == saved["meta"]["dacal"]["temperature"]
    assert saved["meta"]["dataset_meta"] == {"classes": ("a", "b", "c")}
    assert same(state_of(model), before)
    assert [module.training for module in model.modules()] == mode
    folded = made(kind="EncoderDecoder", weights=4)
    folded.load_state_dict(saved["state_dict"], strict=True)
    own, calibrated = (each.eval().test_step(packed(3)) for each in (model, folded))
    for a, b in zip(own, calibrated):
        assert torch.allclose(b.seg_logits.data, a.seg_logits.data / t, atol=1e-5)
    other = {name for name, value in saved["state_dict"].items() if not torch.equal(value, before[name])}
    assert other == (set() if t == 1 else {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"})


def test_the_estimate_is_that_of_the_images_as_a_test_sees_them(ours):
    from mmengine.structures import PixelData

    model = made().eval()

    class Drawn(Given):
        """Its labels are drawn from softmax(z / 2)."""

        def __getitem__(self, index):
            item = super().__getitem__(index)
            (seen,) = model.test_step({name: [value] for name, value in copy.deepcopy(item).items()})
            p = (seen.seg_logits.data / 2).softmax(0).flatten(1).t()
            label = torch.multinomial(p, 1, generator=generator(index)).view(1, self.size, self.size)
            item["data_samples"].gt_sem_seg = PixelData(data=label)
            return item

    sets = {"source": Given(4), "target": Given(4, labels=False, seed=60)}
    found = ours.calibrate_segmentor(model, labelled_target=Drawn(12), estimators={}, **sets)
    assert found.estimates["labelled"].temperature == pytest.approx(2.0, rel=0.1)

    class Small(Given):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            item["data_samples"].gt_sem_seg = PixelData(data=label_of(1, images=1, size=8))
            return item

    with pytest.raises(ValueError, match=r"labels of the images' size, got .*; put LoadAnnotations before Resize"):
        ours.calibrate_segmentor(model, source=Small(2), target=Given(2), estimators={})


def page_blocks():
    return re.findall(r"^```python\n(.*?)^```", (mmseg_host.EXAMPLES / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_pages_config_is_one(tmp_path):
    import cv2
    from mmcv.transforms import Compose
    from mmengine.config import Config

    base = (mmseg_host.EXAMPLES / "source_only.py").read_text()
    crop = 'dict(type="RandomCrop", crop_size=crop_size)'
    assert base.count(crop) == 1
    with_ratio = base.replace(crop, crop.replace(")", ", cat_max_ratio=0.75)"))  # as most of mmsegmentation's have it
    for name, text in (("page.py", page_blocks()[0]), ("dacal.py", (mmseg_host.EXAMPLES / "dacal.py").read_text())):
        (tmp_path / "my_config.py").write_text(with_ratio if name == "page.py" else base)
        (tmp_path / name).write_text(text.replace("source_only.py", "my_config.py"))
        config = Config.fromfile(tmp_path / name)
        plain = Config.fromfile(tmp_path / "my_config.py")
        assert config.model.type == "DACalEncoderDecoder"
        assert parse(config.model.dacal).learner is None
        assert config.model.backbone == plain.model.backbone
        pairs = config.train_dataloader.dataset
        assert (pairs.type, pairs.source) == ("SourceAndTarget", plain.train_dataloader.dataset)
        assert [step.type for step in pairs.target.pipeline] == [
            "LoadImageFromFile",
            "RandomCrop",
            "RandomFlip",
            "PackSegInputs",
        ]
        image = np.random.default_rng(0).integers(0, 256, (60, 70, 3)).astype(np.uint8)
        assert cv2.imwrite(str(tmp_path / "unlabelled.png"), image)
        given = {"img_path": str(tmp_path / "unlabelled.png"), "seg_fields": [], "reduce_zero_label": False}
        crop = Compose(pairs.target.pipeline)(given)["inputs"].numpy().transpose(1, 2, 0)
        crops = np.lib.stride_tricks.sliding_window_view(image, (48, 48, 3)).reshape(-1, 48, 48, 3)
        assert any(np.array_equal(crop, each) or np.array_equal(crop[:, ::-1], each) for each in crops)
        assert config.custom_hooks[0].type == "DACalHook"
        assert [each.type for each in config.val_evaluator] == ["IoUMetric", "CalibrationMetric"]


def test_the_pages_code_folds_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = made(kind="EncoderDecoder")
    Path("config.py").write_text(f"model = {segmentor('EncoderDecoder')!r}\ndefault_scope = 'mmseg'\n")
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": Given(1).metainfo}}, "trained.pth")
    scope = {"held_out": Given(3), "target": Given(3, labels=False, seed=60)}
    exec(page_blocks()[-1], scope)
    saved = checkpoint("calibrated.pth")
    assert folded_temperature(saved) == scope["found"].temperature


def test_its_examples_hold(ours):
    assert doctest.testmod(ours).failed == 0


# The Runner itself, in a process of its own: it seeds and sets up all that is global.


def config_text(work_dir, *, learner, iters=4, kill_at=None, batch=2, **extra):
    options = {} if learner is None else {"learner": learner, **AT_ONCE}
    pairs = {"type": "SourceAndTarget", "source": {"type": "Given", "images": 7}, "target": {"type": "Given", "images": 5}}
    slower = {"type": "LinearLR", "start_factor": 1.0, "end_factor": 0.1, "begin": 0, "end": 6, "by_epoch": False}
    return {
        "model": segmentor(norm=False, threshold=0.3, **options),
        "work_dir": str(work_dir),
        "train_dataloader": {
            "batch_size": batch,
            "num_workers": 0,
            "sampler": {"type": "InfiniteSampler", "shuffle": True},
            "dataset": pairs,
        },
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.01}, "clip_grad": {"max_norm": 1.0}},
        "param_scheduler": [slower],
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": iters, "val_interval": 100},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2}},
        "custom_hooks": [{"type": "DACalHook"}, {"type": "Killing", "at": kill_at}],
        "randomness": {"seed": 0},
        "default_scope": "mmseg",
        **extra,
    }


def run(config, *, resume=False):
    """Train as `tools/train.py` does, in this process."""
    mmseg_host.load()
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner
    from mmseg.registry import DATASETS, HOOKS

    class Killing(Hook):
        def __init__(self, at):
            self.at = at

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if self.at is not None and batch_idx + 1 == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    HOOKS.register_module(module=Killing, force=True)
    DATASETS.register_module(module=Given, force=True)
    runner = Runner.from_cfg(Config({**config, "resume": resume}))
    runner.train()
    return runner


def in_a_process(config, **options):
    code = "import json, sys; import test_mmengine as t; t.run(json.loads(sys.argv[1]), **json.loads(sys.argv[2]))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
        "OMP_NUM_THREADS": "1",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(config), json.dumps(options)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("learner", [None, "bilevel"])
def test_a_runner_that_is_killed_resumes_bit_for_bit(tmp_path, learner):
    whole = in_a_process(config_text(tmp_path / "whole", learner=learner))
    assert whole.returncode == 0, whole.stdout[-3000:]
    killed = in_a_process(config_text(tmp_path / "parts", learner=learner, kill_at=3))
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "parts/iter_4.pth").exists()
    resumed = in_a_process(config_text(tmp_path / "parts", learner=learner), resume=True)
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    assert "Advance dataloader 2 steps" in resumed.stdout
    expected, found = (checkpoint(tmp_path / part / "iter_4.pth") for part in ("whole", "parts"))
    assert same(found["state_dict"], expected["state_dict"])
    assert any(name.startswith("dacal.teacher.") for name in found["state_dict"])
    before = checkpoint(tmp_path / "parts/iter_2.pth")["state_dict"]
    learned = "decode_head.conv_seg.weight" if learner is None else "dacal.learner.temperature_net.last.weight"
    assert not torch.equal(before[learned], found["state_dict"][learned])
    moments = (found["optimizer"]["state"], expected["optimizer"]["state"])
    assert all(same(*pair) for pair in zip(*(each.values() for each in moments)))


def rank_of_two(rank, folder, learner):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = (Path(folder) / "port").read_text()
    torch.set_num_threads(1)
    config = config_text(Path(folder) / "work", learner=learner, iters=3)
    # mmengine chooses a GPU for every rank, also where there is none.
    wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
    config.update(launcher="pytorch", env_cfg={"dist_cfg": {"backend": "gloo"}}, model_wrapper_cfg=wrapper)
    torch.cuda.set_device = lambda device: None
    ours = mmseg_host.load()
    runner = run(config)
    state = runner.model.module.state_dict()
    metric = ours.CalibrationMetric(metric=("ece", "miou", "nll"))
    # Five images on two ranks: the sampler gives the second rank the first image again.
    figures = evaluated(metric, 6, 5, rank, 2)
    found = {"state": state, "figures": figures, "wrapper": type(runner.model).__name__}
    torch.save(found, Path(folder) / f"{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("learner", ["fit", "bilevel"])
def test_two_ranks_stay_one_model(learner):
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            (Path(folder) / "port").write_text(str(free.getsockname()[1]))
        torch.multiprocessing.spawn(rank_of_two, (folder, learner), nprocs=2)
        first, second = (checkpoint(Path(folder) / f"{rank}.pth") for rank in range(2))
    assert first["wrapper"] == "MMDistributedDataParallel"
    assert first["figures"] == second["figures"] == pytest.approx(expected_figures(5), rel=1e-12)
    names = [name for name in first["state"] if name != "dacal.learner.generator"]
    assert any(name.startswith("dacal.teacher.") for name in names)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in names)
    if learner is not None:
        assert float(first["state"]["dacal.learner.temperature_net.last.weight"].abs().sum()) > 0
