"""The quantizer of an activation under calibration: it observes, searches its range, learns, and settles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.generator import TURNS, IntervalGenerator, TableGain
from stepquant.calibration.observer import Observations
from stepquant.core.affine import affine_from_range
from stepquant.core.noise import SampleNoise
from stepquant.core.qtensor import Grid, stored_zero_point
from stepquant.core.ranges import RangeMethod, find_range, least_error_gain
from stepquant.core.rounding import (
    learned_quantize,
)
from stepquant.layers.attention import per_sample
from stepquant.layers.clock import StepClock

NEIGHBOURS = 2
"""Calibrated steps on either side that have a say in where TDQ's interval of a step starts."""


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

    `smoothing`, float32 [channels] or None for ones, multiplies the scale of each channel (`core.transforms.Smoothing`).
    """

    scale: Tensor
    zero_point: Tensor
    smoothing: Tensor | None

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
        self.register_buffer("smoothing", None)
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
            rows, gains = self.found_gain
            self.gain.fit(rows.to(self.scale.device), gains.to(self.scale.device))
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
        return (scale if self.smoothing is None else scale * self._along_channels(self.smoothing, x)), zero_point

    def _along_channels(self, values: Tensor, x: Tensor) -> Tensor:
        """[channels] shaped to broadcast against x."""
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return values.reshape(shape)

    def _broadcast(self, value: Tensor, x: Tensor) -> Tensor:
        if len(self.group_sizes) > 1:
            value = value.repeat_interleave(torch.tensor(self.group_sizes).to(value.device), dim=-1)
            shape = [1] * x.dim()
            shape[self.channel_dim] = value.shape[-1]
            if value.dim() == 2:
                shape[0] = value.shape[0]
            return value.reshape(shape)
        return per_sample(value, x) if value.dim() == 2 else value.reshape((1,) * x.dim())

    def _observe(self, x: Tensor) -> None:
        if self.smoothing is not None:
            x = x / self._along_channels(self.smoothing, x)
        groups = x.movedim(self.channel_dim, 1).split(self.group_sizes or (x.shape[self.channel_dim],), dim=1)
        rows = self.clock.row if self.rows > 1 else torch.zeros((), dtype=torch.long)
        rows = rows.expand(x.shape[0]) if rows.dim() == 0 else rows.repeat_interleave(x.shape[0] // rows.shape[0])
        self.observations.add(rows, [group.reshape(x.shape[0], -1) for group in groups])

    def set_range(self, method: RangeMethod, *, per_row: bool = True, neighbours: int = 0) -> None:
        """Search the range of what was observed, row by row, switch the quantizer on and forget the observations.

        A table row that no sample fell on takes the grid of the nearest row that has one.

        Args:
            per_row: False: one range over the observations of all rows, the same in each. Those of the single rows
                are only remembered, as where a generator starts (`learn`).
            neighbours: observed rows on either side whose observations the range of a row is searched on as well.
        """
        rows = self.observations.rows
        if not rows:
            raise RuntimeError("set_range: nothing was observed")
        if per_row:
            grids = [
                affine_from_range(*self._search(method, near, values), self.bits)
                for near, values in self._neighbourhoods(neighbours)
            ]
            filled = torch.tensor(rows)
            nearest = (torch.arange(self.rows)[:, None] - filled).abs().argmin(dim=1)
            self.scale, self.zero_point = (torch.stack(values)[nearest] for values in zip(*grids, strict=True))
        else:
            scale, zero_point = affine_from_range(*self._search(method, rows, self.observations.values()), self.bits)
            self.scale, self.zero_point = scale.expand(self.rows, -1).clone(), zero_point.expand(self.rows, -1).clone()
            if self.rows > 1:
                self.found_gain = torch.tensor(rows), torch.stack(self._gains(scale, zero_point))
        self.take_range(self.scale, self.zero_point, self.found_gain)

    def take_range(self, scale: Tensor, zero_point: Tensor, found_gain: tuple[Tensor, Tensor] | None) -> None:
        """Take over what `set_range` found, here or in another process."""
        self.scale, self.zero_point, self.found_gain = scale, zero_point, found_gain
        self.enabled, self.observing = True, False
        self.observations = Observations(*self.scale.shape)

    def _gains(self, scale: Tensor, zero_point: Tensor) -> list[Tensor]:
        """The best gain of each row, float [S] each, on what its neighbours saw as well.

        A row has a handful of samples: an interval that fits them alone clips what other images need.
        """
        return [
            least_error_gain(self._thinned(values), scale, zero_point, self.bits)
            for _, values in self._neighbourhoods(NEIGHBOURS)
        ]

    def _neighbourhoods(self, neighbours: int) -> Iterator[tuple[list[int], Tensor]]:
        """Each observed row with its `neighbours` on either side, and what was observed there: float [S, n]."""
        rows = self.observations.rows
        observed = [self.observations.values(row) for row in rows]
        for index in range(len(rows)):
            near = slice(max(0, index - neighbours), index + neighbours + 1)
            yield rows[near], torch.cat(observed[near], dim=1)

    def _search(self, method: RangeMethod, rows: list[int], values: Tensor) -> tuple[Tensor, Tensor]:
        """The range of `values`, float [S, n], which were observed in `rows`: float [S] twice."""
        low, high = self.observations.low[rows].amin(0), self.observations.high[rows].amax(0)
        if self.unsigned:
            low = torch.zeros_like(low)
        return self.find_range(self._thinned(values), method, low, high)

    def find_range(self, values: Tensor, method: RangeMethod, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the grid for `values`, float [S, n], whose true ends are `low` and `high`: float [S] twice.

        A quantizer of one's own overrides it.
        """
        return find_range(values, self.bits, method, low=low, high=high)

    def _thinned(self, values: Tensor) -> Tensor:
        """At most about `SEARCHED_VALUES` of what was observed: float [S, n]."""
        return values[:, :: math.ceil(values.shape[1] / self.SEARCHED_VALUES)]

    def table(self) -> Grid:
        """The learned grid as it ships."""
        return Grid(
            self.current_scale().detach().float().cpu().clone()[..., None],
            stored_zero_point(self.zero_point)[..., None],
            self.bits,
            self.group_sizes if len(self.group_sizes) > 1 else (),
        )
