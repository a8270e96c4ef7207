"""A temperature folded into the last layer: exactness, where the layer is, what is refused, what notes survive."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dacal_addon import two_channels
from dacal_addon.calibrate import TemperatureScaled, classifiers, fold_checkpoint, fold_temperature, folded_temperature

SCALED = r"TemperatureScaled\(model, temperature\)"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image(channels=3, size=(8, 12), n=2):
    return torch.randn(n, channels, *size, generator=generator())


class ConvModule(nn.Module):
    """mmcv's, as far as it matters."""

    def __init__(self, inputs, outputs, *, bare, **options):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, **options)
        self.with_norm, self.with_activation = False, not bare

    def forward(self, x):
        x = self.conv(x)
        return F.relu(x) if self.with_activation else x


class Head(nn.Module):
    """DAFormer's."""

    def __init__(self, channels=6, num_classes=5):
        super().__init__()
        self.fuse = ConvModule(channels, channels, bare=False, kernel_size=3, padding=1)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        return self.conv_seg(self.dropout(self.fuse(x)))


class SegFormerHead(Head):
    """The hosts': it inherits a `conv_seg` that it does not use."""

    def __init__(self, **options):
        super().__init__(**options)
        self.linear_pred = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        return self.linear_pred(self.dropout(self.fuse(x)))


class DLV2Head(nn.Module):
    def __init__(self, channels=6, num_classes=5):
        super().__init__()
        options = {"bare": True, "kernel_size": 3}
        self.aspp_modules = nn.ModuleList(
            [ConvModule(channels, num_classes, padding=d, dilation=d, **options) for d in (1, 2, 3, 4)]
        )

    def forward(self, x):
        return sum(branch(x) for branch in self.aspp_modules)


class DAHead(Head):
    def __init__(self):
        super().__init__()
        self.pam_conv_seg, self.cam_conv_seg = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)


class HRDAHead(nn.Module):
    """HRDA's `forward` without its crops: one head for both scales, an attention of its own, logits that are fused."""

    def __init__(self, kind=Head, attention=True):
        super().__init__()
        self.head = kind()
        self.scale_attention = Head() if attention else None
        self.fixed_attention = 0.3

    def forward(self, inputs):
        low, high = inputs
        low_seg, high_seg = self.head(low), self.head(high)
        att = torch.sigmoid(self.scale_attention(low)) if self.scale_attention is not None else self.fixed_attention
        size = high_seg.shape[-2:]
        low_seg = F.interpolate((1 - att) * low_seg, size=size, mode="bilinear", align_corners=False)
        if torch.is_tensor(att):
            att = F.interpolate(att, size=size, mode="bilinear", align_corners=False)
        return att * high_seg + low_seg, low_seg, high_seg


class EncoderDecoder(nn.Module):
    def __init__(self, head, *, scales=1, auxiliary=False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.decode_head = head
        self.scales = scales
        if auxiliary:
            self.auxiliary_head = Head()

    def forward(self, img):
        if self.scales == 1:
            return self.decode_head(self.backbone(img))
        low = F.avg_pool2d(img, 2)
        return self.decode_head([self.backbone(low), self.backbone(img)])[0]


def kept_argmax(before, after):
    """Equal but where two logits were the same up to rounding."""
    top = before.topk(2, 1)[0]
    clear = top[:, 0] - top[:, 1] > 1e-4 * before.abs().max()
    assert bool(clear.float().mean() > 0.9)
    return bool((before.argmax(1) == after.argmax(1))[clear].all())


MODELS = {
    "daformer": (lambda: EncoderDecoder(Head(), auxiliary=True), ["decode_head.conv_seg"]),
    "segformer": (lambda: EncoderDecoder(SegFormerHead()), ["decode_head.linear_pred"]),
    "da": (lambda: EncoderDecoder(DAHead()), ["decode_head.conv_seg"]),
    "deeplab-v2": (
        lambda: EncoderDecoder(DLV2Head()),
        [f"decode_head.aspp_modules.{i}.conv" for i in range(4)],
    ),
    "hrda": (lambda: EncoderDecoder(HRDAHead(), scales=2), ["decode_head.head.conv_seg"]),
    "hrda, fixed": (lambda: EncoderDecoder(HRDAHead(attention=False), scales=2), ["decode_head.head.conv_seg"]),
    "hrda, deeplab-v2": (
        lambda: EncoderDecoder(HRDAHead(DLV2Head), scales=2),
        [f"decode_head.head.aspp_modules.{i}.conv" for i in range(4)],
    ),
    "cascade": (lambda: EncoderDecoder(Cascade([Head(), Head()])), ["decode_head.1.conv_seg"]),
    "torchvision": (lambda: TorchvisionLike(), ["classifier.4"]),
    "lraspp": (lambda: LRASPPLike(), ["classifier.low_classifier", "classifier.high_classifier"]),
    "sequence": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 5, 1)), nn.Upsample(scale_factor=2)),
        ["1.1"],
    ),
    "wrapped": (lambda: nn.DataParallel(EncoderDecoder(Head())), ["module.decode_head.conv_seg"]),
}  # fmt: skip


class Cascade(nn.ModuleList):
    def forward(self, x):
        self[0](x)
        return self[1](x)


class TorchvisionLike(nn.Module):
    """FCNHead: a sequence that is a class of its own."""

    class FCNHead(nn.Sequential):
        pass

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 6, 3)
        self.classifier = self.FCNHead(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(6, 5, 1))
        self.aux_classifier = self.FCNHead(nn.Conv2d(6, 5, 1))

    def forward(self, x):
        return self.classifier(self.backbone(x))


class LRASPPLike(nn.Module):
    class LRASPPHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.low_classifier, self.high_classifier = nn.Conv2d(3, 5, 1), nn.Conv2d(6, 5, 1)

        def forward(self, low, high):
            return self.low_classifier(low) + self.high_classifier(high)

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 6, 3, padding=1)
        self.classifier = self.LRASPPHead()

    def forward(self, x):
        return self.classifier(x, self.backbone(x))


@pytest.mark.parametrize("name", MODELS)
def test_the_models_logits_are_divided_and_nothing_else_changes(name):
    make, names = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    before, state = model(image()), copy.deepcopy(model.state_dict())
    assert list(fold_temperature(model, 1.7)) == names
    after = model(image())
    assert torch.allclose(after, before / 1.7, rtol=1e-4, atol=1e-5 * float(before.detach().abs().max()))
    assert kept_argmax(before, after)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {f"{name}.{own}" for name in names for own in ("weight", "bias")}
    assert list(model.state_dict()) == list(state)  # a model that nobody folded loads it


def test_a_real_segformer():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=5, depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    x = image(size=(64, 64))
    before = model(x).logits
    names = fold_temperature(model, 0.6, check_on=x, logits_of=lambda out: out.logits)
    assert names == ("decode_head.classifier",)
    assert torch.allclose(model(x).logits, before / 0.6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda bias: nn.Linear(6, 4, bias=bias), (5, 6)),
        (lambda bias: nn.Conv1d(6, 4, 3, bias=bias), (2, 6, 9)),
        (lambda bias: nn.Conv2d(6, 4, 3, bias=bias, groups=2, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
        (lambda bias: nn.Conv3d(6, 4, 1, bias=bias), (2, 6, 3, 3, 3)),
        (lambda bias: nn.ConvTranspose2d(6, 4, 2, stride=2, bias=bias), (2, 6, 3, 3)),
        (lambda bias: nn.ConvTranspose3d(6, 1, 2, stride=2, bias=bias), (2, 6, 3, 3, 3)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_alone_is_exact(layer, shape, bias):
    layer = layer(bias).double()
    x = torch.randn(*shape, generator=generator(), dtype=torch.float64)
    before = layer(x)
    assert fold_temperature(layer, 3.0) == ("",)
    assert torch.allclose(layer(x), before / 3, rtol=1e-13, atol=1e-15)
    assert folded_temperature(layer) == 3.0


def test_one_as_a_temperature_changes_and_notes_nothing():
    layer = nn.Conv2d(6, 4, 1)
    weight = layer.weight.detach().clone()
    fold_temperature(layer, 1.0)
    assert torch.equal(layer.weight, weight)
    assert folded_temperature(layer) is None
    fold_temperature(layer, 2.0)
    assert folded_temperature(layer) == 2.0


def test_folding_twice_is_refused_also_through_copies_and_pickles():
    model = EncoderDecoder(Head())
    fold_temperature(model, 2.0)
    saved = pickle.dumps(model)
    assert b"dacal_addon" not in saved  # whoever loads the network does not need the package
    for again in (model, copy.deepcopy(model), pickle.loads(saved), model.half().float()):
        weight = again.decode_head.conv_seg.weight.detach().clone()
        with pytest.raises(ValueError, match="expected weights into which nothing is folded, got T = 2 in them; start"):
            fold_temperature(again, 1.5)
        assert torch.equal(again.decode_head.conv_seg.weight, weight)


def test_a_note_ends_where_other_weights_are_loaded():
    model = EncoderDecoder(Head())
    original = copy.deepcopy(model.state_dict())
    fold_temperature(model, 2.0)
    folded = copy.deepcopy(model.state_dict())
    model.load_state_dict(original)
    assert folded_temperature(model) is None
    fold_temperature(model, 2.0)
    assert torch.equal(model.decode_head.conv_seg.weight, folded["decode_head.conv_seg.weight"])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), None, "2", torch.ones(3)])
def test_temperatures_that_are_none_are_refused(bad):
    layer = nn.Conv2d(6, 4, 1)
    for use in (
        lambda: fold_temperature(layer, bad),
        lambda: fold_checkpoint({"weight": layer.weight}, bad, layers=[""]),
        lambda: TemperatureScaled(layer, bad),
    ):
        with pytest.raises(ValueError, match="expected a finite temperature > 0, got"):
            use()


def test_a_temperature_may_be_a_number_of_any_kind():
    for value in (2, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0).numpy()):
        layer = nn.Conv2d(6, 4, 1)
        fold_temperature(layer, value)
        assert folded_temperature(layer) == 2.0


def test_weights_that_would_overflow_are_refused():
    layer = nn.Conv2d(6, 4, 1)
    with pytest.raises(ValueError, match="expected weights that stay finite, got a temperature of 1e-40; pass a larger one"):
        fold_temperature(layer, 1e-40)
    assert bool(torch.isfinite(layer.weight).all())


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"layer.weight in float32 or float64, got float16 \(4, 6, 1, 1\); fold before"):
        fold_temperature(nn.Conv2d(6, 4, 1).half(), 2.0)


def test_tied_weights_are_refused():
    model = nn.Module()
    model.embed, model.classifier = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    model.classifier.weight = model.embed.weight
    with pytest.raises(ValueError, match=f"classifier to have its weight for itself, got one that is embed's too; .*{SCALED}"):
        fold_temperature(model, 2.0)
    # A layer that is registered under two names is one layer.
    model = EncoderDecoder(Head())
    model.alias = model.decode_head.conv_seg
    assert fold_temperature(model, 2.0) == ("decode_head.conv_seg",)


def test_weights_that_are_computed_are_refused():
    layers = [nn.utils.weight_norm(nn.Conv2d(6, 4, 1)) if not hasattr(nn.utils, "parametrizations") else None]
    layers.append(nn.utils.spectral_norm(nn.Conv2d(6, 4, 1)))
    if hasattr(nn.utils, "parametrizations"):
        layers.append(nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 1)))
    for layer in filter(None, layers):
        with pytest.raises(ValueError, match=rf"Conv2d whose weight is computed .*; make it plain .*{SCALED}"):
            fold_temperature(layer, 2.0)


def test_layers_that_are_not_linear_in_their_weight_are_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std(), self.bias)

    own = nn.Conv2d(6, 4, 1)
    own.forward = lambda x: x
    for layer in (Standardised(6, 4, 1), own):
        with pytest.raises(ValueError, match=rf"which has a forward pass of its own; wrap the model: {SCALED}"):
            fold_temperature(layer, 2.0)
    with pytest.raises(TypeError, match=r"1: a linear layer or convolution of torch with a plain weight, got ReLU"):
        fold_temperature(nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU()), 2.0, layer="1")


def test_a_quantised_layer_is_refused():
    if torch.backends.quantized.engine == "none":
        pytest.skip("no quantised kernels here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new versions call them deprecated
        quantised = nn.Sequential(torch.nn.quantized.Linear(6, 4))
    with pytest.raises(ValueError, match="expected a model whose last layer is where"):
        fold_temperature(quantised, 2.0)
    with pytest.raises(TypeError, match="0: a linear layer or convolution of torch with a plain weight, got Linear"):
        fold_temperature(quantised, 2.0, layer="0")


def test_where_no_layer_is_found_the_error_lists_candidates():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 7, 1), nn.ReLU())
            self.out = nn.Module()
            self.out.conv = nn.Conv2d(7, 5, 1)

        def forward(self, x):
            return self.out.conv(self.encoder(x))

    model = Odd()
    listed = (
        r'got Odd; say which with layer="...", one of "out.conv" \(Conv2d with 5 outputs\), '
        rf'"encoder.1" \(Conv2d with 7 outputs\); or wrap it: {SCALED}'
    )
    with pytest.raises(ValueError, match=listed):
        fold_temperature(model, 2.0)
    with pytest.raises(ValueError, match=r"expected layer to name modules of Odd, got 'out\.cnv'; say which with layer="):
        fold_temperature(model, 2.0, layer="out.cnv")
    before = model(image())
    assert fold_temperature(model, 2.0, layer="out.conv") == ("out.conv",)
    wrapped = nn.DataParallel(Odd())
    assert fold_temperature(wrapped, 2.0, layer="out.conv") == ("module.out.conv",)
    assert fold_temperature(nn.DataParallel(Odd()), 2.0, layer="module.out.conv") == ("module.out.conv",)
    assert torch.allclose(model(image()), before / 2, atol=1e-6)


def test_a_trainers_student_is_named_by_its_own_layer():
    trainer = nn.Module()
    trainer.model, trainer.ema_model = EncoderDecoder(HRDAHead(), scales=2), EncoderDecoder(HRDAHead(), scales=2)
    with pytest.raises(ValueError, match=r'one of "ema_model.decode_head.head.conv_seg" .*"model.decode_head.head.conv_seg"'):
        classifiers(trainer)


def test_a_trial_finds_what_the_structure_does_not_show():
    class Residual(EncoderDecoder):
        def forward(self, img):
            return super().forward(img) + img.mean(1, keepdim=True) * torch.arange(5.0).view(1, 5, 1, 1)

    model = Residual(Head()).train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected logits that are those before, divided by T, got a difference of"):
        fold_temperature(model, 2.0, check_on=image())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert folded_temperature(model) is None
    unused = EncoderDecoder(SegFormerHead()).train()
    with pytest.raises(ValueError, match="divided by T"):
        fold_temperature(unused, 2.0, layer="decode_head.conv_seg", check_on=image())
    assert fold_temperature(unused, 2.0, check_on=image()) == ("decode_head.linear_pred",)
    assert unused.training
    assert all(int(module.num_batches_tracked) == 0 for module in unused.modules() if isinstance(module, nn.BatchNorm2d))


# Checkpoints


def loaded(checkpoint):
    """As from a file."""
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    stream.seek(0)
    return torch.load(stream)


def test_a_checkpoint_is_folded_as_the_model_is_and_loads_strictly():
    model, folded = EncoderDecoder(HRDAHead(), scales=2).eval(), None
    names = list(classifiers(model))
    untouched = copy.deepcopy(model.state_dict())
    for wrap in (
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": state, "meta": {"a": 1}},
    ):
        checkpoint = wrap(model.state_dict())
        assert folded_temperature(checkpoint) is None
        folded = loaded(fold_checkpoint(checkpoint, 2.5, layers=names))
        assert folded_temperature(checkpoint) is None
        assert folded_temperature(folded) == 2.5
        with pytest.raises(ValueError, match=r"fold_checkpoint: expected weights into which nothing is folded, got T = 2\.5"):
            fold_checkpoint(folded, 2.0, layers=names)
        fresh = EncoderDecoder(HRDAHead(), scales=2).eval()
        fresh.load_state_dict(folded.get("state_dict", folded), strict=True)
        assert torch.allclose(fresh(image()), model(image()) / 2.5, atol=1e-5)
    assert folded["meta"] == {"a": 1, "dacal": {"temperature": 2.5, "layers": names}}
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    fold_temperature(twin, 2.5)
    assert all(torch.equal(value, folded["state_dict"][key]) for key, value in twin.state_dict().items())


def test_in_a_trainers_checkpoint_only_the_student_is_folded():
    student = EncoderDecoder(Head())
    state = OrderedDict(
        (f"{part}.{key}", value.clone()) for part in ("model", "ema_model") for key, value in student.state_dict().items()
    )
    folded = fold_checkpoint({"state_dict": state, "meta": {}}, 2.0, layers=classifiers(student), prefix="model.")
    changed = {key for key, value in folded["state_dict"].items() if not torch.equal(value, state[key])}
    assert changed == {"model.decode_head.conv_seg.weight", "model.decode_head.conv_seg.bias"}
    assert folded["meta"]["dacal"]["layers"] == ["model.decode_head.conv_seg"]


def test_a_checkpoint_without_such_a_weight_or_with_a_tied_one_is_refused():
    state = EncoderDecoder(Head()).state_dict()
    with pytest.raises(ValueError, match=r"expected an entry 'model\.decode_head\.conv_seg\.weight', got 'decode_head"):
        fold_checkpoint(state, 2.0, layers=["decode_head.conv_seg"], prefix="model.")
    state["tied"] = state["decode_head.conv_seg.weight"]
    with pytest.raises(ValueError, match=r"expected 'decode_head\.conv_seg\.weight' to be no other entry, got 'tied'"):
        fold_checkpoint(state, 2.0, layers=["decode_head.conv_seg"])
    half = {"weight": torch.ones(4, 6, 1, 1).half()}
    with pytest.raises(ValueError, match="expected weight in float32 or float64, got float16"):
        fold_checkpoint(half, 2.0, layers=[""])


# The wrapper


def test_the_wrapper_divides_and_keeps_kind_and_state():
    model = EncoderDecoder(Head()).eval()
    scaled = TemperatureScaled(model, 1.3).eval()
    assert torch.allclose(scaled(image()), model(image()) / 1.3, rtol=1e-6)
    assert scaled(img=image()).dtype == torch.float32
    other = TemperatureScaled(EncoderDecoder(Head()), 9.0)
    other.load_state_dict(scaled.state_dict())
    assert float(other.temperature) == 1.3


@pytest.mark.parametrize("output", [{"out": torch.zeros(1)}, (torch.zeros(1),), torch.zeros(1).long()])
def test_the_wrapper_refuses_what_is_no_tensor_of_logits(output):
    class Structured(nn.Module):
        def forward(self):
            return output

    with pytest.raises(TypeError, match="TemperatureScaled: expected a model that returns a tensor of logits, got"):
        TemperatureScaled(Structured(), 2.0)()


# Volumes and one sigmoid channel


@pytest.mark.parametrize(
    "last",
    [lambda: nn.Conv3d(6, 1, 1), lambda: nn.ConvTranspose3d(6, 1, 2, stride=2), lambda: nn.Conv3d(6, 3, 3, padding=1)],
)
def test_a_volumes_last_layer_is_found_tried_and_folded(last):
    model = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), last(), nn.Dropout3d(0.2))
    x = image(2, (4, 6, 8))
    before = model.eval()(x)
    assert fold_temperature(model, 1.7, check_on=x) == ("3",)
    assert torch.allclose(model(x), before / 1.7, atol=1e-6)


@pytest.mark.parametrize("logits_of", [None, two_channels])
def test_one_sigmoid_channel_says_the_sigmoid_of_z_over_t(logits_of):
    model = EncoderDecoder(Head(num_classes=1)).double().eval()
    x = image().double()
    before = model(x).detach()
    assert fold_temperature(model, 2.5, check_on=x, logits_of=logits_of) == ("decode_head.conv_seg",)
    assert torch.allclose(model(x).sigmoid(), 1 / (1 + torch.exp(-before / 2.5)), rtol=1e-12)
    assert torch.equal(model(x) > 0, before > 0)


def test_a_sigmoid_inside_of_the_network_is_found_by_the_trial():
    """Its output is no logit: divided by T, the layer before it gives something else."""

    class Probabilities(EncoderDecoder):
        def forward(self, img):
            return super().forward(img).sigmoid()

    model = Probabilities(Head(num_classes=1)).eval()
    with pytest.raises(ValueError, match="expected logits that are those before, divided by T"):
        fold_temperature(model, 2.5, check_on=image())
    with pytest.raises(TypeError, match=r"fold_temperature: expected a network that returns logits .*got dict of 'out'"):
        fold_temperature(EncoderDecoder(Head()), 2.0, check_on=image(), logits_of=lambda z: {"out": z})
