"""Grids whose rows differ in bits, against plain int64 arithmetic and the textbook formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from stepquant.core.dynamic import DynamicFormat, DynamicGrid
from stepquant.core.qtensor import GridFormat
from stepquant.core.row_bits import InvalidGrid
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS, LayerFormat
from stepquant.layers.linear import QuantizedLinear
from stepquant.runtime import native
from stepquant.runtime.native.attention import NativeAttention
from stepquant.runtime.native.build import available
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import DynamicKernel
from tests.runtime.test_runtimes import STEPS, check, clock, convolution, linear

ROW_BITS = torch.tensor([4, 8, 3], dtype=torch.uint8)
ROWS = {"one step": torch.tensor(2), "another": torch.tensor(1), "mixed steps": torch.tensor([0, 2, 1, 1])}


def by_row(module):
    """The layer with other bits in each row, and zero points that fit them."""
    layer = module.layer()
    top = (1 << ROW_BITS.int())[:, None, None] - 1
    zero_point = torch.minimum(layer.input.zero_point.int(), top).byte()
    scale = layer.input.scale * 255 / top
    grid = replace(layer.input, scale=scale, zero_point=zero_point, row_bits=ROW_BITS)
    module.format = module.format.model_copy(update={"input": grid.format})
    module.register_buffer("input_bits", None)
    module.fill(replace(layer, input=grid))
    return module


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("split", [((), ()), ((2, 5), (3, 4))], ids=["one scale", "channel groups"])
@pytest.mark.parametrize("bits", [(4, 8), (8, 8)], ids=["w4", "w8"])
def test_layers(bits, split, row):
    check(by_row(linear(split=split, bits=bits)), torch.randn(4, 5, 7) * 3, row)
    check(by_row(convolution(7, 6, 3, padding=1, split=split, bits=bits)), torch.randn(4, 7, 6, 5) * 3, row)


def test_native_takes_the_layers():
    assert native.NativeKernel.supports(by_row(linear())) and not OneDnnKernel.supports(by_row(linear()))


@pytest.mark.parametrize("row", [torch.tensor(0), torch.tensor(1), torch.tensor([2, 1])])
@pytest.mark.skipif(native.supported() is not None, reason=str(native.supported()))
def test_attention(row):
    """As the simulation, except where a probability at a tie differs by one code."""
    torch.manual_seed(0)
    mixed = GridFormat(bits=8, rows=STEPS, by_row=True)
    simulated = QuantizedAttentionProcessor(dict.fromkeys(OPERANDS, mixed), StepClock(torch.arange(STEPS).float()))
    top = (1 << ROW_BITS.int())[:, None, None] - 1
    for name in OPERANDS:
        reach = 1.0 if name == "probability" else 6.0
        zero_point = torch.zeros(STEPS, 1, 1) if name == "probability" else top // 2
        setattr(simulated, f"{name}_scale", reach / top)
        setattr(simulated, f"{name}_zero_point", zero_point.byte())
        setattr(simulated, f"{name}_bits", ROW_BITS.clone())
    simulated.attention()
    simulated.clock.row = row
    query, key, value = torch.randn(3, 2, 4, 33, 20).unbind(0)
    expected = simulated.attend(query, key, value, None)
    step = float(simulated.probability_scale.max()) * float(value.abs().max())
    for instructions in available():
        error = (NativeAttention(simulated, instructions=instructions)(query, key, value, None, row) - expected).abs()
        assert (error > 1e-5 * expected.abs().max()).float().mean() < 0.01
        assert error.max() <= 1.5 * step


@pytest.mark.parametrize("row", [torch.tensor(0), torch.tensor(1), torch.tensor([2, 1])])
@pytest.mark.skipif(native.supported() is not None, reason=str(native.supported()))
def test_dynamic_attention(row):
    torch.manual_seed(0)
    formats = {name: DynamicFormat(bits=8, rows=STEPS) for name in OPERANDS}
    simulated = QuantizedAttentionProcessor(formats, StepClock(torch.arange(STEPS).float()))
    for name in OPERANDS:
        setattr(simulated, f"{name}_bits", ROW_BITS.clone())
    simulated.clock.row = row
    query, key, value = torch.randn(3, 2, 4, 33, 20).unbind(0)
    expected = simulated.attend(query, key, value, None)
    step = float(value.abs().max()) / (2 ** int(ROW_BITS[row].min()) - 1)
    for instructions in available():
        error = (NativeAttention(simulated, instructions=instructions)(query, key, value, None, row) - expected).abs()
        assert (error > 1e-4 * expected.abs().max()).float().mean() < 0.02
        assert error.max() <= 1.5 * step


def test_operands_take_the_bits_of_their_row():
    """A row of 4 bits has 16 values, one of 8 bits more."""
    processor = QuantizedAttentionProcessor({"query": GridFormat(bits=8, rows=STEPS, by_row=True)}, clock())
    processor.query_bits = ROW_BITS.clone()
    processor.query_scale = (6 / ((1 << ROW_BITS.int()) - 1))[:, None, None]
    processor.clock.row = torch.tensor([0, 1, 2])
    counts = [len(sample.unique()) for sample in processor.operand("query", torch.linspace(-1, 7, 500).repeat(3, 1, 1))]
    assert counts == [16, 256, 8]


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_dynamic_layers(row):
    """Groups of 4 channels of each token: the grid of the row's bits that spans them and 0."""
    torch.manual_seed(0)
    fixed = linear(inputs=8, bits=(8, 8))
    formats = LayerFormat(weight=fixed.format.weight, input=DynamicFormat(bits=8, group=4, rows=STEPS))
    module = QuantizedLinear.like(nn.Linear(8, 5), formats, clock())
    module.fill(replace(fixed.layer(), input=DynamicGrid(8, 4, ROW_BITS)))
    x = torch.randn(4, 3, 8)
    rounded = x.clone().double()
    for sample, at in enumerate(row.expand(4).tolist()):
        top = 2 ** int(ROW_BITS[at]) - 1
        for group in (slice(0, 4), slice(4, 8)):
            values = x[sample, :, group]
            low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / top
            zero_point = torch.round(-low / scale)
            codes = (torch.round(values * (1 / scale)) + zero_point).clamp(0, top)
            rounded[sample, :, group] = (codes - zero_point) * scale
    expected = rounded @ module.layer().weight.dequantize().double().t() + module.bias
    kernels = [DynamicKernel(module)]
    if native.supported() is None:
        assert native.NativeKernel.supports(module)
        kernels += [native.NativeKernel(module, instructions=instructions) for instructions in available()]
    for kernel in kernels:
        assert (kernel(x, row).double() - expected).abs().max() <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("bits", [[4, 9, 3], [4, 8, 1], [4, 8], [4, 8, 3, 3]])
def test_damaged_bits_are_refused(bits):
    module = by_row(linear())
    module.input_bits = torch.tensor(bits, dtype=torch.uint8)
    with pytest.raises(StepquantError, match="bits"):
        module.layer()


def test_zero_points_beyond_the_bits_of_their_row_are_refused():
    module = by_row(linear())
    module.input_zero_point[0] = 16
    with pytest.raises(InvalidGrid, match="bits of their rows"):
        module.layer()


def test_formats_without_bits_by_row_are_stored_as_before():
    assert GridFormat(bits=4, rows=3).model_dump(mode="json") == {"bits": 4, "groups": [], "rows": 3}
    assert DynamicFormat(bits=4).model_dump(mode="json") == {"kind": "dynamic", "bits": 4, "group": None}
