"""Grids that follow the values: scale and zero point are computed from what is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from stepquant.core.affine import affine_from_range

Bits = Annotated[int, Field(ge=2, le=8)]


class DynamicFormat(BaseModel):
    """A `DynamicGrid`, serializable as JSON.

    Attributes:
        bits: 2 to 8.
        group: channels that share a scale; None for all of a position's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["dynamic"] = "dynamic"
    bits: Bits
    group: PositiveInt | None = None

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the stored groups of input channels: none, as of a `GridFormat` with one group."""
        return ()

    @property
    def rows(self) -> int:
        """Rows of a table, as in `GridFormat`: the grid does not depend on the step."""
        return 1


@dataclass(frozen=True)
class DynamicGrid:
    """Quantization grid ``x ~ (code - zero_point) * scale`` whose range is that of the values, widened to hold 0.

    The channels of a position (a token, or a pixel of an image) share a scale, or each group of them. Nothing is
    stored: `of` computes scale and zero point from x.

    Attributes:
        bits: 2 to 8.
        group: number of consecutive channels that share a scale, the last group having the rest; None for all.
    """

    bits: int
    group: int | None = None

    @property
    def format(self) -> DynamicFormat:
        return DynamicFormat(bits=self.bits, group=self.group)

    @property
    def rows(self) -> int:
        """Rows of a table, as in `Grid`."""
        return 1

    def to(self, _device: torch.device | str) -> DynamicGrid:
        """The grid itself, since it has no tensors."""
        return self

    def check(self) -> None:
        """Nothing is stored that could be damaged."""

    @torch.no_grad()
    def of(self, x: Tensor, channel_dim: int = -1) -> tuple[Tensor, Tensor]:
        """Scale and zero point of x, float32, broadcastable against it."""
        values = x.float().movedim(channel_dim, -1)
        channels = values.shape[-1]
        group = min(self.group or channels, channels)
        groups = F.pad(values, (0, -channels % group)).unflatten(-1, (-1, group))
        scale, zero_point = affine_from_range(groups.amin(-1), groups.amax(-1), self.bits)

        def spread(each: Tensor) -> Tensor:
            whole = each.repeat_interleave(group, dim=-1)[..., :channels] if each.shape[-1] > 1 else each
            return whole.movedim(-1, channel_dim)

        return spread(scale), spread(zero_point)
