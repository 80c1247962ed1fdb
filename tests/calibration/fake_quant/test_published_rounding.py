"""AdaRound, and weights trained in their own units, against the papers' equations in NumPy."""

import numpy as np
import pytest
import torch

from stepquant.calibration.fake_quant.weight import WeightPoint
from stepquant.calibration.fake_quant.weight_quantizers import LeastError, PerChannelLSQ, PerTensorLSQ
from stepquant.optimize.reconstruction import AdaRound


def parts(bits, seed=0):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    point = WeightPoint(weight, bits, (7,), "minmax")
    scale, zero_point = (values[0].double().numpy()[:, None] for values in (point.scale, point.zero_point))
    return weight, point, scale, zero_point


def rectified(v):
    return np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_adaround_follows_its_equations(bits):
    weight, point, scale, zero_point = parts(bits)
    variable = point.adaround(weight)
    exact, top = weight.double().numpy(), 2**bits - 1
    np.testing.assert_allclose(rectified(variable.detach().double().numpy()), exact / scale % 1, atol=1e-5)
    variable.data = torch.randn(variable.shape, generator=torch.Generator().manual_seed(1))
    v = variable.detach().double().numpy()
    soft = scale * (np.clip(np.floor(exact / scale) + rectified(v) + zero_point, 0, top) - zero_point)
    np.testing.assert_allclose(point(weight).detach().numpy(), soft, atol=1e-5)
    hard = np.clip(np.floor(exact / scale) + (v >= 0) + zero_point, 0, top)
    np.testing.assert_array_equal(point.codes(weight).numpy(), hard)
    for beta in (2.0, 7.5, 20.0):
        penalty = (1 - np.abs(2 * rectified(v) - 1) ** beta).sum()
        assert float(point.regularizer(beta)) == pytest.approx(penalty, rel=1e-5)


def test_the_published_regularizer_begins_after_a_fifth_and_falls_along_a_line():
    rounding = AdaRound(regularizer=0.01, published=True)
    assert rounding.weight_and_beta(0.19, 100)[0] == 0
    for progress in (0.2, 0.4, 0.7, 1.0):
        factor, beta = rounding.weight_and_beta(progress, 100)
        assert factor == 0.01 and beta == pytest.approx(20 - 18 * (progress - 0.2) / 0.8)


@pytest.mark.parametrize("held", [True, False])
def test_a_trained_weight_keeps_its_direction_or_is_rounded_again(held):
    weight, point, scale, zero_point = parts(4)
    up = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(2))
    floor = torch.floor(weight / torch.tensor(scale)) + torch.tensor(zero_point)
    point.set_codes((floor + up).clamp(0, 15).to(torch.uint8))
    trained = point.train_weight(weight, held=held)
    assert torch.equal(trained, weight), "in its own units, from full precision on"
    (point(weight).sum()).backward()
    assert torch.equal(trained.grad, torch.ones_like(weight)), "straight through"
    trained.data += 0.3
    steps = trained.detach().double().numpy() / scale
    # Where the code was clipped at an end, the direction that is held is the one that the code has.
    direction = np.clip((floor + up).clamp(0, 15).numpy() - floor.numpy(), 0, 1)
    rounded = np.floor(steps) + direction if held else np.round(steps)
    np.testing.assert_array_equal(point.codes(weight).numpy(), np.clip(rounded + zero_point, 0, 15))
    codes = point.codes(weight)
    point.freeze(weight)
    assert torch.equal(point.codes(weight), codes)


def test_lsq_starts_at_its_scale_per_channel_and_per_tensor():
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(3))
    half = 2 ** (3 - 1) - 1
    channels = 2 * weight.abs().flatten(1).mean(dim=1) / half**0.5
    for rounding, expected in ((PerChannelLSQ, channels), (PerTensorLSQ, channels.mean().expand(5))):
        point = WeightPoint(weight, 3, (7,), "minmax", rounding)
        torch.testing.assert_close(point.scale[0], expected)
        assert bool((point.zero_point == 4).all()), "symmetric"
        (gain,) = point.lsq(weight.clone(), from_codes=False)
        assert gain.numel() == (1 if rounding is PerTensorLSQ else 5)


def test_published_ranges_of_8_bit_weights_have_the_least_error():
    weight = torch.randn(1, 4000, generator=torch.Generator().manual_seed(4))
    weight[0, 0] = 30.0

    def error(point):
        return float((point(weight) - weight).abs().pow(2.4).mean())

    published = WeightPoint(weight, 8, (4000,), "minmax", LeastError)
    assert bool((published.zero_point == 128).all())
    assert error(published) < error(WeightPoint(weight, 8, (4000,), "minmax"))
