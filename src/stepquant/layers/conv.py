"""The quantized convolution."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.format import LayerFormat
from stepquant.layers.quantized import QuantizedModule, quantizes


@quantizes(nn.Conv2d)
class QuantizedConv2d(QuantizedModule):
    """2-d convolution in integers with zero padding; x: float [B, in, H, W] -> float [B, out, H', W'].

    Raises:
        StepquantError: if a convolution with channel groups has transforms or groups of its input.
    """

    channel_dim = 1

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        layer_format: LayerFormat,
        clock: StepClock,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        if groups > 1 and (layer_format.transforms or (layer_format.input and layer_format.input.groups)):
            raise StepquantError(
                "a convolution with channel groups has transforms or groups of its input; expected neither. "
                "The checkpoint is damaged; quantize the model again."
            )
        super().__init__(weight_shape, bias, layer_format, clock)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.in_channels, self.out_channels = weight_shape[1] * groups, weight_shape[0]

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    @classmethod
    def like(cls, module: nn.Conv2d, layer_format: LayerFormat, clock: StepClock) -> QuantizedConv2d:
        return cls(
            tuple(module.weight.shape),
            module.bias is not None,
            layer_format,
            clock,
            stride=_pair(module.stride),
            padding=_pair(module.padding),
            dilation=_pair(module.dilation),
            groups=module.groups,
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, {self.format}"


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)
