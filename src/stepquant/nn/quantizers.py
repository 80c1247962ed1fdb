"""Quantizers that observe, search their range, learn, and settle: what a layer under calibration is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepquant.nn.attention import per_sample
from stepquant.nn.clock import StepClock
from stepquant.nn.intervals import TURNS, IntervalGenerator, TableGain
from stepquant.nn.observations import Observations
from stepquant.nn.tables import ActivationTable, expand_groups
from stepquant.numerics.affine import affine_from_range, largest_code
from stepquant.numerics.noise import SampleNoise
from stepquant.numerics.ranges import RangeMethod, find_range, least_error_gain
from stepquant.numerics.rounding import (
    inverse_rectified_sigmoid,
    learned_quantize,
    rectified_sigmoid,
    rounding_regularizer,
)

NEIGHBOURS = 2
"""Calibrated steps on either side that have a say in where TDQ's interval of a step starts."""

CELL = 0.49
"""Half the width of the cell of a code that a weight under finetuning starts in, in steps; 0.5 would be its edge."""


class ActivationQuantizer(nn.Module):
    """Quantizes one activation with a table of scales, static or one row a step.

    Starts out passing values through; with `observing` it records them; `set_range` gives it a grid and switches it on.

    Args:
        bits: 2 to 8.
        clock: the model's clock; asked for the table row.
        channel_dim: dimension of x that `group_sizes` divides.
        group_sizes: sizes of channel groups with a scale of their own; () for one scale.
        rows: rows of the table: 1, or the number of the clock's timesteps.
        unsigned: x is known to be in [0, 1] (attention probabilities): zero point 0.

    `balance`, float32 [channels] or None for ones, multiplies the scale of each channel (`QuantizedLayer.balance`).
    """

    scale: Tensor
    zero_point: Tensor
    balance: Tensor | None

    SEARCHED_VALUES = 1 << 16
    """Values the search looks at, of all that were kept."""

    def __init__(
        self,
        bits: int,
        clock: StepClock,
        channel_dim: int = -1,
        group_sizes: tuple[int, ...] = (),
        rows: int = 1,
        unsigned: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.clock, self.channel_dim = bits, clock, channel_dim
        self.group_sizes, self.rows, self.unsigned = group_sizes, rows, unsigned
        self.enabled = False
        self.observing = False
        self.drop_probability = 0.0
        self.noise: SampleNoise | None = None
        shape = (rows, max(1, len(group_sizes)))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape))
        self.register_buffer("balance", None)
        self.gain: TableGain | IntervalGenerator | None = None
        self.found_gain: tuple[Tensor, Tensor] | None = None
        self.observations = Observations(*shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x)
        if not self.enabled:
            return x
        scale, zero_point = self._grid(x)
        quantized = learned_quantize(x, scale, zero_point, self.bits)
        if self.drop_probability > 0 and torch.is_grad_enabled():
            # QDrop (arXiv 2203.05740): element by element, keep the full-precision value with this probability.
            assert self.noise is not None
            return torch.where(self.noise.uniform(x) < self.drop_probability, x, quantized)
        return quantized

    def current_scale(self, row: Tensor | None = None) -> Tensor:
        """float32 [R, S], or [S] or [B, S] at a row of shape [] or [B]; while learning, times the learned gain."""
        scale = self.scale if row is None else self.scale[row]
        if self.gain is None:
            return scale
        training = self.gain.training
        self.gain.train(training and torch.is_grad_enabled())  # a generator drops out while it learns, at no other time
        every = torch.arange(self.rows, device=scale.device)
        current = scale * self.gain(every if row is None else row)
        self.gain.train(training)
        return current

    def learn(self, *, over_time: bool = False, turns: float | None = TURNS) -> list[nn.Parameter]:
        """Make the scale learnable, as a gain on the present one that starts at 1; returns its parameters.

        Args:
            over_time: learn a smooth function of the timestep (TDQ) instead of a free gain for each table row.
            turns: of that function's fastest feature, see `IntervalGenerator`.
        """
        groups = self.scale.shape[1]
        if over_time:
            self.gain = IntervalGenerator(self.clock.timesteps, groups, turns=turns)
        else:
            self.gain = TableGain(self.rows, groups)
        self.gain.to(self.scale.device)
        if isinstance(self.gain, IntervalGenerator) and self.found_gain is not None:
            self.gain.fit(*self.found_gain)
            self.gain.eval()  # no dropout: tens of iterations would only be disturbed by it
        return self.learned()

    def learned(self) -> list[nn.Parameter]:
        """The parameters that `learn` returned."""
        return [] if self.gain is None else list(self.gain.parameters())

    def settle(self) -> None:
        """Stop learning: tabulate the scale reached."""
        with torch.no_grad():
            if self.gain is not None:
                self.gain.eval()
            self.scale = self.current_scale()
        self.gain = self.found_gain = None  # the scale has it now

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        row = self.clock.row if self.rows > 1 else torch.zeros((), dtype=torch.long)
        values = (self.current_scale(row), self.zero_point[row])
        scale, zero_point = (self._broadcast(value, x) for value in values)
        return (scale if self.balance is None else scale * self._along_channels(self.balance, x)), zero_point

    def _along_channels(self, values: Tensor, x: Tensor) -> Tensor:
        """[channels] shaped to broadcast against x."""
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return values.reshape(shape)

    def _broadcast(self, value: Tensor, x: Tensor) -> Tensor:
        if len(self.group_sizes) > 1:
            value = value.repeat_interleave(torch.tensor(self.group_sizes, device=value.device), dim=-1)
            shape = [1] * x.dim()
            shape[self.channel_dim] = value.shape[-1]
            if value.dim() == 2:
                shape[0] = value.shape[0]
            return value.reshape(shape)
        return per_sample(value, x) if value.dim() == 2 else value.reshape((1,) * x.dim())

    def _observe(self, x: Tensor) -> None:
        if self.balance is not None:
            x = x / self._along_channels(self.balance, x)
        groups = x.movedim(self.channel_dim, 1).split(self.group_sizes or (x.shape[self.channel_dim],), dim=1)
        rows = self.clock.row if self.rows > 1 else torch.zeros((), dtype=torch.long)
        rows = rows.expand(x.shape[0]) if rows.dim() == 0 else rows.repeat_interleave(x.shape[0] // rows.shape[0])
        self.observations.add(rows, [group.reshape(x.shape[0], -1) for group in groups])

    def set_range(self, method: RangeMethod, *, per_row: bool = True) -> None:
        """Search the range of what was observed, row by row, switch the quantizer on and forget the observations.

        A table row that no sample fell on takes the grid of the nearest row that has one.

        Args:
            per_row: False: one range over the observations of all rows, the same in each. Those of the single rows
                are only remembered, as where a generator starts (`learn`).
        """
        rows = self.observations.rows
        if not rows:
            raise RuntimeError("set_range: nothing was observed")
        if per_row:
            grids = [affine_from_range(*self._search(method, row), self.bits) for row in rows]
            filled = torch.tensor(rows)
            nearest = (torch.arange(self.rows)[:, None] - filled).abs().argmin(dim=1)
            self.scale, self.zero_point = (torch.stack(values)[nearest] for values in zip(*grids, strict=True))
        else:
            scale, zero_point = affine_from_range(*self._search(method), self.bits)
            self.scale, self.zero_point = scale.expand(self.rows, -1).clone(), zero_point.expand(self.rows, -1).clone()
            if self.rows > 1:
                self.found_gain = torch.tensor(rows), torch.stack(self._gains(rows, scale, zero_point))
        self.take_range(self.scale, self.zero_point, self.found_gain)

    def take_range(self, scale: Tensor, zero_point: Tensor, found_gain: tuple[Tensor, Tensor] | None) -> None:
        """Take over what `set_range` found, here or in another process."""
        self.scale, self.zero_point, self.found_gain = scale, zero_point, found_gain
        self.enabled, self.observing = True, False
        self.observations = Observations(*self.scale.shape)

    def _gains(self, rows: list[int], scale: Tensor, zero_point: Tensor) -> list[Tensor]:
        """The best gain of each row, float [S] each, on what its neighbours saw as well.

        A row has a handful of samples: an interval that fits them alone clips what other pictures need.
        """
        observed = [self._observed(row) for row in rows]
        gains = []
        for index in range(len(rows)):
            near = torch.cat(observed[max(0, index - NEIGHBOURS) : index + NEIGHBOURS + 1], dim=1)
            gains.append(least_error_gain(self._thinned(near), scale, zero_point, self.bits))
        return gains

    def _observed(self, row: int | None = None) -> Tensor:
        """What was observed, of one row or of all: float [S, n]."""
        return self.observations.values(row)

    def _search(self, method: RangeMethod, row: int | None = None) -> tuple[Tensor, Tensor]:
        """The range of what was observed, of one row or of all: float [S] twice."""
        values = self._observed(row)
        lows, highs = self.observations.low, self.observations.high
        low, high = (lows.amin(0), highs.amax(0)) if row is None else (lows[row], highs[row])
        if self.unsigned:
            low = torch.zeros_like(low)
        return find_range(self._thinned(values), self.bits, method, low=low, high=high)

    def _thinned(self, values: Tensor) -> Tensor:
        """At most about `SEARCHED_VALUES` of what was observed: float [S, n]."""
        return values[:, :: math.ceil(values.shape[1] / self.SEARCHED_VALUES)]

    def table(self) -> ActivationTable:
        """The learned grid as it ships."""
        return ActivationTable(
            self.current_scale().detach().float().cpu().clone(),
            self.zero_point.to(torch.uint8).cpu().clone(),
            self.bits,
            self.group_sizes if len(self.group_sizes) > 1 else (),
        )


class WeightQuantizer(nn.Module):
    """Quantizes a weight per output channel (and input group), to the nearest code, by AdaRound, or as it learns.

    Args:
        weight: float [out, in, *kernel], the full-precision weight.
        bits: 2 to 8; the grid is symmetric at 8 bits and affine below (see `QuantizedWeight`).
        group_sizes: sizes of consecutive groups of input channels; they sum to `in`.
        method: how the range is found. At 8 bits it is min-max whatever is asked for: the least error there clips the
            largest weights, which shrinks a layer's gain at every step alike and costs more than it saves
            (``docs/quality.md``).

    `balance`, float32 [in] or None for ones, divides the scale of each input channel (`QuantizedLayer.balance`).
    """

    scale: Tensor
    zero_point: Tensor
    balance: Tensor | None

    def __init__(self, weight: Tensor, bits: int, group_sizes: tuple[int, ...], method: RangeMethod) -> None:
        super().__init__()
        self.bits, self.group_sizes, self.method = bits, group_sizes, method
        self.rounding: nn.Parameter | None = None
        self.register_buffer("scale", torch.ones(len(group_sizes), weight.shape[0]))
        self.register_buffer("zero_point", torch.zeros(len(group_sizes), weight.shape[0]))
        self.set_range(weight, None)
        self.decided: Tensor | None = None
        self.start: Tensor | None = None
        self.shift: nn.Parameter | None = None
        self.gain: TableGain | None = None

    def set_range(self, weight: Tensor, balance: Tensor | None) -> None:
        """Search the range of the weight, its input channels multiplied by `balance`."""
        self.register_buffer("balance", balance)
        method = "minmax" if self.bits == 8 else self.method
        balanced = weight.detach().float()
        if balance is not None:
            balanced = balanced * balance.reshape(-1, *(1,) * (weight.dim() - 2))
        for index, group in enumerate(balanced.split(self.group_sizes, dim=1)):
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
        if self.balance is not None:
            scale = scale / self.balance.reshape(-1, *(1,) * (weight.dim() - 2))
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
        along = None if self.balance is None else self.balance.reshape(-1, *(1,) * (weight.dim() - 2))
        balanced = weight if along is None else weight * along
        parts = [
            learned_quantize(part, scale[index], zero_point[index], self.bits)
            for index, part in enumerate(balanced.split(self.group_sizes, dim=1))
        ]
        quantized = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return quantized if along is None else quantized / along
