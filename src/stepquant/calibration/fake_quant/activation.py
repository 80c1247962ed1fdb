"""The place where an activation is quantized, and what holds there at present."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation_quantizers import (
    ActivationLayout,
    FixedGrid,
    GeneratedScale,
    LearnedScale,
    LearnedValue,
    QDrop,
    Start,
)
from stepquant.calibration.fake_quant.generator import Generation
from stepquant.calibration.fake_quant.observer import ActivationRange, Observer
from stepquant.core.qtensor import Grid, InvalidGrid, stored_zero_point
from stepquant.core.row_bits import column
from stepquant.layers.clock import StepClock


class ActivationPoint(nn.Module):
    """One activation of the network, with the quantizer that it has at this stage of calibration.

    Passes x through until it has a grid. See `ActivationLayout` for the arguments.

    Attributes:
        quantizer: an `Observer`, a grid (`FixedGrid`, `LearnedScale`, `GeneratedScale`), or None.
        smoothing: float32 [channels] or None; multiplies the scale of each channel (`core.transforms.Smoothing`).
        bypassed: whether x passes through in full precision for now.
        dropout: QDrop, applied wherever gradients are recorded; None outside training.
    """

    smoothing: Tensor | None

    def __init__(
        self,
        bits: int,
        clock: StepClock,
        channel_dim: int = -1,
        group_sizes: tuple[int, ...] = (),
        rows: int = 1,
        unsigned: bool = False,
        row_bits: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layout = ActivationLayout(bits, clock, channel_dim, group_sizes, rows, unsigned, row_bits=row_bits)
        self.quantizer: Observer | FixedGrid | None = None
        self.bypassed = False
        self.dropout: QDrop | None = None
        self.register_buffer("smoothing", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantizer is None or self.bypassed:
            return x
        quantized: Tensor = self.quantizer(x, self.smoothing)
        if self.dropout is not None and torch.is_grad_enabled():
            return self.dropout(x, quantized)
        return quantized

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def calibrated(self) -> bool:
        """Whether the point has a grid."""
        return isinstance(self.quantizer, FixedGrid)

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn while gradients are recorded."""
        return self.dropout is not None or (isinstance(self.quantizer, GeneratedScale) and self.quantizer.gain.training)

    @property
    def fixed(self) -> FixedGrid:
        """The grid; raises `RuntimeError` before there is one."""
        if not isinstance(self.quantizer, FixedGrid):
            raise RuntimeError("the activation has no grid yet: call calibrate first")
        return self.quantizer

    @property
    def observer(self) -> Observer:
        """The observer; raises `RuntimeError` unless the point observes."""
        if not isinstance(self.quantizer, Observer):
            raise RuntimeError("the activation is not observed: call observe first")
        return self.quantizer

    @property
    def scale(self) -> Tensor:
        """float32 [R, G]; while it is being learned, the scale that learning started from."""
        return self.fixed.scale

    @property
    def zero_point(self) -> Tensor:
        """float32 [R, G]."""
        return self.fixed.zero_point

    def observe(self) -> None:
        """Record what passes through from now on."""
        self.quantizer = Observer(self.layout)

    def calibrate(self, method: ActivationRange, *, per_row: bool = True, neighbours: int = 0) -> None:
        """Search the grid of what was observed, quantize to it, and discard the observations; see `Observer.search`."""
        self.set_grid(*self.observer.search(method, per_row=per_row, neighbours=neighbours))

    def set_grid(self, scale: Tensor, zero_point: Tensor, start: Start | None = None) -> None:
        """Quantize to a given grid, float32 [R, G] twice; `start` as in `FixedGrid`."""
        self.quantizer = FixedGrid(self.layout, scale, zero_point, start)

    def learn_table(self, *, relative: bool = True) -> list[nn.Parameter]:
        """Learn a scale for each table row; returns the parameters: gains on the scales, or with ``relative=False`` the
        scales themselves."""
        self.quantizer = LearnedScale(self.fixed) if relative else LearnedValue(self.fixed)
        return self.parameters_in_training()

    def learn_over_time(self, generation: Generation | None = None) -> list[nn.Parameter]:
        """Learn the scale as a smooth function of the timestep (TDQ); returns the parameters."""
        self.quantizer = GeneratedScale(self.fixed, generation or Generation())
        return self.parameters_in_training()

    def parameters_in_training(self) -> list[nn.Parameter]:
        """What `learn_table` or `learn_over_time` returned; empty when nothing is being learned."""
        return [] if self.quantizer is None else list(self.quantizer.parameters())

    def freeze(self) -> None:
        """Stop learning: keep the scale reached."""
        if isinstance(self.quantizer, FixedGrid):
            self.quantizer = self.quantizer.frozen()

    def stored_grid(self) -> Grid:
        """The grid as it is stored; raises `InvalidGrid` before there is one."""
        if not self.calibrated:
            raise InvalidGrid("an activation was not calibrated")
        sizes = self.layout.group_sizes
        bits, row_bits = column(self.layout.bits_by_row)
        return Grid(
            self.fixed.current_scale().detach().float().cpu().clone()[..., None],
            stored_zero_point(self.zero_point)[..., None],
            bits,
            sizes if len(sizes) > 1 else (),
            row_bits,
        )
