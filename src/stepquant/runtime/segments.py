"""Where a layer's input channels are cut so that each piece has one weight scale a channel and one activation scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.core.qtensor import QuantizedLayer
from stepquant.layers.modules import QuantizedConv2d, QuantizedModule

MOST_INPUTS = (1 << 31) // (255 * 128)
"""Products of a code and a weight that an int32 accumulator holds in the worst case."""

Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``apply(x, weight, bias) -> y``."""


@dataclass(frozen=True)
class Segment:
    """Input channels [start, stop) with their integer weight.

    Attributes:
        weight: int8 [out, stop - start, *kernel].
        scale: float32 [out], of the weight.
        zero_point: uint8 [out], of the weight's codes.
        group: index of the activation group, the column of the activation table.
    """

    start: int
    stop: int
    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    group: int


def segments_of(layer: QuantizedLayer) -> list[Segment]:
    """The refinement of weight groups and activation groups, in order of channels."""
    weight = layer.weight
    channels = weight.codes.shape[1]
    activation_sizes = layer.activation.group_sizes if layer.activation is not None else ()
    weight_ends = list(accumulate(weight.group_sizes))
    activation_ends = list(accumulate(activation_sizes or (channels,)))
    integers = weight.integers()
    segments, start = [], 0
    for stop in sorted({*weight_ends, *activation_ends}):
        row = next(index for index, end in enumerate(weight_ends) if stop <= end)
        group = next(index for index, end in enumerate(activation_ends) if stop <= end)
        part, scale, zero_point = integers[:, start:stop].contiguous(), weight.scale[row], weight.zero_point[row]
        segments.append(Segment(start, stop, part, scale, zero_point, group))
        start = stop
    return segments


def sums_fit(module: QuantizedModule) -> bool:
    """Whether a layer's activation is quantized, and no sum of its products can overflow 32 bits."""
    return module.layer_format.activation_bits is not None and math.prod(module.weight_shape[1:]) <= MOST_INPUTS


def linear_map(module: QuantizedModule) -> Apply:
    """The layer's own linear or convolution, on whatever dtype it is given."""
    if not isinstance(module, QuantizedConv2d):
        return F.linear
    stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    return lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def channel_dim(module: QuantizedModule) -> int:
    """Dimension of the input that holds the channels."""
    return 1 if isinstance(module, QuantizedConv2d) else -1


def along_channels(values: Tensor, dim: int, output_dims: int) -> Tensor:
    """float [out], or [B, out] for a batch, shaped to broadcast against an output with channels at `dim`."""
    shape = [1] * output_dims
    shape[dim] = values.shape[-1]
    if values.dim() == 2:
        shape[0] = values.shape[0]
    return values.reshape(shape)


def bound(weight: Tensor, bits: int) -> int:
    """Largest absolute value an accumulator of these integer weights and `bits`-bit activations can reach."""
    return int(weight.flatten(1).to(torch.int64).abs().sum(dim=1).max()) * ((1 << bits) - 1)
