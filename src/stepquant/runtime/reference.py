"""The reference runtime: simulated, with exact integer semantics. Slow, simple, and the standard for every kernel.

Integers are held in floating point. An accumulator whose worst case stays below 2^24 is exact in float32, any other is
computed in float64 (exact below 2^53, which no layer reaches); so accumulators equal those of integer kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.core.affine import quantize
from stepquant.core.qtensor import ActivationTable
from stepquant.layers.attention import per_sample
from stepquant.layers.modules import Kernel, QuantizedModule
from stepquant.runtime.segments import Apply, along_channels, bound, channel_dim, linear_map, segments_of

EXACT_IN_FLOAT32 = 1 << 24


class WeightOnlyKernel(Kernel):
    """A layer whose activation stays floating point: the dequantized weight in the dtype of x."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        self.apply_map: Apply = linear_map(module)
        weight = layer.weight.dequantize()
        if weight.dim() == 4:  # so that what follows a convolution is laid out as kernels want it
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.clone(), persistent=False)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        y = self.apply_map(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        # Of an image with one channel torch cannot tell the layout.
        return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y


class Span(NamedTuple):
    """Input channels [start, stop) that share one weight scale a channel and an activation scale, that of `group`."""

    start: int
    stop: int
    group: int


class ReferenceKernel(Kernel):
    """Quantize, accumulate integers exactly, scale: ``y = sum over groups of acc * (s_x * s_w) + bias``."""

    table_scale: Tensor
    table_zero_point: Tensor
    smoothing: Tensor | None
    bias: Tensor | None

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert layer.activation is not None
        self.bits = layer.activation.bits
        buffers = {
            "table_scale": layer.activation.scale,
            "table_zero_point": layer.activation.zero_point,
            "smoothing": layer.smoothing,
            "bias": layer.bias,
        }
        self.apply_map: Apply = linear_map(module)
        self.dim = channel_dim(module)
        self.spans = []
        for index, segment in enumerate(segments_of(layer)):
            self.spans.append(Span(segment.start, segment.stop, segment.group))
            buffers[f"weight_{index}"] = segment.weight.to(self._exact_dtype(segment.weight))
            buffers[f"weight_scale_{index}"] = segment.scale
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def _exact_dtype(self, weight: Tensor) -> torch.dtype:
        return torch.float32 if bound(weight, self.bits) < EXACT_IN_FLOAT32 else torch.float64

    def _at(self, row: Tensor) -> tuple[Tensor, Tensor]:
        return ActivationTable(self.table_scale, self.table_zero_point, self.bits).at(row)

    def accumulators(self, x: Tensor, row: Tensor) -> list[Tensor]:
        """Exact integer sums of each segment: float32 or float64 tensors of the output's shape."""
        scale, zero_point = self._at(row)
        sums = []
        for index, span in enumerate(self.spans):
            weight = self.get_buffer(f"weight_{index}")
            part = (x if len(self.spans) == 1 else x.narrow(self.dim, span.start, span.stop - span.start)).float()
            s, z = (_broadcast(values[..., span.group], part) for values in (scale, zero_point))
            if self.smoothing is not None:
                s = s * along_channels(self.smoothing[span.start : span.stop], self.dim, part.dim())
            codes = quantize(part, s, z, self.bits) - z
            sums.append(self.apply_map(codes.to(weight.dtype), weight, None))
        return sums

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        scale, _ = self._at(row)
        y: Tensor | None = None
        for index, (span, total) in enumerate(zip(self.spans, self.accumulators(x, row), strict=True)):
            product = scale[..., span.group, None] * self.get_buffer(f"weight_scale_{index}")
            if product.dim() == 2:
                product = product.repeat_interleave(total.shape[0] // product.shape[0], dim=0)
            part = total.float() * along_channels(product, self.dim, total.dim())
            y = part if y is None else y + part
        assert y is not None
        if self.bias is not None:
            y = y + along_channels(self.bias, self.dim, y.dim())
        return y.to(x.dtype)


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """A scalar, or [B] repeated to the samples of x and shaped to broadcast against it."""
    return values if values.dim() == 0 else per_sample(values[:, None], x)
