"""Helpers shared by the kernels of several runtimes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.quantized import QuantizedModule

Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``apply(x, weight, bias) -> y``."""


def linear_map(module: QuantizedModule) -> Apply:
    """The layer's linear or convolution as a function, for any dtype."""
    if not isinstance(module, QuantizedConv2d):
        return F.linear
    stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    return lambda x, weight, bias: F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def along_channels(values: Tensor, dim: int, output_dims: int) -> Tensor:
    """Shape values, float [out] or [B, out], to broadcast against an output with channels at `dim`."""
    shape = [1] * output_dims
    shape[dim] = values.shape[-1]
    if values.dim() == 2:
        shape[0] = values.shape[0]
    return values.reshape(shape)


def bound(weight: Tensor, bits: int) -> int:
    """Largest absolute value of an accumulator for these integer weights and `bits`-bit activations."""
    return int(weight.flatten(1).to(torch.int64).abs().sum(dim=1).max()) * ((1 << bits) - 1)
