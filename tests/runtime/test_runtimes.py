"""The runtimes against plain int64 arithmetic, and against each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.affine import quantize
from stepquant.core.qtensor import Grid, GridFormat, QTensor, QuantizedLayer
from stepquant.core.transforms import Smoothing
from stepquant.layers.clock import StepClock
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.format import LayerFormat, TransformFormat
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime import DEVICE, INTEGER, native, onednn
from stepquant.runtime.native.build import available
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel

STEPS = 3
CONVOLUTIONS = {
    "3x3": dict(inputs=7, outputs=5, kernel=3, padding=1),
    "stride": dict(inputs=8, outputs=9, kernel=3, padding=1, stride=2),
    "1x1": dict(inputs=16, outputs=3, kernel=1),
    "wide padding": dict(inputs=3, outputs=4, kernel=3, padding=(2, 1)),
    "dilation": dict(inputs=5, outputs=6, kernel=3, padding=2, dilation=2),
    "5x3": dict(inputs=6, outputs=6, kernel=(5, 3), padding=(2, 1)),
}
SPLITS = {"one": ((), ()), "activation": ((), (3, 4)), "both": ((2, 5), (3, 4)), "weight": ((4, 3), ())}

BACKENDS_HERE = [name for name, reason_of in INTEGER.items() if DEVICE[name] == "cpu" and reason_of() is None]
"""Integer runtimes for CPUs; see ``cuda/`` for GPUs."""
needs_onednn = pytest.mark.skipif(onednn.supported() is not None, reason=str(onednn.supported()))


def fill(
    module: QuantizedModule, weight_groups: tuple[int, ...], groups: tuple[int, ...], bits: tuple[int, int | None]
) -> QuantizedModule:
    """Random codes and tables; zero points off the middle, so that tests detect padding with a wrong code."""
    weight_bits, activation_bits = bits
    shape = module.weight_shape
    weight_shape = (1, max(1, len(weight_groups)), shape[0])
    zero_point = torch.randint(0, 1 << weight_bits, weight_shape) if weight_bits < 8 else torch.full(weight_shape, 128)
    codes = torch.randint(0, 1 << weight_bits, shape).byte()
    grid = Grid(torch.rand(weight_shape) * 0.01 + 0.001, zero_point.byte(), weight_bits, weight_groups)
    activation = None
    if activation_bits is not None:
        table_shape = (STEPS, max(1, len(groups)), 1)
        scale = (torch.rand(table_shape) + 0.5) * 4 / (1 << activation_bits)
        zero_points = torch.randint(1, 1 << activation_bits, table_shape).byte()
        activation = Grid(scale, zero_points, activation_bits, groups)
    bias = torch.randn(shape[0]) if module.bias is not None else None
    transforms = tuple(Smoothing(torch.rand(shape[1]) * 4 + 0.1) for _ in module.format.transforms)
    module.fill(QuantizedLayer(QTensor(codes, grid), bias, activation, transforms))
    return module


def format_of(weight_groups, groups, bits, smoothed=False) -> LayerFormat:
    return LayerFormat(
        weight=GridFormat(bits=bits[0], groups=weight_groups),
        input=None if bits[1] is None else GridFormat(bits=bits[1], groups=groups, rows=STEPS),
        transforms=(TransformFormat(kind="smoothing"),) if smoothed else (),
    )


def clock() -> StepClock:
    return StepClock(torch.arange(STEPS).float())


def convolution(
    inputs,
    outputs,
    kernel,
    padding=0,
    stride=1,
    dilation=1,
    groups=1,
    split=((), ()),
    bits=(8, 8),
    bias=True,
    smoothed=False,
) -> QuantizedConv2d:
    torch.manual_seed(0)
    plain = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
    layer_format = format_of(*split, bits, smoothed)
    module = QuantizedConv2d.like(plain, layer_format, clock())
    return fill(module, *split, bits)


def linear(inputs=7, outputs=5, split=((), ()), bits=(8, 8), bias=True, smoothed=False) -> QuantizedLinear:
    torch.manual_seed(0)
    layer_format = format_of(*split, bits, smoothed)
    module = QuantizedLinear.like(nn.Linear(inputs, outputs, bias), layer_format, clock())
    return fill(module, *split, bits)


def plain(module: QuantizedModule, x: Tensor, rows: list[int]) -> tuple[list[Tensor], Tensor]:
    """Accumulators (int64, by segment) and output (float64) of each sample, in plain integer arithmetic."""
    layer = module.layer()
    sizes = layer.weight.grid.group_sizes or (module.weight_shape[1],)
    weight_of = [g for g, size in enumerate(sizes) for _ in range(size)]
    sizes = layer.input.group_sizes or (len(weight_of) * getattr(module, "groups", 1),)
    input_of = [g for g, size in enumerate(sizes) for _ in range(size)]
    codes = layer.weight.codes.long()
    pairs = sorted(set(zip(weight_of, input_of, strict=False)))
    sums = []
    total = 0.0
    for w_group, x_group in pairs:
        mine = torch.tensor([p == (w_group, x_group) for p in zip(weight_of, input_of, strict=False)])
        by_output = (-1,) + (1,) * (codes.dim() - 1)
        weight = codes - layer.weight.grid.zero_point[0, w_group].long().reshape(by_output)
        weight = weight * mine.reshape(1, -1, *(1,) * (codes.dim() - 2))
        outputs = []
        for sample, row in zip(x, rows, strict=True):
            scale, zero = layer.input.scale[row, x_group, 0], layer.input.zero_point[row, x_group, 0].long()
            bits = layer.input.bits if layer.input.row_bits is None else int(layer.input.row_bits[row])
            top = (1 << bits) - 1
            if layer.smoothing is not None:
                scale = scale * layer.smoothing.reshape(-1, *(1,) * (codes.dim() - 2))
            integers = ((sample * (1 / scale)).round().long() + zero).clamp(0, top) - zero
            outputs.append(multiply(module, integers, weight))
        sums.append(torch.stack(outputs))
        by_channel = (1, -1, 1, 1) if codes.dim() == 4 else (-1,)
        by_sample = (-1,) + (1,) * (x.dim() - 1)
        x_scale = layer.input.scale[rows, x_group, 0].double().reshape(by_sample)
        total = total + sums[-1] * x_scale * layer.weight.grid.scale[0, w_group].double().reshape(by_channel)
    if layer.bias is not None:
        total = total + layer.bias.double().reshape(by_channel)
    return sums, total


def multiply(module: QuantizedModule, integers: Tensor, weight: Tensor) -> Tensor:
    """int64 linear, or int64 convolution of one sample by explicit windows."""
    if not isinstance(module, QuantizedConv2d):
        return (integers[..., None, :] * weight).sum(-1)
    (ph, pw), (sh, sw), (dh, dw), groups = module.padding, module.stride, module.dilation, module.groups
    padded = F.pad(integers, (pw, pw, ph, ph))
    kh, kw = weight.shape[2:]
    height = (padded.shape[1] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[2] - dw * (kw - 1) - 1) // sw + 1
    out = torch.zeros(groups, weight.shape[0] // groups, height, width, dtype=torch.int64)
    padded, weight = padded.unflatten(0, (groups, -1)), weight.unflatten(0, (groups, -1))
    for i in range(kh):
        for j in range(kw):
            window = padded[
                :, :, i * dh : i * dh + (height - 1) * sh + 1 : sh, j * dw : j * dw + (width - 1) * sw + 1 : sw
            ]
            out += (window[:, None] * weight[:, :, :, i, j, None, None]).sum(2)
    return out.flatten(0, 1)


def check(module: QuantizedModule, x: Tensor, row: Tensor) -> None:
    """Reference accumulators bit for bit; outputs of both runtimes to float32 rounding of the largest output."""
    rows = [int(row)] * len(x) if row.dim() == 0 else row.tolist()
    sums, expected = plain(module, x, rows)
    reference = ReferenceKernel(module)
    for found, exact in zip(reference.accumulators(x, row), sums, strict=True):
        assert torch.equal(found.long(), exact)
    tolerance = 2e-6 * float(expected.abs().max())
    assert (reference(x, row).double() - expected).abs().max() <= tolerance
    if onednn.supported() is None and OneDnnKernel.supports(module):
        assert (OneDnnKernel(module)(x, row).double() - expected).abs().max() <= tolerance
    if native.supported() is None and native.NativeKernel.supports(module):
        for instructions in available():
            assert (
                native.NativeKernel(module, instructions=instructions)(x, row).double() - expected
            ).abs().max() <= tolerance


@pytest.mark.parametrize("row", [torch.tensor(2), torch.tensor([0, 2, 1, 2])], ids=["one step", "mixed steps"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, row):
    module = convolution(**CONVOLUTIONS[name])
    check(module, torch.randn(4, module.in_channels, 9, 7), row)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_channels_of_a_convolution(split, layout):
    module = convolution(7, 6, 3, padding=1, split=SPLITS[split])
    check(module, torch.randn(3, 7, 6, 5).to(memory_format=layout), torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 7), (4, 2, 3, 7)])
def test_linears(split, shape):
    check(linear(split=SPLITS[split]), torch.randn(shape), torch.tensor([2, 2, 0, 1]))


@pytest.mark.parametrize("bits", [(weight, activation) for weight in range(2, 9) for activation in (2, 5, 8)])
def test_all_bits(bits):
    check(linear(bits=bits, bias=False), torch.randn(6, 7) * 3, torch.tensor(1))
    check(convolution(4, 5, 3, padding=1, bits=bits, bias=False), torch.randn(2, 4, 5, 5) * 3, torch.tensor(1))


@pytest.mark.parametrize("split", SPLITS)
def test_smoothed_layers(split):
    """Each channel is divided by its smoothing factor before rounding; the integer product does not change."""
    row = torch.tensor([1, 0, 1])
    check(convolution(7, 6, 3, padding=1, split=SPLITS[split], smoothed=True), torch.randn(3, 7, 6, 5), row)
    check(linear(split=SPLITS[split], bits=(4, 4), smoothed=True), torch.randn(3, 5, 7), row)
    check(linear(split=SPLITS[split], smoothed=True), torch.randn(3, 7), torch.tensor(2))


def test_smoothing_does_not_change_the_function():
    """On a fine grid, a smoothed layer multiplies by its dequantized weight divided by the factor."""
    module = linear(inputs=6, bits=(8, 8), bias=False, smoothed=True)
    x = torch.randn(50, 6)
    module.input_scale.fill_(2 * float((x / module.transforms[0].factor).abs().max()) / 255)
    module.input_zero_point.fill_(128)
    expected = x @ (module.layer().weight.dequantize() / module.transforms[0].factor).t()
    found = ReferenceKernel(module)(x, torch.tensor(0))
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_grouped_convolution():
    check(convolution(6, 4, 3, padding=1, groups=2), torch.randn(2, 6, 5, 5), torch.tensor(0))


def test_accumulators_beyond_float32_are_exact():
    module = linear(inputs=3000, outputs=2)
    module.weight_packed.fill_(255)
    module.input_zero_point.zero_()
    module.input_scale.fill_(1.0)
    x = torch.full((1, 3000), 255.0)
    x[0, 0] = 254.0
    (sums,) = ReferenceKernel(module).accumulators(x, torch.tensor(0))
    assert sums.long().tolist() == [[127 * (255 * 3000 - 1)] * 2]


@needs_onednn
def test_onednn_accumulators_are_exact():
    """With scales of 1 the output is the accumulator, an integer that float32 holds."""
    module = convolution(40, 16, 3, padding=1, bias=False)
    module.weight_scale.fill_(1.0)
    module.input_scale.fill_(1.0)
    x = torch.randint(-300, 300, (2, 40, 6, 6)).float()
    y = OneDnnKernel(module)(x, torch.tensor(1))
    (sums,), _ = plain(module, x, [1, 1])
    assert float(sums.abs().max()) < 1 << 24
    assert torch.equal(y.long(), sums)


@needs_onednn
@pytest.mark.parametrize("bits", [3, 8])
def test_codes_match_the_definition(bits):
    """Including ties and values far off the grid."""
    module = linear(bits=(8, bits))
    module.input_scale.fill_(0.25)
    kernel = OneDnnKernel(module)
    x = torch.cat([torch.arange(-1000, 1000) * 0.125, torch.randn(1000), torch.tensor([1e9, -1e9, 1e30])])
    for row in range(STEPS):
        expected = quantize(x, module.input_scale[row, 0, 0], module.input_zero_point[row, 0, 0], bits)
        assert torch.equal(kernel.codes(x, row, 0)[0].float(), expected)


@needs_onednn
def test_codes_keep_channels_last():
    module = convolution(8, 4, 3, padding=1)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    codes, _ = OneDnnKernel(module).codes(x, 0, 0)
    assert codes.dtype == torch.uint8 and codes.is_contiguous(memory_format=torch.channels_last)


def test_weight_only_layer():
    module = convolution(4, 5, 3, padding=1, bits=(4, None))
    x = torch.randn(2, 4, 6, 6)
    expected = F.conv2d(x, module.layer().weight.dequantize(), module.bias, padding=1)
    torch.testing.assert_close(WeightOnlyKernel(module)(x, torch.tensor(0)), expected)
