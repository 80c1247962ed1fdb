"""TDQ's generator, grids and start, and QuEST's ranges, against their formulas."""

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.generator import Generation
from stepquant.calibration.silu import layers_behind_silu
from stepquant.core.rounding import learned_quantize
from stepquant.layers.clock import StepClock

PUBLISHED = Generation(turns=None, published=True)


def observed(kind, x, bits=4, rows=50, method="deviations"):
    """A point that has seen x, float [rows, n], one sample per table row."""
    clock = StepClock(torch.arange(rows).float())
    point = ActivationPoint(bits, clock, rows=rows)
    point.layout = point.layout.__class__(**vars(point.layout) | {"kind": kind})
    point.observe()
    clock.set(torch.arange(rows))
    point(x)
    point.calibrate(method, per_row=False)
    return clock, point


def activation(rows=50, offset=0.3):
    return torch.randn(rows, 400, generator=torch.Generator().manual_seed(0)) + offset


def test_signed_grids_start_at_three_standard_deviations():
    x = activation()
    clock, point = observed("signed", x)
    values, n = x.double().numpy(), 16
    scale = (values.mean() + 3 * values.std(ddof=1)) / (n / 2 - 1)
    torch.testing.assert_close(point.scale, torch.full((50, 1), scale).float(), rtol=1e-5, atol=0)
    clock.set(3)
    expected = scale * np.clip(np.round(values[3] / scale), -(n / 2), n / 2 - 1)
    np.testing.assert_allclose(point(x[3:4])[0].numpy(), expected, atol=1e-5)


def test_grids_behind_silu_start_at_its_smallest_value():
    x = torch.nn.functional.silu(activation())
    clock, point = observed("silu", x)
    values, n = x.double().numpy(), 16
    scale = (values.mean() + 16 * values.std(ddof=1)) / (n - 1)
    assert float(point.scale[0]) == pytest.approx(scale, rel=1e-5)
    offset = scale * round(0.2785 / scale)  # the nearest that a whole zero point has
    clock.set(3)
    expected = scale * np.clip(np.round((values[3] + offset) / scale), 0, n - 1) - offset
    np.testing.assert_allclose(point(x[3:4])[0].numpy(), expected, atol=1e-5)


def test_the_zero_point_behind_silu_follows_the_interval():
    _, point = observed("silu", torch.nn.functional.silu(activation()), bits=8)
    for parameter in point.learn_table():
        parameter.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    point.freeze()
    assert torch.equal(point.zero_point, torch.round(0.2785 / point.scale).clamp(max=255))
    assert len(point.zero_point.unique()) >= 8


def test_the_generator_is_the_papers_network():
    """``softplus`` of four layers of width 64 with ReLU, on ``sin, cos(t / 10000^(2i/d))``, from ``s_init`` on."""
    torch.manual_seed(0)
    _, point = observed("signed", activation())
    start = float(point.scale[0])
    parameters = [parameter.detach().double().numpy() for parameter in point.learn_over_time(PUBLISHED)]
    weights, biases = parameters[0::2], parameters[1::2]
    assert [weight.shape for weight in weights] == [(64, 128), (64, 64), (64, 64), (1, 64)]
    for weight in weights:
        assert weight.std() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.25), "He"
    assert all(not bias.any() for bias in biases[:3])
    assert np.log1p(np.exp(biases[3])) == pytest.approx(start, rel=1e-4)
    t, d = np.arange(50.0)[:, None], 128
    angles = t / 10000 ** (2 * np.arange(d // 2) / d)
    hidden = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    for weight, bias in zip(weights[:3], biases[:3], strict=True):
        hidden = np.maximum(hidden @ weight.T + bias, 0)
    expected = np.log1p(np.exp(hidden @ weights[3].T + biases[3]))
    with torch.no_grad():
        np.testing.assert_allclose(point.quantizer.current_scale().numpy(), expected, rtol=2e-3)


def test_dropout_disturbs_a_fifth_of_the_last_hidden_layer_in_training_alone():
    _, point = observed("signed", activation())
    point.learn_over_time(PUBLISHED)
    seen = []
    drop = point.quantizer.gain.layers[-2]
    drop.register_forward_hook(lambda _module, given, output: seen.append((given[0], output)))
    for _ in range(30):
        point.quantizer.current_scale()
    given, output = (torch.cat(values) for values in zip(*seen, strict=True))
    dropped = ((given > 0) & (output == 0)).sum() / (given > 0).sum()
    assert float(dropped) == pytest.approx(0.2, abs=0.02)
    with torch.no_grad():
        assert torch.equal(point.quantizer.current_scale(), point.quantizer.current_scale())
    assert point.random


@pytest.mark.parametrize("generation", [Generation(zero_points=True), PUBLISHED.replace(zero_points=True)])
def test_a_generated_zero_point_follows_a_moving_activation(generation):
    """A shift over time that one zero point does not serve."""
    rows = 50
    clock = StepClock(torch.arange(rows).float())
    point = ActivationPoint(4, clock, rows=rows)
    x = torch.rand(rows, 400, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 1, rows)[:, None]
    point.observe()
    clock.set(torch.arange(rows))
    point(x)
    point.calibrate("least-error", per_row=False)
    fixed = float((point(x) - x).square().mean())
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(point.learn_over_time(generation), lr=2e-3)
    for _ in range(400):
        optimizer.zero_grad()
        (point(x) - x).square().mean().backward()
        optimizer.step()
    point.freeze()
    assert float((point(x) - x).square().mean()) < 0.6 * fixed
    zero_points = point.stored_grid().zero_point[:, 0, 0].int()
    assert zero_points[0] - zero_points[-1] >= 4


def test_gradients_of_scale_and_zero_point_are_those_of_the_rounded_formula():
    generator = torch.Generator().manual_seed(5)
    x, upstream = (torch.randn(40, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    found = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.37, 6.0)]
    (learned_quantize(x, *found, 4) * upstream).sum().backward()
    scale, zero_point = (values.detach().clone().requires_grad_() for values in found)
    inside = (x / scale + zero_point).clamp(0, 15)
    codes = inside + (inside.round() - inside).detach()
    ((codes - zero_point) * scale * upstream).sum().backward()
    for mine, theirs in zip(found, (scale, zero_point), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad / (40 * 15) ** 0.5)


def test_ranges_average_the_ends_of_batches_after_the_first():
    """QuEST: the first 64 samples of a timestep, then a moving average with momentum 0.95."""
    clock = StepClock(torch.tensor([10.0, 20.0]))
    point = ActivationPoint(8, clock, rows=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(320, 30, generator=generator) * torch.linspace(1, 3, 320)[:, None]
    rows = torch.arange(320) % 2
    point.observe()
    for chosen in torch.arange(320).split(7):
        clock.set(torch.tensor([10.0, 20.0])[rows[chosen]])
        point(x[chosen])
    point.calibrate("moving-average")
    for row in (0, 1):
        batches = [x[rows == row][start : start + 64].numpy() for start in range(0, 160, 64)]
        low, high = batches[0].min(), batches[0].max()
        for batch in batches[1:]:
            low, high = 0.95 * low + 0.05 * batch.min(), 0.95 * high + 0.05 * batch.max()
        assert float(point.scale[row]) == pytest.approx((high - low) / 255, rel=1e-5)
        assert float(point.zero_point[row]) == round(-low / ((high - low) / 255))


def test_layers_behind_silu_of_a_residual_block():
    """diffusers applies SiLU before both convolutions and the projection of time, and not before the shortcut."""
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=12, groups=4).eval()
    names = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
    found = layers_behind_silu(block, names, lambda: block(torch.randn(2, 8, 6, 6), torch.randn(2, 12)))
    assert found == {"conv1", "conv2", "time_emb_proj"}
