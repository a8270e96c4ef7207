"""The closed forms against torch's own optimizers, and their slopes against autograd."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import OPTIMIZERS, Student, distance, generator, problem, really_step, with_history
from torch import nn

from dacal_addon import hypergradient
from dacal_addon._many import together
from dacal_addon.engines import has_zero_step
from dacal_addon.engines.update_rules import RULES, step_of

HAS_MAXIMIZE = "maximize" in torch.optim.SGD([torch.zeros(1)], lr=0.1).defaults

share = st.floats(0.0, 0.99)
common = {"lr": st.floats(1e-4, 1.0), "weight_decay": st.sampled_from([0.0, 0.1])}
if HAS_MAXIMIZE:
    common["maximize"] = st.booleans()
adam = {**common, "betas": st.tuples(share, share), "eps": st.sampled_from([1e-8, 1e-3]), "amsgrad": st.booleans()}
optimizers = st.one_of(
    st.tuples(st.just(torch.optim.SGD), st.fixed_dictionaries({**common, "momentum": share, "dampening": share})),
    st.tuples(
        st.just(torch.optim.SGD),
        st.fixed_dictionaries({**common, "momentum": st.floats(0.1, 0.99), "nesterov": st.just(True)}),
    ),
    st.tuples(st.sampled_from([torch.optim.Adam, torch.optim.AdamW]), st.fixed_dictionaries(adam)),
)


@settings(deadline=None, max_examples=60)
@given(made=optimizers, steps=st.integers(0, 3), seed=st.integers(0, 99))
def test_rules_are_torchs_own_and_slopes_are_their_derivatives(made, steps, seed):
    kind, options = made
    parameter = torch.randn(5, generator=generator(seed), dtype=torch.float64, requires_grad=True)
    optimizer = kind([parameter], **options)
    for i in range(steps + 1):
        grad = torch.randn(5, generator=generator(1000 + 10 * seed + i), dtype=torch.float64)
        grad[0] = 0.0  # as of a unit that never fires
        if i == steps:
            break
        parameter.grad = grad
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    group, state = optimizer.param_groups[0], optimizer.state.get(parameter, {})
    rule = RULES[kind]
    leaf = grad.clone().requires_grad_()
    updated = rule.update(parameter.detach(), leaf, group, state)
    (derivative,) = torch.autograd.grad(updated.sum(), leaf)
    slope = rule.slope(parameter.detach(), grad, group, state)
    np.testing.assert_allclose(torch.as_tensor(slope, dtype=torch.float64).expand(5), derivative, rtol=1e-9, atol=1e-12)
    assert str(optimizer.state_dict()) == str(before)
    parameter.grad = grad
    optimizer.step()
    np.testing.assert_allclose(updated.detach(), parameter.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e6])
def test_clipping_is_torchs_and_its_pull_back_its_transposed_jacobian(clip_norm):
    grads = [torch.randn(3, generator=generator(i), dtype=torch.float64) for i in (1, 2)]
    parameters = [torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in grads]
    step = step_of(torch.optim.SGD(parameters[:1], lr=0.1), parameters, clip_norm=clip_norm)

    def updated(flat):
        """By torch's own formula; only the first parameter is the optimizer's, and both count in the norm."""
        return -0.1 * flat[:3] * (clip_norm / (flat.norm() + 1e-6)).clamp(max=1.0)

    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad.clone()
    norm = float(nn.utils.clip_grad_norm_(parameters, clip_norm))
    clipped = step.updated(0, torch.zeros(3).double(), grads[0] * step.scale(norm))
    np.testing.assert_allclose(clipped, -0.1 * parameters[0].grad, rtol=1e-9)
    assert step.updated(1, torch.zeros(3).double(), grads[1]) is None
    flat = torch.cat(grads).requires_grad_()
    cotangent = torch.randn(3, generator=generator(3), dtype=torch.float64)
    (expected,) = torch.autograd.grad(updated(flat), flat, cotangent)
    pulled = [cotangent.clone(), torch.ones(3, dtype=torch.float64)]
    step.pull_back([p.detach() for p in parameters], grads, pulled, norm)
    got = torch.cat([torch.zeros(3).double() if p is None else p for p in pulled])
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 1 << 19), max_size=40), seed=st.integers(0, 99))
def test_what_is_taken_together_is_of_one_kind_and_bounded(sizes, seed):
    tensors = [torch.empty(0).expand(size) if not size else torch.empty(1).expand(size) for size in sizes]
    kinds = torch.randint(-1, 2, (len(sizes),), generator=generator(seed)).tolist()
    groups = list(together(tensors, [None if kind < 0 else kind for kind in kinds]))
    assert sorted(place for group in groups for place in group) == [i for i, kind in enumerate(kinds) if kind >= 0]
    for group in groups:
        assert len({kinds[i] for i in group}) == 1
        assert group == sorted(group)
        if len(group) > 1:
            assert sum(sizes[i] for i in group) <= 1 << 19
            assert max(sizes[i] for i in group) < 1 << 18
    small = [i for i, size in enumerate(sizes) if size < 1 << 13 and kinds[i] >= 0]
    if len(small) == sum(kind >= 0 for kind in kinds):  # all fit: one group a kind
        assert len(groups) == len({kinds[i] for i in small})


def uneven_parameters():
    """Large and small ones of two kinds, in two groups, with and without a history, some the optimizer's, some without grad."""
    g = generator(0)
    shapes = [(3,), (1 << 18,), (2, 3, 4, 5), (), (7,), (2, 2), (1,), (4,)]
    parameters = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    parameters[2] = parameters[2].contiguous(memory_format=torch.channels_last)
    parameters[5] = parameters[5].float()
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:4]}, {"params": parameters[4:7], "lr": 0.5, "weight_decay": 0.3}], lr=0.1
    )
    for steps in ((0, 1, 2, 4, 5, 6), (0, 1)):  # so that some have taken two steps, some one, one none
        for parameter in parameters:
            parameter.grad = None
        for i in steps:
            parameters[i].grad = torch.randn(shapes[i], generator=g, dtype=torch.float64).to(parameters[i])
        optimizer.step()
    grads = [torch.randn(shape, generator=g, dtype=torch.float64).to(p) for shape, p in zip(shapes, parameters)]
    grads[4] = None
    return parameters, optimizer, grads


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_parameters_that_are_taken_together_are_updated_as_each_alone(clip_norm):
    parameters, optimizer, grads = uneven_parameters()
    step = step_of(optimizer, parameters, clip_norm=clip_norm)
    scale = step.scale(3.0)
    live = [parameter.detach() for parameter in parameters]
    found = {i: value for places, values in step.updates(live, grads, scale) for i, value in zip(places, values)}
    assert sorted(found) == [0, 1, 2, 3, 5, 6]
    for i, value in found.items():
        expected = step.updated(i, live[i], scale * grads[i])
        assert value.dtype == expected.dtype
        np.testing.assert_allclose(value, expected, rtol=1e-12 if i != 5 else 1e-6)
    cotangents = [
        torch.randn(grad.shape, generator=generator(i)).to(live[i]) for i, grad in enumerate(grads) if grad is not None
    ]
    cotangents[4:4] = [torch.ones(7, dtype=torch.float64)]
    expected = [
        None if i not in found else v * step.rule.slope(live[i], grads[i], *step.places[i]) for i, v in enumerate(cotangents)
    ]
    step.pull_back(live, grads, cotangents, norm=0.0)  # no clipping
    assert [v is None for v in cotangents] == [v is None for v in expected]
    for i in found:
        np.testing.assert_allclose(cotangents[i], expected[i], rtol=1e-12 if i != 5 else 1e-6)


def test_a_step_on_many_small_parameters_asks_for_few_operations():
    counts = []
    for many in (50, 400):
        parameters = [torch.ones(8, requires_grad=True) for _ in range(many)]
        optimizer = with_grads(torch.optim.AdamW(parameters, lr=0.1), parameters)
        step = step_of(optimizer, parameters)
        with torch.autograd.profiler.profile() as seen, torch.no_grad():
            list(step.updates(parameters, [parameter.grad for parameter in parameters]))
        counts.append(
            sum(1 for event in seen.function_events if event.name in ("aten::add", "aten::mul", "aten::addcdiv", "aten::lerp"))
        )
    assert 0 < counts[0] == counts[1] < 20


def with_grads(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def rmsprop(parameter, grad, group, state):
    """torch.optim.RMSprop without momentum, as a host would write it."""
    square = group["alpha"] * state["square_avg"] + (1 - group["alpha"]) * grad * grad
    return parameter - group["lr"] * grad / (square.sqrt() + group["eps"])


@pytest.mark.parametrize("engine", ["higher", "finite_difference", "auto"])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_an_update_rule_of_the_hosts_own(engine, clip_norm):
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3), student)
    results = []
    for each in ("higher", engine):
        torch.manual_seed(0)
        results.append(
            hypergradient(
                student,
                inner,
                outer,
                list(net.parameters()),
                optimizer=optimizer,
                engine=each,
                update_rule=rmsprop,
                clip_norm=clip_norm,
            )
        )
    assert distance(results[1].grads, results[0].grads) <= 1e-6
    torch.manual_seed(0)
    updated = really_step(student, optimizer, inner, clip_norm)
    with torch.no_grad():
        assert results[1].outer_loss_after.item() == pytest.approx(outer(updated).item(), rel=1e-10)


class Renamed(torch.optim.SGD):
    pass


def with_pre_hook(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer._optimizer_step_pre_hooks = {0: lambda *_: None}  # what register_step_pre_hook fills (torch >= 2.0)
    return optimizer


def of_the_future(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.defaults["look_ahead"] = False
    optimizer.param_groups[0]["look_ahead"] = 3
    return optimizer


@pytest.mark.parametrize(
    ("make", "options", "error", "expected"),
    [
        (lambda p: torch.optim.RMSprop(p), {}, TypeError, r"got torch\.optim\.rmsprop\.RMSprop; pass update_rule"),
        (lambda p: Renamed(p, lr=0.1), {}, TypeError, r"got test_update_rules\.Renamed; pass update_rule"),
        (lambda p: "adam", {}, TypeError, r"a torch\.optim\.Optimizer, got builtins\.str; pass the one inside"),
        (with_pre_hook, {}, ValueError, r"without step hooks"),
        (
            of_the_future,
            {},
            ValueError,
            r"torch\.optim\.SGD that are known here, got look_ahead=3 in param group 0; pass update",
        ),
        (lambda p: torch.optim.SGD(p, lr=0.1), {"clip_norm": 0.0}, ValueError, r"clip_norm > 0, the max_norm .*got 0.0"),
        (
            lambda p: torch.optim.SGD(p, lr=0.1),
            {"update_rule": lambda p, g, group, state: None},
            ValueError,
            r"update_rule to return the updated parameter \(8, 3, 3, 3\), got NoneType",
        ),
        (
            lambda p: torch.optim.SGD(p, lr=0.1),
            {"update_rule": lambda p, g, group, state: p - g.detach()},
            ValueError,
            r"update_rule to be differentiable with respect to grad",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make, options, error, expected):
    student = Student()
    net, inner, outer = problem()
    with pytest.raises(error, match=expected):
        hypergradient(
            student,
            inner,
            outer,
            list(net.parameters()),
            optimizer=make(student.parameters()),
            engine="finite_difference",
            **options,
        )


@pytest.mark.parametrize("make", [float, torch.tensor], ids=["number", "tensor"])
def test_a_learning_rate_of_zero(make):
    student, head, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    whole = nn.ModuleList([student, head])
    optimizer = torch.optim.SGD([{"params": list(module.parameters())} for module in (student, head, other)], lr=0.1)
    for group, lr in zip(optimizer.param_groups, (0.0, 0.2, 0.3)):
        group["lr"] = make(lr)
    assert has_zero_step(optimizer, student.parameters()) is True
    assert has_zero_step(optimizer, whole.parameters()) is False
    head.bias.requires_grad_(False)
    assert has_zero_step(optimizer, whole.parameters()) is False
    head.requires_grad_(False)  # a group that moves nothing of the student does not count
    assert has_zero_step(optimizer, whole.parameters()) is True
    assert has_zero_step(optimizer, nn.Linear(2, 2).parameters()) is False  # not this optimizer's
    del optimizer.param_groups[0]["lr"]  # a host's own rule may have none
    assert has_zero_step(optimizer, student.parameters()) is False


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_zero_step_leaves_the_student_as_it_is(kind):
    student = Student()
    net, inner, outer = problem()
    optimizer = with_history(OPTIMIZERS[kind], student)
    assert not has_zero_step(optimizer, student.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert has_zero_step(optimizer, student.parameters())
    result = hypergradient(student, inner, outer, list(net.parameters()), optimizer=optimizer, engine="finite_difference")
    assert all(bool((grad == 0).all()) for grad in result.grads)
    updated = really_step(student, optimizer, inner)
    assert all(torch.equal(a, b) for a, b in zip(updated.parameters(), student.parameters()))


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="real parameters, got complex ones"):
        step_of(torch.optim.SGD([torch.zeros(2)], lr=0.1), [torch.zeros(2, dtype=torch.complex64)])


def test_every_supported_optimizer_is_among_the_tested_ones():
    tested = {type(make([torch.zeros(1, requires_grad=True)])) for make in OPTIMIZERS.values()}
    assert set(RULES) <= tested
