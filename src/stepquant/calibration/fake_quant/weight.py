"""The quantizer of a weight under calibration: rounds to nearest or by AdaRound, finetunes, or trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.generator import TableGain
from stepquant.core.affine import affine_from_range, largest_code
from stepquant.core.qtensor import expand_groups
from stepquant.core.ranges import RangeMethod, find_range
from stepquant.core.rounding import (
    inverse_rectified_sigmoid,
    learned_quantize,
    rectified_sigmoid,
    rounding_regularizer,
)

CELL = 0.49
"""Half the width of the cell of a code that a weight under finetuning starts in, in steps; 0.5 would be its edge."""


class WeightQuantizer(nn.Module):
    """Quantizes a weight per output channel (and input group), to the nearest code, by AdaRound, or as it learns.

    Args:
        weight: float [out, in, *kernel], the full-precision weight.
        bits: 2 to 8; the grid is symmetric at 8 bits and affine below (see `QTensor`).
        group_sizes: sizes of consecutive groups of input channels; they sum to `in`.
        method: how the range is found. At 8 bits it is min-max whatever is asked for: the least error there clips the
            largest weights, which shrinks a layer's gain at every step alike and costs more than it saves
            (``docs/quality.md``).

    `smoothing`, float32 [in] or None for ones, divides the scale of each input channel (`core.transforms.Smoothing`).
    """

    scale: Tensor
    zero_point: Tensor
    smoothing: Tensor | None
    decided: Tensor | None
    start: Tensor | None

    def __init__(self, weight: Tensor, bits: int, group_sizes: tuple[int, ...], method: RangeMethod) -> None:
        super().__init__()
        self.bits, self.group_sizes, self.method = bits, group_sizes, method
        self.rounding: nn.Parameter | None = None
        shape = (len(group_sizes), weight.shape[0])
        self.register_buffer("scale", torch.ones(shape, device=weight.device))
        self.register_buffer("zero_point", torch.zeros(shape, device=weight.device))
        self.register_buffer("decided", None)
        self.register_buffer("start", None)
        self.set_range(weight, None)
        self.shift: nn.Parameter | None = None
        self.gain: TableGain | None = None

    def set_range(self, weight: Tensor, smoothing: Tensor | None) -> None:
        """Search the range of the weight, its input channels multiplied by `smoothing`."""
        self.register_buffer("smoothing", smoothing)
        method = "minmax" if self.bits == 8 else self.method
        smoothed = weight.detach().float()
        if smoothing is not None:
            smoothed = smoothed * smoothing.reshape(-1, *(1,) * (weight.dim() - 2))
        for index, group in enumerate(smoothed.split(self.group_sizes, dim=1)):
            low, high = find_range(group.flatten(1), self.bits, method, symmetric=self.bits == 8)
            grid = affine_from_range(low, high, self.bits, symmetric=self.bits == 8)
            self.scale[index], self.zero_point[index] = grid

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every input channel, shaped to broadcast against the weight [out, in, *kernel]."""
        grids = []
        for values in (self.scale, self.zero_point):
            expanded = expand_groups(values, self.group_sizes).t()
            grids.append(expanded.reshape(expanded.shape + (1,) * (weight.dim() - 2)))
        scale, zero_point = grids
        if self.smoothing is not None:
            scale = scale / self.smoothing.reshape(-1, *(1,) * (weight.dim() - 2))
        return scale, zero_point

    def forward(self, weight: Tensor) -> Tensor:
        if self.gain is not None:
            return self._learned(weight, self.gain)
        scale, zero_point = self.grid(weight)
        top = largest_code(self.bits)
        if self.shift is not None:
            steps = self._moved()
            codes = steps + (steps.round().clamp(0, top) - steps).detach()  # straight through
            return (codes - zero_point) * scale
        if self.rounding is not None:
            floor = torch.floor(weight.detach() / scale) + zero_point
            return ((floor + rectified_sigmoid(self.rounding)).clamp(0, top) - zero_point) * scale
        if self.decided is not None:
            return (self.decided.to(scale.dtype) - zero_point) * scale
        return learned_quantize(weight, scale, zero_point, self.bits)

    def learn(self, weight: Tensor) -> nn.Parameter:
        """Start AdaRound: one variable a weight, initialised so that the soft code is the unrounded one."""
        steps = weight.detach() / self.grid(weight)[0]
        self.rounding = nn.Parameter(inverse_rectified_sigmoid(steps - steps.floor()))
        return self.rounding

    def finetune(self, weight: Tensor, cell: float = CELL) -> nn.Parameter:
        """Let the weight itself move, through the rounding: returns its shift, in steps of the grid.

        It starts at the codes decided so far: each weight lies where it really is within the cell of its code, or at
        the cell's edge if AdaRound rounded it away from the nearest code (QuEST, arXiv 2402.03666: the rounding
        direction is held). The scale stays.
        """
        codes = self.codes(weight).to(weight.dtype)
        scale, zero_point = self.grid(weight)
        self.start = torch.clamp(weight.detach() / scale + zero_point, codes - cell, codes + cell)
        self.shift = nn.Parameter(torch.zeros_like(weight))
        return self.shift

    @torch.no_grad()
    def release(self, weight: Tensor) -> list[nn.Parameter]:
        """Let weight and scale learn together (LSQ, arXiv 1902.08153): returns the parameters of a gain on the scale.

        `weight` is changed in place: it starts at the codes decided so far, each value where it really is in the middle
        half of its code's cell, or at the end of that half, so that the first small steps do not undo what compensation
        decided; one outside the range starts at its end, where gradients reach it.
        """
        codes = self.codes(weight).to(weight.dtype)
        scale, zero_point = self.grid(weight)
        steps = torch.clamp(weight / scale + zero_point, codes - 0.25, codes + 0.25).clamp(0, largest_code(self.bits))
        weight.copy_((steps - zero_point) * scale)
        self.decided = None
        self.gain = TableGain(*self.scale.shape).to(weight.device)
        return list(self.gain.parameters())

    def regularizer(self, beta: float) -> Tensor:
        """AdaRound's regulariser of the variables that `learn` returned."""
        assert self.rounding is not None
        return rounding_regularizer(self.rounding, beta)

    def settle(self, weight: Tensor) -> None:
        """Stop learning: every weight takes the code its variable leans to (up where v >= 0), or its shift led to.

        A weight that learned together with its scale keeps the scale reached.
        """
        if self.gain is not None:
            self.scale, self.gain = self._current_scale(self.gain).detach(), None
        if self.rounding is not None or self.shift is not None:
            self.decided = self.codes(weight)
            self.rounding = self.shift = self.start = None

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """uint8 codes, hard-rounded."""
        if self.shift is not None:
            return self._moved().round().clamp(0, largest_code(self.bits)).to(torch.uint8)
        if self.rounding is None and self.decided is not None:
            return self.decided
        scale, zero_point = self.grid(weight)
        if self.rounding is not None:
            steps = torch.floor(weight / scale) + (self.rounding >= 0)
        else:
            steps = torch.round(weight * scale.reciprocal())
        return (steps + zero_point).clamp(0, largest_code(self.bits)).to(torch.uint8)

    def _moved(self) -> Tensor:
        """The weight under finetuning, in steps of its grid and not rounded."""
        assert self.start is not None and self.shift is not None
        return self.start + self.shift

    def _current_scale(self, gain: TableGain) -> Tensor:
        return self.scale * gain(torch.arange(self.scale.shape[0], device=self.scale.device))

    def _learned(self, weight: Tensor, gain: TableGain) -> Tensor:
        """Group by group, so that LSQ's gradient scale counts the values of one channel and group."""
        scale, zero_point = (
            values.reshape(*values.shape, *(1,) * (weight.dim() - 1))
            for values in (self._current_scale(gain), self.zero_point)
        )
        along = None if self.smoothing is None else self.smoothing.reshape(-1, *(1,) * (weight.dim() - 2))
        smoothed = weight if along is None else weight * along
        parts = [
            learned_quantize(part, scale[index], zero_point[index], self.bits)
            for index, part in enumerate(smoothed.split(self.group_sizes, dim=1))
        ]
        quantized = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return quantized if along is None else quantized / along
