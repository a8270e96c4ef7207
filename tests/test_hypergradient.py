"""What every engine promises: the exact hypergradient, and a host that is left as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from problems import (
    ENGINES,
    OPTIMIZERS,
    TOLERANCE,
    Student,
    assert_same,
    distance,
    problem,
    randn,
    really_step,
    snapshot,
    with_history,
)
from torch import nn

from dacal_addon import Hypergradient, hypergradient

every_engine = pytest.mark.parametrize("engine", ENGINES)


def outer_after(student, optimizer, inner, outer, clip_norm=None):
    """The outer loss after a real step of the real optimizer, from the present random state, which is left as it is."""
    states = torch.get_rng_state()
    updated = really_step(student, optimizer, inner, clip_norm)
    with torch.no_grad():
        value = outer(updated).item()
    torch.set_rng_state(states)
    return value


@every_engine
@pytest.mark.parametrize("clip_norm", [None, 0.01], ids=["", "clipped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_finite_differences_through_the_real_optimizer(kind, clip_norm, engine):
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS[kind], student)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    optimizer.step()
    scheduler.step()
    torch.manual_seed(0)
    result = hypergradient(
        student, inner, outer, list(net.parameters()), optimizer=optimizer, engine=engine, clip_norm=clip_norm
    )
    assert result.engine == engine
    after = outer_after(student, optimizer, inner, outer, clip_norm)
    assert result.outer_loss_after.item() == pytest.approx(after, rel=1e-12)
    eps, got, expected = 1e-4, [], []
    for parameter, grad in zip(net.parameters(), result.grads):
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 3)):
            entry = parameter.data.view(-1)
            value, losses = float(entry[index]), []
            for sign in (1, -1):
                entry[index] = value + sign * eps
                losses.append(outer_after(student, optimizer, inner, outer, clip_norm))
            entry[index] = value
            expected.append((losses[0] - losses[1]) / (2 * eps))
            got.append(float(grad.view(-1)[index]))
    assert np.linalg.norm(expected) > 0
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "higher"])
@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6], ids=["", "clipped", "below the limit"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_engines_agree(kind, clip_norm, engine):
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS[kind], student)
    grads = []
    for each in ("higher", engine):
        torch.manual_seed(0)
        arguments = (student, inner, outer, list(net.parameters()))
        grads.append(hypergradient(*arguments, optimizer=optimizer, engine=each, clip_norm=clip_norm).grads)
    assert distance(grads[1], grads[0]) <= TOLERANCE[engine]


@every_engine
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_quadratic_has_the_closed_form(momentum, engine):
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
        engine=engine,
    )
    gradient = a.T @ (a @ w - b @ omega.detach())
    updated = w - 0.1 * gradient  # the first step of momentum is plain
    assert distance(result.grads, [0.1 * b.T @ a @ (updated - c)]) <= TOLERANCE[engine]
    assert result.outer_loss_before.item() == pytest.approx(float((w - c).pow(2).sum() / 2))
    assert result.outer_loss_after.item() == pytest.approx(float((updated - c).pow(2).sum() / 2))


@every_engine
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "AMSGrad"])
def test_the_first_step_of_adam_has_the_closed_form(kind, engine):
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
        engine=engine,
    )
    gradient = (w - omega.detach()).abs()
    assert distance(result.grads, [lr * eps / (gradient + eps).pow(2)]) <= TOLERANCE[engine]


@every_engine
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_float32_agrees_with_float64(kind, engine):
    student, grads = Student().float(), {}
    student.dropout.eval()  # draws other masks in another precision
    optimizer = with_history(OPTIMIZERS[kind], student)
    for dtype, each in ((torch.float32, engine), (torch.float64, "higher")):
        twin = copy.deepcopy(student).to(dtype)
        twin_optimizer = with_history(OPTIMIZERS[kind], twin, steps=0)
        twin_optimizer.load_state_dict(optimizer.state_dict())
        net, inner, outer = problem(dtype)
        grads[dtype] = hypergradient(twin, inner, outer, list(net.parameters()), optimizer=twin_optimizer, engine=each).grads
    # Differences in float32 round by the processor's kernels: 3e-4 on one machine, 1.1e-3 on another (measured).
    assert distance(grads[torch.float32], grads[torch.float64]) <= (3e-3 if engine == "finite_difference" else 1e-5)


class Boom(Exception):
    pass


@every_engine
@pytest.mark.parametrize("kind", ["SGD", "momentum", "AMSGrad"])
@pytest.mark.parametrize(
    "where",
    ["nowhere", "under no_grad", "inner 1 before", "inner 1 after", "inner 2 after", "outer 1 before", "outer 2 before"],
)
def test_the_host_is_left_bit_for_bit_as_it_was(kind, where, engine):
    if where == "inner 2 after" and engine == "higher":
        return  # which runs the inner loss once
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
            if where == f"{name} {calls.count(name)} before":
                raise Boom
            loss = closure(f)
            if where == f"{name} {calls.count(name)} after":
                raise Boom
            return loss

        return run

    before = snapshot(student, optimizer, net)
    arguments = (student, noisy(inner, "inner"), noisy(outer, "outer"), list(net.parameters()))
    options = {"optimizer": optimizer, "engine": engine}
    if where == "under no_grad":
        with torch.no_grad():
            hypergradient(*arguments, **options)
    elif where == "nowhere":
        hypergradient(*arguments, **options)
    else:
        with pytest.raises(Boom):
            hypergradient(*arguments, **options, backward=True)
    assert_same(before, snapshot(student, optimizer, net))


@every_engine
def test_every_pass_draws_the_same_dropout_masks_and_starts_from_the_live_buffers(engine):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
            means.append((float(self.passes), self.net[1].running_mean.detach().clone()))
            return y

    spy = Spy()
    optimizer = torch.optim.SGD(spy.parameters(), lr=1e-5)

    def loss(f):
        return (f(image) * omega).pow(2).sum()

    hypergradient(spy, loss, lambda f: f(image).pow(2).sum(), [omega], optimizer=optimizer, engine=engine)
    assert len(seen) == {"higher": 3, "forward": 4, "finite_difference": 5}[engine]
    assert bool(seen[0].any())
    for mask, (passes, mean) in zip(seen[1:], means[1:]):
        assert torch.equal(mask, seen[0])
        assert passes == means[0][0] == 1
        np.testing.assert_allclose(mean, means[0][1], rtol=0.05, atol=1e-3)
    assert float(spy.passes) == 0


@every_engine
def test_a_closure_that_runs_the_live_student_leaves_it_alone_and_is_refused_where_it_cannot_work(engine):
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS["SGD"], student)
    image = randn(2, 3, 8, 8, seed=1)
    student.dropout.eval()
    pending = student(image).sum()  # the host has a graph that is still to run backward
    before = snapshot(student, optimizer, net)

    def consistent(f):
        return inner(f) + 0.1 * (f(image) * student(image).detach()).mean()

    arguments = (student, consistent, outer, list(net.parameters()))
    if engine != "finite_difference":
        got = hypergradient(*arguments, optimizer=optimizer, engine=engine).grads
        assert distance(got, hypergradient(*arguments, optimizer=optimizer, engine="higher").grads) <= 1e-10
    else:  # which moves the detached student too
        with pytest.raises(
            RuntimeError, match=r"all passes of inner_loss to be one function .*reach the student only through f"
        ):
            hypergradient(*arguments, optimizer=optimizer, engine=engine)
    assert_same(before, snapshot(student, optimizer, net))
    pending.backward()


@every_engine
def test_what_modules_note_down_is_forgotten(engine):
    class Noting(Student):
        def __init__(self):
            super().__init__()
            self.seen, self.by_name, self.last_mean = ["before"], {}, None

        def forward(self, image):
            logits = super().forward(image)
            self.seen.append(logits)
            self.by_name["logits"] = logits
            self.last_mean, self.new = logits.mean(), 1
            return logits

    student = Noting()
    net, inner, outer = problem()
    optimizer = OPTIMIZERS["SGD"](student.parameters())
    seen = student.seen
    hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine=engine)
    assert (student.seen, student.by_name, student.last_mean) == (["before"], {}, None)
    assert student.seen is seen
    assert not hasattr(student, "new")


@every_engine
def test_optimizer_may_own_more_than_the_student_and_state_may_be_partial(engine):
    student, extra = Student(), nn.Linear(2, 2).double()
    net, inner, outer = problem()
    results = []
    for parameters in (list(student.parameters()), [*extra.parameters(), *student.parameters(), *net.parameters()]):
        optimizer = torch.optim.AdamW(parameters, lr=0.02)
        torch.manual_seed(0)
        results.append(hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine=engine))
    for a, b in zip(results[0].grads, results[1].grads):
        assert torch.equal(a, b)


@every_engine
def test_momentum_switched_on_after_the_first_step(engine):
    """torch 1.12 to 2.2 leave `momentum_buffer: None` in the state of plain SGD."""
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS["SGD"], student)
    for parameter in student.parameters():
        optimizer.state[parameter] = {"momentum_buffer": None}
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    torch.manual_seed(0)
    result = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine=engine)
    optimizer.state.clear()  # the same to all of them, and the only form that torch 1.7 knows
    updated = really_step(student, optimizer, inner)
    with torch.no_grad():
        assert outer(updated).item() == pytest.approx(result.outer_loss_after.item(), rel=1e-12)


@every_engine
def test_uninfluential_meta_parameters_get_zeros(engine):
    student = Student()
    net, inner, outer = problem()
    lonely = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = OPTIMIZERS["SGD"](student.parameters())
    result = hypergradient(student, inner, outer, [lonely, *net.parameters()], optimizer=optimizer, engine=engine)
    assert isinstance(result, Hypergradient)
    assert result.grads[0].tolist() == [0, 0, 0]
    assert not any(grad.requires_grad for grad in result.grads)


@every_engine
def test_the_outer_loss_may_depend_on_the_meta_parameters_itself(engine):
    """d/d omega of outer(w'(omega)) + 3 omega is that of the first term plus 3."""
    student, omega = nn.Linear(1, 1, bias=False).double(), torch.ones(1, dtype=torch.float64, requires_grad=True)
    one, optimizer = torch.ones(1, 1, dtype=torch.float64), torch.optim.SGD(student.parameters(), lr=0.1)
    grads = [
        hypergradient(
            student,
            lambda f: (f(one) - omega).pow(2).sum(),
            lambda f, prior=prior: f(one).pow(2).sum() + prior * omega.sum(),
            [omega],
            optimizer=optimizer,
            engine=engine,
        ).grads[0]
        for prior in (0.0, 3.0)
    ]
    np.testing.assert_allclose(grads[1] - grads[0], [3.0], rtol=1e-9)


@every_engine
def test_without_the_loss_before_nothing_else_changes(engine):
    student = Student()
    net, inner, outer = problem()
    calls, optimizer = [], OPTIMIZERS["AdamW"](student.parameters())

    def counted(f):
        calls.append(1)
        return outer(f)

    results = []
    for measure in (True, False):
        torch.manual_seed(0)
        arguments = (student, inner, counted, list(net.parameters()))
        results.append(hypergradient(*arguments, optimizer=optimizer, engine=engine, measure_before=measure))
    assert len(calls) == 3
    assert np.isnan(results[1].outer_loss_before.item())
    assert results[0].outer_loss_after == results[1].outer_loss_after
    assert all(torch.equal(a, b) for a, b in zip(results[0].grads, results[1].grads))
    with torch.no_grad():
        torch.manual_seed(0)
        before = copy.deepcopy(student)
        assert results[0].outer_loss_before.item() == pytest.approx(outer(before).item(), rel=1e-12)


@every_engine
def test_backward_is_the_hosts_own_pass(engine):
    """`.grad` on top of what is there, buffers and random states, as after the host's own pass; and the same hypergradient."""
    results, students = [], []
    net, inner, outer = problem()
    for shared in (False, True):
        student = Student()
        optimizer = with_history(OPTIMIZERS["AdamW"], student)
        student(randn(2, 3, 8, 8, seed=9)).sum().backward()  # the source pass
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        results.append(
            hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine=engine, backward=shared)
        )
        if not shared:
            inner(student).backward()
            net.zero_grad()
        students.append(snapshot(student, optimizer, net))
    for name in ("parameters", "buffers", "grad", "optimizer", "torch", "numpy", "training"):
        assert students[0][name] == students[1][name], name
    assert results[0].inner_loss.item() == results[1].inner_loss.item()
    assert all(torch.equal(a, b) for a, b in zip(results[0].grads, results[1].grads))


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
        (lambda: {"engine": "magic"}, ValueError, r"engine to be one of 'higher', 'forward', .*, got 'magic'"),
        (lambda: {"meta": []}, ValueError, r"at least one meta parameter, got none"),
        (lambda: {"meta": [torch.ones(1)]}, ValueError, r"requires grad, got float32 \(1,\) without grad"),
        (lambda: {"meta": [3.0]}, TypeError, r"meta_parameters\[0\].*got float"),
        (lambda: {"student": lambda x: x}, TypeError, r"a torch.nn.Module, got function"),
        (
            lambda: {"student": nn.DataParallel(plain()[0])},
            ValueError,
            r"unwrapped student, got DataParallel; pass student.module",
        ),
        (lambda: {"student": Compiled(1, 1).double()}, ValueError, r"uncompiled student .*got a compiled module '\(root\)'"),
        (lambda: {"student": compiled_inside()}, ValueError, r"uncompiled student .*got a compiled module '0'"),
        (
            lambda: {"student": hooked_parameter()},
            ValueError,
            r"without hooks on gradients.*got a hook on module '0' \(Linear\)",
        ),
        (lambda: {"student": hooked()}, ValueError, r"without hooks.*got a hook on module '0' \(Linear\)"),
        (lambda: {"student": overridden()}, ValueError, r"got a forward set on module '0'"),
        (lambda: {"optimizer": torch.optim.RMSprop}, TypeError, r"SGD, torch.optim.Adam, .*RMSprop; pass update_rule"),
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
