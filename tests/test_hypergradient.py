"""The hypergradient against closed forms and against brute finite differences through the real optimizer."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dacal_addon import Hypergradient, MetaTemperatureNet, SoftPseudoLabeler, hypergradient, soft_cross_entropy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Student(nn.Module):
    """Convolution, BatchNorm, dropout, a frozen and an unused parameter, a tied weight and a skip at lower resolution."""

    def __init__(self, classes=4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.frozen = nn.Conv2d(8, 8, 1)
            self.dropout = nn.Dropout2d(0.3)
            self.tied = nn.Conv2d(8, 8, 1, bias=False)
            self.tied.weight = nn.Parameter(self.frozen.weight.detach().clone())
            self.again = nn.Conv2d(8, 8, 1, bias=False)
            self.again.weight = self.tied.weight
            self.last = nn.Conv2d(8, classes, 1)
            self.unused = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, image):
        x = torch.tanh(self.norm(self.first(image)))
        x = self.dropout(torch.tanh(self.tied(x) + self.frozen(x)))
        x = torch.tanh(self.again(F.avg_pool2d(x, 2)))
        return F.interpolate(self.last(x), scale_factor=2, mode="bilinear", align_corners=False)


def problem(student=None):
    """Closures as a host would write them: soft labels of a temperature net, uneven weights, hard outer labels."""
    image, outer_image = randn(2, 3, 8, 8, seed=1), randn(2, 3, 8, 8, seed=2)
    teacher_logits = 3 * randn(2, 4, 8, 8, seed=3)
    weight = torch.rand(2, 8, 8, generator=generator(4), dtype=torch.float64)
    weight[:, :2] = 0.0
    outer_label = torch.randint(0, 4, (2, 8, 8), generator=generator(5))
    outer_label[:, 3] = 255
    net = MetaTemperatureNet(4, hidden_channels=4, generator=generator(6)).double()
    with torch.no_grad():
        net.last.weight.copy_(0.1 * randn(1, 4, 1, 1, seed=7))
    labeler = SoftPseudoLabeler(net)

    def inner(f):
        return soft_cross_entropy(f(image), labeler(teacher_logits).soft_label, weight)

    def outer(f):
        return F.cross_entropy(f(outer_image), outer_label, ignore_index=255)

    return net, inner, outer


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.01, eps=1e-3),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, eps=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3),
}


def with_history(make, student, steps=3):
    """An optimizer with two param groups and a non-trivial state."""
    head = list(student.last.parameters())
    body = [p for p in student.parameters() if all(p is not q for q in head)]
    optimizer = make([{"params": body}, {"params": head}])
    optimizer.param_groups[1]["lr"] *= 0.5
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(student(randn(2, 3, 8, 8, seed=50 + i)), torch.zeros(2, 8, 8, dtype=torch.int64)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def really_step(student, optimizer, inner):
    """A copy of the student after one real step of a copy of the real optimizer."""
    student, optimizer = copy.deepcopy((student, optimizer))
    states = torch.get_rng_state()
    optimizer.zero_grad()
    inner(student).backward()
    optimizer.step()
    torch.set_rng_state(states)
    return student


def close(a, b, tolerance):
    a, b = torch.cat([x.flatten() for x in a]), torch.cat([x.flatten() for x in b])
    assert float((a - b).norm() / b.norm()) <= tolerance


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_finite_differences_through_the_real_optimizer(kind):
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS[kind], student)
    torch.manual_seed(0)
    result = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer)

    def outer_after():
        updated = really_step(student, optimizer, inner)
        before = torch.get_rng_state()
        with torch.no_grad():
            value = outer(updated).item()
        torch.set_rng_state(before)
        return value

    assert result.outer_loss_after.item() == pytest.approx(outer_after(), rel=1e-12)
    eps, got, expected = 1e-4, [], []
    for parameter, grad in zip(net.parameters(), result.grads):
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 3)):
            entry = parameter.data.view(-1)
            value, losses = float(entry[index]), []
            for sign in (1, -1):
                entry[index] = value + sign * eps
                losses.append(outer_after())
            entry[index] = value
            expected.append((losses[0] - losses[1]) / (2 * eps))
            got.append(float(grad.view(-1)[index]))
    assert np.linalg.norm(expected) > 0
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_quadratic_has_the_closed_form(momentum):
    """inner = |A w - B omega|^2 / 2 and outer = |w - c|^2 / 2: d outer / d omega = lr B^T A (w' - c) for SGD."""
    a, b, c, w = randn(4, 3, seed=1), randn(4, 2, seed=2), randn(3, seed=3), randn(3, seed=4)
    omega = randn(2, seed=5).requires_grad_()
    student = nn.Linear(3, 1, bias=False).double()
    student.weight.data.copy_(w.view(1, 3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=momentum)
    result = hypergradient(
        student,
        lambda f: (f(a).squeeze(1) - b @ omega).pow(2).sum() / 2,
        lambda f: (f(torch.eye(3, dtype=torch.float64)).squeeze(1) - c).pow(2).sum() / 2,
        [omega],
        optimizer=optimizer,
    )
    gradient = a.T @ (a @ w - b @ omega.detach())
    updated = w - 0.1 * gradient  # the first step of momentum is plain
    np.testing.assert_allclose(result.grads[0], 0.1 * b.T @ a @ (updated - c), rtol=1e-12, atol=1e-12)
    assert result.outer_loss_before.item() == pytest.approx(float((w - c).pow(2).sum() / 2))
    assert result.outer_loss_after.item() == pytest.approx(float((updated - c).pow(2).sum() / 2))


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "AMSGrad"])
def test_the_first_step_of_adam_has_the_closed_form(kind):
    """Without state Adam moves by lr * g / (|g| + eps): d w' / d g = -lr * eps / (|g| + eps)^2, and -lr / eps at g = 0."""
    lr, eps = 0.1, 0.5
    w, omega = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, 0.4, 0.5]).double().requires_grad_()
    student = nn.Linear(3, 1, bias=False).double()
    student.weight.data.copy_(w.view(1, 3))
    make = torch.optim.AdamW if kind == "AdamW" else torch.optim.Adam
    optimizer = make(student.parameters(), lr=lr, eps=eps, weight_decay=0.0, amsgrad=kind == "AMSGrad")
    eye = torch.eye(3, dtype=torch.float64)
    result = hypergradient(
        student,
        lambda f: (f(eye).squeeze(1) - omega).pow(2).sum() / 2,  # gradient w - omega, zero in the third place
        lambda f: f(eye).sum(),
        [omega],
        optimizer=optimizer,
    )
    gradient = (w - omega.detach()).abs()
    np.testing.assert_allclose(result.grads[0], lr * eps / (gradient + eps).pow(2), rtol=1e-10, atol=1e-12)


def test_float32_agrees_with_float64():
    grads = {}
    for dtype in (torch.float32, torch.float64):
        student = Student().to(dtype)
        net = MetaTemperatureNet(4, hidden_channels=4).to(dtype)
        torch.nn.init.constant_(net.last.weight, 0.1)
        z, image = (3 * randn(2, 4, 8, 8, seed=3)).to(dtype), randn(2, 3, 8, 8, seed=1).to(dtype)
        labeler, label = SoftPseudoLabeler(net), torch.randint(0, 4, (2, 8, 8), generator=generator(5))
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, eps=1e-3)
        torch.manual_seed(0)
        result = hypergradient(
            student.eval(),  # dropout draws other masks in another precision
            lambda f, z=z, x=image, lab=labeler: soft_cross_entropy(f(x), lab(z).soft_label),
            lambda f, x=image, y=label: F.cross_entropy(f(x), y),
            list(net.parameters()),
            optimizer=optimizer,
        )
        grads[dtype] = [grad.double() for grad in result.grads]
    close(grads[torch.float32], grads[torch.float64], 1e-3)


def snapshot(student, optimizer, net):
    """Everything that a meta-step must leave alone, as bytes and plain values."""

    def freeze(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.detach().numpy().tobytes()
        if isinstance(value, dict):
            return {key: freeze(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [freeze(entry) for entry in value]
        return value

    return {
        "parameters": {name: freeze(p) for name, p in student.named_parameters()},
        "identity": [id(p) for p in student.parameters()] + [id(b) for b in student.buffers()],
        "buffers": {name: freeze(b) for name, b in student.named_buffers()},
        "grad": [freeze(p.grad) for p in student.parameters()],
        "requires_grad": [p.requires_grad for p in student.parameters()],
        "optimizer": freeze(optimizer.state_dict()),
        "training": [module.training for module in student.modules()],
        "torch": freeze(torch.get_rng_state()),
        "numpy": freeze([part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]),
        "python": random.getstate(),
        "meta": [freeze(p) for p in net.parameters()],
        "meta grad": [freeze(p.grad) for p in net.parameters()],
        "enabled": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    for key, value in before.items():
        assert value == after[key], key


class Boom(Exception):
    pass


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("where", ["nowhere", "inner before", "inner after", "outer first", "outer second", "under no_grad"])
def test_the_host_is_left_bit_for_bit_as_it_was(kind, where):
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS[kind], student)
    student.norm.eval()  # a mixed pattern of training flags
    student(randn(2, 3, 8, 8, seed=9)).sum().backward()  # the host's source gradient lies in .grad
    calls = []

    def noisy(closure, name):
        def run(f):
            calls.append(name)
            torch.rand(3), np.random.rand(3), random.random()
            student.train()
            for module in (student.dropout, student.last):
                module.eval()
            if where == f"{name} before" or where == f"{name} first" or (where == f"{name} second" and calls.count(name) == 2):
                raise Boom
            loss = closure(f)
            if where == f"{name} after":
                raise Boom
            return loss

        return run

    before = snapshot(student, optimizer, net)
    arguments = (student, noisy(inner, "inner"), noisy(outer, "outer"), list(net.parameters()))
    if where == "under no_grad":
        with torch.no_grad():
            hypergradient(*arguments, optimizer=optimizer)
    elif where == "nowhere":
        hypergradient(*arguments, optimizer=optimizer)
    else:
        with pytest.raises(Boom):
            hypergradient(*arguments, optimizer=optimizer)
    assert_same(before, snapshot(student, optimizer, net))


def test_every_pass_draws_the_same_dropout_masks_and_starts_from_the_live_buffers():
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).double()
    omega = torch.ones(1, dtype=torch.float64, requires_grad=True)
    image, seen, means = randn(2, 3, 8, 8), [], []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = student
            self.register_buffer("passes", torch.zeros(1))

        def forward(self, x):
            y = self.net(x)
            self.passes += 1
            seen.append(y == 0)
            means.append((float(self.passes), self.net[1].running_mean.clone()))
            return y

    spy = Spy()
    optimizer = torch.optim.SGD(spy.parameters(), lr=1e-3)

    def loss(f):
        return (f(image) * omega).pow(2).sum()

    hypergradient(spy, loss, loss, [omega], optimizer=optimizer)
    assert len(seen) == 3
    assert bool(seen[0].any())
    for mask, (passes, mean) in zip(seen[1:], means[1:]):
        assert torch.equal(mask, seen[0])
        assert passes == means[0][0] == 1
        np.testing.assert_allclose(mean, means[0][1], rtol=0.05, atol=1e-3)
    assert float(spy.passes) == 0


def test_a_closure_that_runs_the_live_student_leaves_its_buffers_alone():
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS["SGD"], student)
    image = randn(2, 3, 8, 8, seed=1)
    pending = student(image).sum()  # the host has a graph that is still to run backward
    before = snapshot(student, optimizer, net)

    def consistent(f):
        return inner(f) + 0.1 * (f(image) - student(image).detach()).pow(2).mean()

    hypergradient(student, consistent, outer, list(net.parameters()), optimizer=optimizer)
    assert_same(before, snapshot(student, optimizer, net))
    pending.backward()


def test_what_modules_note_down_stays_with_the_copy():
    class Noting(Student):
        def __init__(self):
            super().__init__()
            self.seen, self.by_name = [], {}

        def forward(self, image):
            logits = super().forward(image)
            self.seen.append(logits)
            self.by_name["logits"] = logits
            return logits

    student = Noting()
    net, inner, outer = problem()
    hypergradient(student, inner, outer, list(net.parameters()), optimizer=OPTIMIZERS["SGD"](student.parameters()))
    assert (student.seen, student.by_name) == ([], {})


def test_optimizer_may_own_more_than_the_student_and_state_may_be_partial():
    student, extra = Student(), nn.Linear(2, 2).double()
    net, inner, outer = problem()
    results = []
    for parameters in (list(student.parameters()), [*extra.parameters(), *student.parameters(), *net.parameters()]):
        optimizer = torch.optim.AdamW(parameters, lr=0.02)
        torch.manual_seed(0)
        results.append(hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer))
    for a, b in zip(results[0].grads, results[1].grads):
        assert torch.equal(a, b)


def test_momentum_switched_on_after_the_first_step():
    """torch 1.12 to 2.2 leave `momentum_buffer: None` in the state of plain SGD."""
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS["SGD"], student)
    for parameter in student.parameters():
        optimizer.state[parameter] = {"momentum_buffer": None}
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    torch.manual_seed(0)
    result = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer)
    optimizer.state.clear()  # the same to all of them, and the only form that torch 1.7 knows
    updated = really_step(student, optimizer, inner)
    with torch.no_grad():
        assert outer(updated).item() == pytest.approx(result.outer_loss_after.item(), rel=1e-12)


def test_uninfluential_meta_parameters_get_zeros():
    student = Student()
    net, inner, outer = problem()
    lonely = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = OPTIMIZERS["SGD"](student.parameters())
    result = hypergradient(student, inner, outer, [lonely, *net.parameters()], optimizer=optimizer)
    assert isinstance(result, Hypergradient)
    assert result.grads[0].tolist() == [0, 0, 0]
    assert not any(grad.requires_grad for grad in result.grads)


@pytest.mark.skipif(not hasattr(F, "scaled_dot_product_attention"), reason="torch < 2 has no fused attention")
def test_fused_attention_is_replaced_by_one_with_a_second_derivative():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12).double()

        def forward(self, x):
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)  # one head; without the dimension torch takes the plain kernel
            return F.scaled_dot_product_attention(q, k, v)

    student, omega = Attention(), torch.ones(1, dtype=torch.float64, requires_grad=True)
    x, optimizer = randn(2, 5, 4), torch.optim.SGD(student.parameters(), lr=0.1)
    inner, outer = (lambda f: (f(x) - omega).pow(2).sum()), (lambda f: f(x).pow(2).sum())
    got = hypergradient(student, inner, outer, [omega], optimizer=optimizer).grads[0].item()
    losses = []
    for eps in (1e-5, -1e-5):
        omega.data += eps
        losses.append(outer(really_step(student, optimizer, inner)).item())
        omega.data -= eps
    assert got == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def plain():
    return nn.Linear(1, 1).double(), torch.ones(1, dtype=torch.float64, requires_grad=True)


def call(student=None, inner=None, outer=None, meta=None, optimizer=None, **options):
    default, omega = plain()
    student = default if student is None else student
    x = torch.ones(1, 1, dtype=torch.float64)
    parameters = student.parameters() if isinstance(student, nn.Module) else default.parameters()
    return hypergradient(
        student,
        inner or (lambda f: (f(x) * omega).sum()),
        outer or (lambda f: f(x).pow(2).sum()),
        [omega] if meta is None else meta,
        optimizer=optimizer(student.parameters()) if optimizer else torch.optim.SGD(parameters, lr=0.1),
        **options,
    )


def hooked():
    student = nn.Sequential(nn.Linear(1, 1)).double()
    student[0].register_forward_hook(lambda *_: None)
    return student


def hooked_parameter():
    student = nn.Sequential(nn.Linear(1, 1)).double()
    student[0].weight.register_hook(lambda grad: 2 * grad)
    return student


def compiled_inside():
    student = nn.Sequential(nn.Linear(1, 1)).double()
    student[0]._compiled_call_impl = student[0]._call_impl  # what student[0].compile() sets
    return student


def overridden():
    student = nn.Sequential(nn.Linear(1, 1)).double()
    student[0].forward = lambda x: x
    return student


class Compiled(nn.Linear):
    """What torch.compile returns carries its module under this name."""

    @property
    def _orig_mod(self):
        return self


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (lambda: {"engine": "magic"}, ValueError, r"engine to be one of 'higher', got 'magic'"),
        (lambda: {"meta": []}, ValueError, r"at least one meta parameter, got none"),
        (lambda: {"meta": [torch.ones(1)]}, ValueError, r"requires grad, got float32 \(1,\) without grad"),
        (lambda: {"meta": [3.0]}, TypeError, r"meta_parameters\[0\].*got float"),
        (lambda: {"student": lambda x: x}, TypeError, r"a torch.nn.Module, got function"),
        (
            lambda: {"student": nn.DataParallel(plain()[0])},
            ValueError,
            r"unwrapped student, got DataParallel; pass student.module",
        ),
        (lambda: {"student": Compiled(1, 1).double()}, ValueError, r"uncompiled student, got a compiled module '\(root\)'"),
        (lambda: {"student": compiled_inside()}, ValueError, r"uncompiled student, got a compiled module '0'"),
        (lambda: {"student": hooked_parameter()}, ValueError, r"without hooks.*got a hook on module '0' \(Linear\)"),
        (lambda: {"student": hooked()}, ValueError, r"without hooks.*got a hook on module '0' \(Linear\)"),
        (lambda: {"student": overridden()}, ValueError, r"got a forward set on module '0'"),
        (lambda: {"optimizer": torch.optim.RMSprop}, TypeError, r"SGD, torch.optim.Adam, .*RMSprop; train"),
        (lambda: {"inner": lambda f: None}, TypeError, r"inner_loss: a scalar tensor, got NoneType"),
        (
            lambda: {"outer": lambda f: f(torch.ones(2, 1).double())},
            ValueError,
            r"outer_loss to return a scalar, got float64 \(2, 1\)",
        ),
        (
            lambda: {"inner": lambda f: f(torch.ones(1, 1).double()).sum()},
            ValueError,
            r"got no dependence; compute the soft labels",
        ),
        (lambda: {"inner": lambda f: torch.ones(())}, ValueError, r"an inner_loss with gradient, got float32 \(\)"),
        (lambda: {"student": plain()[0].requires_grad_(False)}, ValueError, r"leave some parameters of the student trainable"),
    ],
)
def test_errors_name_expected_got_and_remedy(arguments, error, expected):
    with pytest.raises(error, match=expected):
        call(**arguments())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_maximize_is_refused(optimizer):
    def make(parameters):
        made = optimizer(parameters, lr=0.1)
        made.param_groups[0]["maximize"] = True
        return made

    with pytest.raises(ValueError, match=r"maximize=False .*got maximize=True in param group 0; negate the loss"):
        call(optimizer=make)
