"""The reference runtime: integer arithmetic simulated in floating point, slow but exact; kernels are tested against it.

An accumulator with a worst case below 2^24 is exact in float32; any other is computed in float64, which is exact below
2^53. So accumulators equal those of integer kernels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from stepquant.core.affine import quantize
from stepquant.core.dynamic import DynamicGrid
from stepquant.core.qtensor import Grid
from stepquant.core.transforms import LayerTransform
from stepquant.layers.attention import bits_of, per_sample
from stepquant.layers.buffers import TransformBuffers
from stepquant.layers.conv import Apply, linear_map
from stepquant.layers.kernel import UNLIMITED, Capabilities, Kernel
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.common import along_channels, bound

EXACT_IN_FLOAT32 = 1 << 24

EVERY_LAYER = Capabilities(
    transforms=None,
    kernel_dims=frozenset({0, 1, 2, 3}),
    transposed=True,
    grouped_convolutions=True,
    grouped_both=True,
    bits_by_row=True,
    most_products=UNLIMITED,
)


class WeightOnlyKernel(Kernel):
    """A layer whose activation stays in floating point: multiplies by the dequantized weight in the dtype of x."""

    capabilities = replace(EVERY_LAYER, integer=False)
    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        self.apply_map: Apply = linear_map(module)
        weight = layer.weight.dequantize()
        if weight.dim() == 4:  # the layout that kernels after it use
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        _hold(self, "bias", None if layer.bias is None else layer.bias.clone())

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        y = self.apply_map(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        # For images with one channel torch loses the layout.
        return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


class ReferenceKernel(Kernel):
    """Quantize, accumulate integers exactly, scale: ``y = sum over segments of acc * (s_x * s_w) + bias``."""

    capabilities = EVERY_LAYER
    input_scale: Tensor
    input_zero_point: Tensor
    row_bits: Tensor | None
    bias: Tensor | None

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert isinstance(layer.input, Grid)
        self.bits = layer.input.bits
        self.apply_map: Apply = linear_map(module)
        self.dim = module.channel_dim
        self.transforms = nn.ModuleList(TransformBuffers(transform, persistent=False) for transform in layer.transforms)
        grid = layer.input
        buffers = {"input_scale": grid.scale, "input_zero_point": grid.zero_point, "row_bits": grid.row_bits}
        buffers["bias"] = layer.bias
        self.segments: list[tuple[slice, int]] = []
        for index, (channels, group, weight) in enumerate(layer.segments()):
            self.segments.append((channels, group))
            integers = weight.integers()
            exact = bound(integers, self.bits) < EXACT_IN_FLOAT32
            buffers[f"weight_{index}"] = integers.to(torch.float32 if exact else torch.float64)
            buffers[f"weight_scale_{index}"] = weight.grid.scale[0, 0]
        for name, value in buffers.items():
            _hold(self, name, value)

    @property
    def grid(self) -> Grid:
        """Of the input."""
        return Grid(self.input_scale, self.input_zero_point, self.bits, row_bits=self.row_bits)

    def _at(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each group: [G], or [B, G] for a row of shape [B]."""
        scale, zero_point = self.grid.at(row)
        return scale[..., 0], zero_point[..., 0]

    def accumulators(self, x: Tensor, row: Tensor) -> list[Tensor]:
        """Exact integer sums per segment: float32 or float64, of the output's shape."""
        transforms: list[LayerTransform] = [buffers.transform() for buffers in self.transforms]  # type: ignore[operator]
        for transform in transforms:
            x = transform.transform_input(x, self.dim)
        scale, zero_point = self._at(row)
        bits = bits_of(self.grid, row, x)
        sums = []
        for index, (channels, group) in enumerate(self.segments):
            weight = self.get_buffer(f"weight_{index}")
            part = x if len(self.segments) == 1 else x.narrow(self.dim, channels.start, channels.stop - channels.start)
            part = part.float()
            s, z = (_broadcast(values[..., group], part) for values in (scale, zero_point))
            for transform in transforms:
                s = transform.transform_scale(s, channels, part.dim(), self.dim)
            codes = quantize(part, s, z, bits) - z
            sums.append(self.apply_map(codes.to(weight.dtype), weight, None))
        return sums

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        scale, _ = self._at(row)
        y: Tensor | None = None
        for index, ((_, group), total) in enumerate(zip(self.segments, self.accumulators(x, row), strict=True)):
            product = scale[..., group, None] * self.get_buffer(f"weight_scale_{index}")
            if product.dim() == 2:
                product = product.repeat_interleave(total.shape[0] // product.shape[0], dim=0)
            part = total.float() * along_channels(product, self.dim, total.dim())
            y = part if y is None else y + part
        assert y is not None
        if self.bias is not None:
            y = y + along_channels(self.bias, self.dim, y.dim())
        return y.to(x.dtype)


class DynamicKernel(Kernel):
    """A layer whose input has a dynamic grid, one for each group g of channels of each position r.

    ``y[r', o] = bias[o] + sum over taps r of the window, and groups g, of s[r, g] * w_s[g, o] * acc[r, g, o]`` with the
    integers ``acc = sum over the channels of g of (code - z[r, g]) * w`` and the weight's scale ``w_s``. Computed in
    float64, which holds ``(code - z) * s`` exactly: integer kernels, whose ``acc`` are exact, differ by the rounding of
    sums in float32 only. A smoothed input is multiplied by the reciprocals of the factors, in float32. A position with
    a NaN or infinite value has no grid: what depends on it is NaN.
    """

    capabilities = replace(EVERY_LAYER, dynamic=True)
    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert isinstance(layer.input, DynamicGrid)
        self.grid, self.dim = layer.input, module.channel_dim
        self.apply_map: Apply = linear_map(module)
        self.transforms = nn.ModuleList(TransformBuffers(transform, persistent=False) for transform in layer.transforms)
        grid = layer.weight.grid
        weight = replace(layer.weight, grid=replace(grid, scale=grid.scale.double())).dequantize()
        self.register_buffer("weight", weight, persistent=False)
        _hold(self, "bias", None if layer.bias is None else layer.bias.double())

    def codes(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Codes less their zero points, and their scales: float32, broadcastable against x."""
        values = x.float()
        for buffers in self.transforms:
            transform: LayerTransform = buffers.transform()  # type: ignore[operator]
            values = transform.transform_input(values, self.dim)
            one = torch.ones((), device=x.device)
            values = values * transform.transform_scale(one, slice(None), values.dim(), self.dim).reciprocal()
        bits = bits_of(self.grid, row, values)
        scale, zero_point = self.grid.of(values, self.dim, bits)
        return quantize(values, scale, zero_point, bits) - zero_point, scale

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        codes, scale = self.codes(x, row)
        return self.apply_map(codes.double() * scale.double(), self.weight, self.bias).to(x.dtype)


def _hold(kernel: Kernel, name: str, value: Tensor | None) -> None:
    """Keep a tensor as a buffer that is not stored; None as an attribute: accelerate offloads no such buffer."""
    if value is None:
        setattr(kernel, name, None)
    else:
        kernel.register_buffer(name, value, persistent=False)


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Shape a scalar, or values [B], to broadcast against x."""
    return values if values.dim() == 0 else per_sample(values[:, None], x)
