"""The place where a weight is quantized, and what holds there at present."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.weight_quantizers import (
    LSQ,
    AdaRound,
    FixedCodes,
    RoundToNearest,
    StraightThrough,
    TrainedWeight,
    WeightGrid,
    WeightQuantizer,
)
from stepquant.core.qtensor import Grid
from stepquant.core.ranges import Range

CELL = 0.49
"""Half the width of the part of a code's cell where a weight starts to move, in steps of the grid; 0.5 is its edge."""


class WeightPoint(nn.Module):
    """One weight of the network, with the quantizer that it has at this stage of calibration.

    Args:
        weight: float [out, in, *kernel], in full precision.
        bits: 2 to 8; the grid is symmetric at 8 bits and affine below (see `QTensor`).
        group_sizes: sizes of consecutive groups of input channels; they sum to `in`.
        method: of the range search, or a function, see `find_range`. At 8 bits the range is always min-max: the least
            error there clips the largest weights, which shrinks a layer's gain at every step alike and costs more than
            it saves (``docs/results/defaults.md``).
        rounding: the quantizer to start with: `RoundToNearest`, or a class with its interface.

    Attributes:
        bypassed: whether the weight stays in full precision for now.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group_sizes: tuple[int, ...],
        method: Range = "least-error",
        rounding: type[RoundToNearest] = RoundToNearest,
    ) -> None:
        super().__init__()
        self.rounding, self.method = rounding, "minmax" if bits == 8 else method
        self.bypassed = False
        self.quantizer: WeightQuantizer = rounding(WeightGrid(bits, group_sizes, weight, rounding.search, self.method))

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.bypassed else self.quantizer(weight)

    @property
    def bits(self) -> int:
        return self.quantizer.grid.bits

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return self.quantizer.grid.group_sizes

    @property
    def scale(self) -> Tensor:
        """float32 [G, out]; while it is being learned, the scale that learning started from."""
        return self.quantizer.grid.scale

    @property
    def zero_point(self) -> Tensor:
        """float32 [G, out]."""
        return self.quantizer.grid.zero_point

    @property
    def smoothing(self) -> Tensor | None:
        """float32 [in] or None; divides the scale of each input channel (`core.transforms.Smoothing`)."""
        return self.quantizer.grid.smoothing

    def smooth(self, weight: Tensor, smoothing: Tensor) -> None:
        """Search the range again for the weight with its input channels multiplied by `smoothing`, float32 [in]."""
        grid = WeightGrid(self.bits, self.group_sizes, weight, self.rounding.search, self.method, smoothing)
        self.quantizer = self.rounding(grid)

    def regularizer(self, beta: float) -> Tensor:
        """AdaRound's regularizer of the variables that `adaround` returned."""
        assert isinstance(self.quantizer, AdaRound)
        return self.quantizer.regularizer(beta)

    def stored_grid(self) -> Grid:
        """The grid as it is stored."""
        return self.quantizer.grid.stored()

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over a grid, float32 [G, out] twice, that was searched in another process."""
        self.quantizer.grid.scale, self.quantizer.grid.zero_point = scale, zero_point

    def set_codes(self, codes: Tensor) -> None:
        """Fix the codes, uint8 [out, in, *kernel]."""
        self.quantizer = FixedCodes(self.quantizer.grid, codes)

    def codes(self, weight: Tensor) -> Tensor:
        """uint8 [out, in, *kernel]."""
        return self.quantizer.codes(weight)

    def adaround(self, weight: Tensor) -> nn.Parameter:
        """Learn whether each weight is rounded up or down, from the unrounded weight on; returns the variables."""
        self.quantizer = learned = AdaRound(self.quantizer.grid, weight)
        return learned.variable

    def finetune(self, weight: Tensor, cell: float = CELL) -> nn.Parameter:
        """Move the weight through the rounding, from the present codes on, on a fixed grid.

        Args:
            weight: each value starts where it is within its code's cell, at most `cell` from the middle: where
                AdaRound or GPTQ rounded away from the nearest code, it starts at that distance on the side of the
                weight (QuEST, arXiv 2402.03666: the rounding direction is held).
            cell: in steps of the grid.

        Returns:
            The shift of the weight, in steps of the grid.
        """
        self.quantizer = learned = StraightThrough(self.quantizer.grid, weight, self.codes(weight), cell)
        return learned.shift

    def train_weight(self, weight: Tensor, *, held: bool) -> nn.Parameter:
        """Train the weight itself through the rounding, from its full-precision value on, on a fixed grid.

        Args:
            held: round each weight in the direction of its present code; else to nearest.

        Returns:
            The weight that is trained.
        """
        self.quantizer = learned = TrainedWeight(self.quantizer.grid, weight, self.codes(weight), held=held)
        return learned.weight

    @torch.no_grad()
    def lsq(self, weight: Tensor, *, from_codes: bool = True) -> list[nn.Parameter]:
        """Train weight and scale together (LSQ); returns the parameters of the scale.

        Args:
            weight: with `from_codes` changed in place to start from the present codes, see `LSQ.start`.
        """
        if from_codes:
            weight.copy_(LSQ.start(self.quantizer.grid, weight, self.codes(weight)))
        self.quantizer = learned = LSQ(self.quantizer.grid, per_tensor=self.rounding.per_tensor)
        return list(learned.gain.parameters())

    def freeze(self, weight: Tensor) -> None:
        """Stop learning: keep the codes, or after LSQ the scale, that were reached."""
        if isinstance(self.quantizer, LSQ):
            self.quantizer = self.rounding(self.quantizer.frozen_grid())
        elif list(self.quantizer.parameters()):
            self.set_codes(self.codes(weight))
