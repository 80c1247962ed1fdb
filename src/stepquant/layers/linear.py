"""The quantized linear."""

from __future__ import annotations

from torch import nn

from stepquant.layers.clock import StepClock
from stepquant.layers.format import LayerFormat
from stepquant.layers.quantized import QuantizedModule, quantizes


@quantizes(nn.Linear)
class QuantizedLinear(QuantizedModule):
    """Linear in integers; x: float [B, ..., in] -> float [B, ..., out]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, layer_format: LayerFormat, clock: StepClock
    ) -> None:
        super().__init__((out_features, in_features), bias, layer_format, clock)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, module: nn.Linear, layer_format: LayerFormat, clock: StepClock) -> QuantizedLinear:
        return cls(module.in_features, module.out_features, module.bias is not None, layer_format, clock)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"
