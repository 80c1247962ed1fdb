import math

import torch

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import FixedGrid
from stepquant.calibration.fake_quant.generator import IntervalGenerator, time_features
from stepquant.core.affine import fake_quantize
from stepquant.layers.clock import StepClock


def test_features_are_the_papers():
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


def moving_quantizer(rows=100):
    clock = StepClock(torch.arange(rows).float())
    quantizer = ActivationPoint(4, clock, rows=rows)
    torch.manual_seed(0)
    x = torch.randn(rows, 512) * torch.linspace(0.5, 4, rows)[:, None]  # the range grows with t
    quantizer.observe()
    clock.set(torch.arange(rows))
    quantizer(x)
    quantizer.calibrate("least-error", per_row=False)
    assert quantizer.scale.unique().numel() == 1
    return clock, quantizer, x


def test_a_learned_generator_follows_the_range_and_ships_as_its_table():
    clock, quantizer, x = moving_quantizer()
    static = float((quantizer(x) - x).square().mean())
    optimizer = torch.optim.Adam(quantizer.learn_over_time(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        clock.set(torch.arange(100))
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    quantizer.freeze()
    assert type(quantizer.quantizer) is FixedGrid
    assert float((quantizer(x) - x).square().mean()) < 0.75 * static
    table = quantizer.grid()
    assert table.scale.shape == (100, 1, 1)
    assert float(table.scale[90]) > 2 * float(table.scale[10])
    clock.set(37)
    expected = fake_quantize(x[37:38], table.scale[37], table.zero_point[37].float(), 4)
    assert torch.equal(quantizer(x[37:38]), expected)


def test_a_batch_of_mixed_steps_equals_each_alone():
    clock, quantizer, x = moving_quantizer()
    quantizer.learn_over_time()
    quantizer.quantizer.gain.eval()
    with torch.no_grad():
        quantizer.quantizer.gain.layers[-1].weight.normal_(std=0.05)
        rows = torch.tensor([3, 80, 41])
        clock.set(rows)
        together = quantizer(x[rows])
        for index, row in enumerate(rows.tolist()):
            clock.set(row)
            assert torch.allclose(quantizer(x[row : row + 1]), together[index : index + 1], atol=1e-6)


def test_a_generator_starts_near_the_ranges_found_step_by_step():
    _clock, quantizer, _x = moving_quantizer()
    torch.manual_seed(0)
    quantizer.learn_over_time()
    quantizer.freeze()
    scale = quantizer.grid().scale[:, 0, 0]
    assert float(scale[95] / scale[5]) > 3  # the spread of x grows from 0.68 to 3.8
    roughness = scale.diff().abs().sum() / (scale[-1] - scale[0]).abs()
    assert float(roughness) < 1.5, "smooth: a free table of one sample a step would jitter"


def test_a_second_generator_starts_where_the_first_settled():
    _clock, quantizer, _x = moving_quantizer()
    torch.manual_seed(0)
    quantizer.learn_over_time()
    quantizer.freeze()
    settled = quantizer.grid().scale
    quantizer.learn_over_time()
    quantizer.freeze()
    assert torch.allclose(quantizer.grid().scale, settled, rtol=1e-5)


def test_the_fastest_feature_turns_as_often_as_asked_or_as_in_the_paper():
    timesteps = torch.arange(1000).float()
    assert torch.equal(IntervalGenerator(timesteps, 1, turns=None).features, time_features(timesteps))
    slow = IntervalGenerator(timesteps, 1, turns=2.0).features[:, 0]
    assert int(((slow[:-1] <= 0) & (slow[1:] > 0)).sum()) == 2
