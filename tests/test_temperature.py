import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from dacal_addon import MetaTemperatureNet, two_channels
from dacal_addon.temperature import bounded_temperature, temperature_features


def logits(seed=0, shape=(2, 5, 6, 7), scale=3.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("initial", [1.0, 0.3, 2.7])
@pytest.mark.parametrize("feature_channels", [0, 8])
def test_starts_at_exactly_the_initial_temperature(initial, feature_channels):
    net = MetaTemperatureNet(5, feature_channels=feature_channels, initial_temperature=initial)
    features = logits(1, (2, 8, 3, 4)) if feature_channels else None
    temperature = net(logits(scale=100.0), features)
    assert temperature.shape == (2, 1, 6, 7)
    assert bool((temperature == torch.tensor(initial)).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0), st.floats(1.1, 20.0), st.floats(0.1, 1e4))
def test_stays_within_its_bounds_whatever_the_weights(seed, initial, ratio, scale):
    net = MetaTemperatureNet(5, initial_temperature=initial, max_ratio=ratio)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(logits(seed + i, parameter.shape, scale))
        temperature = net(logits(seed))
    assert float(temperature.min()) >= initial / ratio * (1 - 1e-5)
    assert float(temperature.max()) <= initial * ratio * (1 + 1e-5)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_comes_back_from_its_bound(direction):
    """A plain clamp (or a tanh) has no gradient once it is out there, and T would stay at its bound for good."""
    net = MetaTemperatureNet(5)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    z = logits()
    for _ in range(200):
        optimizer.zero_grad()
        (-direction * net(z).log().mean()).backward()
        optimizer.step()
    assert float((net(z).log() * direction).detach().min()) == pytest.approx(np.log(5.0), rel=1e-4)
    for _ in range(400):
        optimizer.zero_grad()
        net(z).log().pow(2).mean().backward()
        optimizer.step()
    assert float(net(z).log().abs().detach().max()) < 0.5


def test_gradient_is_exact_inside_and_only_leads_back_outside():
    h = torch.tensor([-3.0, -0.5, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    (up,) = torch.autograd.grad(bounded_temperature(h, initial=2.0, max_ratio=np.e).sum(), h)  # descent lowers h
    (down,) = torch.autograd.grad(-bounded_temperature(h, initial=2.0, max_ratio=np.e).sum(), h)  # descent raises h
    np.testing.assert_allclose(up.tolist(), [0.0, 2 * np.exp(-0.5), 2 * np.exp(0.7), 2 * np.e])
    np.testing.assert_allclose(down.tolist(), [-2 / np.e, -2 * np.exp(-0.5), -2 * np.exp(0.7), 0.0])


def test_features_equal_an_independent_computation():
    z = logits(dtype=torch.float64)
    got = temperature_features(z).numpy()
    log_p = log_softmax(z.numpy(), axis=1)
    p = np.sort(np.exp(log_p), axis=1)
    np.testing.assert_allclose(got[:, :5], np.maximum(log_p, -9) / 4.5 + 1)
    np.testing.assert_allclose(got[:, 5], 2 * (p[:, -1] - p[:, -2]) - 1)
    np.testing.assert_allclose(got[:, 6], 2 * -(p * np.log(p)).sum(1) / np.log(5) - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_give_finite_features_in_every_precision(dtype):
    z = torch.tensor([6e4, -6e4, 0.0, 0.0, 0.0]).view(1, 5, 1, 1).to(dtype)
    features = temperature_features(z)
    assert bool(torch.isfinite(features).all())
    assert features.abs().max() <= 2
    assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-50, 50))
def test_depends_on_the_softmax_only(seed, shift):
    z = logits(seed, dtype=torch.float64)
    np.testing.assert_allclose(temperature_features(z + shift), temperature_features(z), rtol=1e-9, atol=1e-9)


def test_sees_features_whatever_their_scale_and_resolution():
    net = MetaTemperatureNet(5, feature_channels=8)
    torch.nn.init.constant_(net.last.weight, 0.3)
    z, features = logits(), logits(1, (2, 8, 3, 4))
    base = net(z, features)
    assert not torch.equal(base, net(z, features.flip(0)))
    np.testing.assert_allclose(net(z, 1000 * features).detach(), base.detach(), rtol=1e-3, atol=1e-3)


def test_one_that_sees_confidence_does_not_know_which_class_it_is():
    net, informed = MetaTemperatureNet(5), MetaTemperatureNet(5, sees="logits")
    for each in (net, informed):
        torch.nn.init.constant_(each.last.weight, 0.2)
    z = logits()
    renamed = z[:, [3, 1, 4, 0, 2]]
    assert net(z).std() > 0.01
    assert bool(torch.isclose(net(renamed), net(z)).all())
    assert not bool(torch.isclose(informed(renamed), informed(z)).all())


@pytest.mark.parametrize(("kernel_size", "reach"), [(1, 0), (3, 3)])
def test_sees_the_neighbourhood_that_the_kernel_size_says(kernel_size, reach):
    net = MetaTemperatureNet(5, kernel_size=kernel_size)
    torch.nn.init.constant_(net.last.weight, 0.2)
    z = logits(shape=(1, 5, 11, 13))
    changed = z.clone()
    changed[..., 5, 6] = 5 * changed[..., 5, 6] + 1
    rows, columns = (net(z) != net(changed))[0, 0].nonzero(as_tuple=True)
    found = (rows - 5).abs().max(), (columns - 6).abs().max()
    assert found == (reach, reach)


def test_gradient_reaches_the_net_and_nothing_else():
    net = MetaTemperatureNet(5, feature_channels=8)
    z, features = logits().requires_grad_(), logits(1, (2, 8, 3, 4)).requires_grad_()
    net(z, features).sum().backward()
    assert z.grad is None
    assert features.grad is None
    assert float(net.last.weight.grad.abs().sum()) > 0


def test_a_class_masked_out_is_no_trouble():
    z = logits()
    z[:, 1] = -np.inf
    features = temperature_features(z)
    assert bool(torch.isfinite(features).all())
    without = temperature_features(torch.cat([z[:, :1], z[:, 2:]], 1))
    np.testing.assert_allclose(features[:, 5], without[:, 4], rtol=1e-5, atol=1e-6)


def test_the_narrowest_net_works():
    net = MetaTemperatureNet(5, feature_channels=6, hidden_channels=1)
    assert net(logits(), logits(1, (2, 6, 3, 4))).shape == (2, 1, 6, 7)


def test_building_leaves_the_global_random_state_alone_and_is_reproducible():
    before = torch.get_rng_state()
    first, second = MetaTemperatureNet(5), MetaTemperatureNet(5)
    other = MetaTemperatureNet(5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.layers[0].weight, second.layers[0].weight)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_has_a_few_thousand_parameters():
    def count(**options):
        return sum(parameter.numel() for parameter in MetaTemperatureNet(19, **options).parameters())

    assert (count(), count(sees="logits", kernel_size=3)) == (337, 5377)  # the docstring says so
    assert count(feature_channels=256) < 10_000


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: MetaTemperatureNet(1), r"MetaTemperatureNet: expected num_classes >= 2, got 1; .*two_channels"),
        (lambda: MetaTemperatureNet(0), r"expected a whole number num_classes >= 2, got 0;"),
        (lambda: MetaTemperatureNet(5, spatial_dims=4), r"a whole number spatial_dims in 1..3, got 4"),
        (lambda: MetaTemperatureNet(2)(logits(shape=(2, 1, 6, 7))), r"with C = 2, got float32 \(2, 1, 6, 7\); .*two_channels"),
        (lambda: MetaTemperatureNet(5)(logits(shape=(2, 6, 7, 5))), r"the classes are last: x.permute\(0, 3, 1, 2\)"),
        (
            lambda: MetaTemperatureNet(5)(logits(shape=(2, 5, 2, 3, 4))),
            r"2 spatial dim.*build the net with spatial_dims=3",
        ),
        (lambda: MetaTemperatureNet(5, spatial_dims=3)(logits()), r"3 spatial dimensions, .*build the net with spatial_dims=2"),
        (lambda: MetaTemperatureNet(5, max_ratio=1.0), r"expected max_ratio > 1"),
        (lambda: MetaTemperatureNet(5, kernel_size=2), r"MetaTemperatureNet: expected an odd kernel_size, got 2; use 1 or 3"),
        (lambda: MetaTemperatureNet(5, initial_temperature=float("nan")), r"expected initial_temperature .*got nan"),
        (lambda: MetaTemperatureNet(5)(logits(shape=(2, 4, 6, 7))), r"with C = 5, got float32 \(2, 4, 6, 7\);"),
        (lambda: MetaTemperatureNet(5)(logits(), logits()), r"expected features=None, .*feature_channels=5"),
        (lambda: MetaTemperatureNet(5, feature_channels=8)(logits()), r"features: a floating tensor \(N=2, F=8, h, w\)"),
        (lambda: MetaTemperatureNet(5, feature_channels=8)(logits(), logits()), r"F=8, h, w\), got float32 \(2, 5, 6, 7\)"),
        (lambda: temperature_features(torch.zeros(1, 3, 2, 2, dtype=torch.int64)), r"a floating tensor"),
    ],
)
def test_errors_name_expected_got_and_remedy(call, expected):
    with pytest.raises((ValueError, TypeError), match=expected):
        call()


@pytest.mark.parametrize("spatial", [(42,), (2, 3, 7)])
@pytest.mark.parametrize("sees", ["confidence", "logits"])
def test_a_voxels_temperature_is_a_pixels(spatial, sees):
    """With the same weights, where each pixel is seen alone."""
    flat = MetaTemperatureNet(5, sees=sees)
    net = MetaTemperatureNet(5, sees=sees, spatial_dims=len(spatial))
    torch.nn.init.constant_(flat.last.weight, 0.2)
    net.load_state_dict({name: value.reshape(net.state_dict()[name].shape) for name, value in flat.state_dict().items()})
    z = logits()
    found = net(z.reshape(2, 5, *spatial))
    assert found.shape == (2, 1, *spatial)
    assert found.std() > 0.01
    np.testing.assert_allclose(found.detach().flatten(), flat(z).detach().flatten(), rtol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_weights_are_drawn_alike_in_all_dimensions(dims):
    """The generator decides; of kernel size 1 all have the same numbers of weights."""
    one, other = MetaTemperatureNet(5, spatial_dims=dims), MetaTemperatureNet(5)
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a.flatten(), b.flatten())


def test_a_kernel_reaches_alike_in_depth_height_and_width():
    net = MetaTemperatureNet(5, kernel_size=3, spatial_dims=3)
    torch.nn.init.constant_(net.last.weight, 0.2)
    z = logits(shape=(1, 5, 9, 9, 9))
    changed = z.clone()
    changed[..., 4, 4, 4] = 5 * changed[..., 4, 4, 4] + 1
    where = (net(z) != net(changed))[0, 0].nonzero(as_tuple=False)
    assert (where - 4).abs().max(0)[0].tolist() == [3, 3, 3]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_features_of_a_lower_resolution_are_interpolated(dims):
    """Features that are the same everywhere say the same at any resolution."""
    net = MetaTemperatureNet(5, feature_channels=8, spatial_dims=dims)
    torch.nn.init.constant_(net.last.weight, 0.02)
    z = logits(shape=(2, 5, *(6, 7, 5)[:dims]))
    features = logits(1, (2, 8, *[1] * dims))
    whole = net(z, features.expand(2, 8, *z.shape[2:]))
    assert float((whole - net(z, features.flip(0))).detach().abs().max()) > 0.01
    np.testing.assert_allclose(net(z, features.expand(2, 8, *(3, 2, 4)[:dims])).detach(), whole.detach(), rtol=1e-5)


def test_a_class_masked_out_is_no_trouble_in_a_volume():
    z = logits(shape=(2, 2, 3, 4, 5))
    z[:, 1] = -np.inf
    net = MetaTemperatureNet(2, sees="logits", kernel_size=3, spatial_dims=3)
    torch.nn.init.constant_(net.last.weight, 0.2)
    assert bool(torch.isfinite(net(z)).all())


def test_one_sigmoid_channel_comes_as_two():
    net = MetaTemperatureNet(2)
    torch.nn.init.constant_(net.last.weight, 0.2)
    z = logits(shape=(2, 1, 6, 7))
    # What the net sees is how sure the channel is, and not of what.
    np.testing.assert_allclose(net(two_channels(z)).detach(), net(two_channels(-z)).detach(), rtol=1e-5)


def test_counts_may_be_numpys():
    net = MetaTemperatureNet(np.int64(5), feature_channels=np.int64(8), kernel_size=np.int64(3), hidden_channels=np.int32(4))
    assert type(net.num_classes) is int
    assert net(logits(), logits(1, (2, 8, 3, 4))).shape == (2, 1, 6, 7)
