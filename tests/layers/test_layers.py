import pytest
import torch
from torch import nn

from stepquant.calibration.fake_quant.layers import wrap
from stepquant.core.qtensor import Grid, GridFormat, QTensor
from stepquant.core.weights import group_channels
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.clock import StepClock
from stepquant.layers.correction import OutputCorrection
from stepquant.layers.format import LayerFormat, Structure
from stepquant.layers.install import install_empty
from stepquant.layers.linear import QuantizedLinear


def quantized_linear() -> QuantizedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    clock = StepClock()
    layer = wrap(linear, 4, 8, clock)
    layer.smooth(torch.rand(6) + 0.5)
    layer.input_point.observe()
    layer(torch.randn(3, 6))
    layer.input_point.calibrate("minmax")
    frozen = layer.to_quantized()
    module = QuantizedLinear.like(linear, LayerFormat.of(frozen), clock)
    module.fill(frozen)
    return module


def test_layer_round_trip():
    module = quantized_linear()
    other = QuantizedLinear(6, 5, True, module.format, module.clock)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.layer().weight.codes, module.layer().weight.codes)
    assert torch.equal(other.layer().weight.dequantize(), module.layer().weight.dequantize())


def test_half_does_not_change_scales():
    module = quantized_linear()
    scale = module.input_scale.clone()
    module.half()
    assert module.input_scale.dtype == torch.float32 and torch.equal(module.input_scale, scale)


@pytest.mark.parametrize(
    "name, value",
    [("weight_scale", -1.0), ("weight_scale", float("nan")), ("input_scale", 0.0), ("transforms.0.factor", -2.0)],
)
def test_bad_scales_are_refused(name, value):
    module = quantized_linear()
    module.get_buffer(name).view(-1)[0] = value
    with pytest.raises(StepquantError, match="not a positive number"):
        module.layer()


def test_grouped_convolution_with_channel_groups_cannot_be_smoothed():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    layers = {"0": {"weight": {"bits": 4}, "input": {"bits": 4}, "transforms": [{"kind": "smoothing"}]}}
    with pytest.raises(StepquantError, match="channel groups"):
        install_empty(model, {"timesteps": [0.0], "layers": layers, "attentions": {}})


def test_zero_points_off_the_grid_are_refused():
    module = quantized_linear()
    module.weight_zero_point[0, 0, 0] = 16
    with pytest.raises(StepquantError, match="4 bits"):
        module.layer()


def test_eight_bit_weights_always_fit_int8():
    codes = torch.tensor([[0, 255, 128]], dtype=torch.uint8)
    for zero_point in (128, 3):
        grid = Grid(torch.ones(1, 1, 1), torch.full((1, 1, 1), zero_point, dtype=torch.uint8), 8)
        weight = QTensor(codes, grid)
        if zero_point == 128:
            weight.check()
            assert weight.integers().tolist() == [[-128, 127, 0]]
            continue
        with pytest.raises(StepquantError, match="128"):
            weight.check()


@pytest.mark.parametrize(
    "channels, split, size, expected",
    [(8, None, None, (8,)), (8, 3, None, (3, 5)), (8, None, 4, (4, 4)), (8, 4, 2, (2, 2, 2, 2)), (8, 3, 4, (3, 5))],
)
def test_groups_respect_the_split(channels, split, size, expected):
    assert group_channels(channels, split, size) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": []}, {"timesteps": [2.0, 1.0]}, {"timesteps": [float("nan")]},
        {"layers": {"a": {"weight": {"bits": 9}}}},
        {"layers": {"a": {"weight": {"bits": 4, "groups": [-1]}}}},
        {"layers": {"a": {"weight": {"bits": 4, "rows": 2}}}},
        {"layers": {"a": {"weight": {"bits": 4}, "transforms": [{"kind": "smoothing"}]}}},
        {"layers": {"a": {"weight": {"bits": 4}, "input": {"bits": 8}, "transforms": [{"kind": "smoothing"}] * 2}}},
        {"layers": {"a": {"weight": {"bits": 4}, "input": {"bits": 8}, "transforms": [{"kind": "rotation"}]}}},
        {"layers": {"a": {"weight": {"bits": 4}, "input": {"bits": 8, "rows": 10**9}}}},
        {"layers": {"a": {"weight": {"bits": 4}, "input": {"bits": 8, "rows": 3}}}},
        {"attentions": {"a": {"query": {"bits": 8, "groups": [1, 2]}}}},
        {"attentions": {"a": {"colour": {"bits": 8}}}},
        {"attentions": {"a": {"query": {"bits": 8, "rows": 3}}}},
    ],
)  # fmt: skip
def test_malformed_structure_is_refused(change):
    with pytest.raises(StepquantError) as caught:
        Structure.parse({"timesteps": [0.0, 1.0], "layers": {}, "attentions": {}} | change)
    assert "\n" not in str(caught.value)


def test_tables_are_float32_under_another_default_dtype():
    """As when a model is created in half precision."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        modules = [
            QuantizedLinear(4, 3, True, LayerFormat(weight=GridFormat(bits=8), input=GridFormat(bits=8)), StepClock()),
            QuantizedAttentionProcessor({"query": GridFormat(bits=8, rows=2)}),
            OutputCorrection(2, StepClock()),
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    for module in modules:
        assert {buffer.dtype for buffer in module.buffers()} <= {torch.float32, torch.uint8}
