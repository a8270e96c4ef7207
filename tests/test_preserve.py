"""What a pass registers, removes or notes down in a student is taken back, to the object; and so are modes."""

from contextlib import nullcontext

import pytest
import torch
from problems import randn
from torch import nn

from dacal_addon.preserve import in_evaluation_mode, moved, preserved

HOOK_DICTS = [name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict)]


def nothing(*_):
    """A hook that changes nothing."""


class Counting:
    """A hook that is counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1


class Passing(nn.Module):
    """Does at each pass what it is told."""

    def __init__(self, at_each_pass):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.at_each_pass = at_each_pass

    def forward(self, x):
        self.at_each_pass(self)
        return self.conv(x)


def image():
    return randn(1, 3, 4, 4).float()


def test_the_dicts_of_hooks_are_found():
    kinds = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"}
    assert kinds <= set(HOOK_DICTS)


def test_hooks_that_the_first_pass_registers_are_registered_anew_by_the_hosts_first_pass():
    """transformers' models do so; doubled hooks collected every feature map twice."""
    hook = Counting()

    def once(module):
        if not hasattr(module, "installed"):
            module.installed = module.conv.register_forward_hook(hook)

    student = Passing(once)
    with preserved(student) as state:
        student(image())
        state.rewind()
        student(image())
    assert len(student.conv._forward_hooks) == 0
    assert not hasattr(student, "installed")
    assert hook.calls == 2
    student(image())
    assert len(student.conv._forward_hooks) == 1
    assert hook.calls == 3


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", HOOK_DICTS)
def test_every_dict_of_hooks_is_put_back_in_place_and_in_order(name, fails):
    a, b, c = object(), object(), object()

    def meddle(module):
        hooks = vars(module.conv)[name]
        hooks[3] = c
        hooks[1] = hooks.pop(1)  # to the end
        del hooks[2]
        if fails:
            raise KeyError

    student = nn.ModuleList([Passing(nothing)])
    hooks = vars(student[0].conv)[name]
    hooks.update({1: a, 2: b})
    with pytest.raises(KeyError) if fails else nullcontext(), preserved(student):
        meddle(student[0])
    assert vars(student[0].conv)[name] is hooks
    assert list(hooks.items()) == [(1, a), (2, b)]


def test_handles_from_before_still_remove_their_hooks_and_hooks_that_removed_themselves_are_back():
    student = Passing(nothing)
    calls = []

    def once(*_):
        calls.append(1)
        handle.remove()

    handle = student.conv.register_forward_hook(once)
    other = student.conv.register_forward_pre_hook(nothing)
    with preserved(student):
        student(image())
    assert list(student.conv._forward_hooks.values()) == [once]
    other.remove()
    assert not student.conv._forward_pre_hooks
    student(image())
    assert len(calls) == 2
    assert not student.conv._forward_hooks


@pytest.mark.skipif(not hasattr(nn.Module, "register_full_backward_hook"), reason="torch < 1.8")
def test_the_kind_of_backward_hooks_is_forgotten():
    student = Passing(lambda module: module.conv.register_full_backward_hook(nothing))
    with preserved(student):
        student(image())
    assert not student.conv._backward_hooks
    student.conv.register_backward_hook(nothing)  # torch refuses to mix both kinds


def test_submodules_and_parameters_that_a_pass_registers_or_removes():
    def build(module):
        if not hasattr(module, "late"):
            module.late, module.scale = nn.Linear(2, 2), nn.Parameter(torch.rand(1))
            module.register_parameter("shift", nn.Parameter(torch.rand(1)))
            del module.early
        drawn.append(module.scale.item())

    drawn = []
    student = Passing(build)
    student.register_parameter("shift", None)
    student.early = nn.Linear(1, 1)
    student.last = nn.Linear(1, 1)
    early, names = student.early, [name for name, _ in student.named_modules()]
    parameters, keys = [id(p) for p in student.parameters()], list(student.state_dict())
    with preserved(student) as state:
        student(image())
        state.rewind()
        student(image())
    assert drawn[0] == drawn[1]
    assert student.early is early
    assert [name for name, _ in student.named_modules()] == names
    assert [id(p) for p in student.parameters()] == parameters
    assert list(student.state_dict()) == keys
    assert student.shift is None
    with preserved(student) as state:
        student(image())
        late, scale = student.late, student.scale
        state.keep()
        state.rewind()
        assert not hasattr(student, "late")
    assert student.late is late
    assert student.scale is scale
    assert not hasattr(student, "early")


@pytest.mark.skipif(not hasattr(nn, "LazyConv2d"), reason="torch < 1.8")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_stays_what_it_has_become_and_works():
    student = nn.Sequential(nn.LazyConv2d(2, 1), nn.BatchNorm2d(2))
    with preserved(student) as state:
        first = student(image())
        state.rewind()
        assert torch.equal(student(image()), first)
    assert type(student[0]) is nn.Conv2d
    assert student[0].weight.shape == (2, 3, 1, 1)
    assert float(student[1].num_batches_tracked) == 0
    assert torch.equal(student(image()), first)


class NormsEvaluate(nn.Sequential):
    """As many backbones are trained: whatever mode they are put into, BatchNorm evaluates."""

    calls = 0

    def train(self, mode=True):
        self.calls += 1
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self


def of_mixed_modes(inner=nn.Sequential):
    """A network, some modules of which evaluate; one of them is in it twice."""
    shared = nn.Dropout(0.5)
    network = nn.Sequential(inner(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), shared), nn.ModuleList([shared]), nn.Dropout(0.5))
    network.train()
    network[1].eval()
    network[0][0].eval()
    network[0][1].training = True
    return network


def modes(network):
    return {name: module.training for name, module in network.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("inner", [nn.Sequential, NormsEvaluate])
def test_in_evaluation_mode_every_module_evaluates_and_gets_its_own_mode_back(inner, fails):
    network = of_mixed_modes(inner)
    before, calls = modes(network), getattr(network[0], "calls", 0)
    assert set(before.values()) == {True, False}
    with pytest.raises(KeyError) if fails else nullcontext(), in_evaluation_mode(network):
        assert set(modes(network).values()) == {False}
        network[2].train()  # what is done inside does not matter
        if fails:
            raise KeyError
    assert modes(network) == before
    assert getattr(network[0], "calls", 0) == calls  # a `train` that does more than set flags is not called


def test_in_evaluation_mode_nests_and_leaves_a_network_that_evaluates_alone():
    network = of_mixed_modes()
    before = modes(network)
    with in_evaluation_mode(network), in_evaluation_mode(network):
        pass
    assert modes(network) == before
    network.eval()
    with in_evaluation_mode(network):
        pass
    assert not any(modes(network).values())


def test_in_evaluation_mode_knows_nothing_of_functions():
    network = of_mixed_modes()
    for function in (lambda x: network(x), network.forward, len):
        with in_evaluation_mode(function):
            assert modes(network) == modes(of_mixed_modes())
    with pytest.raises(KeyError), in_evaluation_mode(len):
        raise KeyError


class Swaps(nn.Module):
    """A pass gives its buffer and its parameter other memory."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("run", torch.zeros(2))

    def forward(self, x):
        self.run.data = self.run + 1
        self.weight.data = self.weight.data + 5
        return x


def test_a_pass_that_gives_tensors_other_memory_is_undone_too():
    student = Swaps()
    with preserved(student), moved([student.weight], [([0], [torch.ones(2)])]):
        student(torch.zeros(2))
        assert student.run.tolist() == [1.0, 1.0]
        assert student.weight.tolist() == [6.0, 6.0]
    assert student.run.tolist() == student.weight.tolist() == [0.0, 0.0]
