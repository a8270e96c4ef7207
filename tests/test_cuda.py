"""On a GPU: what a CPU gives, with TF32 as torch has it by default, and the GPU's random state left alone. CI has no GPU."""

import copy

import pytest
import torch
from problems import ENGINES, OPTIMIZERS, Student, distance, generator, problem, randn, with_history
from torch import nn

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, TemperatureFit, hypergradient
from dacal_addon.demo.network import SmallUNet
from dacal_addon.metrics import CalibrationStats, pixels
from dacal_addon.mixing import class_mask, cut_mask, mix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU = torch.device("cuda")
every_engine = pytest.mark.parametrize("engine", ENGINES)


def batch(seed=0):
    g = generator(seed)
    label = torch.randint(0, 5, (2, 4, 8), generator=g).repeat_interleave(8, 1).repeat_interleave(4, 2)
    label[:, :3] = 255
    return [x.to(GPU) for x in (torch.rand(2, 3, 32, 32, generator=g), label, torch.rand(2, 3, 32, 32, generator=g))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on loading its compiler
@pytest.mark.parametrize(
    ("backend", "judge", "elements"),  # several pieces an image, and one; a launch has none
    [("torch", "torch", 6000), ("torch", "torch", 4_000_000), ("compile", "compile", 4_000_000), (None, "triton", 6000)],
)
def test_metrics_count_the_same_pixels(backend, judge, elements, monkeypatch):
    monkeypatch.setitem(pixels._ELEMENTS, GPU.type, elements)
    logits, label = 4 * randn(3, 6, 40, 50).float(), torch.randint(0, 6, (3, 40, 50), generator=generator())
    label[0, :5] = 255
    on_cpu = CalibrationStats(6, input="logits", classwise=True, per_image=True)
    on_gpu = CalibrationStats(6, input="logits", classwise=True, per_image=True, backend=backend, device=GPU)
    for part in zip(logits.split(1), label.split(1)):
        on_cpu.update(*part)
        on_gpu.update(*(x.to(GPU) for x in part))
    assert on_gpu.judged_by == judge
    assert on_gpu.pixels == 3 * 40 * 50 - 5 * 50
    for metric in ("ece", "mce", "ks", "smece", "classwise_ece", "brier", "nll", "aurc", "mean_confidence", "accuracy", "miou"):
        assert getattr(on_gpu, metric)() == pytest.approx(getattr(on_cpu, metric)(), rel=1e-9), metric
    assert on_gpu.ece(reduce="image_mean") == pytest.approx(on_cpu.ece(reduce="image_mean"), rel=1e-9)


@pytest.mark.parametrize("each", [False, True])
def test_a_batch_is_one_launch_and_one_transfer(each):
    from torch.autograd import DeviceType  # not in torch 1.7
    from torch.profiler import ProfilerActivity, profile

    logits, label = 4 * randn(3, 6, 40, 50).float(), torch.randint(0, 6, (3, 40, 50), generator=generator())
    stats = CalibrationStats(6, input="logits", classwise=True, per_image=each)
    batch = logits.to(GPU), label.to(GPU)
    stats.update(*batch)  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        stats.update(*batch)
    names = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
    assert sum("_count" in name for name in names) == 1
    assert sum("Memcpy" in name for name in names) == 1
    assert len(names) <= 6  # beside these two: zeros, and a sum over the programs of each kind of number


@every_engine
@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
def test_hypergradient_is_the_cpus(kind, engine):
    found = []
    for device in ("cpu", GPU):
        student = Student()
        student.dropout.p = 0.0  # its masks are another generator's
        optimizer = with_history(OPTIMIZERS[kind], student)
        net, inner, outer = problem(device=device)
        student.to(device)
        optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to the parameters' device
        result = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine=engine)
        found.append([grad.cpu() for grad in result.grads])
    assert distance(found[1], found[0]) < {"finite_difference": 1e-5}.get(engine, 1e-9)


@pytest.fixture(params=["torch's default", "all TF32"])
def precision(request):
    """TF32 as it may be in a training script: cuDNN's is on by default."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = request.param == "all TF32" or before
    yield lambda: (matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    matmul.allow_tf32 = before


@every_engine
def test_a_meta_step_in_tf32_is_taken_and_close(precision, engine):
    """No engine takes TF32's rounding for another function of the parameters, and the switches are as they were."""
    switches = precision()
    found = []
    for dtype in (torch.float64, torch.float32):
        student = SmallUNet(5, seed=0).to(GPU, dtype)
        net = MetaTemperatureNet(5, sees="logits", kernel_size=3, generator=generator(1)).to(GPU, dtype)
        nn.init.constant_(net.last.weight, 0.05)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)  # a first step of Adam's is a sign, which rounding turns
        meta = torch.optim.SGD(net.parameters(), lr=1.0)
        labeler = SoftPseudoLabeler(net, weight="none")
        step = BilevelCalibrationStep(student, labeler, optimizer=optimizer, meta_optimizer=meta, warmup=0, engine=engine)
        source, label, target = batch()
        student.dropout.p = 0.0
        before = [p.detach().clone() for p in net.parameters()]
        logits = 3 * randn(2, 5, 32, 32, seed=3).to(GPU, dtype)
        result = step(source.to(dtype), label, target.to(dtype), logits, generator=generator())
        assert not result.skipped
        found.append([new.detach() - old for new, old in zip(net.parameters(), before)])
    assert distance(found[1], found[0]) < 0.1
    assert precision() == switches


@every_engine
def test_under_autocast_a_meta_step_is_taken(engine):
    student = SmallUNet(5, seed=0).to(GPU)
    net = MetaTemperatureNet(5, generator=generator(1)).to(GPU)
    labeler, meta = SoftPseudoLabeler(net, weight="none"), torch.optim.Adam(net.parameters(), lr=1e-2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    step = BilevelCalibrationStep(student, labeler, optimizer=optimizer, meta_optimizer=meta, warmup=0, engine=engine)
    before = copy.deepcopy(net.state_dict())
    source, label, target = batch()
    with torch.autocast("cuda", dtype=torch.float16):
        with torch.no_grad():
            logits = student(target)
        result = step(source, label, target, logits, generator=generator())
    assert not result.skipped
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("engine", [None, *ENGINES])
def test_leaves_the_gpus_random_state_and_buffers(engine):
    student = SmallUNet(5, seed=0).to(GPU)  # draws dropout masks on the GPU
    net = MetaTemperatureNet(5).to(GPU)
    meta = torch.optim.Adam(net.parameters(), lr=1e-2)
    source, label, target = batch()
    student(source)
    buffers, random = copy.deepcopy(dict(student.named_buffers())), torch.cuda.get_rng_state()
    with torch.no_grad():
        logits = copy.deepcopy(student)(target)
    torch.cuda.set_rng_state(random)
    if engine is None:
        result = TemperatureFit(net, meta)(student, target, logits.argmax(1), generator=generator())
    else:
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        labeler = SoftPseudoLabeler(net, weight="none")
        step = BilevelCalibrationStep(student, labeler, optimizer=optimizer, meta_optimizer=meta, warmup=0, engine=engine)
        result = step(source, label, target, logits, generator=generator())
    assert not result.skipped
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert all(torch.equal(value, buffers[name]) for name, value in student.named_buffers())


def test_a_generator_of_the_cpu_draws_the_cpus_masks_and_labels_are_the_same():
    source, label, target = batch()
    mask = class_mask(label, generator=generator(4))
    assert torch.equal(mask.cpu(), class_mask(label.cpu(), generator=generator(4)))
    assert torch.equal(mix(mask, source, target).cpu(), mix(mask.cpu(), source.cpu(), target.cpu()))
    assert torch.equal(
        cut_mask((2, 9, 9), generator=generator(4), device=GPU).cpu(),
        cut_mask((2, 9, 9), generator=generator(4), device=torch.device("cpu")),
    )
    net, logits = MetaTemperatureNet(5, generator=generator(1)).double(), 3 * randn(2, 5, 8, 8)
    nn.init.constant_(net.last.weight, 0.3)
    with torch.no_grad():
        expected = SoftPseudoLabeler(net)(logits)
        found = SoftPseudoLabeler(net.to(GPU))(logits.to(GPU))
    torch.testing.assert_close(found.soft_label.cpu(), expected.soft_label, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.weight.cpu(), expected.weight)
