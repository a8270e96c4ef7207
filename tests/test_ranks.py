"""Several processes, on gloo: one hypergradient, that of the whole batch, and one temperature net."""

import copy
import math
import os
import tempfile

import pytest
import torch
import torch.nn.functional as F
from problems import ENGINES, TOLERANCE, distance, generator, randn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SkipKind, SoftPseudoLabeler, TemperatureFit, hypergradient
from dacal_addon.learners.judged_sets import DomainBatch, differing_blends
from dacal_addon.losses import brier
from dacal_addon.pseudo_labels import one_hot
from dacal_addon.ranks import Ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")


class Student(nn.Module):
    """Without BatchNorm, whose statistics are each rank's own, and with a branch that not every batch takes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 6, 3, padding=1)
            self.bright = nn.Conv2d(6, 6, 1)
            self.last = nn.Conv2d(6, 4, 1)
        self.double()

    def forward(self, image):
        x = torch.tanh(self.first(image))
        bright = (image > 90).flatten(1).any(1)
        if bool(bright.any()):
            x = torch.where(bright.view(-1, 1, 1, 1), torch.tanh(self.bright(x)), x)
        return self.last(x)


def batch(part=None):
    """Four images of each domain, or the part of one of two ranks. Only the second rank's are bright."""
    source, target = randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
    source[2:, :, 0, 0] = 99.0
    label = torch.randint(0, 4, (4, 8, 8), generator=generator(3))
    label[0, :3] = 255
    logits = 3 * randn(4, 4, 8, 8, seed=4)
    mask = torch.rand(4, 1, 8, 8, generator=generator(5)) < 0.5
    valid = torch.rand(4, 8, 8, generator=generator(6)) < 0.7
    valid[:2] = False  # the first rank has no valid target pixel
    tensors = source, label, target, logits, mask, valid
    return tensors if part is None else tuple(x[2 * part : 2 * part + 2] for x in tensors)


def temperature_net():
    net = MetaTemperatureNet(4, hidden_channels=4, generator=generator(6)).double()
    with torch.no_grad():
        net.last.weight.copy_(0.1 * randn(1, 4, 1, 1, seed=7))
    return net


def optimizer_of(student):
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.02, eps=1e-3)
    for i, parameter in enumerate(student.parameters()):
        parameter.grad = randn(*parameter.shape, seed=20 + i)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def with_closures(student, part, engine, wrapped=False, **options):
    """`hypergradient` on sums that are the same share of the whole on every rank, with uneven pixel weights."""
    source, label, target, logits, _, valid = batch(part)
    net, optimizer = temperature_net(), optimizer_of(student)
    weight = torch.rand(4, 8, 8, generator=generator(8)).double()
    weight = (weight if part is None else weight[2 * part : 2 * part + 2]) * valid
    labeler = SoftPseudoLabeler(net)
    result = hypergradient(
        DistributedDataParallel(student, find_unused_parameters=True) if wrapped else student,
        lambda f: (
            0.1 * f(source).pow(2).mean() - (weight * (labeler(logits).soft_label * f(target).log_softmax(1)).sum(1)).mean()
        ),
        lambda f: F.cross_entropy(f(source), label % 4),
        list(net.parameters()),
        optimizer=optimizer,
        engine=engine,
        clip_norm=0.05,
        backward=True,
        **options,
    )
    return result, [None if parameter.grad is None else parameter.grad for parameter in student.parameters()]


def calibration(part, engine, **options):
    """Three iterations of BilevelCalibrationStep with the built-in losses."""
    source, label, target, logits, mask, valid = batch(part)
    net, student = temperature_net(), Student()
    step = BilevelCalibrationStep(
        student,
        SoftPseudoLabeler(net, weight="none"),
        optimizer=optimizer_of(student),
        meta_optimizer=torch.optim.SGD(net.parameters(), lr=10.0),
        engine=engine,
        warmup=0,
        every=2,
        **options,
    )
    results = [step(source, label, target, logits, mask=mask, valid=valid, backward=True) for _ in range(3)]
    return results, list(net.parameters()), [parameter.grad for parameter in student.parameters()]


def worker(rank, store, check, arguments, size):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        globals()[check](rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(check, *arguments, size=2):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (os.path.join(folder, "store"), check.__name__, arguments, size), nprocs=size)


def check_averages(rank):
    ranks = Ranks()
    mine = [torch.full((3,), 1.0 + rank), None if rank == 0 else torch.ones(2).double(), None]
    like = [torch.zeros(3), torch.zeros(2).double(), torch.zeros(1)]
    averaged = ranks.average(mine, like)
    assert averaged[0].tolist() == [1.5] * 3
    assert averaged[0] is mine[0]
    assert averaged[1].tolist() == [0.5] * 2
    assert averaged[2] is None
    assert ranks.average_number(torch.tensor(float(rank))).item() == 0.5
    assert ranks.anywhere(rank == 1, like=torch.zeros(()))
    assert not ranks.anywhere(False, like=torch.zeros(()))
    assert ranks.first(torch.tensor([3 + rank])).tolist() == [3]
    mine = torch.tensor([[10.0 * rank, -math.inf]])
    mine.requires_grad_()
    gathered = ranks.gather("f", "x", mine)
    assert gathered.tolist() == [[0.0, -math.inf], [10.0, -math.inf]]
    assert not gathered.requires_grad
    assert ranks.gather("f", "x", torch.full((2, 1), rank)).flatten().tolist() == [0, 0, 1, 1]
    expected = r"f: expected x of one shape on every rank, .* got \(1, 3\) on rank 0 and \(2, 3\) on rank 1; .*drop_last=True"
    with pytest.raises(ValueError, match=expected):
        ranks.gather("f", "x", torch.zeros(1 + rank, 3))
    big = [torch.full((1 << 22,), float(rank)), torch.full((5,), float(rank))]  # more than one bucket
    assert all(bool((x == 0.5).all()) for x in ranks.average(big, big))
    alone = [torch.distributed.new_group([i]) for i in range(2)][rank]
    assert Ranks(alone).size == 1


def check_hypergradients(rank):
    for engine in ENGINES:
        expected, expected_grads = with_closures(Student(), None, engine, process_group=alone(rank))
        for wrapped in (False, True):
            got, grads = with_closures(Student(), rank, engine, wrapped)
            assert distance(got.grads, expected.grads) <= max(TOLERANCE[engine], 1e-10), engine
            for name in ("outer_loss_before", "outer_loss_after", "inner_loss"):
                assert getattr(got, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-12), name
            assert distance(grads, expected_grads) <= 1e-12


_alone = {}


def alone(rank):
    """A group of this rank only: every group is made on all ranks, once."""
    if not _alone:
        _alone.update({i: torch.distributed.new_group([i]) for i in range(2)})
    return _alone[rank]


def check_calibration(rank):
    # Losses that are means over labelled pixels, of which the ranks have different numbers.
    for engine, outer_loss in [*((engine, "cross_entropy") for engine in ENGINES), (ENGINES[-1], "brier"), (ENGINES[0], brier)]:
        expected, expected_net, expected_grads = calibration(None, engine, outer_loss=outer_loss, process_group=alone(rank))
        got, net, grads = calibration(rank, engine, outer_loss=outer_loss)
        assert distance(net, expected_net) <= max(TOLERANCE[engine], 1e-10)
        assert distance(grads, expected_grads) <= max(TOLERANCE[engine], 1e-10)
        for a, b in zip(got, expected):
            assert (a.skipped, a.engine) == (b.skipped, b.engine)
            assert a.inner_loss == pytest.approx(b.inner_loss, rel=1e-9)
            assert a.outer_loss_after == pytest.approx(b.outer_loss_after, rel=1e-9, nan_ok=True)
            assert a.hypergradient_norm == pytest.approx(b.hypergradient_norm, rel=1e-6, nan_ok=True)


def check_nets_stay_identical(rank):
    torch.manual_seed(rank)
    student = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)))
    net = MetaTemperatureNet(4, generator=generator(rank))  # differs: the first call makes them one
    step = BilevelCalibrationStep(
        student,
        SoftPseudoLabeler(net, weight="none"),
        optimizer=torch.optim.AdamW(student.parameters(), lr=1e-3),
        meta_optimizer=torch.optim.Adam(net.parameters(), lr=1e-2),
        engine="auto" if hasattr(torch, "func") else "finite_difference",
        warmup=1,
    )
    start = copy.deepcopy(net.state_dict())
    for i in range(50):
        g = generator(100 * rank + i)
        source, target = torch.rand(2, 1, 3, 8, 8, generator=g)
        label, logits = torch.randint(0, 4, (1, 8, 8), generator=g), torch.randn(1, 4, 8, 8, generator=g)
        step.optimizer.zero_grad()
        step(source, label, target, logits, backward=True, generator=g)
        step.optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in [*net.parameters(), *student.parameters()]])
    everybodys = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(everybodys, flat)
    assert torch.equal(*everybodys)
    assert not torch.equal(start["last.weight"], net.last.weight)


def check_auto_falls_back_together(rank):
    """Only one rank meets the operation without a forward derivative."""

    class Fork(Student):
        def forward(self, image):
            x = super().forward(image)
            grid = F.affine_grid(torch.eye(2, 3).double().expand(2, 2, 3), x.shape, False)
            return F.grid_sample(x, grid, align_corners=False) if bool((image > 90).any()) else x

    with pytest.warns(UserWarning, match="grid_sampler_2d" if rank == 1 else "what another rank met"):
        result, _ = with_closures(Fork(), rank, "auto")
    assert result.engine == "finite_difference"


def check_sharded_students_are_refused(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for student, expected in (
        (FullyShardedDataParallel(Student(), device_id=torch.device("cpu")), r"FSDP: module '\(root\)' \(FullyShardedDataPar"),
        (nn.Sequential(fully_shard(Student(), mesh=mesh)), r"whole on every rank .*got FSDP: module '0' \(FSDPStudent\)"),
        (nn.Sequential(DistributedDataParallel(Student())), r"wrapped as a whole, got DDP around module '0'"),
    ):
        optimizer, omega = torch.optim.SGD(student.parameters(), lr=0.1), torch.ones(1, requires_grad=True)
        for engine in ENGINES:
            with pytest.raises(ValueError, match=expected):
                hypergradient(student, lambda f: None, lambda f: None, [omega], optimizer=optimizer, engine=engine)


def blending(kind, part, images=2, **options):
    """Three iterations of a learner that blends target images; `part`: the rank whose share it sees, None for everything."""
    source, label, target, logits, mask, _ = batch()
    share = slice(0, images) if part is None else slice(part * images // 2, (part + 1) * images // 2)
    valid = torch.rand(4, 8, 8, generator=generator(6)) < 0.9
    net, student = temperature_net(), Student()
    learner = kind.for_loop(
        SoftPseudoLabeler(net, weight="none"),
        student=student,
        optimizer=optimizer_of(student),
        meta_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        warmup=0,
        **options,
    )
    results = [
        learner(
            *(x[share] for x in (source, label, target, logits)),
            mask=mask[share],
            valid=valid[share],
            teacher=lambda image: 3 * torch.cat([image, image[:, :1].cos()], 1),
        )
        for _ in range(3)
    ]
    assert all(result.skipped is None for result in results)
    figures = [x for result in results for x in (result.outer_loss_before, result.hypergradient_norm)]
    return figures, [parameter.detach() for parameter in net.parameters()]


def check_one_image_a_rank(rank):
    """Two ranks give what one process gives that has both images; with two images each they blend their own, as ever."""
    for kind, options in (
        (TemperatureFit, {}),
        (TemperatureFit, {"judged_set": "target_blends"}),
        (BilevelCalibrationStep, {"judged_set": "target_blends", "engine": "higher"}),
        (BilevelCalibrationStep, {"judged_set": "differing_blends", "engine": "finite_difference"}),
    ):
        expected, expected_net = blending(kind, None, process_group=alone(rank), **options)
        got, net = blending(kind, rank, **options)
        assert got == pytest.approx(expected, rel=1e-6)
        assert min(expected) > 0
        assert distance(net, expected_net) <= 1e-6
        start = [parameter.detach() for parameter in temperature_net().parameters()]
        assert distance(net, start) > 1e-5  # it has learned
        other, _ = blending(kind, None, process_group=alone(rank), images=4, **options)
        assert other != pytest.approx(expected, rel=1e-3)  # which images matters
    with pytest.raises(ValueError, match="expected at least 2 target images to blend, got 1; use a larger batch"):
        blending(TemperatureFit, None, images=1, process_group=alone(rank))


def check_ranks_of_unlike_batches(rank):
    source, label, target, logits, mask, _ = batch()
    share = slice(0, 1) if rank else slice(2, 4)
    net = temperature_net()
    fit = TemperatureFit(SoftPseudoLabeler(net, weight="none"), meta_optimizer=torch.optim.SGD(net.parameters(), lr=1.0))
    expected = (
        r"target_blends: expected target_image of one shape on every rank, .* got \(2, 3, 8, 8\) on rank 0 and \(1, 3, 8, 8\)"
    )
    with pytest.raises(ValueError, match=expected):
        fit(*(x[share] for x in (source, label, target, logits)), mask=mask[share], teacher=lambda image: image)
    assert fit.iteration == 0


CHECKS = [
    check_averages,
    check_hypergradients,
    check_calibration,
    check_nets_stay_identical,
    check_one_image_a_rank,
    check_ranks_of_unlike_batches,
]
if hasattr(torch, "func"):
    CHECKS += [check_auto_falls_back_together]
if hasattr(torch.distributed, "device_mesh"):  # torch >= 2.6 has both kinds of FSDP in one place
    CHECKS += [check_sharded_students_are_refused]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[len("check_") :])
def test_two_ranks(check):
    on_ranks(check)


def test_four_ranks_of_one_image():
    on_ranks(check_every_rank_blends_with_another_ones_image, size=4)


def test_one_process_needs_nothing_of_torch_distributed():
    tensors = [torch.ones(2), None]
    assert Ranks().size == 1
    assert Ranks().average(tensors, [torch.zeros(2), torch.zeros(1)]) == tensors
    assert Ranks().gather("f", "x", tensors[0]).tolist() == [1.0, 1.0]
    assert Ranks().first(tensors[0]).tolist() == [1.0, 1.0]


def check_fitted_temperatures(rank, expected):
    net = MetaTemperatureNet(3)
    if rank:  # as if it had been built otherwise: the first call must overwrite it
        nn.init.constant_(net.last.weight, 1.0)
    image, label = fitting_batch(rank)
    fit = TemperatureFit(SoftPseudoLabeler(net, weight="none"), meta_optimizer=torch.optim.SGD(net.parameters(), lr=1.0))

    def step(teacher=torch.exp, label=label):
        logits = one_hot(label, 3)
        return fit(image, label, image, logits, teacher=teacher, generator=generator(0))

    losses = [step().outer_loss_before for _ in range(2)]
    assert step(label=torch.zeros_like(label)).skipped.kind is SkipKind.UNJUDGED
    assert step(torch.log if rank else torch.exp).skipped.kind is SkipKind.NOT_FINITE  # NaN on one rank
    found = [*losses, *(parameter.detach() for parameter in net.parameters())]
    for one, other in zip(found, expected):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), atol=1e-6)

    step(label=label if rank else torch.zeros_like(label))  # judged on one rank alone
    same = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for parameter, value in zip(net.parameters(), same):
        value.copy_(parameter.detach())
        torch.distributed.broadcast(value, 0)
        assert torch.equal(value, parameter.detach())
    assert not all(torch.equal(value, other) for value, other in zip(same, expected[2:]))


def check_every_rank_blends_with_another_ones_image(rank):
    """Four ranks of one image: the first rank's draw decides for all, though the generators differ."""
    images = [torch.full((1, 3, 2, 2), float(10**i)) for i in range(4)]
    labels = [torch.full((1, 2, 2), i) for i in range(4)]
    weight = torch.ones(1, 2, 2)
    shifts = set()
    for seed in range(8):
        mine = DomainBatch(images[0], labels[0], images[rank], labels[rank], weight, weight.view(1, 1, 2, 2) > 0, 255, Ranks())
        judged = differing_blends(mine, generator=generator(100 * rank + seed))
        other = ((judged.image - 0.65 * images[rank]) / 0.35).log10().round()
        assert judged.image.shape == images[rank].shape
        shift = torch.randint(1, 4, (1,), generator=generator(seed)).item()
        assert bool((other == (rank - shift) % 4).all())
        assert torch.equal(judged.label, labels[rank])
        shifts.add(shift)
    assert len(shifts) == 3
    same = mine._replace(pseudo_label=labels[0])
    assert bool((differing_blends(same, generator=generator()).label == 255).all())  # all labels of all ranks are one


def fitting_batch(rank):
    image = randn(2, 3, 4, 4, seed=8 + rank).float()
    label = torch.randint(0, 3, (2, 4, 4), generator=generator(rank))
    return image, label


def test_two_ranks_fit_the_temperatures_of_the_whole_batch():
    """Of one process, by hand: the mean over the judged pixels of both batches."""
    net = MetaTemperatureNet(3)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    losses = []
    batches = [fitting_batch(rank) for rank in range(2)]
    judged = [label.masked_fill(label == label.flip(0), 255) for _, label in batches]
    share = torch.cat([label for _, label in batches]).flatten().bincount(minlength=3).double()
    weight = share / torch.cat(judged)[torch.cat(judged) != 255].bincount(minlength=3)
    for _ in range(2):
        total, count = 0.0, 0.0
        for (image, _), label in zip(batches, judged):
            z = torch.exp(0.65 * image + 0.35 * image.flip(0))
            costs = F.cross_entropy(z / net(z), label, weight=weight.float(), ignore_index=255, reduction="sum")
            total, count = total + costs, count + float(weight[label[label != 255]].sum())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float(total.detach()) / count)
    on_ranks(check_fitted_temperatures, [*losses, *(p.detach() for p in net.parameters())])
