import copy

import pytest
import torch
from torch import nn

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import QDrop
from stepquant.calibration.fake_quant.layers import wrap
from stepquant.calibration.fake_quant.observer import SEARCHED_VALUES
from stepquant.core.affine import fake_quantize
from stepquant.core.noise import SampleNoise
from stepquant.core.qtensor import InvalidGrid
from stepquant.layers.clock import StepClock
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.format import LayerFormat
from stepquant.layers.linear import QuantizedLinear
from stepquant.runtime.reference import ReferenceKernel


def test_a_static_grid_spans_all_observations():
    point = ActivationPoint(8, StepClock())
    point.observe()
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(point(x), x), "passes through until it has a range"
    point(2 * x)
    point.calibrate("minmax")
    table = point.stored_grid()
    table.check()
    scale, zero_point = table.scale.item(), table.zero_point.item()
    assert abs(-zero_point * scale - 2 * x.min()) <= scale
    assert abs((255 - zero_point) * scale - 2 * x.max()) <= scale
    assert torch.equal(point(x), fake_quantize(x, table.scale[0], table.zero_point[0].float(), 8))


def test_unobserved_steps_take_the_nearest_row():
    clock = StepClock(torch.tensor([0.0, 10.0, 20.0]))
    point = ActivationPoint(8, clock, rows=3)
    point.observe()
    clock.set(torch.tensor([0, 10]))
    x = torch.stack([torch.linspace(-1, 1, 50), torch.linspace(-4, 4, 50)])
    point(x)
    point.calibrate("minmax")
    scale = point.stored_grid().scale[:, 0, 0]
    assert torch.allclose(scale, torch.tensor([2 / 255, 8 / 255, 8 / 255]))
    mixed = point(x)
    for time, row in ((0, 0), (10, 1)):
        clock.set(time)
        assert torch.equal(point(x[row : row + 1]), mixed[row : row + 1])


@pytest.mark.parametrize("method", ["minmax", "least-error"])
def test_ranges_include_neighbouring_steps(method):
    clock = StepClock(torch.arange(5.0) * 10)
    point = ActivationPoint(4, clock, rows=5)
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 4.0, 2.0, 9.0])[:, None]
    steps = torch.tensor([0, 10, 30, 40])  # nothing is seen at 20: neighbours are those that were

    def grids(neighbours):
        clock.set(steps)
        point.observe()
        point(x)
        point.calibrate(method, neighbours=neighbours)
        return point.scale[:, 0], point.zero_point[:, 0]

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
def test_thinning_keeps_extremes_as_often_as_other_values(observations):
    """However many were observed: a stride in step with their length would meet all of their maxima, or none."""
    point = ActivationPoint(4, StepClock())
    point.observe()
    for _ in range(observations):
        point(torch.tensor([[0.0] * 99 + [-1.0, 1.0]]))
    observed = point.observer.observations.values()
    seen = point.observer._thinned(observed)
    assert seen.shape[1] <= 1.1 * SEARCHED_VALUES
    for end in (-1, 1):
        share = (seen == end).sum() / (observed == end).sum()
        assert share == pytest.approx(seen.shape[1] / observed.shape[1], rel=0.5)


def test_channel_groups_have_separate_grids():
    point = ActivationPoint(4, StepClock(), channel_dim=1, group_sizes=(2, 3))
    point.observe()
    sizes = torch.tensor([1, 1, 9, 9, 9.0]).view(1, 5, 1, 1)
    x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1)) * sizes
    point(x)
    point.calibrate("minmax")
    table = point.stored_grid()
    assert table.group_sizes == (2, 3) and table.scale.shape == (1, 2, 1)
    for group, channels in enumerate((slice(0, 2), slice(2, 5))):
        expected = fake_quantize(x[:, channels], table.scale[0, group], table.zero_point[0, group].float(), 4)
        assert torch.equal(point(x)[:, channels], expected)


def test_a_learned_scale_is_kept_when_frozen():
    point = ActivationPoint(2, StepClock())
    point.observe()
    x = torch.randn(1, 1000, generator=torch.Generator().manual_seed(2))
    point(x)
    point.calibrate("minmax")
    optimizer = torch.optim.Adam(point.learn_table(), lr=0.02)
    errors = []
    for _ in range(100):
        error = (point(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    before = point(x).detach()
    point.freeze()
    assert errors[-1] < 0.7 * errors[0]
    assert torch.allclose(point(x), before)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_smoothed_layer_has_less_error_and_is_stored_as_simulated(kind):
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


def test_points_pass_through_while_bypassed_and_qdrop_needs_gradients():
    point = ActivationPoint(2, StepClock())
    point.set_grid(torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    x = torch.linspace(-1, 0.5, 64).reshape(1, 64)
    quantized = point(x)
    assert set(quantized.flatten().tolist()) == {-1.0, -0.5, 0.0, 0.5}
    point.dropout = QDrop(0.5, SampleNoise(0, 0, range(1)))
    mixed = point(x)
    kept = mixed == x
    assert torch.equal(mixed[~kept], quantized[~kept]) and 16 < int(kept.sum()) < 56
    with torch.no_grad():
        assert torch.equal(point(x), quantized)
    point.bypassed = True
    assert torch.equal(point(x), x)


def test_points_refuse_what_they_have_no_grid_for():
    point = ActivationPoint(8, StepClock())
    with pytest.raises(InvalidGrid, match="was not calibrated"):
        point.stored_grid()
    point.observe()
    with pytest.raises(RuntimeError, match="never observed"):
        point.calibrate("minmax")
