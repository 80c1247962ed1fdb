"""Layers with dynamic activations: bit for bit against int64, and against the reference to float32 rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.dynamic import DynamicFormat, DynamicGrid
from stepquant.core.qtensor import Grid, GridFormat, QTensor, QuantizedLayer
from stepquant.core.transforms import Smoothing
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.format import LayerFormat, TransformFormat
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.native.build import available
from stepquant.runtime.native.kernel import NativeKernel
from stepquant.runtime.native.norms import Norm
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import DynamicKernel
from tests.runtime.native.test_native_kernel import assert_same_up_to_ties
from tests.runtime.test_runtimes import clock, multiply

pytestmark = pytest.mark.usefixtures("kernels")
ROW = torch.tensor(0)
LAYERS = {
    "linear": dict(inputs=70, outputs=40),
    "linear of one channel": dict(inputs=1, outputs=3),
    "3x3": dict(inputs=20, outputs=5, kernel=3, padding=1),
    "3 channels": dict(inputs=3, outputs=40, kernel=3, padding=1),
    "1 channel": dict(inputs=1, outputs=6, kernel=3, padding=(2, 1)),
    "stride": dict(inputs=8, outputs=9, kernel=3, padding=1, stride=2),
    "1x1": dict(inputs=33, outputs=3, kernel=1),
    "dilation": dict(inputs=5, outputs=6, kernel=3, padding=2, dilation=2),
}
GROUPS = {"whole": None, "groups of 16": 16, "groups of 3": 3}


def layer(inputs, outputs, kernel=None, bits=(8, 8), group=None, weight_groups=(), smoothed=False, **geometry):
    """Scales of the weight are powers of two from 1 to 8, so that the integers of `lossless` have integer products."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs) if kernel is None else nn.Conv2d(inputs, outputs, kernel, **geometry)
    layer_format = LayerFormat(
        weight=GridFormat(bits=bits[0], groups=weight_groups),
        input=DynamicFormat(bits=bits[1], group=group),
        transforms=(TransformFormat(kind="smoothing"),) if smoothed else (),
    )
    module = (QuantizedLinear if kernel is None else QuantizedConv2d).like(plain, layer_format, clock())
    shape = (1, max(1, len(weight_groups)), outputs)
    zero_point = torch.randint(0, 1 << bits[0], shape) if bits[0] < 8 else torch.full(shape, 128)
    grid = Grid(2.0 ** torch.randint(0, 4, shape), zero_point.byte(), bits[0], weight_groups)
    weight = QTensor(torch.randint(0, 1 << bits[0], module.weight_shape).byte(), grid)
    transforms = (Smoothing(torch.rand(inputs) * 4 + 0.1),) if smoothed else ()
    bias = torch.randint(-9, 9, (outputs,)).float()
    module.fill(QuantizedLayer(weight, bias, DynamicGrid(bits[1], group), transforms))
    return module


def image(module: QuantizedModule, values: Tensor) -> Tensor:
    """Values [B, H, W, C] in the layout of the layer's input."""
    return values.permute(0, 3, 1, 2) if isinstance(module, QuantizedConv2d) else values


def lossless(shape: tuple[int, ...], group: int | None, bits: int) -> Tensor:
    """Integers [..., C] whose dynamic grids have scales of 1, 2 or 4 and hold every value.

    The first two channels of each group are the ends of its range.
    """
    top, parts = (1 << bits) - 1, []
    for part in torch.empty(shape).split(group or shape[-1], dim=-1):
        zero_point, size = torch.randint(0, top + 1, (*shape[:-1], 1)), part.shape[-1]
        if size == 1:
            zero_point = (zero_point > top // 2) * top
        codes = torch.randint(0, top + 1, part.shape)
        codes[..., 0] = 0 if size > 1 else top - zero_point[..., 0]
        codes[..., 1:2] = top
        parts.append((codes - zero_point) * 2 ** torch.randint(0, 3, (*shape[:-1], 1)))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=["w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", LAYERS)
def test_sums_are_those_of_int64(name, group, bits):
    module = layer(**LAYERS[name], bits=bits, group=GROUPS[group])
    integers = lossless((2, 9, 6, LAYERS[name]["inputs"]), GROUPS[group], bits[1])
    scale = module.weight_scale[0, 0].long().reshape(-1, *(1,) * (len(module.weight_shape) - 1))
    weight = module.layer().weight.integers().long() * scale
    bias = module.bias.long().reshape(-1, *(1,) * (len(module.weight_shape) - 2))
    expected = torch.stack([multiply(module, x, weight) + bias for x in image(module, integers)])
    for instructions in available():
        kernel = NativeKernel(module, instructions=instructions)
        assert torch.equal(kernel(image(module, integers).float(), ROW).double(), expected.double())


SPLITS = {"same": ((32, 32, 6), 32), "others": ((20, 50), 16), "weight": ((35, 35), None), "activation": ((), 64)}


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("bits", [(4, 8), (4, 4), (8, 8)])
@pytest.mark.parametrize("kernel", [None, 3])
def test_groups_of_weight_and_activation(split, bits, smoothed, kernel):
    weight_groups, group = SPLITS[split]
    module = layer(70, 40, kernel, bits, group, weight_groups, smoothed)
    x = image(module, torch.randn(2, 5, 7, 70))
    expected = DynamicKernel(module)(x, ROW)
    for instructions in available():
        for packed in (False, True):
            found = NativeKernel(module, instructions=instructions, packed=packed)
            assert torch.equal(found.integers(), module.layer().weight.integers())
            torch.testing.assert_close(found(x, ROW), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_reference_is_the_definition():
    """Sums over taps and groups, in int64 and float64."""
    module = layer(10, 4, 3, (8, 4), group=4, weight_groups=(3, 7), padding=1)
    x = torch.randn(1, 10, 4, 5)
    weight, total = module.layer().weight, module.bias.double().reshape(4, 1, 1).repeat(1, 4, 5)
    for start, stop, grid, of_weight in ((0, 3, 0, 0), (3, 4, 0, 1), (4, 8, 1, 1), (8, 10, 2, 1)):
        values = x[0, 4 * grid : 4 * grid + 4]
        low, high = values.amin(0).clamp(max=0), values.amax(0).clamp(min=0)
        scale = (high - low) / 15
        zero = torch.round(-low / scale)
        integers = ((x[0, start:stop] * (1 / scale)).round() + zero).clamp(0, 15).long() - zero.long()
        integers, scale = F.pad(integers, (1, 1, 1, 1)), F.pad(scale, (1, 1, 1, 1)).double()
        codes = weight.integers().long()[:, start:stop]
        for i in range(3):
            for j in range(3):
                window = integers[:, i : i + 4, j : j + 5]
                product = (window[None] * codes[:, :, i, j, None, None]).sum(1)
                by_output = weight.grid.scale[0, of_weight].double().reshape(4, 1, 1)
                total = total + product * scale[i : i + 4, j : j + 5] * by_output
    torch.testing.assert_close(DynamicKernel(module)(x, ROW)[0].double(), total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("shape", [(19, 6, 9, 7), (64, 33, 5, 33)])
def test_everything_fused(shape, group, dtype):
    channels, outputs, height, width = shape
    module = layer(channels, outputs, 3, group=group, padding=1)
    x = torch.randn(3, channels, height, width).to(dtype)
    norm = Norm(torch.rand(3, channels) + 0.5, torch.randn(3, channels))
    added, gate = torch.randn(3, outputs), torch.randn(3, outputs)
    residual = torch.randn(3, outputs, 2 * height, 2 * width).to(memory_format=torch.channels_last)
    plain = F.silu(x.float() * norm.multiply[..., None, None] + norm.add[..., None, None])
    layer_output = DynamicKernel(module)(F.interpolate(plain, scale_factor=2.0), ROW)
    expected = ((layer_output + added[..., None, None]) * gate[..., None, None] + residual) * 0.5
    step = float(plain.abs().max()) * 2 / 255 * float(module.weight_scale.max()) * 128 * float(gate.abs().max())
    for instructions in available():
        found = NativeKernel(module, instructions=instructions).run(
            x, ROW, norm=norm, activation="silu", upsample=2, channel_add=added, gate=gate, residual=residual,
            factor=0.5, dtype=torch.float32,
        )  # fmt: skip
        assert_same_up_to_ties(found, expected, step=step)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("activation", ["layer norm", "silu", "gelu", "gelu_tanh", "geglu"])
def test_activations_of_tokens(activation, group):
    module = layer(40, 5, group=group)
    x = torch.randn(2, 9, 80 if activation == "geglu" else 40)
    norm = Norm(torch.rand(2, 40), torch.randn(2, 40), 1e-5) if activation == "layer norm" else None
    plain = {
        "layer norm": lambda: F.layer_norm(x, (40,), eps=1e-5) * norm.multiply[:, None] + norm.add[:, None],
        "silu": lambda: F.silu(x),
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "geglu": lambda: x[..., :40] * F.gelu(x[..., 40:]),
    }[activation]()
    expected = DynamicKernel(module)(plain, ROW)
    found = NativeKernel(module).run(x, ROW, norm=norm, activation=None if norm else activation)
    assert_same_up_to_ties(found, expected, step=float(plain.abs().max()) * 2 / 255 * 8 * 128)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("kernel", [None, 3])
def test_what_depends_on_a_nan_is_nan(value, group, kernel):
    """As in the reference; infinity has no grid either."""
    module = layer(10, 5, kernel, group=group)
    values = torch.randn(2, 6, 6, 10)
    x = image(module, values)
    clean = NativeKernel(module)(x, ROW)
    values[1, 2, 3, 5] = value
    expected = DynamicKernel(module)(x, ROW)
    assert 0 < int(expected.isnan().sum()) < expected[1].numel()
    for instructions in available():
        found = NativeKernel(module, instructions=instructions)(x, ROW)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[~found.isnan()], clean[~found.isnan()])


def test_extreme_ranges():
    """Zeros, tiny values, and a spread beyond the largest float."""
    module = layer(4, 5)
    most = torch.finfo(torch.float32).max
    x = torch.tensor([[0.0] * 4, [1e-12, 0, 0, 0], [most, -most, 0, 1], [1, 2, 3, 4], [-4, -3, -2, -1]]) * 1.0
    expected = DynamicKernel(module)(x, ROW)
    torch.testing.assert_close(NativeKernel(module)(x, ROW), expected, rtol=1e-5, atol=1e-5)


def test_which_runtimes_have_kernels():
    plain, grouped = layer(8, 4, 3, group=4), layer(2, 4, 3)
    assert NativeKernel.supports(plain) and NativeKernel.supports(grouped)
    assert not OneDnnKernel.supports(plain)
