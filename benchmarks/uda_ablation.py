"""The search for DA-Cal's configuration: what the temperatures are learned by, from, on and for, one change at a time.

Three families, each varied around a method: `bilevel-*` around `dacal-bilevel` (the paper's meta-step); `first-*` around
`first`, the first configuration of temperatures fitted directly, from which the search went on to the default; `fit-*` around
that, `dacal`, of which `fit-late-75` begins as `hard`. All are trained and scored by `uda.py --ablation`.
"""

from functools import partial
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from temperature_nets import ContextNet, OneTemperature
from torch import Tensor, nn
from torch.func import functional_call
from uda_methods import Method

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, soft_cross_entropy
from dacal_addon.demo.batches import Batch
from dacal_addon.demo.methods import FittedTemperatures, HardLabels, Teaching
from dacal_addon.demo.recipes import Recipe
from dacal_addon.learners.judged_sets import JUDGED_SETS, DomainBatch, JudgedBatch, target_blends
from dacal_addon.learners.temperature_fit import class_share_weights
from dacal_addon.losses import OUTER_LOSSES, brier, cross_entropy
from dacal_addon.mixing import cut_mask, mix
from dacal_addon.preserve import preserved
from dacal_addon.pseudo_labels import one_hot

IGNORED = 255


class Design(NamedTuple):
    """One configuration. The defaults are those of `dacal-bilevel`."""

    learn: Tuple[str, ...] = ("bilevel",)
    """Of "bilevel" and "fit"."""
    sees: str = "features"
    """What the net sees: see `_net`."""
    context: Tuple[int, ...] = (1, 2)
    """Dilations of its convolutions; (0, 0) for a net that sees one pixel."""
    min_temperature: float = 0.0
    judged_set: str = "source_and_target_pixels"
    outer_loss: str = "cross_entropy"
    meta_lr: float = 3e-4
    warmup: Optional[int] = None
    every: int = 2
    prior: float = 0.0
    """Times the mean of (log T)^2, added to the outer or the fit's loss."""
    weight: str = "ratio"
    """A mode of `confidence_weight`; "calibrated": the mode "confidence" with the calibrated confidence; "class": the mode
    "confidence" with the same mean for every predicted class."""
    step_scale: float = 1.0
    """Times the learning rate of the virtual step."""
    virtual_steps: int = 1
    fit_sets: Tuple[str, ...] = ("differing",)
    """Several count equally, whatever their pixels."""
    fit_loss: str = "cross_entropy"
    class_shares: bool = False
    """Whether the judged pixels are weighted so that every class has the share that it has on the target, by pseudo-labels."""
    fit_lr: float = 2e-3


FIRST = Design(learn=("fit",), sees="confidence", weight="confidence")
FITTED = Design(learn=("fit",), sees="confidence", context=(0, 0), class_shares=True)
"""`dacal`."""


def restyled_source(batch: DomainBatch, *, generator: torch.Generator) -> JudgedBatch:
    """Source images with the low frequencies' amplitudes of a target image, judged by the ground truth.

    Source: FDA (Yang and Soatto, CVPR 2020), with a band of a tenth of the frequencies.
    """
    height, width = batch.source_image.shape[-2:]
    band = max(1, min(height, width) // 20)
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    low = ((rows.abs()[:, None] <= band) & (columns.abs()[None] <= band)).to(batch.source_image.device)
    source, target = torch.fft.fft2(batch.source_image), torch.fft.fft2(batch.target_image)
    image = torch.fft.ifft2(torch.polar(torch.where(low, target.abs(), source.abs()), source.angle())).real
    return JudgedBatch(image.clamp(0.0, 1.0), batch.source_label, torch.ones_like(batch.weight))


def target_cut_mix(batch: DomainBatch, *, generator: torch.Generator) -> JudgedBatch:
    """A box of one target image in another one, judged by pseudo-labels."""
    label = batch.pseudo_label.masked_fill(batch.weight == 0, batch.ignore_index)
    n, height, width = label.shape
    mask = cut_mask((n, height, width), generator=generator, device=label.device)
    image, weight = batch.target_image, batch.weight
    return JudgedBatch(*(mix(mask, x, x.roll(1, 0)) for x in (image, label, weight)))


SETS: Dict[str, Callable[..., JudgedBatch]] = {
    **JUDGED_SETS,
    "differing": partial(target_blends, differing=True),
    "differing_80": partial(target_blends, differing=True, share=0.8),
    "cut_mix": target_cut_mix,
    "restyled": restyled_source,
}


def cross_entropy_and_brier(
    logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, *, ignore_index: int = IGNORED
) -> Tensor:
    both = [loss(logits, label, weight, ignore_index=ignore_index) for loss in (cross_entropy, brier)]
    return both[0] + both[1]


LOSSES = {**OUTER_LOSSES, "cross_entropy_and_brier": cross_entropy_and_brier}


class Variant(Teaching):
    """Self-training with soft labels of any `Design`."""

    title = "variant"

    def __init__(self, student: Any, optimizer: torch.optim.Optimizer, recipe: Recipe, *, design: Design) -> None:
        super().__init__(student, optimizer, recipe)
        self.design = design
        self.temperature_net = _net(student, design).to(next(student.parameters()).device)
        parameters = list(self.temperature_net.parameters())
        self.fit_optimizer = torch.optim.Adam(parameters, lr=design.fit_lr)
        self.meta_optimizer = torch.optim.Adam(parameters, lr=design.meta_lr)
        mode = "confidence" if design.weight in ("calibrated", "class") else design.weight
        self.label = SoftPseudoLabeler(self.temperature_net, threshold=recipe.threshold, weight=mode)
        self.warmup = recipe.meta_warmup if design.warmup is None else design.warmup
        self.by_hand = design.virtual_steps > 1 or design.step_scale != 1 or (design.prior > 0 and "bilevel" in design.learn)
        self.iteration = 0
        self.calibrate = BilevelCalibrationStep(
            student,
            self.label,
            optimizer=optimizer,
            meta_optimizer=self.meta_optimizer,
            engine="auto",
            judged_set=SETS[design.judged_set],
            outer_loss=LOSSES[design.outer_loss],
            warmup=self.warmup,
            every=design.every,
            measure_before=False,
        )

    def teach(self, teacher: Any, batch: Batch) -> str:
        self.iteration += 1
        with torch.no_grad():
            logits, maps = self.see(teacher, batch.target_image)
        if "fit" in self.design.learn:
            self.fit(teacher, batch, logits)
        if "bilevel" in self.design.learn and not self.by_hand:
            inputs = (batch.source_strong, batch.source_label, batch.target_strong, logits)
            self.calibrate(*inputs, mask=batch.mask, teacher_features=maps, backward=True, generator=batch.generator)
            return ""
        with torch.no_grad():
            labels = self.label(logits, features=maps)
        weight = labels.weight
        if self.design.weight == "calibrated":
            square = labels.soft_label.amax(1).pow(2)
            weight = weight.mean() * square / square.mean()
        elif self.design.weight == "class":
            one = one_hot(labels.pseudo_label, logits.shape[1])
            of_class = (weight.unsqueeze(1) * one).sum((0, 2, 3)) / one.sum((0, 2, 3)).clamp(min=1)
            weight = weight.mean() * weight / of_class[labels.pseudo_label].clamp(min=1e-12)
        since = self.iteration - 1 - self.warmup
        if self.by_hand and since >= 0 and since % self.design.every == 0:
            self.look_ahead(batch, logits, maps)
        self.mixed_loss(batch, labels.soft_label, weight).backward()
        return ""

    def see(self, teacher: Any, image: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """The teacher's logits, and what else the temperature net takes."""
        features = teacher.features(image)
        logits = teacher.logits(features)
        if self.design.sees.endswith("features"):
            return logits, features
        if not self.design.sees.endswith("disagreement"):
            return logits, None
        training = self.student.training
        self.student.eval()
        p, q = F.softmax(logits, 1), F.softmax(self.student(image), 1)
        self.student.train(training)
        middle = ((p + q) / 2).clamp(min=1e-7).log()
        divergence = sum((x * (x.clamp(min=1e-7).log() - middle)).sum(1, keepdim=True) for x in (p, q))
        agreement = q.gather(1, p.argmax(1, keepdim=True))
        return logits, torch.cat([torch.as_tensor(divergence).clamp(min=0).sqrt(), 2 * agreement - 1], 1)

    def domain(self, batch: Batch, logits: Tensor, *, strong: bool) -> DomainBatch:
        labels = SoftPseudoLabeler(None, threshold=self.recipe.threshold, weight="ratio")(logits)
        source = batch.source_strong if strong else batch.source_image
        target = batch.target_strong if strong else batch.target_image
        return DomainBatch(source, batch.source_label, target, labels.pseudo_label, labels.weight, batch.mask, IGNORED)

    def fit(self, teacher: Any, batch: Batch, logits: Tensor) -> None:
        """A step of the temperatures towards the labels of images that have some."""
        losses = []
        for name in self.design.fit_sets:
            domain = self.domain(batch, logits, strong=False)
            judged = SETS[name](domain, generator=batch.generator)
            weight = None
            if self.design.class_shares:
                labels = (judged.label, domain.pseudo_label)
                counts = (one_hot(label, logits.shape[1]).double().sum((0, 2, 3)) for label in labels)
                weight = class_share_weights(*counts)[judged.label.masked_fill(judged.label == IGNORED, 0)]
            with preserved(teacher), torch.no_grad():
                z, maps = self.see(teacher, judged.image)
            temperature = self.temperature_net(z, maps)
            losses.append(LOSSES[self.design.fit_loss](z / temperature, judged.label, weight) + self.prior(temperature))
        loss = torch.stack(losses).mean()
        self.descend(self.fit_optimizer, torch.autograd.grad(loss, list(self.temperature_net.parameters())))

    def look_ahead(self, batch: Batch, logits: Tensor, maps: Optional[Tensor]) -> None:
        """The bilevel step, unrolled by hand: any number and size of AdamW's steps, whose second moments count as constants."""
        labels = self.label(logits, features=maps)
        image = mix(batch.mask, batch.source_strong, batch.target_strong)
        label = mix(batch.mask, batch.source_label, labels.soft_label)
        weight = mix(batch.mask, torch.ones_like(labels.weight), labels.weight)
        outer = SETS[self.design.judged_set](self.domain(batch, logits, strong=True), generator=batch.generator)
        group = self.optimizer.param_groups[0]
        (beta1, beta2), lr = group["betas"], group["lr"] * self.design.step_scale
        with preserved(self.student):
            names = [name for name, _ in self.student.named_parameters()]
            values = [value for _, value in self.student.named_parameters()]
            states = [self.optimizer.state[value] for value in values]
            moments = [(state["exp_avg"], state["exp_avg_sq"], float(state["step"])) for state in states]
            for _ in range(self.design.virtual_steps):
                inner = soft_cross_entropy(functional_call(self.student, dict(zip(names, values)), (image,)), label, weight)
                grads = torch.autograd.grad(inner, values, create_graph=True)
                moments = [
                    (beta1 * m + (1 - beta1) * g, (beta2 * v + (1 - beta2) * g**2).detach(), step + 1)
                    for (m, v, step), g in zip(moments, grads)
                ]
                values = [
                    value * (1 - lr * group["weight_decay"])
                    - lr * m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
                    for value, (m, v, step) in zip(values, moments)
                ]
            judged = functional_call(self.student, dict(zip(names, values)), (outer.image,))
            loss = LOSSES[self.design.outer_loss](judged, outer.label, outer.weight) + self.prior(labels.temperature)
            meta_grads = torch.autograd.grad(loss, list(self.temperature_net.parameters()))
        self.descend(self.meta_optimizer, meta_grads)

    def prior(self, temperature: Tensor) -> Tensor:
        return self.design.prior * temperature.log().pow(2).mean()

    def descend(self, optimizer: torch.optim.Optimizer, grads: Tuple[Tensor, ...]) -> None:
        for parameter, grad in zip(self.temperature_net.parameters(), grads):
            parameter.grad = grad
        optimizer.step()
        optimizer.zero_grad()

    def temperature(self, teacher: Any, image: Tensor) -> Tensor:
        logits, maps = self.see(teacher, image)
        temperature: Tensor = self.temperature_net(logits, maps)
        return temperature


class HardFirst(FittedTemperatures):
    """Hard labels, and for the last quarter of the iterations the default; the temperatures are fitted from the beginning."""

    title = "hard labels for three quarters of the iterations"

    def __init__(self, student: Any, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        super().__init__(student, optimizer, recipe)
        self.hard = HardLabels(student, optimizer, recipe)
        self.left = round(0.75 * recipe.iterations)

    def teach(self, teacher: Any, batch: Batch) -> str:
        self.left -= 1
        if self.left < 0:
            return super().teach(teacher, batch)
        with torch.no_grad():
            logits = teacher(batch.target_image)
        self.fit_temperatures(teacher, batch, logits)
        return self.hard.teach(teacher, batch)


def _net(student: Any, design: Design) -> nn.Module:
    classes = student.head.out_channels
    if design.sees == "nothing":
        return OneTemperature()
    kernel_size = 3 if any(design.context) else 1
    if design.sees.endswith("features"):
        sees = "confidence" if design.sees.startswith("confidence") else "logits"
        return MetaTemperatureNet(classes, feature_channels=student.feature_channels, sees=sees, kernel_size=kernel_size)
    return ContextNet(
        classes,
        extra=2 * design.sees.endswith("disagreement"),
        sees_classes=not design.sees.startswith("confidence"),
        kernel=kernel_size,
        dilations=[max(1, dilation) for dilation in design.context],
        min_temperature=design.min_temperature,
    )


def _bilevel(title: str, **changes: Any) -> Method:
    return Method(title, partial(Variant, design=Design()._replace(**changes)), seeds=1)


def _first(title: str, **changes: Any) -> Method:
    return Method(title, partial(Variant, design=FIRST._replace(**changes)), seeds=1)


def _fitted(title: str, *, seeds: int = 1, **changes: Any) -> Method:
    return Method(title, partial(Variant, design=FITTED._replace(**changes)), seeds=seeds)


BASES = ("hard", "soft", "dacal-bilevel", "dacal")
"""Methods of the table to run beside the variants."""

ABLATION: Dict[str, Method] = {
    "bilevel-logits": _bilevel("net sees logits, margin, entropy (no features)", sees="logits"),
    "bilevel-confidence": _bilevel("net sees margin and entropy", sees="confidence"),
    "bilevel-disagreement": _bilevel("net sees logits, and where student and teacher disagree", sees="logits+disagreement"),
    "bilevel-context-1": _bilevel("net sees logits of 1 pixel", sees="logits", context=(0, 0)),
    "bilevel-context-31": _bilevel("net sees logits of 31 x 31 pixels", sees="logits", context=(1, 2, 4, 8)),
    "bilevel-source": _bilevel("judged set: source pixels", judged_set="source_pixels"),
    "bilevel-mixup": _bilevel("judged set: target blends", judged_set="target_blends"),
    "bilevel-differing": _bilevel("judged set: target blends where labels differ", judged_set="differing"),
    "bilevel-cut-mix": _bilevel("judged set: cut-mix of target images", judged_set="cut_mix"),
    "bilevel-restyled": _bilevel("judged set: restyled source", judged_set="restyled"),
    "bilevel-brier": _bilevel("outer loss: Brier", outer_loss="brier"),
    "bilevel-gap": _bilevel("outer loss: binned gap, l2", outer_loss="calibration_gap"),
    "bilevel-ce-gap": _bilevel("outer loss: cross-entropy + 10 gap", outer_loss="cross_entropy_and_gap"),
    "bilevel-ce-brier": _bilevel("outer loss: cross-entropy + Brier", outer_loss="cross_entropy_and_brier"),
    "bilevel-mixup-gap": _bilevel(
        "judged set: target blends, outer loss: gap", judged_set="target_blends", outer_loss="calibration_gap"
    ),
    "bilevel-lr-1e-4": _bilevel("meta learning rate 1e-4", meta_lr=1e-4),
    "bilevel-lr-1e-3": _bilevel("meta learning rate 1e-3", meta_lr=1e-3),
    "bilevel-warmup-0": _bilevel("no warm-up", warmup=0),
    "bilevel-warmup-200": _bilevel("warm-up of 200 iterations", warmup=200),
    "bilevel-every-1": _bilevel("every iteration", every=1),
    "bilevel-every-4": _bilevel("every 4th iteration", every=4),
    "bilevel-by-hand": _bilevel("nothing, but unrolled by hand: AdamW's second moment counts as constant", prior=1e-30),
    "bilevel-prior": _bilevel("by hand, prior: + 0.1 (log T)^2", prior=0.1),
    "bilevel-weight-confidence": _bilevel("weights by confidence", weight="confidence"),
    "bilevel-weight-none": _bilevel("weights 1", weight="none"),
    "bilevel-step-0.1": _bilevel("by hand, a tenth of the virtual step", step_scale=0.1),
    "bilevel-step-10": _bilevel("by hand, ten times the virtual step", step_scale=10.0),
    "bilevel-3-steps": _bilevel("by hand, 3 virtual steps", virtual_steps=3),
    "first": _first("first configuration: 7 x 7 pixels, weights by confidence, cross-entropy"),
    "first-one": _first("one temperature for all pixels, learning rate 1e-2", sees="nothing", fit_lr=1e-2),
    "first-logits": _first("net sees logits too", sees="logits"),
    "first-features": _first("net sees logits and features too", sees="features"),
    "first-disagreement": _first("net sees where student and teacher disagree too", sees="confidence+disagreement"),
    "first-context-1": _first("net sees 1 pixel", context=(0, 0)),
    "first-context-31": _first("net sees 31 x 31 pixels", context=(1, 2, 4, 8)),
    "first-mixup": _first("fitted on all pixels of the blends", fit_sets=("target_blends",)),
    "first-80": _first("blends of 80 to 20", fit_sets=("differing_80",)),
    "first-pasted": _first("fitted on source pixels pasted into target", fit_sets=("source_pixels",)),
    "first-restyled": _first("fitted on restyled source", fit_sets=("restyled",)),
    "first-blends-and-pasted": _first("fitted on blends and pasted source", fit_sets=("differing", "source_pixels")),
    "first-blends-and-restyled": _first("fitted on blends and restyled source", fit_sets=("differing", "restyled")),
    "first-cut-mix": _first("fitted on cut-mix of target images", fit_sets=("cut_mix",)),
    "first-brier": _first("fitted by Brier", fit_loss="brier"),
    "first-gap": _first("fitted by binned gap, l2", fit_loss="calibration_gap"),
    "first-lr-5e-4": _first("learning rate 5e-4", fit_lr=5e-4),
    "first-lr-1e-2": _first("learning rate 1e-2", fit_lr=1e-2),
    "first-prior": _first("prior: + 0.1 (log T)^2", prior=0.1),
    "first-weight-ratio": _first("DAFormer's weights (ratio)", weight="ratio"),
    "first-weight-none": _first("weights 1", weight="none"),
    "first-softening": _first("T at least 1", min_temperature=1.0),
    "first-weight-class": _first("weights by confidence within a predicted class", weight="class"),
    "first-weight-calibrated": _first("weights by calibrated confidence", weight="calibrated"),
    "first-and-bilevel": _first("with the bilevel step besides", learn=("fit", "bilevel")),
    "fit-one": _fitted("one temperature for all pixels, learning rate 1e-2", sees="nothing", fit_lr=1e-2),
    "fit-logits": _fitted("net sees logits too", sees="logits"),
    "fit-features": _fitted("net sees logits and features too", sees="features"),
    "fit-context-7": _fitted("net sees 7 x 7 pixels", context=(1, 2)),
    "fit-mixup": _fitted("fitted on all pixels of the blends", fit_sets=("target_blends",)),
    "fit-80": _fitted("blends of 80 to 20", fit_sets=("differing_80",)),
    "fit-pasted": _fitted("fitted on source pixels pasted into target", fit_sets=("source_pixels",)),
    "fit-restyled": _fitted("fitted on restyled source", fit_sets=("restyled",)),
    "fit-blends-and-pasted": _fitted("fitted on blends and pasted source", fit_sets=("differing", "source_pixels")),
    "fit-unweighted": _fitted("class shares as on the blends", class_shares=False, seeds=3),
    "fit-unweighted-brier": _fitted(
        "class shares as on the blends, fitted by Brier", class_shares=False, fit_loss="brier", seeds=3
    ),
    "fit-brier": _fitted("fitted by Brier", fit_loss="brier", seeds=3),
    "fit-gap": _fitted("fitted by binned gap, l2", fit_loss="calibration_gap"),
    "fit-lr-5e-4": _fitted("learning rate 5e-4", fit_lr=5e-4),
    "fit-lr-1e-2": _fitted("learning rate 1e-2", fit_lr=1e-2),
    "fit-prior": _fitted("prior: + 0.1 (log T)^2", prior=0.1),
    "fit-weight-confidence": _fitted("weights by confidence", weight="confidence"),
    "fit-weight-none": _fitted("weights 1", weight="none"),
    "fit-and-bilevel": _fitted("with the bilevel step besides", learn=("fit", "bilevel")),
    "fit-late-75": Method(HardFirst.title, HardFirst, seeds=1),
}
