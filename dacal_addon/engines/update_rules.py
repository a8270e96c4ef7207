"""The update rules of torch's optimizers as pure functions of the gradient, with their slopes in closed form.

A rule maps (parameter, grad, group, state) to the updated parameter, for one tensor. It reads the live optimizer's param group
and state and changes neither. The slope, d updated / d grad, is what engines need that do not unroll; it is elementwise.
"""

import sys
from typing import (
    Any,
    Dict,
    Hashable,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

import torch
from torch import Tensor

from .._check import check_number, describe, problem
from .._many import as_numbers, inner_product, joined, multiply_all_, parts, together

Group = Dict[str, Any]
State = Dict[str, Any]


class Update(Protocol):
    """One optimizer's step on one tensor, in torch operations and nothing in place: `update_rule` of `hypergradient`."""

    def __call__(self, parameter: Tensor, grad: Tensor, group: Group, state: State, /) -> Tensor:
        """The updated parameter; differentiable with respect to the gradient. `group` and `state` are the live optimizer's."""


class Derivative(Protocol):
    """The derivative of an `Update` with respect to the gradient, elementwise."""

    def __call__(self, parameter: Tensor, grad: Tensor, group: Group, state: State, /) -> Union[float, Tensor]:
        """One number for all elements, or one each."""


class UpdateRule(NamedTuple):
    """What is known of an optimizer."""

    update: Update
    slope: Optional[Derivative]
    """None: by autograd."""
    settings: Set[str]
    """The settings of a param group that this rule knows."""


def sgd(parameter: Tensor, grad: Tensor, group: Group, state: State) -> Tensor:
    """torch.optim.SGD: momentum, dampening, Nesterov, weight decay (on the gradient), maximize.

    Example:
        >>> group = dict(lr=0.5, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0)
        >>> sgd(torch.ones(1), torch.ones(1), group, {}).item()
        0.5
    """
    grad = _signed(grad, group)
    if group["weight_decay"] != 0:
        grad = grad + group["weight_decay"] * parameter
    momentum = group["momentum"]
    if momentum != 0:
        moving = state.get("momentum_buffer")  # torch 1.12 to 2.2 leave None where there was no momentum
        velocity = grad if moving is None else momentum * moving + (1 - group["dampening"]) * grad
        grad = grad + momentum * velocity if group["nesterov"] else velocity
    updated: Tensor = parameter - float(group["lr"]) * grad
    return updated


def sgd_slope(parameter: Tensor, grad: Tensor, group: Group, state: State) -> float:
    """The same for every element: -lr, times what momentum lets through of the new gradient."""
    momentum, share = group["momentum"], 1.0
    if momentum != 0:
        share = 1.0 if state.get("momentum_buffer") is None else 1.0 - group["dampening"]
        share = 1.0 + momentum * share if group["nesterov"] else share
    return -float(group["lr"]) * share * (-1.0 if group.get("maximize", False) else 1.0)


def adam(parameter: Tensor, grad: Tensor, group: Group, state: State, *, decoupled: bool = False) -> Tensor:
    """torch.optim.Adam (Kingma & Ba 2015) with AMSGrad, weight decay on the gradient or decoupled, maximize.

    Example (the first step moves by lr, whatever the size of the gradient):
        >>> group = dict(lr=0.5, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, amsgrad=False)
        >>> round(adam(torch.ones(1), torch.full((1,), 1e-3), group, {}).item(), 6)
        0.5
    """
    now = _adam(parameter, grad, group, state, decoupled)
    return torch.addcdiv(now.start, now.first, now.denominator, value=-now.step_size)


def adam_slope(parameter: Tensor, grad: Tensor, group: Group, state: State, *, decoupled: bool = False) -> Tensor:
    """-step_size * ((1 - beta1) - d denominator / d grad * first / denominator) / denominator.

    At a second moment of 0 (a parameter that never had a gradient) the square root has an infinite slope, the update as a whole
    has -lr / eps at the first step.
    """
    now = _adam(parameter, grad, group, state, decoupled)
    beta1, beta2 = map(float, group["betas"])
    slope = now.grad / now.root  # times a constant, d denominator / d grad
    slope.masked_fill_(now.root == 0 if now.held is None else (now.root == 0) | now.held, 0.0)
    slope.mul_(now.first).div_(now.denominator).mul_((1 - beta2) / now.root_correction).sub_(1 - beta1)
    return slope.div_(now.denominator).mul_(-now.step_size if group.get("maximize", False) else now.step_size)


def adamw(parameter: Tensor, grad: Tensor, group: Group, state: State) -> Tensor:
    """torch.optim.AdamW (Loshchilov & Hutter 2019): Adam with decoupled weight decay."""
    return adam(parameter, grad, group, state, decoupled=True)


def adamw_slope(parameter: Tensor, grad: Tensor, group: Group, state: State) -> Tensor:
    """`adam_slope`: decay that does not pass through the gradient does not change it."""
    return adam_slope(parameter, grad, group, state, decoupled=True)


class _Adam(NamedTuple):
    start: Tensor  # the parameter, after decoupled decay
    grad: Tensor
    first: Tensor
    root: Tensor  # of the second moment
    root_correction: float
    denominator: Tensor
    step_size: float
    held: Optional[Tensor]  # where AMSGrad keeps an older second moment, which does not depend on this gradient


def _adam(parameter: Tensor, grad: Tensor, group: Group, state: State, decoupled: bool) -> _Adam:
    grad = _signed(grad, group)
    (beta1, beta2), lr, decay = map(float, group["betas"]), float(group["lr"]), float(group["weight_decay"])
    if decay != 0:
        if decoupled or group.get("decoupled_weight_decay", False):
            parameter = parameter * (1 - lr * decay)
        else:
            grad = torch.add(grad, parameter, alpha=decay)
    # torch 2 counts in a float32 tensor but corrects the bias in double precision; beta ** tensor would be float32 and wrong in
    # the eighth digit.
    step = float(state.get("step", 0)) + 1
    if "exp_avg" in state:
        first = torch.lerp(state["exp_avg"], grad, 1 - beta1)
        second = torch.addcmul(state["exp_avg_sq"] * beta2, grad, grad, value=1 - beta2)
    else:
        first, second = grad * (1 - beta1), (1 - beta2) * grad * grad
    held = None
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        held = state["max_exp_avg_sq"] > second
        second = torch.max(state["max_exp_avg_sq"], second)
    if second.requires_grad:
        # sqrt has an infinite slope at 0: a parameter that never had a gradient would give NaN when this is unrolled.
        never = second == 0
        root = torch.sqrt(second.masked_fill(never, 1.0)).masked_fill(never, 0.0)
    else:
        root = torch.sqrt(second)
    root_correction = (1 - beta2**step) ** 0.5
    denominator = (root / root_correction).add_(group["eps"])
    return _Adam(parameter, grad, first, root, root_correction, denominator, lr / (1 - beta1**step), held)


def _signed(grad: Tensor, group: Group) -> Tensor:
    return -grad if group.get("maximize", False) else grad


# How torch computes the step (foreach, fused, capturable, differentiable) does not change what it is.
_COMMON = {"lr", "weight_decay", "maximize", "foreach", "fused", "capturable", "differentiable"}
_ADAM = _COMMON | {"betas", "eps", "amsgrad", "decoupled_weight_decay"}
RULES: Dict[Type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: UpdateRule(sgd, sgd_slope, _COMMON | {"momentum", "dampening", "nesterov"}),
    torch.optim.Adam: UpdateRule(adam, adam_slope, _ADAM),
    torch.optim.AdamW: UpdateRule(adamw, adamw_slope, _ADAM),
}


def rule_for(optimizer: torch.optim.Optimizer, update_rule: Optional[Update]) -> UpdateRule:
    """The rule of a live optimizer, or the host's own. Refuses, by name, what would be another rule than the optimizer's."""
    remedy = "pass update_rule, a function (parameter, grad, group, state) -> updated parameter"
    if not isinstance(optimizer, torch.optim.Optimizer):
        expected = "optimizer: a torch.optim.Optimizer"
        got = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise problem("hypergradient", expected=expected, got=got, remedy="pass the one inside", error=TypeError)
    hooks = [getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
    hooks += [
        getattr(sys.modules[torch.optim.Optimizer.__module__], f"_global_optimizer_{when}_hooks", None)
        for when in ("pre", "post")
    ]
    if any(hooks):
        expected = "an optimizer without step hooks, which may change gradients or parameters unseen"
        raise problem("hypergradient", expected=expected, got="a hook", remedy="clip with clip_norm; remove other hooks")
    if update_rule is not None:
        return UpdateRule(update_rule, None, set())
    kind = type(optimizer)
    if kind not in RULES:
        expected = "optimizer: " + ", ".join(f"torch.optim.{known.__name__}" for known in RULES)
        got = f"{kind.__module__}.{kind.__name__}"
        raise problem("hypergradient", expected=expected, got=got, remedy=remedy, error=TypeError)
    for i, group in enumerate(optimizer.param_groups):
        for setting in optimizer.defaults:
            if setting not in RULES[kind].settings and group.get(setting):
                expected = f"settings of torch.optim.{kind.__name__} that are known here"
                got = f"{setting}={group[setting]!r} in param group {i}"
                raise problem("hypergradient", expected=expected, got=got, remedy=remedy)
    return RULES[kind]


class Step(NamedTuple):
    """One virtual step: everything but the gradient that it is a function of."""

    rule: UpdateRule
    places: List[Optional[Tuple[Group, State]]]
    """The group and state of each parameter; None: the optimizer does not own it, and the step leaves it."""
    clip_norm: Optional[float]

    def scale(self, norm: float) -> float:
        """What `torch.nn.utils.clip_grad_norm_` multiplies gradients of this total norm by."""
        return 1.0 if self.clip_norm is None else min(1.0, self.clip_norm / (norm + 1e-6))

    def updated(self, i: int, parameter: Tensor, grad: Tensor) -> Optional[Tensor]:
        """Parameter i after the step with this, clipped, gradient; None if the optimizer does not own it."""
        place = self.places[i]
        if place is None:
            return None
        updated = self.rule.update(parameter, grad, *place)
        if not isinstance(updated, Tensor) or updated.shape != parameter.shape:
            expected = f"update_rule to return the updated parameter {tuple(parameter.shape)}"
            remedy = "return a new tensor; change nothing in place"
            raise problem("hypergradient", expected=expected, got=describe(updated), remedy=remedy)
        return updated

    def updates(
        self, parameters: Sequence[Tensor], grads: Sequence[Optional[Tensor]], scale: float = 1.0
    ) -> Iterator[Tuple[List[int], List[Tensor]]]:
        """The places of parameters, and these after the step with `scale` times their gradient; not those without one.

        A few at a time, so that not all need memory at once.
        """
        for own in self._joined(parameters, grads):
            grad = own.grad if scale == 1.0 else scale * own.grad
            if len(own.places) == 1:  # of a host's own rule, which may not return what it should
                updated = self.updated(own.places[0], own.parameter, grad)
                yield own.places, [] if updated is None else [updated]
            else:
                updated = self.rule.update(own.parameter, grad, own.group, own.state)
                yield own.places, parts(updated, [parameters[i] for i in own.places])

    def pull_back(
        self, parameters: Sequence[Tensor], grads: Sequence[Optional[Tensor]], cotangents: List[Optional[Tensor]], norm: float
    ) -> None:
        """Replace each cotangent v by D^T v, where D = d updated / d grads; in place, None for zero.

        Clipping by norm has the Jacobian scale * (I - g g^T / (|g| (|g| + 1e-6))), which is symmetric.
        """
        scale = self.scale(norm)
        given = list(cotangents)
        cotangents[:] = [None] * len(given)
        for own in self._joined(parameters, [None if v is None else grad for grad, v in zip(grads, given)]):
            grad = own.grad if scale == 1.0 else scale * own.grad
            some = [v for v in (given[i] for i in own.places) if v is not None]
            if self.rule.slope is None:
                cotangents[own.places[0]] = _pull_back_by_autograd(
                    self.rule.update, own.parameter, grad, (own.group, own.state), some[0]
                )
                continue
            slope = self.rule.slope(own.parameter, grad, own.group, own.state)
            multiply_all_(some, parts(slope, some) if isinstance(slope, Tensor) else slope)
            for i, v in zip(own.places, some):
                cotangents[i] = v
        if scale == 1.0:
            return
        along = float(inner_product(grads, cotangents))
        for i, (each, pulled) in enumerate(zip(grads, cotangents)):
            if each is not None:
                scaled = torch.zeros_like(each) if pulled is None else pulled.mul_(scale)
                cotangents[i] = scaled.add_(each, alpha=-scale * along / (norm * (norm + 1e-6)))

    def _joined(self, parameters: Sequence[Tensor], grads: Sequence[Optional[Tensor]]) -> Iterator["_Joined"]:
        """What the optimizer owns and has a gradient, laid end to end where the rule is known to be elementwise."""
        kinds = [self._kind(i, grad) for i, grad in enumerate(grads)]
        for places in together(parameters, kinds):
            some = [place for place in (self.places[i] for i in places) if place is not None]
            own = [grad for grad in (grads[i] for i in places) if grad is not None]
            group, state = some[0]
            if len(places) > 1:
                each = [state for _, state in some]
                state = {
                    name: joined([one[name] for one in each]) if _is_moment(value) else value for name, value in state.items()
                }
            yield _Joined(places, joined([parameters[i] for i in places]), joined(own), group, state)

    def _kind(self, i: int, grad: Optional[Tensor]) -> Optional[Hashable]:
        """Parameters of one kind may be joined; None: has no step."""
        place = self.places[i]
        if place is None or grad is None:
            return None
        if self.rule.slope is None:
            return i
        group, state = place
        noted = tuple((name, _kind_of(value)) for name, value in state.items())
        return id(group), grad.dtype, grad.device, noted


class _Joined(NamedTuple):
    """Parameters that a rule takes as one."""

    places: List[int]
    parameter: Tensor
    grad: Tensor
    group: Group
    state: State


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor)  # `step` is a number: see `_counted`


def _kind_of(value: Any) -> Hashable:
    """What two entries of a state must share for their parameters to be joined; of what a host has put there, itself."""
    if _is_moment(value):
        return str(value.dtype)
    return value if value is None or isinstance(value, (int, float)) else id(value)


def _pull_back_by_autograd(
    update: Update, parameter: Tensor, grad: Tensor, place: Tuple[Group, State], cotangent: Tensor
) -> Optional[Tensor]:
    with torch.enable_grad():
        leaf = grad.detach().requires_grad_()
        updated = update(parameter, leaf, *place)
        if not updated.requires_grad:
            expected = "update_rule to be differentiable with respect to grad"
            raise problem("hypergradient", expected=expected, got="no graph", remedy="use torch operations without no_grad")
        (pulled,) = torch.autograd.grad(updated, leaf, cotangent, allow_unused=True)
    return pulled


def step_of(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    *,
    update_rule: Optional[Update] = None,
    clip_norm: Optional[float] = None,
) -> Step:
    """The virtual step that the live optimizer would take now on these parameters.

    A host's optimizer may own more than the student (a discriminator, the temperature net as a child module of the trainer),
    and less.
    """
    if clip_norm is not None:
        check_number("hypergradient", "clip_norm", clip_norm, low=1e-30, rule="> 0, the max_norm of clip_grad_norm_")
    rule = rule_for(optimizer, update_rule)
    if any(parameter.is_complex() for parameter in parameters):
        remedy = "keep complex parameters as pairs of real ones (torch.view_as_real)"
        raise problem("hypergradient", expected="real parameters", got="complex ones", remedy=remedy)
    # .get, because indexing would write an empty state into the live optimizer
    owned = {id(p): (group, optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]}
    places = [owned.get(id(parameter)) for parameter in parameters]
    if update_rule is None:
        places = _counted(places)
    if all(place is None for place in places):
        remedy = "pass the optimizer that trains the student"
        raise problem("hypergradient", expected="an optimizer of the student's parameters", got="none of them", remedy=remedy)
    return Step(rule, places, clip_norm)


def _counted(places: Sequence[Optional[Tuple[Group, State]]]) -> List[Optional[Tuple[Group, State]]]:
    """The same with `step` as a number: torch 2 has a tensor a parameter, with capturable=True or fused=True on the GPU."""
    steps = iter(as_numbers([place[1]["step"] for place in places if place is not None and "step" in place[1]]))
    return [
        (place[0], {**place[1], "step": next(steps)}) if place is not None and "step" in place[1] else place for place in places
    ]


def has_zero_step(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether the learning rate of every param group with trainable ones of these parameters is 0 (torch's own rules then leave
    them as they are, decay included): the hypergradient is zero, and no fault of the labels.

    Example (as in the first iteration of a linear warm-up):
        >>> student, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD([{"params": student.parameters(), "lr": 0.0}, {"params": head.parameters()}], lr=0.1)
        >>> has_zero_step(optimizer, student.parameters()), has_zero_step(optimizer, head.parameters())
        (True, False)
    """
    trainable = {id(parameter) for parameter in parameters if parameter.requires_grad}
    groups = [group for group in optimizer.param_groups if any(id(parameter) in trainable for parameter in group["params"])]
    # A group without a learning rate is that of a host's own rule, of which nothing is known.
    return bool(groups) and all("lr" in group and float(group["lr"]) == 0.0 for group in groups)
