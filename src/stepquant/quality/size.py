"""Size of a quantized denoiser on disk, relative to float32."""

from __future__ import annotations

from torch import Tensor, nn

from stepquant.core.qtensor import Grid, QuantizedLayer
from stepquant.layers.install import Quantization

SCALE_BITS = 40
"""Of a scale and its zero point."""


def relative_size(quantization: Quantization, model: nn.Module) -> float:
    """Bits of codes, scales, tables and of what stays in float32, relative to all parameters in float32."""
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    kept = sum(count for name, count in parameters.items() if name.removesuffix(".weight") not in quantization.layers)
    bits = 32 * kept + sum(map(_bits, quantization.layers.values()))
    return bits / (32 * sum(parameters.values()))


def _bits(layer: QuantizedLayer) -> int:
    """Of a layer without its bias."""
    weight = layer.weight
    tables = sum(SCALE_BITS * grid.scale.numel() for grid in (weight.grid, layer.input) if isinstance(grid, Grid))
    values = (value for transform in layer.transforms for value in vars(transform).values())
    factors = sum(32 * value.numel() for value in values if isinstance(value, Tensor))
    return weight.codes.numel() * weight.bits + tables + factors
