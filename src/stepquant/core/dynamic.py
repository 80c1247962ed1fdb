"""Grids that follow the values: scale and zero point are computed from what is quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, model_serializer
from pydantic.functional_serializers import SerializerFunctionWrapHandler
from torch import Tensor

from stepquant.core.affine import affine_from_range
from stepquant.core.row_bits import Bits, Rows, bits_at, check_row_bits, tops


class DynamicFormat(BaseModel):
    """A `DynamicGrid`, serializable as JSON.

    Attributes:
        bits: 2 to 8.
        group: channels that share a scale; None for all of a position's.
        rows: rows of the table of bits; 1 if there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["dynamic"] = "dynamic"
    bits: Bits
    group: PositiveInt | None = None
    rows: Rows = 1

    @property
    def by_row(self) -> bool:
        """Whether rows differ in bits, of which `bits` is the most."""
        return self.rows > 1

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Releases before bits by row read the formats that do not need them."""
        return {name: value for name, value in serialize(self).items() if (name, value) != ("rows", 1)}

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the stored groups of input channels: none, as of a `GridFormat` with one group."""
        return ()


@dataclass(frozen=True)
class DynamicGrid:
    """Quantization grid ``x ~ (code - zero_point) * scale`` whose range is that of the values, widened to hold 0.

    The channels of a position (a token, or a pixel of an image) share a scale, or each group of them. Nothing is
    stored: `of` computes scale and zero point from x.

    Attributes:
        bits: 2 to 8.
        group: number of consecutive channels that share a scale, the last group having the rest; None for all.
        row_bits: uint8 [R], as in `Grid`.
    """

    bits: int
    group: int | None = None
    row_bits: Tensor | None = None

    @property
    def format(self) -> DynamicFormat:
        return DynamicFormat(bits=self.bits, group=self.group, rows=self.rows)

    @property
    def rows(self) -> int:
        """Rows of the table of bits, as in `Grid`."""
        return 1 if self.row_bits is None else len(self.row_bits)

    def to(self, device: torch.device | str) -> DynamicGrid:
        """Copy the grid to `device`."""
        return self if self.row_bits is None else replace(self, row_bits=self.row_bits.to(device))

    def bits_at(self, row: Tensor) -> int | Tensor:
        """Bits at the clock's row, see `core.row_bits.bits_at`."""
        return bits_at(self.bits, self.row_bits, row)

    @property
    def tops(self) -> Tensor:
        """The largest code of each row: int32 [R]."""
        return tops(self.bits, self.row_bits, self.rows)

    def check(self, what: str = "activation") -> None:
        """Raise `InvalidGrid` for bits by row that are not 2 to 8."""
        check_row_bits(what, self.bits, self.row_bits, self.rows)

    @torch.no_grad()
    def of(self, x: Tensor, channel_dim: int = -1, bits: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of x, float32, broadcastable against it.

        Args:
            bits: at the clock's row, broadcastable against x; by default those of all rows.
        """
        bits = self.bits if bits is None else bits
        values = x.float().movedim(channel_dim, -1)
        channels = values.shape[-1]
        group = min(self.group or channels, channels)
        groups = F.pad(values, (0, -channels % group)).unflatten(-1, (-1, group))
        scale, zero_point = affine_from_range(groups.amin(-1), groups.amax(-1), bits)

        def spread(each: Tensor) -> Tensor:
            whole = each.repeat_interleave(group, dim=-1)[..., :channels] if each.shape[-1] > 1 else each
            return whole.movedim(-1, channel_dim)

        return spread(scale), spread(zero_point)
