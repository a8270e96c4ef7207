"""The reference engine: unroll the virtual step with `higher` and differentiate through its graph.

The only file that imports `higher`. Used of it: `monkeypatch` (a stateless copy of the student) and the base class of its
differentiable optimizers. Its own Adam (0.2.1 on PyPI) adds eps before the bias correction, where torch's adds it after, it has
no AdamW and ignores `maximize`; with the rules of `update_rules`, any version of `higher` gives the same, right result.
"""

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import higher
import torch
from torch import Tensor, nn

from .._check import describe, problem
from ..preserve import CONTAINERS, Preserved, preserved
from .attention import plain_attention
from .passes import OUT_OF_MEMORY, add_to_grad, has_reentrant_checkpoint, leaves_beside, scalar
from .setting import Hypergradient, LossClosure, Setting, no_inner_gradient
from .update_rules import Step


def unroll(setting: Setting, inner_loss: LossClosure, outer_loss: LossClosure) -> Hypergradient:
    """`hypergradient` by unrolling; see there."""
    student, meta, ranks = setting.student, list(setting.meta_parameters), setting.ranks
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    step = setting.step(list(student.parameters()))
    with preserved(student) as state, torch.enable_grad(), plain_attention():
        copy = _stateless_copy(student)
        f = _OnlyForward(copy, student)
        before = setting.outer_loss_before(outer_loss, f)

        _rewind(student, copy, state)
        inner = scalar("inner_loss", inner_loss(f))
        if not trainable or not ranks.anywhere(inner.requires_grad, like=inner.detach()):
            raise no_inner_gradient(describe(inner))
        if not inner.requires_grad:  # on this rank alone, which must go along
            inner = inner + 0.0 * sum(p.sum() for p in copy.parameters() if p.requires_grad)
        if has_reentrant_checkpoint(inner):
            raise _no_second_derivative()
        if setting.backward:
            _adopt_buffers(student, copy)
            state.keep()
        virtual = _VirtualOptimizer(setting.optimizer, step, student, copy, setting)
        virtual.step(inner)
        _refuse_backward_passes_inside(inner, copy, meta)

        _rewind(student, copy, state)
        # The outer pass gets leaves, so that its gradient stops at them and can be averaged over the ranks.
        unrolled = list(copy.parameters())
        copy.update_params([parameter.detach().requires_grad_(parameter.requires_grad) for parameter in unrolled])
        fast = [parameter for parameter in copy.parameters() if parameter.requires_grad]
        after = scalar("outer_loss", outer_loss(f))
        v: Sequence[Optional[Tensor]] = [None] * (len(fast) + len(meta))
        if after.requires_grad:
            v = torch.autograd.grad(after, [*fast, *meta], allow_unused=True)
        cotangents = ranks.average(v[: len(fast)], fast)
        moved = [parameter for parameter in unrolled if parameter.requires_grad]
        pairs = [(p, c) for p, c in zip(moved, cotangents) if p.grad_fn is not None and c is not None]
        through: Sequence[Optional[Tensor]] = [None] * len(meta)
        if pairs:
            updated, weights = zip(*pairs)
            through = torch.autograd.grad(updated, meta, weights, allow_unused=True)
        grads = setting.total(through, v[len(fast) :])
    if setting.backward:
        add_to_grad(list(student.parameters()), virtual.gradient)
    return Hypergradient(grads, before, ranks.average_number(after), ranks.average_number(inner), "higher")


def _refuse_backward_passes_inside(inner: Tensor, copy: Any, meta: Sequence[Tensor]) -> None:
    """Raise if functions of the student have trained parameters themselves: the virtual step knows nothing of it."""
    leaves = [parameter for parameter in copy.init_fast_params if parameter.is_leaf]
    beside = leaves_beside(inner, [*leaves, *meta])
    own = [leaf.grad for leaf in beside]
    if beside:
        torch.autograd.grad(inner, beside, allow_unused=True, retain_graph=True)
    for leaf, grad in zip(beside, own):
        leaf.grad = grad
    if any(leaf.grad is not None for leaf in leaves):
        raise _no_second_derivative()


def _no_second_derivative() -> Exception:
    return problem(
        "hypergradient",
        expected="a student without re-entrant checkpointing, which has no second derivative (engine 'higher')",
        got="it, or another autograd.Function with a backward pass of its own",
        remedy="choose engine='finite_difference', or checkpoint with use_reentrant=False",
    )


class _VirtualOptimizer(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]  # higher is untyped
    """One step of the live optimizer's rule on the stateless copy, with the graph from the meta parameters kept."""

    def __init__(self, optimizer: torch.optim.Optimizer, step: Step, student: nn.Module, copy: Any, setting: Setting) -> None:
        # One param group of everything, without state: the rule finds each parameter's own in `step`, and `higher` would copy
        # the optimizer's.
        view: Any = type(optimizer).__new__(type(optimizer))
        view.state = {}
        view.param_groups = [{"params": list(student.parameters())}]
        super().__init__(view, student.parameters(), fmodel=copy, grad_callback=self._shared)
        self._step, self._ranks = step, setting.ranks
        self._live = list(student.parameters())
        self.gradient: List[Optional[Tensor]] = []

    def _shared(self, grads: Sequence[Optional[Tensor]]) -> List[Optional[Tensor]]:
        """Average the gradient over the ranks: the value is everybody's, the graph this rank's own."""
        self.gradient = self._ranks.average([None if g is None else g.detach().clone() for g in grads], self._live)
        if self._ranks.size == 1:
            return list(grads)
        return [mean if g is None or mean is None else g + (mean - g).detach() for g, mean in zip(grads, self.gradient)]

    def _update(self, grouped_grads: Sequence[Sequence[Optional[Tensor]]], **kwargs: Any) -> None:
        (grads,), (group,) = grouped_grads, self.param_groups
        clip_norm, scale = self._step.clip_norm, None
        if clip_norm is not None:
            norm = torch.stack([grad.pow(2).sum() for grad in grads if grad is not None]).sum().sqrt()
            if self._step.scale(float(norm.detach())) < 1.0:
                scale = clip_norm / (norm + 1e-6)
        for i, (parameter, grad) in enumerate(zip(group["params"], grads)):
            if grad is None:
                continue
            updated = self._step.updated(i, parameter, grad if scale is None else grad * scale)
            if updated is not None:
                group["params"][i] = updated


class _OnlyForward:
    """What closures get: the copy, which `higher` can call but whose other methods would run without its parameters."""

    def __init__(self, copy: Any, student: nn.Module) -> None:
        self._copy, self._student = copy, student

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._copy(*args, **kwargs)
        except Exception as error:
            if isinstance(error, OUT_OF_MEMORY) or not _runs(self._student, args, kwargs):
                raise
            # Its modules are of other classes, which a student that looks itself up by class (transformers') does not find.
            raise problem(
                "hypergradient",
                expected="a student whose copy runs (engine 'higher' makes one)",
                got=f"{type(error).__name__}: {error}",
                remedy="choose engine='forward' or 'finite_difference', which run the student itself",
            ) from error

    def modules(self) -> Iterator[nn.Module]:
        """Those of the copy, whose modes a closure may change."""
        modules: Iterator[nn.Module] = self._copy.modules()
        return modules

    def __getattr__(self, name: str) -> Any:
        raise problem(
            "hypergradient",
            expected="closures that enter the student by calling f (engine 'higher' knows no other way in)",
            got=f"f.{name}",
            remedy="choose engine='forward' or 'finite_difference', where f is the student itself",
            error=AttributeError,
        )


def _runs(student: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> bool:
    """Whether the live student takes these arguments; what the pass changes is for the caller to put back."""
    try:
        with torch.no_grad():
            student(*args, **kwargs)
    except Exception:  # of whatever kind: the caller raises the error of the copy then
        return False
    return True


def _stateless_copy(student: nn.Module) -> Any:
    """`higher`'s functional copy of the student."""
    copy = higher.patch.monkeypatch(student)
    for module, twin in _pairs(student, copy):
        for name, value in vars(twin).items():
            # `higher` shares these with the live modules: one that logs into a list would keep the unrolled graph alive, and
            # what is put back in the live ones before each pass (the settings of newer kinds of hooks) would be gone here too.
            if type(value) in CONTAINERS and vars(module).get(name) is value:
                shared: Any = value
                vars(twin)[name] = shared.copy()
    return copy


def _pairs(module: nn.Module, twin: Any) -> Iterator[Tuple[nn.Module, Any]]:
    """Every module of the student with its copy. One that is at two places, as activations often are, has two copies."""
    yield module, twin
    for name, child in module._modules.items():
        if child is not None:
            yield from _pairs(child, twin._modules[name])


def _rewind(student: nn.Module, copy: Any, state: Preserved) -> None:
    """Before the next pass: the random numbers and buffers with which the first one began."""
    state.rewind()
    higher.patch.buffer_sync(student, copy)


def _adopt_buffers(student: nn.Module, copy: Any) -> None:
    """Give the live student the buffers that the pass of the copy has left."""
    for module, twin in _pairs(student, copy):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffer.data.copy_(twin._buffers[name])
