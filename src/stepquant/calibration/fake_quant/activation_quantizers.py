"""Ways of quantizing an activation: a fixed grid, a learned scale, and one generated from the timestep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.generator import Generation, IntervalGenerator, TableGain
from stepquant.core.affine import SMALLEST_SCALE, affine_from_range, clamp_codes, largest_code
from stepquant.core.noise import SampleNoise
from stepquant.core.rounding import learned_quantize, round_straight_through
from stepquant.layers.attention import per_sample
from stepquant.layers.clock import StepClock

SILU_MINIMUM = -0.2785
"""The smallest value of SiLU (TDQ, public code)."""


class Start(NamedTuple):
    """Where a generator starts: what is best in each observed table row.

    Attributes:
        rows: int64 [K].
        gains: float32 [K, G], on the scale shared by all rows.
        zero_points: float32 [K, G]; the shared one, unless gains were found together with other zero points.
    """

    rows: Tensor
    gains: Tensor
    zero_points: Tensor


@dataclass(frozen=True)
class ActivationLayout:
    """What is known of an activation before any value is seen.

    Attributes:
        bits: 2 to 8, of every row without `row_bits`.
        clock: of the model; selects the table row.
        channel_dim: dimension of x that `group_sizes` divides.
        group_sizes: sizes of consecutive channel groups, each with a scale; () for one scale.
        rows: 1 for a static grid, else the number of the clock's timesteps.
        unsigned: x lies in [0, 1] (attention probabilities), so the zero point is 0.
        kind: of grid. ``"affine"``: spans the range. TDQ's others are ``"signed"``, symmetric about 0, and ``"silu"``,
            from SiLU's smallest value up, as near as a whole zero point allows.
        row_bits: uint8 [R], bits of each row, or None.
    """

    bits: int
    clock: StepClock
    channel_dim: int = -1
    group_sizes: tuple[int, ...] = ()
    rows: int = 1
    unsigned: bool = False
    kind: Literal["affine", "signed", "silu"] = "affine"
    row_bits: Tensor | None = None

    def grid(self, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range, float [G] each."""
        if self.kind == "affine":
            return affine_from_range(low, high, bits)
        if self.kind == "silu":
            scale = (high / largest_code(bits)).clamp(min=SMALLEST_SCALE)
            return scale, silu_zero_point(scale, bits)
        half = 1 << (bits - 1)
        scale = (torch.maximum(-low, high) / (half - 1)).clamp(min=SMALLEST_SCALE)
        return scale, torch.full_like(scale, half)

    @property
    def bits_by_row(self) -> list[int]:
        """Bits of each row."""
        return [self.bits] * self.rows if self.row_bits is None else self.row_bits.tolist()

    def bits_at(self, row: Tensor | None) -> int | Tensor:
        """Bits at a row, broadcastable against a scale [G], [B, G], or without a row [R, G]: int, or uint8 [..., 1]."""
        if self.row_bits is None:
            return self.bits
        return (self.row_bits if row is None else self.row_bits[row.cpu()])[..., None]

    @property
    def shape(self) -> tuple[int, int]:
        """R and G of a grid [R, G]."""
        return self.rows, max(1, len(self.group_sizes))

    @property
    def row(self) -> Tensor:
        """Table row of the current forward pass: int64 [] or [B]."""
        return self.clock.row if self.rows > 1 else torch.zeros((), dtype=torch.long)

    def along_channels(self, values: Tensor, x: Tensor) -> Tensor:
        """Reshape [channels] to broadcast against x."""
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return values.reshape(shape)

    def broadcast(self, values: Tensor, x: Tensor) -> Tensor:
        """Reshape [G] or [B, G] to broadcast against x."""
        if len(self.group_sizes) > 1:
            values = values.repeat_interleave(torch.tensor(self.group_sizes).to(values.device), dim=-1)
            shape = [1] * x.dim()
            shape[self.channel_dim] = values.shape[-1]
            if values.dim() == 2:
                shape[0] = values.shape[0]
            return values.reshape(shape)
        return per_sample(values, x) if values.dim() == 2 else values.reshape((1,) * x.dim())


def silu_zero_point(scale: Tensor, bits: int | Tensor) -> Tensor:
    """The zero point at which SiLU's smallest value has code 0, rounded straight through."""
    return round_straight_through(clamp_codes(-SILU_MINIMUM / scale, bits))


class FixedGrid(nn.Module):
    """Quantizes to a table of scales and zero points.

    Args:
        scale, zero_point: float32 [R, G].
        start: where a generator starts, if one scale was searched for all rows.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, layout: ActivationLayout, scale: Tensor, zero_point: Tensor, start: Start | None = None) -> None:
        super().__init__()
        self.layout, self.start = layout, start
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def current_scale(self, row: Tensor | None = None) -> Tensor:
        """float32 [R, G], or [G] or [B, G] at a row of shape [] or [B]."""
        return self.scale if row is None else self.scale[row]

    def current_zero_point(self, row: Tensor | None, scale: Tensor) -> Tensor:
        """Of the shape of `scale`, which is `current_scale` at this row."""
        return self.zero_point if row is None else self.zero_point[row]

    def forward(self, x: Tensor, smoothing: Tensor | None) -> Tensor:
        row = self.layout.row
        current = self.current_scale(row)
        zero_point = self.layout.broadcast(self.current_zero_point(row, current), x)
        scale = self.layout.broadcast(current, x)
        if smoothing is not None:
            scale = scale * self.layout.along_channels(smoothing, x)
        bits = self.layout.bits_at(row)
        if not isinstance(bits, int):
            bits = bits.to(x.device)
            bits = per_sample(bits, x) if bits.dim() == 2 else bits
        return learned_quantize(x, scale, zero_point, bits)

    @torch.no_grad()
    def frozen(self) -> FixedGrid:
        """The grid at the scale reached; a later generator starts there."""
        scale = self.current_scale()
        return FixedGrid(self.layout, scale, self.current_zero_point(None, scale))


class LearnedScale(FixedGrid):
    """Learns a gain on each scale of the table (LSQ, arXiv 1902.08153)."""

    def __init__(self, grid: FixedGrid, gain: nn.Module | None = None) -> None:
        super().__init__(grid.layout, grid.scale, grid.zero_point)
        self.gain = (gain or TableGain(*self.layout.shape)).to(self.scale.device)

    def current_scale(self, row: Tensor | None = None) -> Tensor:
        every = torch.arange(self.layout.rows, device=self.scale.device)
        return super().current_scale(row) * self.gain(every if row is None else row)

    def current_zero_point(self, row: Tensor | None, scale: Tensor) -> Tensor:
        if self.layout.kind == "silu":
            return silu_zero_point(scale, self.layout.bits_at(row))
        return super().current_zero_point(row, scale)


class LearnedValue(LearnedScale):
    """Learns the scales themselves, as the papers' public code does: learning rates are in their units."""

    def __init__(self, grid: FixedGrid) -> None:
        super().__init__(grid, nn.Identity())
        self.value = nn.Parameter(grid.scale.clone())

    def current_scale(self, row: Tensor | None = None) -> Tensor:
        scale = self.value if row is None else self.value[row]
        return scale.clamp(min=SMALLEST_SCALE)


class GeneratedScale(LearnedScale):
    """Learns the scale as a function of the timestep (TDQ, arXiv 2306.02316)."""

    gain: IntervalGenerator

    def __init__(self, grid: FixedGrid, generation: Generation) -> None:
        groups = grid.layout.shape[1]
        clock, zero_points = grid.layout.clock, generation.zero_points
        generator = IntervalGenerator(clock.timesteps, groups, turns=generation.turns, zero_points=zero_points)
        super().__init__(grid, generator)
        self.generation = generation
        if generation.published:
            generator.start(self.scale[0], self.zero_point[0] / self._top(torch.tensor(0)))
        elif grid.start is not None:
            start = Start(*(values.to(self.scale.device) for values in grid.start))
            generator.fit(start.rows, start.gains, start.zero_points / self._top(start.rows))
            generator.eval()  # without dropout, which would only disturb tens of iterations
        elif zero_points:
            every = torch.arange(grid.layout.rows, device=self.scale.device)
            generator.fit(every, torch.ones_like(self.scale), self.zero_point / self._top(None))

    def _top(self, row: Tensor | None) -> int | Tensor:
        """The largest code at a row, shaped as by `ActivationLayout.bits_at`."""
        top = largest_code(self.layout.bits_at(row))
        return top if isinstance(top, int) else top.to(self.scale.device)

    def current_scale(self, row: Tensor | None = None) -> Tensor:
        training = self.gain.training
        self.gain.train(training and torch.is_grad_enabled())  # dropout only while gradients are recorded
        if self.generation.published:
            every = torch.arange(self.layout.rows, device=self.scale.device)
            # The interval is the same whatever the bits: of row 0, which the generator started from.
            steps = self._top(torch.tensor(0)) / self._top(row)
            scale = (self.gain(every if row is None else row) * steps).clamp(min=SMALLEST_SCALE)
        else:
            scale = super().current_scale(row)
        self.gain.train(training)
        return scale

    def current_zero_point(self, row: Tensor | None, scale: Tensor) -> Tensor:
        if not self.generation.zero_points:
            return super().current_zero_point(row, scale)
        training, top = self.gain.training, self._top(row)
        self.gain.train(training and torch.is_grad_enabled())
        every = torch.arange(self.layout.rows, device=self.scale.device)
        share = self.gain.zero_points(every if row is None else row)
        self.gain.train(training)
        return round_straight_through(clamp_codes(top * share, self.layout.bits_at(row)))


@dataclass(frozen=True)
class QDrop:
    """Keeps each element in full precision with a probability while training (QDrop, arXiv 2203.05740).

    Attributes:
        probability: of full precision, 0 to 1.
        noise: random numbers of the minibatch.
    """

    probability: float
    noise: SampleNoise

    def __call__(self, x: Tensor, quantized: Tensor) -> Tensor:
        return torch.where(self.noise.uniform(x) < self.probability, x, quantized)
