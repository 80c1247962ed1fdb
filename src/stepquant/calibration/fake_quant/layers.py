"""Layers under calibration: full-precision layers whose weights and inputs are quantized in simulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.dynamic import DynamicPoint
from stepquant.calibration.fake_quant.weight import WeightPoint
from stepquant.calibration.fake_quant.weight_quantizers import RoundToNearest
from stepquant.config import FLOAT_BITS, LayerBits
from stepquant.core.dynamic import DynamicGrid
from stepquant.core.qtensor import QTensor, QuantizedAttention, QuantizedLayer
from stepquant.core.ranges import Range
from stepquant.core.transforms import Smoothing
from stepquant.core.weights import group_channels
from stepquant.layers.attention import AttentionProcessor, dynamic_scale
from stepquant.layers.clock import StepClock
from stepquant.layers.conv import linear_map, weight_by_output
from stepquant.layers.format import OPERANDS
from stepquant.layers.quantized import can_quantize

Point = ActivationPoint | DynamicPoint


class CalibratedLayer(nn.Module):
    """A linear or convolution under calibration.

    Args:
        inner: the full-precision layer.
        weight: quantizes its weight.
        input: quantizes its input; None where that stays in floating point.
    """

    def __init__(self, inner: Any, weight: WeightPoint, input: Point | None) -> None:
        super().__init__()
        self.inner, self.weight_point, self.input_point = inner, weight, input

    def forward(self, input: Tensor, *_args: object, **_kwargs: object) -> Tensor:  # `input`: models call by keyword
        x = input if self.input_point is None else self.input_point(input)
        return linear_map(self.inner)(x, self.weight_point(self.weight), self.inner.bias)

    def __getattr__(self, name: str) -> Any:
        """Sizes, bias and the like of the full-precision layer, which models read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    @property
    def weight(self) -> Tensor:
        """float32 [out, in, *kernel], converted where the weight is stored in half precision."""
        return weight_by_output(self.inner).float()

    @property
    def bits(self) -> LayerBits:
        """Bits of the weight and the input."""
        return LayerBits(self.weight_point.bits, FLOAT_BITS if self.input_point is None else self.input_point.bits)

    def smooth(self, smoothing: Tensor) -> None:
        """Divide input channels by `smoothing`, float32 [in], and multiply those of the weight by it."""
        assert isinstance(self.input_point, ActivationPoint)
        self.weight_point.smooth(self.weight, smoothing)
        self.input_point.smoothing = smoothing

    def to_quantized(self) -> QuantizedLayer:
        """Integers and grids as they are stored."""
        weight = QTensor(self.weight_point.codes(self.weight).cpu().clone(), self.weight_point.stored_grid())
        bias = None if self.inner.bias is None else self.inner.bias.detach().float().cpu().clone()
        grid = None if self.input_point is None else self.input_point.stored_grid()
        factor = self.weight_point.smoothing
        transforms = () if factor is None else (Smoothing(factor.float().cpu().clone()),)
        return QuantizedLayer(weight, bias, grid, transforms)


class CalibratedAttention(AttentionProcessor):
    """Attention under calibration; `points` holds one for each operand that is quantized."""

    def __init__(self, points: dict[str, Point]) -> None:
        super().__init__()
        self.points = nn.ModuleDict(points)

    @property
    def repeatable(self) -> bool:
        """False while QDrop or a generator's dropout draws random numbers."""
        return not any(point.random for point in self.points.children())

    def operand(self, name: str, x: Tensor) -> Tensor:
        return self.points[name](x) if name in self.points else x

    def scale_of_value(self, value: Tensor) -> Tensor | None:
        points: list[Any] = [self.points[name] for name in ("probability", "value") if name in self.points]
        if not all(isinstance(each, DynamicPoint) and not each.bypassed for each in points):
            return None
        return dynamic_scale(value, points[-1].clock.row, *(each.grid for each in points)) if points else None

    def to_quantized(self) -> QuantizedAttention:
        """Grids as they are stored."""
        return QuantizedAttention(
            **{name: self.points[name].stored_grid() if name in self.points else None for name in OPERANDS}  # type: ignore[operator]
        )


def wrap(
    module: nn.Module,
    weight_bits: int,
    activation_bits: int | None,
    clock: StepClock,
    *,
    split: int | None = None,
    group_size: int | None = None,
    rows: int = 1,
    row_bits: Tensor | None = None,
    dynamic: bool = False,
    weight_range: Range = "least-error",
    rounding: type[RoundToNearest] = RoundToNearest,
) -> CalibratedLayer:
    """Put a linear or convolution under calibration and search its weight range.

    Args:
        activation_bits: of the input; None leaves it in floating point.
        split, group_size: see `group_channels`.
        rows: of the input's grid.
        row_bits: uint8 [rows], bits of the input in each row; None: `activation_bits`.
        dynamic: the input's grid follows its values; it has rows only for `row_bits`.
        weight_range, rounding: see `WeightPoint`.
    """
    assert can_quantize(module)
    weights = weight_by_output(module)
    channels = weights.shape[1]
    if getattr(module, "groups", 1) > 1:
        split = group_size = None
    groups = group_channels(channels, split, group_size)
    weight = WeightPoint(weights, weight_bits, groups, weight_range, rounding)
    if activation_bits is None:
        return CalibratedLayer(module, weight, None)
    channel_dim = -1 if isinstance(module, nn.Linear) else 1
    if dynamic:
        grid = dynamic_grid(activation_bits, group_size, row_bits)
        return CalibratedLayer(module, weight, DynamicPoint(grid, clock, channel_dim))
    sides = group_channels(channels, split, None) if split is not None else ()
    point = ActivationPoint(activation_bits, clock, channel_dim, sides, rows, row_bits=row_bits)
    return CalibratedLayer(module, weight, point)


def dynamic_grid(bits: int, group_size: int | None, row_bits: Tensor | None) -> DynamicGrid:
    """A dynamic grid of `bits`, or with bits for each row: uint8 [R]."""
    return DynamicGrid(bits if row_bits is None else int(row_bits.max()), group_size, row_bits)
