"""Several processes, on gloo: uneven shares of the images sum to the statistics of one process."""

import os
import tempfile

import pytest
import torch
from oracles import predictions

from dacal_addon.metrics import CalibrationStats

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
# Images of each rank: uneven, in any order, and the first has none that counts.
SHARES = {2: [[6], [0, 1, 2, 3, 4, 5]], 3: [[6], [4, 0], [1, 2, 3, 5]]}
OPTIONS = {"input": "logits", "classwise": True, "per_image": True}


def images():
    z, target = predictions(1, (7, 5, 20, 30), dtype=torch.float32)
    target[6] = 255
    return z, target


def worker(rank, size, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        check(rank, size)
    finally:
        torch.distributed.destroy_process_group()


def check(rank, size):
    z, target = images()
    whole = CalibrationStats(5, **OPTIONS)
    for share in SHARES[size]:
        whole.update(z[share], target[share])
    mine = SHARES[size][rank]
    stats = CalibrationStats(5, **OPTIONS)
    for i in mine:
        stats.update(z[i : i + 1], target[i : i + 1])
    stats.sync()
    for part in ("totals", "images"):
        got, expected = (one.state_dict()[part] for one in (stats, whole))
        for name, value in expected.items():
            if value.dtype == torch.int64:
                assert torch.equal(got[name], value), name
            else:
                assert got[name].numpy() == pytest.approx(value.numpy(), rel=1e-12, abs=1e-12), name
    assert stats.images == 7
    assert stats.ece(reduce="image_mean") == pytest.approx(whole.ece(reduce="image_mean"), abs=1e-12)
    assert stats.ignored_pixels == whole.ignored_pixels >= 600
    drawn, expected = (one.bootstrap("miou", replicates=20).samples for one in (stats, whole))
    assert torch.equal(drawn, expected)
    for call in (stats.sync, lambda: stats.update(z, target)):
        with pytest.raises(RuntimeError, match=r"sync: expected counts that were not|update: expected counts of this process"):
            call()
    stats.reset()
    stats.sync()  # nothing anywhere
    assert (stats.pixels, stats.images) == (0, 0)

    alone = [torch.distributed.new_group([i]) for i in range(size)][rank]
    stats = CalibrationStats(5, **OPTIONS)
    stats.update(z, target)
    stats.sync(alone)
    assert stats.images == 7
    stats.update(z, target)  # a group of one has summed nothing

    for different in ({"n_bins": 15 + rank}, {"ignore_index": tuple(range(254, 255 + rank))}):
        others = CalibrationStats(5, input="logits", **different)
        with pytest.raises(ValueError, match="sync: expected the same settings in every process, got CalibrationStats"):
            others.sync()


@pytest.mark.parametrize("size", SHARES)
def test_the_sum_over_the_processes_is_that_of_one(size):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (size, os.path.join(folder, "store")), nprocs=size)


def test_one_process_needs_nothing_of_torch_distributed():
    z, target = images()
    stats = CalibrationStats(5, **OPTIONS)
    for _ in range(2):
        stats.update(z, target)
        stats.sync()
    assert stats.images == 14
