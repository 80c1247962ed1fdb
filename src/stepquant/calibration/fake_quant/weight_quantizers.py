"""Ways of rounding a weight: to the nearest code, to fixed codes, by AdaRound, straight through, and by LSQ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.generator import TableGain
from stepquant.core.affine import SMALLEST_SCALE, affine_from_range, largest_code
from stepquant.core.qtensor import Grid, expand_groups, stored_zero_point
from stepquant.core.ranges import Range, find_range
from stepquant.core.rounding import (
    inverse_rectified_sigmoid,
    learned_quantize,
    rectified_sigmoid,
    rounding_regularizer,
)

LSQ_CELL = 0.25
"""Half the width of the part of its code's cell in which a weight starts to train, in steps of the grid."""

GridSearch = Callable[[Tensor, int, Range], tuple[Tensor, Tensor]]
"""``search(values, bits, method) -> (scale, zero_point)`` of the output channels of a group, see `RoundToNearest`."""


class WeightGrid(nn.Module):
    """Scale and zero point of a weight, for each group of input channels and each output channel.

    Args:
        bits: 2 to 8.
        group_sizes: sizes of consecutive groups of input channels.
        weight: float [out, in, *kernel], whose grid is searched group by group.
        search: finds the grid of one group.
        method: passed to `search`.
        smoothing: float32 [in] or None: multiplies the input channels before the search, and divides their scales.
    """

    scale: Tensor
    zero_point: Tensor
    smoothing: Tensor | None

    def __init__(
        self,
        bits: int,
        group_sizes: tuple[int, ...],
        weight: Tensor,
        search: GridSearch,
        method: Range,
        smoothing: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.group_sizes = bits, group_sizes
        self.register_buffer("smoothing", smoothing)
        smoothed = self.smoothed(weight.detach().float())
        grids = [search(group.flatten(1), bits, method) for group in smoothed.split(group_sizes, dim=1)]
        scale, zero_point = (torch.stack(values) for values in zip(*grids, strict=True))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def top(self) -> int:
        """The largest code."""
        return largest_code(self.bits)

    def smoothed(self, weight: Tensor) -> Tensor:
        """The weight with its input channels multiplied by the smoothing."""
        return weight if self.smoothing is None else weight * self._along_inputs(self.smoothing, weight.dim())

    def restored(self, weight: Tensor) -> Tensor:
        """The inverse of `smoothed`."""
        return weight if self.smoothing is None else weight / self._along_inputs(self.smoothing, weight.dim())

    def expanded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every input channel, shaped to broadcast against the weight [out, in, *kernel]."""
        scale, zero_point = (
            self._along_inputs(expand_groups(values, self.group_sizes).t(), weight.dim())
            for values in (self.scale, self.zero_point)
        )
        return self.restored(scale), zero_point

    def stored(self) -> Grid:
        """The grid as it is stored."""
        return Grid(
            self.scale.float().cpu().clone()[None],
            stored_zero_point(self.zero_point)[None],
            self.bits,
            self.group_sizes,
        )

    @staticmethod
    def _along_inputs(values: Tensor, dims: int) -> Tensor:
        """[..., in] -> [..., in, 1, ...], to broadcast against a weight of `dims` dimensions."""
        return values.reshape(values.shape + (1,) * (dims - 2))


class WeightQuantizer(nn.Module):
    """Base class: ``forward(weight)`` simulates the weight that ``codes(weight)``, uint8, stand for on `grid`."""

    def __init__(self, grid: WeightGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def codes(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _clamped(self, codes: Tensor) -> Tensor:
        return codes.clamp(0, self.grid.top).to(torch.uint8)


class RoundToNearest(WeightQuantizer):
    """Rounds every weight to the nearest code.

    A custom quantizer is a class with this constructor and these three methods.

    Attributes:
        per_tensor: whether all output channels share a scale, also while it is trained (LSQ).
    """

    per_tensor: ClassVar[bool] = False

    @staticmethod
    def search(values: Tensor, bits: int, method: Range) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each output channel, float32 [out] each.

        Args:
            values: float32 [out, n], the weights of one group of input channels.
            bits: of the grid, symmetric at 8 bits and affine below.
            method: of the range search, see `find_range`.
        """
        low, high = find_range(values, bits, method, symmetric=bits == 8)
        return affine_from_range(low, high, bits, symmetric=bits == 8)

    def forward(self, weight: Tensor) -> Tensor:
        return learned_quantize(weight, *self.grid.expanded(weight), self.grid.bits)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.grid.expanded(weight)
        return self._clamped(torch.round(weight * scale.reciprocal()) + zero_point)


class LeastError(RoundToNearest):
    """Rounds to nearest in the range of least error at 8 bits, too, as the public code of the papers does.

    At 8 bits the grid stays symmetric: integer kernels take no zero point of an 8-bit weight.
    """

    @staticmethod
    def search(values: Tensor, bits: int, method: Range) -> tuple[Tensor, Tensor]:
        return RoundToNearest.search(values, bits, "least-error" if method == "minmax" else method)


class PerChannelLSQ(RoundToNearest):
    """Rounds to nearest on the symmetric grid that LSQ starts at: ``s = 2 mean |w| / sqrt(2^(b-1) - 1)``."""

    @staticmethod
    def search(values: Tensor, bits: int, method: Range) -> tuple[Tensor, Tensor]:
        half = 1 << (bits - 1)
        scale = 2 * values.abs().mean(dim=1) / math.sqrt(half - 1)
        return scale.clamp(min=SMALLEST_SCALE), torch.full_like(scale, half)


class PerTensorLSQ(PerChannelLSQ):
    """One such grid for all output channels."""

    per_tensor = True

    @staticmethod
    def search(values: Tensor, bits: int, method: Range) -> tuple[Tensor, Tensor]:
        scale, zero_point = PerChannelLSQ.search(values.reshape(1, -1), bits, method)
        return scale.repeat(len(values)), zero_point.repeat(len(values))


class FixedCodes(WeightQuantizer):
    """Holds codes decided before, by GPTQ or by learning: uint8 [out, in, *kernel]."""

    fixed: Tensor

    def __init__(self, grid: WeightGrid, codes: Tensor) -> None:
        super().__init__(grid)
        self.register_buffer("fixed", codes)

    def forward(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.grid.expanded(weight)
        return (self.fixed.to(scale.dtype) - zero_point) * scale

    def codes(self, weight: Tensor) -> Tensor:
        return self.fixed


class AdaRound(WeightQuantizer):
    """Learns for each weight whether it is rounded up or down (AdaRound, arXiv 2004.10568).

    Attributes:
        variable: the paper's V, initialized so that the soft code is the unrounded one.
    """

    def __init__(self, grid: WeightGrid, weight: Tensor) -> None:
        super().__init__(grid)
        steps = weight.detach() / grid.expanded(weight)[0]
        self.variable = nn.Parameter(inverse_rectified_sigmoid(steps - steps.floor()))

    def forward(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.grid.expanded(weight)
        floor = torch.floor(weight.detach() / scale) + zero_point
        return ((floor + rectified_sigmoid(self.variable)).clamp(0, self.grid.top) - zero_point) * scale

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.grid.expanded(weight)
        return self._clamped(torch.floor(weight / scale) + (self.variable >= 0) + zero_point)

    def regularizer(self, beta: float) -> Tensor:
        """The paper's regularizer, which draws every variable to a decision."""
        return rounding_regularizer(self.variable, beta)


class StraightThrough(WeightQuantizer):
    """Moves a weight on a fixed grid, with gradients straight through the rounding.

    Attributes:
        start: float [out, in, *kernel], within `cell` of the given codes, in steps of the grid.
        shift: what is learned, from zero on.
    """

    start: Tensor

    def __init__(self, grid: WeightGrid, weight: Tensor, codes: Tensor, cell: float) -> None:
        super().__init__(grid)
        codes = codes.to(weight.dtype)
        scale, zero_point = grid.expanded(weight)
        self.register_buffer("start", torch.clamp(weight.detach() / scale + zero_point, codes - cell, codes + cell))
        self.shift = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.grid.expanded(weight)
        steps = self.start + self.shift
        codes = steps + (steps.round().clamp(0, self.grid.top) - steps).detach()
        return (codes - zero_point) * scale

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        return self._clamped((self.start + self.shift).round())


class TrainedWeight(WeightQuantizer):
    """Trains the weight itself on a fixed grid, with gradients straight through the rounding (QuEST, arXiv 2402.03666).

    Attributes:
        weight: what is trained, in the weight's own units.
        up: uint8 [out, in, *kernel], what is added to the floor of each weight, if its direction is held; else None,
            and weights are rounded to nearest.
    """

    up: Tensor | None

    def __init__(self, grid: WeightGrid, weight: Tensor, codes: Tensor, *, held: bool) -> None:
        super().__init__(grid)
        scale, zero_point = grid.expanded(weight)
        up = (codes.to(weight.dtype) - zero_point - torch.floor(weight.detach() / scale)).clamp(0, 1)
        self.register_buffer("up", up.to(torch.uint8) if held else None)
        self.weight = nn.Parameter(weight.detach().clone())

    def _rounded(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        steps = self.weight.detach() / scale
        rounded = torch.round(steps) if self.up is None else torch.floor(steps) + self.up
        return (rounded + zero_point).clamp(0, self.grid.top)

    def forward(self, weight: Tensor) -> Tensor:
        scale, zero_point = self.grid.expanded(self.weight)
        codes, inside = self._rounded(scale, zero_point), self.weight / scale + zero_point
        inside = inside.clamp(-0.5, self.grid.top + 0.5)
        return (codes + inside - inside.detach() - zero_point) * scale

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        return self._rounded(*self.grid.expanded(self.weight)).to(torch.uint8)


class LSQ(WeightQuantizer):
    """Trains the scale, as a gain, together with the weight (LSQ, arXiv 1902.08153).

    Args:
        per_tensor: one gain for all output channels.
    """

    def __init__(self, grid: WeightGrid, *, per_tensor: bool = False) -> None:
        super().__init__(grid)
        groups, outputs = grid.scale.shape
        self.gain = TableGain(groups, 1 if per_tensor else outputs).to(grid.scale.device)

    @staticmethod
    def start(grid: WeightGrid, weight: Tensor, codes: Tensor) -> Tensor:
        """The weight that training starts from: inside the range, and within `LSQ_CELL` of its code.

        The first small steps then do not undo what GPTQ decided, and gradients reach every weight.
        """
        codes = codes.to(weight.dtype)
        scale, zero_point = grid.expanded(weight)
        steps = torch.clamp(weight / scale + zero_point, codes - LSQ_CELL, codes + LSQ_CELL).clamp(0, grid.top)
        return (steps - zero_point) * scale

    def forward(self, weight: Tensor) -> Tensor:
        # Group by group, so that LSQ's gradient scale counts the values of one channel and group.
        scale, zero_point = (
            values.reshape(*values.shape, *(1,) * (weight.dim() - 1))
            for values in (self.current_scale(), self.grid.zero_point)
        )
        parts = [
            learned_quantize(part, scale[index], zero_point[index], self.grid.bits)
            for index, part in enumerate(self.grid.smoothed(weight).split(self.grid.group_sizes, dim=1))
        ]
        return self.grid.restored(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        return RoundToNearest(self.frozen_grid()).codes(weight)

    def current_scale(self) -> Tensor:
        """float32 [G, out]."""
        return self.grid.scale * self.gain(torch.arange(len(self.grid.scale), device=self.grid.scale.device))

    @torch.no_grad()
    def frozen_grid(self) -> WeightGrid:
        """A copy of the grid at the scale reached."""
        grid = copy.deepcopy(self.grid)
        grid.scale = self.current_scale()
        return grid
