"""Quantized convolutions and transposed convolutions, over 1, 2 or 3 dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.format import LayerFormat
from stepquant.layers.quantized import QuantizedModule, quantizes

Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``apply(x, weight, bias) -> y``."""

CONVOLVE: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
"""(dimensions, transposed) -> function."""


class QuantizedConv(QuantizedModule):
    """Convolution in integers with zero padding; x: float [B, in, *size] -> float [B, out, *size'].

    The weight is stored as [out, in / groups, *kernel]. Torch keeps that of a transposed convolution as
    [in, out, *kernel]; here its first two dimensions are swapped, so that every kind has a scale per output channel.

    Raises:
        StepquantError: if a convolution with channel groups has transforms or groups of its input.
    """

    channel_dim = 1
    transposed = False
    padding_mode = "zeros"

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        layer_format: LayerFormat,
        clock: StepClock,
        *,
        stride: tuple[int, ...] | int = 1,
        padding: tuple[int, ...] | int = 0,
        dilation: tuple[int, ...] | int = 1,
        output_padding: tuple[int, ...] | int = 0,
        groups: int = 1,
    ) -> None:
        if groups > 1 and (layer_format.transforms or (layer_format.input and layer_format.input.groups)):
            raise StepquantError(
                "a convolution with channel groups has transforms or groups of its input; expected neither. "
                "The checkpoint is damaged; quantize the model again."
            )
        super().__init__(weight_shape, bias, layer_format, clock)
        self.kernel_size = tuple(weight_shape[2:])
        self.stride, self.padding, self.dilation, self.output_padding = (
            _sizes(value, len(self.kernel_size)) for value in (stride, padding, dilation, output_padding)
        )
        self.groups = groups
        self.in_channels, self.out_channels = weight_shape[1] * groups, weight_shape[0]

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        convolution: Any = module
        grouped = convolution.transposed and convolution.groups > 1
        return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str) and not grouped

    @classmethod
    def like(cls, module: Any, layer_format: LayerFormat, clock: StepClock) -> QuantizedConv:
        return cls(
            tuple(weight_by_output(module).shape),
            module.bias is not None,
            layer_format,
            clock,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            output_padding=module.output_padding,
            groups=module.groups,
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, {self.format}"


@quantizes(nn.Conv1d)
class QuantizedConv1d(QuantizedConv):
    """See `QuantizedConv`; x: float [B, in, L]."""


@quantizes(nn.Conv2d)
class QuantizedConv2d(QuantizedConv):
    """See `QuantizedConv`; x: float [B, in, H, W]."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@quantizes(nn.Conv3d)
class QuantizedConv3d(QuantizedConv):
    """See `QuantizedConv`; x: float [B, in, T, H, W]."""


class QuantizedConvTranspose(QuantizedConv):
    """Transposed convolution without channel groups, see `QuantizedConv`."""

    transposed = True

    def in_torch_layout(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)


@quantizes(nn.ConvTranspose1d)
class QuantizedConvTranspose1d(QuantizedConvTranspose):
    """See `QuantizedConvTranspose`; x: float [B, in, L]."""


@quantizes(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(QuantizedConvTranspose):
    """See `QuantizedConvTranspose`; x: float [B, in, H, W]."""


@quantizes(nn.ConvTranspose3d)
class QuantizedConvTranspose3d(QuantizedConvTranspose):
    """See `QuantizedConvTranspose`; x: float [B, in, T, H, W]."""


def weight_by_output(module: Any) -> Tensor:
    """The weight of a linear or convolution of torch as a view [out, in / groups, *kernel]."""
    return module.weight.transpose(0, 1) if getattr(module, "transposed", False) else module.weight


def linear_map(module: Any) -> Apply:
    """A linear or convolution, of torch or quantized, as a function; its weight is [out, in / groups, *kernel]."""
    if not hasattr(module, "kernel_size"):
        return F.linear
    convolve = CONVOLVE[len(module.kernel_size), module.transposed]
    stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    if not module.transposed:
        return lambda x, weight, bias: convolve(x, weight, bias, stride, padding, dilation, groups)
    output_padding = module.output_padding
    return lambda x, weight, bias: convolve(
        x, weight.transpose(0, 1), bias, stride, padding, output_padding, groups, dilation
    )


def _sizes(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(int(size) for size in value) if isinstance(value, tuple | list) else (int(value),) * dims
