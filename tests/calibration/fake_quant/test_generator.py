import math

import torch

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import FixedGrid
from stepquant.calibration.fake_quant.generator import IntervalGenerator, time_features
from stepquant.core.affine import fake_quantize
from stepquant.layers.clock import StepClock


def test_time_features_follow_the_paper():
    features = time_features(torch.tensor([0.0, 7.0]), 6)
    for i in range(3):
        angle = 7 / 10000 ** (2 * i / 6)
        assert math.isclose(features[1, i], math.sin(angle), abs_tol=1e-5)
        assert math.isclose(features[1, 3 + i], math.cos(angle), abs_tol=1e-5)
    assert torch.equal(features[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_a_generator_starts_at_the_static_scale():
    torch.manual_seed(0)
    generator = IntervalGenerator(torch.arange(1000), groups=2).eval()
    assert torch.allclose(generator(torch.arange(1000)), torch.ones(1000, 2))


def moving_point(rows=100):
    clock = StepClock(torch.arange(rows).float())
    point = ActivationPoint(4, clock, rows=rows)
    torch.manual_seed(0)
    x = torch.randn(rows, 512) * torch.linspace(0.5, 4, rows)[:, None]  # the range grows with t
    point.observe()
    clock.set(torch.arange(rows))
    point(x)
    point.calibrate("least-error", per_row=False)
    assert point.scale.unique().numel() == 1
    return clock, point, x


def test_a_trained_generator_follows_the_range_and_is_stored_as_a_table():
    clock, point, x = moving_point()
    static = float((point(x) - x).square().mean())
    optimizer = torch.optim.Adam(point.learn_over_time(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        clock.set(torch.arange(100))
        (point(x) - x).square().mean().backward()
        optimizer.step()
    point.freeze()
    assert type(point.quantizer) is FixedGrid
    assert float((point(x) - x).square().mean()) < 0.75 * static
    table = point.stored_grid()
    assert table.scale.shape == (100, 1, 1)
    assert float(table.scale[90]) > 2 * float(table.scale[10])
    clock.set(37)
    expected = fake_quantize(x[37:38], table.scale[37], table.zero_point[37].float(), 4)
    assert torch.equal(point(x[37:38]), expected)


def test_a_batch_of_mixed_steps_equals_single_steps():
    clock, point, x = moving_point()
    point.learn_over_time()
    point.quantizer.gain.eval()
    with torch.no_grad():
        point.quantizer.gain.layers[-1].weight.normal_(std=0.05)
        rows = torch.tensor([3, 80, 41])
        clock.set(rows)
        together = point(x[rows])
        for index, row in enumerate(rows.tolist()):
            clock.set(row)
            assert torch.allclose(point(x[row : row + 1]), together[index : index + 1], atol=1e-6)


def test_a_generator_starts_near_the_ranges_of_single_steps():
    _clock, point, _x = moving_point()
    torch.manual_seed(0)
    point.learn_over_time()
    point.freeze()
    scale = point.stored_grid().scale[:, 0, 0]
    assert float(scale[95] / scale[5]) > 3  # the spread of x grows from 0.68 to 3.8
    roughness = scale.diff().abs().sum() / (scale[-1] - scale[0]).abs()
    assert float(roughness) < 1.5, "smooth: a free table of one sample a step would jitter"


def test_a_second_generator_starts_at_the_frozen_scale():
    _clock, point, _x = moving_point()
    torch.manual_seed(0)
    point.learn_over_time()
    point.freeze()
    frozen = point.stored_grid().scale
    point.learn_over_time()
    point.freeze()
    assert torch.allclose(point.stored_grid().scale, frozen, rtol=1e-5)


def test_periods_of_the_fastest_feature():
    timesteps = torch.arange(1000).float()
    assert torch.equal(IntervalGenerator(timesteps, 1, turns=None).features, time_features(timesteps))
    slow = IntervalGenerator(timesteps, 1, turns=2.0).features[:, 0]
    assert int(((slow[:-1] <= 0) & (slow[1:] > 0)).sum()) == 2
