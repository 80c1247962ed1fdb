"""Layers under calibration: a full-precision layer, and the quantizers on its weight and its input.

`TrainableLayer.freeze` and `TrainableAttention.freeze` turn what was learned into tables. All quantization here is
simulated in floating point.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation import ActivationQuantizer
from stepquant.calibration.fake_quant.weight import WeightQuantizer
from stepquant.config import FLOAT_BITS, LayerBits
from stepquant.core.qtensor import Grid, QTensor, QuantizedAttention, QuantizedLayer, stored_zero_point
from stepquant.core.ranges import RangeMethod
from stepquant.core.transforms import Smoothing
from stepquant.core.weights import group_channels
from stepquant.layers.attention import AttentionProcessor
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS
from stepquant.layers.quantized import can_quantize


class TrainableLayer(nn.Module):
    """A linear or convolution under calibration: ``y = layer(activation(x); weight(W))``.

    `quantizing_weight` off leaves the weight in full precision; activation quantizers are switched one by one.
    """

    def __init__(
        self, inner: nn.Linear | nn.Conv2d, weight: WeightQuantizer, activation: ActivationQuantizer | None
    ) -> None:
        super().__init__()
        self.inner, self.weight_quantizer, self.activation_quantizer = inner, weight, activation
        self.quantizing_weight = True

    def forward(self, input: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        x = input  # named as in torch's own layers, which some models call by keyword
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        weight = self.weight_quantizer(self.weight) if self.quantizing_weight else self.weight
        if isinstance(self.inner, nn.Linear):
            return F.linear(x, weight, self.inner.bias)
        conv = self.inner
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in, *kernel], widened where the weight is held in less (`stepquant.calibration.float32`)."""
        return self.inner.weight.float()

    @property
    def bits(self) -> LayerBits:
        """Of its weight, and of its input if that is quantized."""
        activation = FLOAT_BITS if self.activation_quantizer is None else self.activation_quantizer.bits
        return LayerBits(self.weight_quantizer.bits, activation)

    def freeze(self) -> QuantizedLayer:
        """What calibration found, as it ships."""
        weight = self.weight_quantizer
        scale, zero_point = weight.scale.float().cpu().clone(), stored_zero_point(weight.zero_point)
        grid = Grid(scale[None], zero_point[None], weight.bits, weight.group_sizes)
        quantized = QTensor(weight.codes(self.weight).cpu().clone(), grid)
        bias = None if self.inner.bias is None else self.inner.bias.detach().float().cpu().clone()
        activation = None if self.activation_quantizer is None else self.activation_quantizer.table()
        smoothing = () if weight.smoothing is None else (Smoothing(weight.smoothing.float().cpu().clone()),)
        return QuantizedLayer(quantized, bias, activation, smoothing)

    def smoothing(self, smoothing: Tensor) -> None:
        """Divide input channels by `smoothing`, float [in], and multiply the weight's by it; searches its range anew."""
        assert self.activation_quantizer is not None
        self.weight_quantizer.set_range(self.weight, smoothing)
        self.activation_quantizer.smoothing = smoothing


class TrainableAttention(AttentionProcessor):
    """Attention under calibration; `quantizers` holds one for each operand that is quantized."""

    def __init__(self, quantizers: dict[str, ActivationQuantizer]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleDict(quantizers)

    @property
    def repeatable(self) -> bool:
        """Not while QDrop draws random numbers."""
        return all(quantizer.drop_probability == 0 for quantizer in self.quantizers.children())

    def operand(self, name: str, x: Tensor) -> Tensor:
        return self.quantizers[name](x) if name in self.quantizers else x

    def freeze(self) -> QuantizedAttention:
        """What calibration found, as it ships."""
        tables = dict.fromkeys(OPERANDS, None) | {
            name: quantizer.table()
            for name, quantizer in self.quantizers.items()
            if isinstance(quantizer, ActivationQuantizer)
        }
        return QuantizedAttention(**tables)


def wrap(
    module: nn.Module,
    weight_bits: int,
    activation_bits: int | None,
    clock: StepClock,
    *,
    split: int | None = None,
    group_size: int | None = None,
    rows: int = 1,
    weight_range: RangeMethod = "least-error",
    weight_quantizer: type[WeightQuantizer] = WeightQuantizer,
    activation_quantizer: type[ActivationQuantizer] = ActivationQuantizer,
) -> TrainableLayer:
    """A linear or convolution -> the same layer under calibration, its weight range already found."""
    assert can_quantize(module) and isinstance(module, nn.Linear | nn.Conv2d)
    channels = module.weight.shape[1]
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        split = group_size = None
    weight = weight_quantizer(module.weight, weight_bits, group_channels(channels, split, group_size), weight_range)
    activation = None
    if activation_bits is not None:
        sides = group_channels(channels, split, None) if split is not None else ()
        channel_dim = 1 if isinstance(module, nn.Conv2d) else -1
        activation = activation_quantizer(activation_bits, clock, channel_dim, sides, rows)
    return TrainableLayer(module, weight, activation)
