"""Ways of quantizing an activation: a fixed grid, a learned scale, and one generated from the timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.generator import IntervalGenerator, TableGain
from stepquant.core.noise import SampleNoise
from stepquant.core.rounding import learned_quantize
from stepquant.layers.attention import per_sample
from stepquant.layers.clock import StepClock

Start = tuple[Tensor, Tensor]
"""Table rows, int64 [K], and the best gain on a shared scale in each, float32 [K, G]."""


@dataclass(frozen=True)
class ActivationLayout:
    """What is known of an activation before any value is seen.

    Attributes:
        bits: 2 to 8.
        clock: of the model; selects the table row.
        channel_dim: dimension of x that `group_sizes` divides.
        group_sizes: sizes of consecutive channel groups, each with a scale; () for one scale.
        rows: 1 for a static grid, else the number of the clock's timesteps.
        unsigned: x lies in [0, 1] (attention probabilities), so the zero point is 0.
    """

    bits: int
    clock: StepClock
    channel_dim: int = -1
    group_sizes: tuple[int, ...] = ()
    rows: int = 1
    unsigned: bool = False

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

    def forward(self, x: Tensor, smoothing: Tensor | None) -> Tensor:
        row = self.layout.row
        scale, zero_point = (
            self.layout.broadcast(values, x) for values in (self.current_scale(row), self.zero_point[row])
        )
        if smoothing is not None:
            scale = scale * self.layout.along_channels(smoothing, x)
        return learned_quantize(x, scale, zero_point, self.layout.bits)

    @torch.no_grad()
    def frozen(self) -> FixedGrid:
        """The grid at the scale reached; a later generator starts there."""
        return FixedGrid(self.layout, self.current_scale(), self.zero_point)


class LearnedScale(FixedGrid):
    """Learns a gain on each scale of the table (LSQ, arXiv 1902.08153)."""

    def __init__(self, grid: FixedGrid, gain: nn.Module | None = None) -> None:
        super().__init__(grid.layout, grid.scale, grid.zero_point)
        self.gain = (gain or TableGain(*self.layout.shape)).to(self.scale.device)

    def current_scale(self, row: Tensor | None = None) -> Tensor:
        every = torch.arange(self.layout.rows, device=self.scale.device)
        return super().current_scale(row) * self.gain(every if row is None else row)


class GeneratedScale(LearnedScale):
    """Learns the gain on the scale as a function of the timestep (TDQ, arXiv 2306.02316)."""

    def __init__(self, grid: FixedGrid, turns: float | None) -> None:
        generator = IntervalGenerator(grid.layout.clock.timesteps, grid.layout.shape[1], turns=turns)
        super().__init__(grid, generator)
        if grid.start is not None:
            rows, gains = grid.start
            generator.fit(rows.to(self.scale.device), gains.to(self.scale.device))
            generator.eval()  # without dropout, which would only disturb tens of iterations

    def current_scale(self, row: Tensor | None = None) -> Tensor:
        training = self.gain.training
        self.gain.train(training and torch.is_grad_enabled())  # dropout only while gradients are recorded
        scale = super().current_scale(row)
        self.gain.train(training)
        return scale


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
