"""Convolutions over 1 to 3 dimensions, transposed and with channel groups, against sums of integers and torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from stepquant.core.affine import quantize
from stepquant.core.dynamic import DynamicFormat, DynamicGrid
from stepquant.core.qtensor import GridFormat
from stepquant.layers.conv import CONVOLVE
from stepquant.layers.format import LayerFormat
from stepquant.layers.quantized import QuantizedModule, empty_like
from stepquant.runtime.native.build import available
from stepquant.runtime.native.kernel import NativeKernel
from stepquant.runtime.reference import DynamicKernel
from tests.runtime.test_runtimes import clock, fill, format_of

pytestmark = pytest.mark.usefixtures("kernels")

SIZES = {1: (19,), 2: (9, 7), 3: (5, 6, 7)}
LAYERS = {
    "1d": nn.Conv1d(7, 5, 3, padding=1),
    "1d, stride and dilation": nn.Conv1d(8, 33, 5, stride=3, padding=2, dilation=2),
    "3d": nn.Conv3d(7, 5, 3, padding=1),
    "3d, patches": nn.Conv3d(16, 40, (1, 2, 2), stride=(1, 2, 2)),
    "3d, causal": nn.Conv3d(6, 9, (3, 1, 1)),
    "3d, every size different": nn.Conv3d(4, 6, (2, 3, 1), stride=(2, 1, 2), padding=(1, 2, 0), dilation=(2, 1, 1)),
    "3d, dilation": nn.Conv3d(3, 4, 2, padding=1, dilation=2),
    "transposed 1d": nn.ConvTranspose1d(7, 5, 4, stride=2, padding=1),
    "transposed 1d, wide stride": nn.ConvTranspose1d(6, 20, 16, stride=8, padding=4),
    "transposed 1d, stride above the kernel": nn.ConvTranspose1d(4, 3, 2, stride=3, output_padding=1),
    "transposed 2d": nn.ConvTranspose2d(7, 5, 3, padding=1),
    "transposed 2d, stride": nn.ConvTranspose2d(16, 9, (4, 2), stride=2, padding=(1, 0)),
    "transposed 2d, everything": nn.ConvTranspose2d(5, 6, 3, stride=(3, 2), padding=2, output_padding=1, dilation=2),
    "transposed 2d, more padding than kernel": nn.ConvTranspose2d(3, 4, 2, padding=2),
    "transposed 3d": nn.ConvTranspose3d(6, 5, (3, 4, 4), stride=(1, 2, 2), padding=1),
    "groups": nn.Conv2d(12, 66, 3, padding=1, groups=3),
    "groups, stride": nn.Conv2d(8, 40, 3, stride=2, padding=1, groups=4),
    "depthwise 1d": nn.Conv1d(70, 70, 7, padding=3, groups=70),
    "depthwise 2d": nn.Conv2d(40, 40, 3, padding=1, groups=40),
    "depthwise 3d": nn.Conv3d(33, 66, (3, 1, 1), padding=(1, 0, 0), groups=33),
}


def quantized(name: str, bits: tuple[int, int] = (8, 8), split=((), ()), smoothed: bool = False) -> QuantizedModule:
    torch.manual_seed(0)
    return fill(empty_like(LAYERS[name], format_of(*split, bits, smoothed), clock()), *split, bits)


def exact(module: QuantizedModule, x: Tensor, rows: list[int]) -> Tensor:
    """Each sample in float64 by torch's function: sums of integers below 2^53, then scaled."""
    layer, transposed = module.layer(), module.transposed
    convolve = CONVOLVE[x.dim() - 2, transposed]
    wide = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation, "groups": module.groups}
    wide |= {"output_padding": module.output_padding} if transposed else {}
    channel, outputs = (-1,) + (1,) * (x.dim() - 2), []
    smoothing = torch.ones(x.shape[1]) if layer.smoothing is None else layer.smoothing
    for sample, row in zip(x, rows, strict=True):
        total = 0.0
        for channels, group, part in layer.segments():
            mine = sample if module.groups > 1 else sample[channels]
            scale, zero = layer.input.scale[row, group, 0], layer.input.zero_point[row, group, 0].float()
            of_channel = scale * (smoothing if module.groups > 1 else smoothing[channels]).view(channel)
            codes = quantize(mine, of_channel, zero, layer.input.bits).double() - zero
            weight = part.integers().double()
            sums = convolve(codes[None], weight.transpose(0, 1) if transposed else weight, **wide)[0]
            total = total + sums * (scale.double() * part.grid.scale[0, 0].double()).view(channel)
        outputs.append(total + layer.bias.double().view(channel))
    return torch.stack(outputs)


def check(module: QuantizedModule, x: Tensor, row: Tensor, **arguments) -> None:
    rows = [int(row)] * len(x) if row.dim() == 0 else row.tolist()
    expected = exact(module, x, rows)
    for instructions in available():
        kernel = NativeKernel(module, instructions=instructions, **arguments)
        found = kernel(x, row)
        assert found.shape == expected.shape and found.dtype == x.dtype
        assert (found.double() - expected).abs().max() <= 2e-6 * expected.abs().max()
        assert torch.equal(kernel.integers(), module.layer().weight.integers())


def example(name: str, batch: int = 3) -> Tensor:
    layer = LAYERS[name]
    return torch.randn(batch, layer.in_channels, *SIZES[len(layer.kernel_size)])


@pytest.mark.parametrize("row", [torch.tensor(2), torch.tensor([0, 2, 1])], ids=["one step", "mixed steps"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, row):
    check(quantized(name), example(name), row)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_weights(name):
    module = quantized(name, bits=(4, 8))
    check(module, example(name), torch.tensor(0), packed=True)


@pytest.mark.parametrize("name", ["1d", "3d", "transposed 1d", "transposed 2d"])
def test_channel_groups_and_smoothing(name):
    check(quantized(name, split=((2, 5), (3, 4)), smoothed=True), example(name), torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.groups == 1])
def test_dynamic_activations(name, group):
    """Against the reference; a code at a tie may differ by one."""
    static = quantized(name)
    layer_format = LayerFormat(weight=GridFormat(bits=8), input=DynamicFormat(bits=8, group=group))
    module = empty_like(LAYERS[name], layer_format, clock())
    module.fill(dataclasses.replace(static.layer(), input=DynamicGrid(8, group)))
    x, row = example(name), torch.tensor(0)
    expected = DynamicKernel(module)(x, row)
    error = (NativeKernel(module)(x, row) - expected).abs()
    assert (error > 1e-5 * expected.abs().max()).float().mean() < 0.01 and error.max() <= 0.01 * expected.abs().max()
    assert torch.equal(NativeKernel(module).integers(), module.layer().weight.integers())


def test_dynamic_activations_with_channel_groups_have_no_kernel():
    layer_format = LayerFormat(weight=GridFormat(bits=8), input=DynamicFormat(bits=8))
    assert not NativeKernel.supports(empty_like(LAYERS["groups"], layer_format, clock()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_any_layout(name, dtype):
    """Channels adjacent, which are read in place, gaps between samples, and one size only."""
    module, x = quantized(name), example(name).to(dtype)
    kernel, row = NativeKernel(module), torch.tensor(1)
    expected = kernel(x, row)
    for other in (x.movedim(1, -1).contiguous().movedim(-1, 1), torch.stack([x, x], dim=1)[:, 0]):
        assert torch.equal(kernel(other, row), expected)
    assert torch.equal(kernel(x[:1], row), expected[:1])


@pytest.mark.parametrize("name", LAYERS)
def test_nan_reaches_the_sample_only(name):
    module, x = quantized(name), example(name)
    expected = NativeKernel(module)(x, torch.tensor(0))
    x[1].view(-1)[3] = torch.nan
    found = NativeKernel(module)(x, torch.tensor(0))
    assert bool(found[1].isnan().all()) and torch.equal(found[::2], expected[::2])
