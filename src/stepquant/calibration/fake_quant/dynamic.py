"""The place where an activation is quantized to the range of its own values."""

from __future__ import annotations

from torch import Tensor, nn

from stepquant.core.dynamic import DynamicGrid
from stepquant.core.rounding import learned_quantize
from stepquant.layers.attention import bits_of
from stepquant.layers.clock import StepClock


class DynamicPoint(nn.Module):
    """One activation of the network with a dynamic grid. There is nothing to calibrate.

    Gradients pass straight through to x.

    Attributes:
        bypassed: whether x passes through in full precision for now.
    """

    random = False
    """Whether random numbers are drawn, as in `ActivationPoint`."""

    def __init__(self, grid: DynamicGrid, clock: StepClock, channel_dim: int = -1) -> None:
        super().__init__()
        self.grid, self.clock, self.channel_dim = grid, clock, channel_dim
        self.bypassed = False

    @property
    def bits(self) -> int:
        return self.grid.bits

    def forward(self, x: Tensor) -> Tensor:
        if self.bypassed:
            return x
        bits = bits_of(self.grid, self.clock.row, x)
        scale, zero_point = self.grid.of(x, self.channel_dim, bits)
        return learned_quantize(x, scale, zero_point, bits)

    def stored_grid(self) -> DynamicGrid:
        """The grid as it is stored."""
        return self.grid
