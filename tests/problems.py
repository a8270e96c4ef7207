"""Students, problems and optimizers that several test files share."""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler, soft_cross_entropy

# Engine "forward" needs torch >= 2.0.
ENGINES = ["higher", "finite_difference"] + (["forward"] if hasattr(torch, "func") else [])
# Relative distance to the exact hypergradient in float64; differences are limited by rounding.
TOLERANCE = {"higher": 1e-10, "forward": 1e-10, "finite_difference": 1e-6}


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


def problem(dtype=torch.float64, size=8, device="cpu"):
    """Closures as a host would write them: soft labels of a temperature net, uneven weights, hard outer labels."""
    image, outer_image = randn(2, 3, size, size, seed=1).to(dtype), randn(2, 3, size, size, seed=2).to(dtype)
    teacher_logits = 3 * randn(2, 4, size, size, seed=3).to(dtype)
    weight = torch.rand(2, size, size, generator=generator(4), dtype=torch.float64).to(dtype)
    weight[:, :2] = 0.0
    outer_label = torch.randint(0, 4, (2, size, size), generator=generator(5))
    outer_label[:, 3] = 255
    net = MetaTemperatureNet(4, hidden_channels=4, generator=generator(6)).double()
    with torch.no_grad():
        net.last.weight.copy_(0.1 * randn(1, 4, 1, 1, seed=7))
    net.to(device, dtype)
    image, outer_image, teacher_logits, weight, outer_label = (
        x.to(device) for x in (image, outer_image, teacher_logits, weight, outer_label)
    )
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
if "maximize" in torch.optim.SGD([torch.zeros(1)], lr=0.1).defaults:  # torch >= 1.11
    OPTIMIZERS["momentum, maximize"] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, maximize=True)
    OPTIMIZERS["AdamW, maximize"] = lambda p: torch.optim.AdamW(p, lr=0.02, maximize=True, eps=1e-3)
if "decoupled_weight_decay" in torch.optim.Adam([torch.zeros(1)]).defaults:  # torch >= 2.6
    OPTIMIZERS["Adam, decoupled"] = lambda p: torch.optim.Adam(
        p, lr=0.02, weight_decay=0.1, eps=1e-3, decoupled_weight_decay=True
    )


def with_history(make, student, steps=3):
    """An optimizer with two param groups and a non-trivial state."""
    head = list(student.last.parameters())
    body = [p for p in student.parameters() if all(p is not q for q in head)]
    optimizer = make([{"params": body}, {"params": head}])
    optimizer.param_groups[1]["lr"] *= 0.5
    for i in range(steps):
        optimizer.zero_grad()
        image = randn(2, 3, 8, 8, seed=50 + i).to(student.last.weight.dtype)
        F.cross_entropy(student(image), torch.zeros(2, 8, 8, dtype=torch.int64)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def really_step(student, optimizer, inner, clip_norm=None):
    """A copy of the student after one real step of a copy of the real optimizer."""
    student, optimizer = copy.deepcopy((student, optimizer))
    states = torch.get_rng_state()
    optimizer.zero_grad()
    inner(student).backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(student.parameters(), clip_norm)
    optimizer.step()
    torch.set_rng_state(states)
    return student


def distance(a, b):
    """Relative Euclidean distance of two lists of tensors."""
    a, b = torch.cat([x.flatten().double() for x in a]), torch.cat([x.flatten().double() for x in b])
    return float((a - b).norm() / b.norm())


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
