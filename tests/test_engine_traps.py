"""What makes a hypergradient silently wrong, or an engine fail late: each has a guard, and each guard a test."""

import contextlib
import copy
import gc
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from problems import ENGINES, OPTIMIZERS, TOLERANCE, Student, distance, generator, problem, randn, really_step, with_history
from torch import nn
from torch.utils.checkpoint import checkpoint

from dacal_addon import hypergradient, soft_cross_entropy
from dacal_addon.engines import check_supported
from dacal_addon.engines.precision import without_tf32

LIVE = [engine for engine in ENGINES if engine != "higher"]  # engines whose passes run the live student
live_engine = pytest.mark.parametrize("engine", LIVE)
needs_torch_2 = pytest.mark.skipif(not hasattr(torch, "func"), reason="torch < 2 has neither fused attention nor forward AD")


def grads_of(student, engine, optimizer=None, wrap=lambda closure: closure):
    """The hypergradient of the shared problem, its closures wrapped."""
    net, inner, outer = problem()
    optimizer = OPTIMIZERS["AdamW"](student.parameters()) if optimizer is None else optimizer
    torch.manual_seed(0)
    arguments = (student, wrap(inner), wrap(outer), list(net.parameters()))
    return hypergradient(*arguments, optimizer=optimizer, engine=engine).grads


def with_layer(layer):
    """The shared student with one more layer on its features."""
    student = Student()
    student.dropout = layer
    return student.double()


@live_engine
def test_dropout_draws_the_same_masks_in_channels_last_too(engine):
    """torch.func.jvp draws others there: 40 % off."""

    class ChannelsLast(Student):
        def forward(self, image):
            return super().forward(image.contiguous(memory_format=torch.channels_last))

    student = ChannelsLast().to(memory_format=torch.channels_last)
    student.dropout = nn.Dropout(0.5)
    assert distance(grads_of(student, engine), grads_of(student, "higher")) <= TOLERANCE[engine]


@live_engine
def test_random_numbers_that_the_passes_do_not_share_are_found_out(engine):
    own = generator(3)

    class OwnNoise(nn.Module):
        def forward(self, x):
            return x * (1 + torch.randn(x.shape, generator=own, dtype=x.dtype))

    with pytest.raises(
        RuntimeError, match=r"one function of the student's parameters .*draw random numbers from global states"
    ):
        grads_of(with_layer(OwnNoise()), engine)


def test_differences_find_a_stop_gradient_that_they_cannot_see():
    image = randn(2, 3, 8, 8, seed=1)

    def stopping(closure):
        return lambda f: closure(f) + f(image).detach().pow(2).mean()

    with pytest.raises(RuntimeError, match=r"got slope .* where the inner gradient gives .*without detach"):
        grads_of(Student(), "finite_difference", wrap=stopping)


@live_engine
def test_a_loss_that_changes_from_call_to_call_is_found_out(engine):
    calls = []

    def drifting(closure):
        def run(f):
            calls.append(1)
            return closure(f) + 0.1 * len(calls)

        return run

    with pytest.raises(RuntimeError, match=r"got loss .* where the inner pass had"):
        grads_of(Student(), engine, wrap=drifting)


@needs_torch_2
@live_engine
def test_a_transformer_layer_in_eval_mode_computes_what_it_does_in_training(engine):
    """Without gradients it would take the inference kernel, which has no forward derivative."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                self.layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)

        def forward(self, x):
            return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)

    student = with_layer(Layer())
    optimizer = with_history(OPTIMIZERS["momentum"], student)
    student.eval()
    assert distance(grads_of(student, engine, optimizer), grads_of(student, "higher", optimizer)) <= TOLERANCE[engine]


class Attention(nn.Module):
    """Self-attention over the pixels, by the fused function or by torch's module."""

    def __init__(self, kind):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.qkv = nn.Linear(8, 24)
            self.module = nn.MultiheadAttention(8, 2, batch_first=True)
        self.kind = kind

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.kind == "module":
            tokens = tokens + self.module(tokens, tokens, tokens, need_weights=False)[0]
        else:
            q, k, v = self.qkv(tokens).view(n, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return tokens.transpose(1, 2).reshape(n, c, h, w)


@needs_torch_2
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["function", "module"])
@pytest.mark.parametrize("engine", ENGINES)
def test_fused_attention(engine, kind, training):
    """Has neither a second nor a forward derivative, and in eval mode, without gradients, another kernel yet."""
    student = with_layer(Attention(kind)).train(training)
    optimizer = with_history(OPTIMIZERS["AdamW"], student)
    net, inner, outer = problem()
    torch.manual_seed(0)
    got = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine=engine).grads
    bias, losses = net.last.bias, []
    for eps in (1e-4, -1e-4):
        bias.data += eps
        losses.append(outer(really_step(student, optimizer, inner)).item())
        bias.data -= eps
    assert got[-1].item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-5)
    assert distance(got, grads_of(student, "higher", optimizer)) <= TOLERANCE[engine]


class Doubling(torch.autograd.Function):
    """A custom operation without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Custom(nn.Module):
    def forward(self, x):
        return Doubling.apply(x)


class Warped(nn.Module):
    def forward(self, x):
        return F.grid_sample(
            x, F.affine_grid(0.9 * torch.eye(2, 3).double().expand(2, 2, 3), x.shape, False), align_corners=False
        )


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(0.2), nn.Tanh())

    def forward(self, x):
        if hasattr(torch, "func"):
            return checkpoint(self.inner, x, use_reentrant=True)
        return checkpoint(self.inner, x)


def normalised(how):
    """As in a network that has been trained for a while: spectral_norm's power iteration, of whose vectors autograd takes no
    derivative where differences do, has converged. At its random start the slope was 0.5 % off, on some processors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = how(nn.Conv2d(8, 8, 1))
    with torch.no_grad():
        for _ in range(200):
            layer(torch.zeros(1, 8, 1, 1))
    return layer


WITHOUT_FORWARD = {
    "custom": (Custom, "autograd.Function Doubling"),
    "grid_sample": (Warped, "grid_sampler_2d"),
    "re-entrant checkpoint": (Checkpointed, "autograd.Function CheckpointFunction"),
    "spectral_norm": (lambda: normalised(nn.utils.spectral_norm), "div_out|linalg|norm"),
}
without_forward = pytest.mark.parametrize("kind", WITHOUT_FORWARD)
quiet_checkpoint = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@needs_torch_2
@quiet_checkpoint
@without_forward
def test_auto_falls_back_once_and_names_the_operation(kind):
    make, name = WITHOUT_FORWARD[kind]
    student = with_layer(make())
    with pytest.raises(
        ValueError, match=rf"has a forward derivative \(engine 'forward'\), got .*({name}).*; choose engine='fin"
    ):
        grads_of(student, "forward")
    with pytest.warns(UserWarning, match=rf"goes on with 'finite_difference' for this student, because: .*({name})") as caught:
        first = grads_of(student, "auto")
    assert sum("goes on" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on with")
        again = grads_of(student, "auto")
    expected = grads_of(student, "finite_difference")
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, again, expected))


@quiet_checkpoint
@without_forward
def test_differences_need_nothing_of_an_operation(kind):
    make, _ = WITHOUT_FORWARD[kind]
    student = with_layer(make())
    if kind == "spectral_norm":
        student.dropout.eval()  # each pass begins with the live buffers, a real step leaves them to the next
    net, inner, outer = problem()
    optimizer = OPTIMIZERS["momentum"](student.parameters())
    torch.manual_seed(0)
    got = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine="finite_difference").grads
    bias, losses = net.last.bias, []
    for eps in (1e-4, -1e-4):
        bias.data += eps
        torch.manual_seed(0)
        updated = really_step(student, optimizer, inner)
        with torch.no_grad():
            losses.append(outer(updated).item())
        bias.data -= eps
    assert got[-1].item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-4)


@quiet_checkpoint
def test_re_entrant_checkpoints_leave_every_grad_alone():
    """They work with .backward() alone, which writes into all leaves that it meets."""
    student, other = with_layer(Checkpointed()), torch.ones(1, dtype=torch.float64, requires_grad=True)
    net, inner, outer = problem()
    for leaf in (*student.parameters(), *net.parameters(), other):
        leaf.grad = torch.full_like(leaf, 7.0)
    torch.manual_seed(0)
    got = hypergradient(
        student,
        lambda f: inner(f) * other.sum(),
        outer,
        list(net.parameters()),
        optimizer=OPTIMIZERS["SGD"](student.parameters()),
        engine="finite_difference",
    ).grads
    for leaf in (*student.parameters(), *net.parameters(), other):
        assert bool((leaf.grad == 7.0).all())
    plain = copy.deepcopy(student)
    plain.dropout = student.dropout.inner
    assert distance(got, grads_of(plain, "higher", OPTIMIZERS["SGD"](plain.parameters()))) <= 1e-6
    with pytest.raises(ValueError, match=r"without re-entrant checkpointing, .*engine 'higher'.*use_reentrant=False"):
        grads_of(student, "higher")


class FirstBlock(nn.Module):
    """Checkpointed where its input needs no gradient, with a dummy that does, so that the block is trained (pytorch#7617)."""

    def __init__(self, how="checkpoint"):
        super().__init__()
        self.student, self.how = Student(), how
        self.dummy = torch.ones(1, requires_grad=True)

    def forward(self, image):
        def block(x, _):
            return torch.tanh(self.student.norm(self.student.first(x)))

        if self.how == "plain":
            x = block(image, None)
        elif self.how == "reversible":
            x = Rerun.apply(image.detach().requires_grad_(), nn.Sequential(self.student.first, self.student.norm, nn.Tanh()))
        elif hasattr(torch, "func"):
            x = checkpoint(block, image, self.dummy, use_reentrant=True)
        else:
            x = checkpoint(block, image, self.dummy)
        x = torch.tanh(self.student.again(F.avg_pool2d(x, 2)))
        return F.interpolate(self.student.last(x), scale_factor=2, mode="bilinear", align_corners=False)


class Aside(nn.Module):
    """Keeps its parameter where no module looks."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 1.5).double())
        self.aside = [self.factor]

    def forward(self, x):
        return x * self.aside[0]


def without_tangents(kind):
    """A student whose forward-mode pass ends without an error, and with a wrong slope."""
    if kind == "re-entrant checkpoint":
        return FirstBlock()
    student = with_layer(Aside())
    student.dropout.aside = [student.dropout.factor]  # .double() has replaced it
    return student


@needs_torch_2
@pytest.mark.parametrize("kind", ["re-entrant checkpoint", "parameter kept aside"])
def test_auto_falls_back_after_a_whole_pass_with_labels_that_are_computed_once(kind):
    """As those of the bilevel step are: their graph is needed by the pass that fails, and again by those that follow."""
    student, results = without_tangents(kind), {}
    image, logits = randn(2, 3, 8, 8, seed=1), 3 * randn(2, 4, 8, 8, seed=3)
    for engine in ("finite_difference", "auto", "auto again"):
        net, _, outer = problem()
        label = (logits / net(logits)).softmax(1)
        torch.manual_seed(0)
        arguments = (student, lambda f, label=label: soft_cross_entropy(f(image), label), outer, list(net.parameters()))
        optimizer = OPTIMIZERS["AdamW"](student.parameters())
        expecting = pytest.warns(UserWarning, match="goes on with 'finite_difference'") if engine == "auto" else warns_not()
        with expecting:
            results[engine] = hypergradient(*arguments, optimizer=optimizer, engine=engine.split()[0])
    for result in results.values():
        assert result.engine == "finite_difference"
        assert all(torch.equal(a, b) for a, b in zip(result.grads, results["finite_difference"].grads))


@contextlib.contextmanager
def warns_not():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on with")
        yield


@needs_torch_2
@pytest.mark.parametrize(("how", "name"), [("checkpoint", "CheckpointFunction"), ("reversible", "Rerun")])
def test_tangents_that_a_checkpoint_loses_are_found_out_by_name(how, name):
    """Under autocast the slope, which may be a quarter off, does not show them."""
    student = FirstBlock(how).float()
    autocast = how == "checkpoint"  # the other's part would have no gradient there: torch keeps its casts from the first run
    net, inner, outer = problem(torch.float32)
    optimizer = OPTIMIZERS["SGD"](student.parameters())
    expected = rf"got autograd.Function {name}, which runs a part once more .*; choose engine='finite"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), pytest.raises(ValueError, match=expected):
        hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine="forward")


@needs_torch_2
def test_auto_lets_errors_of_the_host_through():
    """Also those that it meets in the forward-mode pass alone, after which it does not give up forward mode either."""
    student, calls = Student(), []

    def failing(closure):
        def run(f):
            calls.append(1)
            if len(calls) == 4:  # the first was the inner pass, the outer ones came next
                raise RuntimeError("the host's own")
            return closure(f)

        return run

    with warns_not(), pytest.raises(RuntimeError, match="the host's own"):
        grads_of(student, "auto", wrap=failing)
    with warns_not():
        assert all(torch.equal(a, b) for a, b in zip(grads_of(student, "auto"), grads_of(student, "forward")))


@quiet_checkpoint
def test_re_entrant_checkpoints_with_labels_from_outside_of_the_closure():
    student, image, logits = with_layer(Checkpointed()), randn(2, 3, 8, 8), randn(2, 4, 8, 8, seed=1)
    omega, optimizer = torch.ones(1, dtype=torch.float64, requires_grad=True), OPTIMIZERS["SGD"](student.parameters())
    outside, grads = (logits / omega).softmax(1), []
    for label in (lambda: outside, lambda: (logits / omega).softmax(1)):
        torch.manual_seed(0)
        result = hypergradient(
            student,
            lambda f, label=label: soft_cross_entropy(f(image), label()),
            lambda f: f(image).pow(2).mean(),
            [omega],
            optimizer=optimizer,
            engine="finite_difference",
        )
        grads.append(result.grads[0])
    assert distance([grads[0]], [grads[1]]) <= 1e-6


class Rerun(torch.autograd.Function):
    """Runs a module once more to go backward, as reversible blocks do, and writes the gradients of its parameters itself."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.module(x).backward(grad)
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return Rerun.apply(x, self.inner)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("engine", ["finite_difference", "auto", "forward", "higher"])
def test_custom_functions_that_train_parameters_aside(engine, twice):
    """Their gradients are in no graph: `torch.autograd.grad` does not see them, and `.grad` has them."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.reversible = Reversible()

        def forward(self, x):
            return self.reversible(x) + (self.reversible.inner(x) if twice else 0)

    class Plain(Both):
        def forward(self, x):
            return (2 if twice else 1) * self.reversible.inner(x)

    student, plain = with_layer(Both()), with_layer(Plain())
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    if engine in ("higher", "forward"):
        if engine in ENGINES:
            with pytest.raises(ValueError, match="backward pass of its own" if engine == "higher" else "Function Rerun"):
                grads_of(student, engine)
    else:
        falling = engine == "auto" and hasattr(torch, "func")
        with pytest.warns(UserWarning, match="Function Rerun") if falling else warns_not():
            got = grads_of(student, engine)
        assert distance(got, grads_of(plain, "higher")) <= 1e-6
    assert all(bool((parameter.grad == 7.0).all()) for parameter in student.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_custom_functions_behind_which_there_is_only_an_image(engine):
    """`torch.autograd.grad` leaves their backward passes out; a host's `.backward()` does not."""
    student, plain = FirstBlock("reversible"), FirstBlock("plain")
    for each in (student, plain):
        each.student.norm.eval()  # which would count twice in the one that runs twice
    if engine == "finite_difference":
        assert distance(grads_of(student, engine), grads_of(plain, "higher")) <= 1e-6
    else:
        with pytest.raises(ValueError, match="backward pass of its own" if engine == "higher" else "Function Rerun"):
            grads_of(student, engine)
    assert all(parameter.grad is None for parameter in student.parameters())


@live_engine
def test_only_the_passes_with_a_gradient_keep_a_graph_of_the_student(engine):
    kept = []

    def noting(closure):
        def run(f):
            def student(image):
                logits = f(image)
                kept.append(logits.requires_grad)
                return logits

            return closure(student)

        return run

    grads_of(Student(), engine, wrap=noting)
    assert kept == [True, False, True] + [False] * (1 if engine == "forward" else 2)


@needs_torch_2
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_forward_mode_through_every_kind_of_batch_norm(training, affine, tracking):
    norm = nn.BatchNorm2d(8, affine=affine, track_running_stats=tracking, momentum=None if affine else 0.3)
    student = with_layer(nn.Sequential(norm, nn.Tanh()))
    student.dropout.train(training)
    optimizer = with_history(OPTIMIZERS["momentum"], student)
    student.dropout.train(training)
    if affine:
        norm.bias.requires_grad_(False)  # a tangent for one of the two
    assert distance(grads_of(student, "forward", optimizer), grads_of(student, "higher", optimizer)) <= 1e-10


@pytest.mark.skipif(not hasattr(getattr(torch.autograd, "graph", None), "saved_tensors_hooks"), reason="torch < 1.10")
@live_engine
def test_the_students_input_may_depend_on_the_meta_parameters(engine):
    """Then the directional pass saves weights, which are back at their own values before its backward pass."""
    student, image = Student(), randn(2, 3, 8, 8)
    omega, optimizer, grads = torch.full((1,), 0.7).double().requires_grad_(), OPTIMIZERS["AdamW"](student.parameters()), []
    for each in ("higher", engine):
        torch.manual_seed(0)
        result = hypergradient(
            student,
            lambda f: f(image * omega + omega.pow(2) * image.flip(-1)).pow(2).mean(),
            lambda f: f(image).sigmoid().mean(),
            [omega],
            optimizer=optimizer,
            engine=each,
        )
        grads.append(result.grads)
    assert distance(grads[1], grads[0]) <= TOLERANCE[engine]


@live_engine
def test_parameters_that_share_memory_get_their_own_values_back(engine):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = nn.Parameter(randn(3, 3))
            self.part = nn.Parameter(self.whole.data[:1])

        def forward(self, x):
            return (x @ self.whole) * self.part

    student, omega, x = Shared(), torch.ones(1, dtype=torch.float64, requires_grad=True), randn(4, 3, seed=1)
    before, optimizer = student.whole.detach().clone(), torch.optim.SGD(student.parameters(), lr=0.1)
    arguments = (student, lambda f: (f(x) - omega).pow(2).sum(), lambda f: f(x).pow(2).sum(), [omega])
    with contextlib.suppress(RuntimeError):  # whether or not the engine finds out that its passes differ
        hypergradient(*arguments, optimizer=optimizer, engine=engine)
    assert torch.equal(student.whole, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_that_a_pass_registers_and_tensors_that_it_changes_are_put_back(engine):
    class Lazy(Student):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", None)
            self.steps = torch.zeros(1)

        def forward(self, image):
            logits = super().forward(image)
            self.mean = logits.mean().detach()
            self.register_buffer("late", logits.detach().clone())
            self.steps += 1
            return logits

    student = Lazy()
    if engine != "higher":  # which cannot copy such a student's buffers
        grads_of(student, engine)
    assert (student.mean, float(student.steps)) == (None, 0.0)
    assert "late" not in student._buffers


def compiled(student, backend):
    torch._dynamo.reset()
    return torch.compile(student, backend=backend)


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch < 2 does not compile")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("engine", [*LIVE, "auto"])
def test_compiled_students(engine, backend):
    student = Student()
    student.dropout.p = 0.0
    optimizer = with_history(OPTIMIZERS["AdamW"], student)
    expected = grads_of(student, "higher", optimizer)
    if engine == "auto":
        student.compile(backend=backend)  # in place
        got = grads_of(student, engine, optimizer)
    else:
        got = grads_of(compiled(student, backend), engine, optimizer)
    assert distance(got, expected) <= 1e-6


class Framework(nn.Module):
    """A student that is entered through a method, as mmseg's are."""

    def __init__(self):
        super().__init__()
        self.backbone = Student()

    def encode_decode(self, image, metas):
        return self.backbone(image)

    def forward(self, image, metas, return_loss=True):
        raise RuntimeError("the host does not come in here")


def test_methods_other_than_forward():
    def entering(closure):
        return lambda f: closure(lambda image: f.encode_decode(image, []))

    expected = grads_of(Student(), "higher")
    for engine in LIVE:
        assert distance(grads_of(Framework(), engine, wrap=entering), expected) <= TOLERANCE[engine]
    with pytest.raises(AttributeError, match=r"by calling f .*got f\.encode_decode; choose engine='forward' or"):
        grads_of(Framework(), "higher", wrap=entering)


@live_engine
def test_forward_hooks_and_forwards_of_instances_are_part_of_the_student(engine):
    class Doubled(Student):
        def forward(self, image):
            return 3 * super().forward(image)

    expected = grads_of(Doubled(), "higher")
    hooked, overridden = Student(), Student()
    hooked.register_forward_hook(lambda module, inputs, output: 3 * output)
    plain = overridden.forward
    overridden.forward = lambda image: 3 * plain(image)
    for student in (hooked, overridden):
        with pytest.raises(ValueError, match="engine 'higher'"):
            grads_of(student, "higher")
        assert distance(grads_of(student, engine), expected) <= TOLERANCE[engine]


class Hooking(Student):
    """Registers a hook at its first pass, as transformers' models do; this one counts for the result."""

    def forward(self, image):
        if not hasattr(self, "installed"):
            self.installed = True
            if hasattr(torch, "func"):  # torch 2 notes in a dict of its own that this one takes the keyword arguments too
                self.last.register_forward_hook(lambda module, inputs, kwargs, output: 3 * output, with_kwargs=True)
            else:
                self.last.register_forward_hook(lambda module, inputs, output: 3 * output)
        return super().forward(image)


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_that_the_first_pass_registers(engine):
    class Tripled(Student):
        def forward(self, image):
            return 3 * super().forward(image)

    student = Hooking()
    got = grads_of(student, engine)
    assert distance(got, grads_of(Tripled(), "higher")) <= TOLERANCE[engine]
    assert not student.last._forward_hooks
    image = randn(2, 3, 8, 8, seed=1)
    with torch.no_grad():
        assert torch.allclose(student.eval()(image), Tripled().eval()(image))
    assert len(student.last._forward_hooks) == 1
    student.train()
    if engine == "higher":
        with pytest.raises(ValueError, match=r"a student without hooks .*module 'last' \(Conv2d\)"):
            grads_of(student, engine)
    else:
        assert all(torch.equal(a, b) for a, b in zip(grads_of(student, engine), got))
        assert len(student.last._forward_hooks) == 1


@live_engine
def test_parameters_that_a_pass_registers_do_not_stay(engine):
    class Growing(Student):
        def forward(self, image):
            if not hasattr(self, "scale"):
                self.scale = nn.Parameter(1.5 * torch.ones(1, dtype=torch.float64))
            return self.scale * super().forward(image)

    class Scaled(Student):
        def forward(self, image):
            return 1.5 * super().forward(image)

    student = Growing()
    assert distance(grads_of(student, engine), grads_of(Scaled(), "higher")) <= TOLERANCE[engine]
    assert not hasattr(student, "scale")


def test_a_student_whose_copy_does_not_run_is_named():
    """transformers' models look themselves up by their class, of which the copy's is not."""
    known = {"LooksUp": 1.0}

    class LooksUp(Student):
        def forward(self, image):
            return known[type(self).__name__] * super().forward(image)

    with pytest.raises(ValueError, match=r"whose copy runs \(engine 'higher' .*got KeyError: .*; choose engine='forward' or"):
        grads_of(LooksUp(), "higher")
    after = torch.get_rng_state()
    torch.manual_seed(0)  # as `grads_of` does
    assert torch.equal(torch.get_rng_state(), after)
    known.clear()
    with pytest.raises(KeyError):  # the student's own
        grads_of(LooksUp(), "higher")


def test_modules_at_two_places_leave_the_buffers_of_the_others_where_they_belong():
    """`higher` copies them twice."""

    class Shared(nn.Sequential):
        def __init__(self):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                act, layers = nn.Tanh(), [nn.Conv2d(8, 8, 1) for _ in range(2)]
            super().__init__(layers[0], act, nn.BatchNorm2d(8), layers[1], act, nn.BatchNorm2d(8))

    buffers = []
    for engine in ENGINES:
        student = with_layer(Shared())
        net, inner, outer = problem()
        optimizer = OPTIMIZERS["SGD"](student.parameters())
        torch.manual_seed(0)
        arguments = (student, inner, outer, list(net.parameters()))
        hypergradient(*arguments, optimizer=optimizer, engine=engine, backward=True)
        buffers.append([buffer.clone() for buffer in student.buffers()])
    for other in buffers[1:]:
        assert all(torch.allclose(a, b) for a, b in zip(buffers[0], other))


@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_on_gradients_are_refused(engine):
    student = Student()
    handle = student.first.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(ValueError, match=r"without hooks on gradients .*module 'first' \(Conv2d\)"):
        grads_of(student, engine)
    handle.remove()
    if hasattr(student.first, "register_full_backward_hook"):  # torch >= 1.8
        student.first.register_full_backward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="without hooks on gradients"):
            grads_of(student, engine)


@needs_torch_2
def test_a_parameter_that_forward_mode_cannot_replace_is_found_out():
    student = without_tangents("parameter kept aside")
    with pytest.raises(RuntimeError, match=r"\(engine 'forward'\), got slope"):
        grads_of(student, "forward")
    with pytest.warns(UserWarning, match=r"all passes of inner_loss to be one function"):
        got = grads_of(student, "auto")
    student.dropout.forward = lambda x: x * student.dropout.factor
    assert distance(got, grads_of(student, "forward")) <= 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_that_share_a_gradient_do_not_share_its_memory(engine):
    """Autograd hands one tensor to both terms of a sum, and an expanded one to a bias."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.full((3, 3), value).double()) for value in (0.1, 0.2, 0.3))

        def forward(self, x):
            return x @ (self.a + self.b) + self.c

    student, omega, x = Sum(), torch.ones(3, dtype=torch.float64, requires_grad=True), randn(3, 3)
    optimizer = torch.optim.SGD([{"params": [student.a, student.c]}, {"params": [student.b], "lr": 0.3}], lr=0.1)
    result = hypergradient(
        student,
        lambda f: (f(x) * omega).sum(),
        lambda f: f(x).sum(),
        [omega],
        optimizer=optimizer,
        engine=engine,
        backward=True,
    )
    # d w / d omega is -lr times what d inner / d w holds of omega: x^T 1 for a and b, 1 for c
    column = x.sum(0)
    expected = -(0.4 * float(column @ column) + 0.1 * 3) * torch.ones(3, dtype=torch.float64)
    assert distance(result.grads, [expected]) <= TOLERANCE[engine]
    for parameter in student.parameters():
        before = [other.grad.clone() for other in student.parameters()]
        parameter.grad.add_(1.0)
        changed = [not torch.equal(a, other.grad) for a, other in zip(before, student.parameters())]
        assert sum(changed) == 1


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="torch < 1.10 has no autocast on the CPU")
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_does_not_keep_the_weights_of_another_pass(engine):
    """Its cache holds bfloat16 copies of parameters until the outermost context ends."""
    student = Student().float()
    net, inner, outer = problem(torch.float32)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    results, image = [], randn(2, 3, 8, 8).float()
    for filled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if filled:
                student(image).sum().backward()
                student.zero_grad()
            torch.manual_seed(0)
            arguments = (student, inner, outer, list(net.parameters()))
            results.append(hypergradient(*arguments, optimizer=optimizer, engine=engine))
            with torch.no_grad():  # and afterwards the cache holds the live weights
                assert torch.equal(copy.deepcopy(student).eval()(image), student.eval()(image))
                student.train()
    assert results[0].outer_loss_after == results[1].outer_loss_after
    torch.manual_seed(0)
    exact = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer)
    moved = abs(exact.outer_loss_after - exact.outer_loss_before)
    assert abs(results[0].outer_loss_after - exact.outer_loss_after) < 0.1 * moved
    assert distance(results[1].grads, exact.grads) <= 0.1


def test_tf32_is_off_for_differences_on_a_gpu_and_then_as_it_was():
    """The switches exist without a GPU too; its parameters are played by a stand-in."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def switches():
        if hasattr(cudnn, "conv"):  # torch >= 2.9
            return [matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
        return [matmul.allow_tf32, cudnn.allow_tf32]

    before, inside = switches(), []

    def failing():
        with without_tf32([SimpleNamespace(is_cuda=True)]):
            inside.extend(switches())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert set(inside) in ({"ieee"}, {False})
    assert switches() == before != inside


def cast(closure):
    return lambda f: closure(lambda image: f(image.to(torch.bfloat16)).double())


@needs_torch_2
def test_half_precision_parameters_are_refused_by_differences():
    student = Student().to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"in float32 or float64 \(engine 'finite_difference'\), got torch.bfloat16; keep float32"
    ):
        grads_of(student, "finite_difference", wrap=cast)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("engine", "reason"),
    [("finite_difference", "engine 'finite_difference'"), ("auto", "engine 'auto' may have to go on with 'finite_difference'")],
)
def test_half_precision_parameters_are_refused_before_any_pass(engine, reason, half):
    student = Student().float()
    student.last.to(half)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=re.escape(f"({reason}), got {half}; keep float32 parameters and use autocast, or ")):
        check_supported(student, optimizer, engine=engine)
    check_supported(student, optimizer, engine="higher")
    student.last.requires_grad_(False)  # not moved by differences
    check_supported(student, optimizer, engine=engine)
    student.last.requires_grad_(True)
    check_supported(student, torch.optim.SGD(student.first.parameters(), lr=0.1), engine=engine)


@needs_torch_2
def test_forward_mode_takes_half_precision_parameters():
    """It is what the refusal of the others recommends."""
    student = Student()
    student.dropout.eval()
    exact = grads_of(student, "forward")
    assert distance(grads_of(copy.deepcopy(student).to(torch.bfloat16), "forward", wrap=cast), exact) <= 0.1


def held():
    """Live tensors that python sees, and the process's resident bytes (Linux), in which a graph that C++ keeps alive shows."""
    gc.collect()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    resident = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
    return sum(1 for entry in gc.get_objects() if issubclass(type(entry), torch.Tensor)), sum(resident)


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_does_not_grow_over_200_steps(engine):
    student = Student()
    net, inner, outer = problem(size=32)
    optimizer = with_history(OPTIMIZERS["AdamW"], student)
    before = after = (0, 0)
    for i in range(220):
        arguments = (student, inner, outer, list(net.parameters()))
        hypergradient(*arguments, optimizer=optimizer, engine=engine, backward=i % 2 == 0)
        optimizer.zero_grad()
        if i == 19:
            before = held()
    after = held()
    assert after[0] <= before[0]
    assert after[1] - before[1] < 30e6  # one pass's graph holds more than 0.5 MB: 200 of them, 100 MB


@pytest.mark.skipif(not hasattr(torch, "func"), reason="the profiler of old versions does not report memory this way")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
@pytest.mark.parametrize("width", [512, 300])
@live_engine
def test_at_most_three_copies_of_the_parameters_beside_a_plain_step(engine, width, kind, shared):
    """On a student that is nothing but parameters: layers for one pixel, too large for `_many` to join them, or joined."""
    from torch.profiler import ProfilerActivity, profile

    student = nn.Sequential(*(nn.Linear(width, width) for _ in range(30 if width == 512 else 90)))
    optimizer = OPTIMIZERS[kind](student.parameters())
    x, omega = torch.ones(1, width), torch.ones(1, requires_grad=True)
    size = sum(4 * parameter.numel() for parameter in student.parameters())

    def plain():
        optimizer.zero_grad()
        (student(x) - omega.detach()).pow(2).mean().backward()
        optimizer.step()

    def meta():
        optimizer.zero_grad()
        hypergradient(
            student,
            lambda f: (f(x) - omega).pow(2).mean(),
            lambda f: f(x).pow(2).mean(),
            [omega],
            optimizer=optimizer,
            engine=engine,
            backward=shared,
        )

    def peak(work):
        """Of what is allocated while the work runs, from the allocator's own reports."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        held, highest = 0, 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                highest = max(highest, held)
        return highest

    plain(), meta()
    optimizer.zero_grad()
    assert size > 30e6
    assert peak(plain) >= 0.9 * size  # the gradients: the reports are there
    optimizer.zero_grad()
    # Three copies, and the temporaries of one layer of thirty, or of what is joined.
    assert peak(meta) <= 3.4 * size + (20e6 if width == 300 else 0)
