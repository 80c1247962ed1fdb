import copy

import pytest
import torch
from torch import nn

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.layers import wrap
from stepquant.calibration.fake_quant.observer import SEARCHED_VALUES
from stepquant.core.affine import fake_quantize
from stepquant.layers.clock import StepClock
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.format import LayerFormat
from stepquant.layers.linear import QuantizedLinear
from stepquant.runtime.reference import ReferenceKernel


def test_a_static_table_spans_all_that_was_observed():
    quantizer = ActivationPoint(8, StepClock())
    quantizer.observe()
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer(x), x), "passes through until it has a range"
    quantizer(2 * x)
    quantizer.calibrate("minmax")
    table = quantizer.grid()
    table.check()
    scale, zero_point = table.scale.item(), table.zero_point.item()
    assert abs(-zero_point * scale - 2 * x.min()) <= scale
    assert abs((255 - zero_point) * scale - 2 * x.max()) <= scale
    assert torch.equal(quantizer(x), fake_quantize(x, table.scale[0], table.zero_point[0].float(), 8))


def test_each_step_has_its_own_row_and_unseen_steps_take_the_nearest():
    clock = StepClock(torch.tensor([0.0, 10.0, 20.0]))
    quantizer = ActivationPoint(8, clock, rows=3)
    quantizer.observe()
    clock.set(torch.tensor([0, 10]))
    x = torch.stack([torch.linspace(-1, 1, 50), torch.linspace(-4, 4, 50)])
    quantizer(x)
    quantizer.calibrate("minmax")
    scale = quantizer.grid().scale[:, 0, 0]
    assert torch.allclose(scale, torch.tensor([2 / 255, 8 / 255, 8 / 255]))
    mixed = quantizer(x)
    for time, row in ((0, 0), (10, 1)):
        clock.set(time)
        assert torch.equal(quantizer(x[row : row + 1]), mixed[row : row + 1])


@pytest.mark.parametrize("method", ["minmax", "least-error"])
def test_neighbours_have_a_say_in_the_range_of_a_step(method):
    clock = StepClock(torch.arange(5.0) * 10)
    quantizer = ActivationPoint(4, clock, rows=5)
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 4.0, 2.0, 9.0])[:, None]
    steps = torch.tensor([0, 10, 30, 40])  # nothing is seen at 20: neighbours are those that were

    def grids(neighbours):
        clock.set(steps)
        quantizer.observe()
        quantizer(x)
        quantizer.calibrate(method, neighbours=neighbours)
        return quantizer.scale[:, 0], quantizer.zero_point[:, 0]

    def alone(rows):
        single = ActivationPoint(4, StepClock())
        single.observe()
        single(x[rows])
        single.calibrate(method)
        return single.scale[0, 0], single.zero_point[0, 0]

    scale, zero_point = grids(1)
    for row, near in ((0, [0, 1]), (1, [0, 1, 2]), (3, [1, 2, 3]), (4, [2, 3])):
        assert (scale[row], zero_point[row]) == alone(near)
    assert scale[2] == scale[1]
    scale, _ = grids(0)
    assert [scale[row] for row in (0, 1, 3, 4)] == [alone([row])[0] for row in range(4)]


@pytest.mark.parametrize("observations", [17, 40, 100])
def test_a_range_search_meets_the_ends_of_observations_as_often_as_other_values(observations):
    """However many were observed: a stride in step with their length would meet all of their maxima, or none."""
    quantizer = ActivationPoint(4, StepClock())
    quantizer.observe()
    for _ in range(observations):
        quantizer(torch.tensor([[0.0] * 99 + [-1.0, 1.0]]))
    observed = quantizer.observer.observations.values()
    seen = quantizer.observer._thinned(observed)
    assert seen.shape[1] <= 1.1 * SEARCHED_VALUES
    for end in (-1, 1):
        share = (seen == end).sum() / (observed == end).sum()
        assert share == pytest.approx(seen.shape[1] / observed.shape[1], rel=0.5)


def test_channel_groups_are_quantized_apart():
    quantizer = ActivationPoint(4, StepClock(), channel_dim=1, group_sizes=(2, 3))
    quantizer.observe()
    sizes = torch.tensor([1, 1, 9, 9, 9.0]).view(1, 5, 1, 1)
    x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1)) * sizes
    quantizer(x)
    quantizer.calibrate("minmax")
    table = quantizer.grid()
    assert table.group_sizes == (2, 3) and table.scale.shape == (1, 2, 1)
    for group, channels in enumerate((slice(0, 2), slice(2, 5))):
        expected = fake_quantize(x[:, channels], table.scale[0, group], table.zero_point[0, group].float(), 4)
        assert torch.equal(quantizer(x)[:, channels], expected)


def test_learning_a_scale_moves_it_and_settles_there():
    quantizer = ActivationPoint(2, StepClock())
    quantizer.observe()
    x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(2))
    quantizer(x)
    quantizer.calibrate("minmax")
    optimizer = torch.optim.Adam(quantizer.learn_table(), lr=0.02)
    errors = []
    for _ in range(100):
        error = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    before = quantizer(x).detach()
    quantizer.freeze()
    assert errors[-1] < 0.7 * errors[0]
    assert torch.allclose(quantizer(x), before)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_balanced_layer_is_finer_where_channels_differ_and_ships_as_it_was_simulated(kind):
    torch.manual_seed(4)
    sizes = torch.tensor([0.1, 0.1, 10, 1, 1, 1])
    plain = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(6, 5, 3, padding=1)
    x = torch.randn(8, 6) * sizes if kind == "linear" else torch.randn(8, 6, 4, 4) * sizes[:, None, None]
    clock = StepClock()
    errors = []
    for smoothing in (None, sizes.sqrt()):
        layer = wrap(copy.deepcopy(plain), 6, 6, clock, split=2)
        if smoothing is not None:
            layer.smooth(smoothing)
        layer.input_point.observe()
        layer(x)
        layer.input_point.calibrate("minmax")
        errors.append((layer(x) - plain(x)).norm().item())
    assert errors[1] < 0.6 * errors[0]
    frozen = layer.to_quantized()
    shipped = (QuantizedLinear if kind == "linear" else QuantizedConv2d).like(plain, LayerFormat.of(frozen), clock)
    shipped.fill(frozen)
    assert torch.equal(shipped.layer().smoothing, sizes.sqrt())
    torch.testing.assert_close(ReferenceKernel(shipped)(x, clock.row), layer(x))
