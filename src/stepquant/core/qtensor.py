"""The quantized tensor: integer codes and their quantization grid.

    x ~ (code - zero_point) * scale

Calibration creates these objects, checkpoints store them, and kernels, exporters and reports read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_serializer
from pydantic.functional_serializers import SerializerFunctionWrapHandler
from torch import Tensor

from stepquant.core.affine import largest_code
from stepquant.core.dynamic import DynamicGrid
from stepquant.core.row_bits import Bits, InvalidGrid, Rows, bits_at, check_row_bits, tops
from stepquant.core.transforms import LayerTransform, Smoothing


class GridFormat(BaseModel):
    """Shape of a `Grid`, serializable as JSON.

    Attributes:
        bits: 2 to 8.
        groups: sizes of the groups of input channels; () for one group of any size.
        rows: rows of the table, 1 for a static grid.
        by_row: whether rows differ in bits, of which `bits` is the most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bits: Bits
    groups: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    rows: Rows = 1
    by_row: bool = False

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Releases before `by_row` read the formats that do not need it."""
        return {name: value for name, value in serialize(self).items() if (name, value) != ("by_row", False)}

    def shape(self, outputs: int = 1) -> tuple[int, int, int]:
        """[R, G, C] of scale and zero point."""
        return self.rows, max(1, len(self.groups)), outputs


@dataclass(frozen=True)
class Grid:
    """Quantization grid: ``x ~ (code - zero_point[r, g, c]) * scale[r, g, c]``, with unsigned codes.

    Attributes:
        scale: float32 [R, G, C], finite and positive. R: rows of the table, 1 for a static grid, else one for each
            timestep of the clock. G: groups of consecutive input channels. C: output channels; 1 for an activation.
        zero_point: uint8 [R, G, C], below 2^bits.
        bits: 2 to 8; if rows differ, the most of any.
        group_sizes: G sizes that sum to the input channels; () for one group of any size.
        row_bits: uint8 [R], bits of each row; None if all rows have `bits`.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    group_sizes: tuple[int, ...] = ()
    row_bits: Tensor | None = None

    @property
    def format(self) -> GridFormat:
        groups = self.group_sizes if len(self.group_sizes) > 1 else ()
        return GridFormat(bits=self.bits, groups=groups, rows=self.rows, by_row=self.row_bits is not None)

    @property
    def rows(self) -> int:
        """Number of rows, R."""
        return self.scale.shape[0]

    def to(self, device: torch.device | str) -> Grid:
        """Copy the grid to `device`."""
        row_bits = None if self.row_bits is None else self.row_bits.to(device)
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device), row_bits=row_bits)

    def sizes(self, channels: int) -> tuple[int, ...]:
        """Sizes of the groups of `channels` input channels."""
        return self.group_sizes or (channels,)

    def at(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point at the clock's row: [G, C] each, or [B, G, C] for a row of shape [B]."""
        if self.rows == 1:
            return self.scale[0], self.zero_point[0]
        # `[row]` would synchronize with an accelerator and break the graph of torch.compile.
        chosen = row.reshape(-1).to(self.scale.device)
        scale, zero_point = (values.index_select(0, chosen) for values in (self.scale, self.zero_point))
        return (scale, zero_point) if row.dim() else (scale[0], zero_point[0])

    def bits_at(self, row: Tensor) -> int | Tensor:
        """Bits at the clock's row, see `core.row_bits.bits_at`."""
        return bits_at(self.bits, self.row_bits, row)

    @property
    def tops(self) -> Tensor:
        """The largest code of each row: int32 [R]."""
        return tops(self.bits, self.row_bits, self.rows)

    def check(self, what: str = "activation", outputs: int = 1) -> None:
        """Raise `InvalidGrid` unless the invariants above hold for C = `outputs`; `what` names the quantized tensor."""
        scale, zero_point = self.scale, self.zero_point
        expected = (self.rows if scale.dim() else 0, max(1, len(self.group_sizes)), outputs)
        if scale.dtype != torch.float32 or tuple(scale.shape) != expected or expected[0] == 0:
            raise InvalidGrid(f"{what} scales are {scale.dtype} {list(scale.shape)}; expected float32 {list(expected)}")
        if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
            raise InvalidGrid(f"a scale of the {what} is not a positive number")
        check_codes(f"{what} zero points", zero_point, self.bits)
        if zero_point.shape != scale.shape:
            raise InvalidGrid(f"{what} scales and zero points differ in shape")
        check_row_bits(what, self.bits, self.row_bits, self.rows)
        if self.row_bits is not None and bool((zero_point > self.tops[:, None, None]).any()):
            raise InvalidGrid(f"{what} zero points exceed the bits of their rows")


@dataclass(frozen=True)
class QTensor:
    """Quantized weight of a linear or convolution: ``w[o, i] ~ (codes[o, i] - zero_point[0, g, o]) * scale[0, g, o]``.

    Attributes:
        codes: uint8 [out, in, *kernel], each below 2^bits.
        grid: one row, C = out. At 8 bits every zero point is 128, so that ``codes - zero_point`` always fits int8 and
            integer kernels need no zero point for weights.
    """

    codes: Tensor
    grid: Grid

    @classmethod
    def of_integers(cls, integers: Tensor, grid: Grid) -> QTensor:
        """Inverse of `integers`."""
        _, zero_point = _spread(grid, integers.shape)
        return cls((integers + zero_point).to(torch.uint8), grid)

    @property
    def bits(self) -> int:
        return self.grid.bits

    def check(self) -> None:
        """Raise `InvalidGrid` unless the invariants above hold."""
        out, channels = self.codes.shape[:2]
        self.grid.check("weight", out)
        check_codes("weight codes", self.codes, self.bits)
        if self.grid.rows != 1 or sum(self.grid.sizes(channels)) != channels:
            raise InvalidGrid(f"weight groups {list(self.grid.group_sizes)} do not sum to {channels} input channels")
        if self.bits == 8 and bool((self.grid.zero_point != 128).any()):
            raise InvalidGrid("an 8-bit weight has a zero point other than 128")

    def integers(self) -> Tensor:
        """``codes - zero_point`` as int8 [out, in, *kernel]."""
        _, zero_point = _spread(self.grid, self.codes.shape)
        return (self.codes.short() - zero_point).to(torch.int8)

    def dequantize(self) -> Tensor:
        """float32 [out, in, *kernel]."""
        scale, _ = _spread(self.grid, self.codes.shape)
        return self.integers() * scale

    def slice(self, start: int, stop: int) -> QTensor:
        """Input channels [start, stop), with their groups."""
        groups, sizes, first = [], [], 0
        for group, size in enumerate(self.grid.sizes(self.codes.shape[1])):
            inside = min(stop, first + size) - max(start, first)
            if inside > 0:
                groups.append(group)
                sizes.append(inside)
            first += size
        grid = Grid(self.grid.scale[:, groups], self.grid.zero_point[:, groups], self.bits, tuple(sizes))
        return QTensor(self.codes[:, start:stop].contiguous(), grid)


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear or convolution in integers.

    Attributes:
        weight: weight of the transformed layer, C = out.
        bias: float32 [out], or None.
        input: grid of the transformed input, fixed or dynamic; None where the activation stays in floating point.
        transforms: transforms of the input, in the order in which they are applied.
    """

    weight: QTensor
    bias: Tensor | None
    input: Grid | DynamicGrid | None
    transforms: tuple[LayerTransform, ...] = ()

    def check(self) -> None:
        """Raise `InvalidGrid` unless the invariants of all parts hold."""
        self.weight.check()
        if self.bias is not None and not bool(torch.isfinite(self.bias).all()):
            raise InvalidGrid("a bias is not finite")
        if self.input is not None:
            self.input.check()
        for transform in self.transforms:
            problem = transform.problem(self.weight.codes.shape[1])
            if problem is not None:
                raise InvalidGrid(problem)

    def original_weight(self) -> Tensor:
        """The dequantized weight of the layer without its transforms, float32 [out, in, *kernel]."""
        weight = self.weight.dequantize()
        for transform in reversed(self.transforms):
            weight = transform.restore_weight(weight)
        return weight

    @property
    def smoothing(self) -> Tensor | None:
        """float32 [in], the factor of the layer's `Smoothing`, if it has one."""
        return next((each.factor for each in self.transforms if isinstance(each, Smoothing)), None)

    def segments(self) -> list[tuple[slice, int, QTensor]]:
        """Split the input channels into runs with one weight scale per output channel and one input scale.

        Returns:
            Per run: the channels, the group of the input's grid, and the part of the weight, which has one group.
        """
        channels = self.weight.codes.shape[1]
        weight_ends = list(accumulate(self.weight.grid.sizes(channels)))
        input_ends = list(accumulate(self.input.group_sizes if isinstance(self.input, Grid) else ())) or [channels]
        found, start = [], 0
        for stop in sorted({*weight_ends, *input_ends}):
            group = next(index for index, end in enumerate(input_ends) if stop <= end)
            found.append((slice(start, stop), group, self.weight.slice(start, stop)))
            start = stop
        return found


@dataclass(frozen=True)
class QuantizedAttention:
    """Grids of an attention's operands; None for an operand that stays in floating point."""

    query: Grid | DynamicGrid | None
    key: Grid | DynamicGrid | None
    value: Grid | DynamicGrid | None
    probability: Grid | DynamicGrid | None

    def check(self) -> None:
        """Raise `InvalidGrid` unless the invariants of all grids hold."""
        for grid in (self.query, self.key, self.value, self.probability):
            if grid is not None:
                grid.check()


def expand_groups(values: Tensor, group_sizes: tuple[int, ...]) -> Tensor:
    """Repeat the value of each group, [G, ...], for its input channels: [in, ...]."""
    if len(group_sizes) == 1:
        return values.expand(group_sizes[0], *values.shape[1:])
    return values.repeat_interleave(torch.tensor(group_sizes).to(values.device), dim=0)


def stored_zero_point(values: Tensor) -> Tensor:
    """Zero point as uint8; raises `InvalidGrid` unless all values are integers from 0 to 255."""
    stored = values.to(torch.uint8)
    if bool((stored.to(values.dtype) != values).any()):
        raise InvalidGrid("a zero point is not an integer from 0 to 255")
    return stored.cpu().clone()


def check_codes(what: str, codes: Tensor, bits: int) -> None:
    """Raise `InvalidGrid` unless `codes` are uint8 and below 2^bits."""
    if not 2 <= bits <= 8:
        raise InvalidGrid(f"{what} have {bits} bits; expected 2 to 8")
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) > largest_code(bits)):
        raise InvalidGrid(f"{what} exceed {bits} bits")


def _spread(grid: Grid, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Scale, and zero point as int16, per input channel of a weight of this shape: [out, in, 1, ...]."""
    sizes = grid.sizes(shape[1])
    scale, zero_point = (
        expand_groups(values[0], sizes).t().reshape(-1, shape[1], *(1,) * (len(shape) - 2))
        for values in (grid.scale, grid.zero_point.short())
    )
    return scale, zero_point
