"""Observe an activation and search its grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation_quantizers import ActivationLayout, Start
from stepquant.calibration.fake_quant.observations import Observations
from stepquant.core.ranges import Range, find_range, least_error_gain

NEIGHBOURS = 2
"""Observed rows on either side that are included when a row's best gain is searched."""

PublishedRange = Literal["deviations", "moving-average"]
"""``"deviations"``, TDQ's start: mean plus 3 standard deviations, behind SiLU 16. ``"moving-average"``, QuEST's: the
ends of the first samples, averaged with those of all further ones; up to 4 bits the range of least error."""
ActivationRange = Range | PublishedRange
"""How the range of an activation is found."""
DEVIATIONS, SILU_DEVIATIONS = 3, 16
FIRST_SAMPLES, MOMENTUM, SEARCHED_BELOW = 64, 0.95, 4

SEARCHED_VALUES = 1 << 16
"""Values that a search looks at, of all that were recorded."""


class Observer(nn.Module):
    """Records an activation and passes it through."""

    def __init__(self, layout: ActivationLayout) -> None:
        super().__init__()
        self.layout = layout
        self.observations = Observations(*layout.shape)

    def forward(self, x: Tensor, smoothing: Tensor | None) -> Tensor:
        layout = self.layout
        seen = x if smoothing is None else x / layout.along_channels(smoothing, x)
        groups = seen.movedim(layout.channel_dim, 1).split(layout.group_sizes or (x.shape[layout.channel_dim],), dim=1)
        rows, batch = layout.row, x.shape[0]
        rows = rows.expand(batch) if rows.dim() == 0 else rows.repeat_interleave(batch // rows.shape[0])
        self.observations.add(rows, [group.reshape(batch, -1) for group in groups])
        return x

    def search(
        self, method: ActivationRange, *, per_row: bool = True, neighbours: int = 0, row_zero_points: bool = False
    ) -> tuple[Tensor, Tensor, Start | None]:
        """Search the grid of what was observed.

        A table row without observations takes the grid of the nearest row that has some.

        Args:
            method: of the range search, or a function, see `find_range`; or one of `PublishedRange`.
            per_row: search each row; False searches one range for all rows, and the best gain on it in each.
            neighbours: observed rows on either side that are included in a row's search.
            row_zero_points: with ``per_row=False``, find the gain in each row together with a zero point.

        Returns:
            Scale and zero point, float32 [R, G] each, and the gains of a search with ``per_row=False``.

        Raises:
            RuntimeError: if nothing was observed.
        """
        rows, (count, _), bits = self.observations.rows, self.layout.shape, self.layout.bits_by_row
        if not rows:
            raise RuntimeError("no range can be searched: the activation was never observed")
        nearest = (torch.arange(count)[:, None] - torch.tensor(rows)).abs().argmin(dim=1)
        if per_row:
            return *self._row_grids(method, neighbours, list(zip(nearest.tolist(), bits, strict=True))), None
        values = self.observations.values()
        shared = {one: self.layout.grid(*self._range(method, rows, values, one), one) for one in set(bits)}
        scale, zero_point = _stacked([shared[one] for one in bits])
        start = None
        if count > 1 and row_zero_points:
            own = [(index, bits[row]) for index, row in enumerate(rows)]
            scales, zero_points = self._row_grids(method, NEIGHBOURS, own)
            start = Start(torch.tensor(rows), scales / scale[rows], zero_points)
        elif count > 1:
            # On the neighbours' values as well: a row has few samples, whose range clips what other images need.
            gains = [
                least_error_gain(self._thinned(values), scale[row], zero_point[row], bits[row])
                for row, (_, values) in zip(rows, self._neighbourhoods(NEIGHBOURS), strict=True)
            ]
            start = Start(torch.tensor(rows), torch.stack(gains), zero_point[rows])
        return scale, zero_point, start

    def _row_grids(
        self, method: ActivationRange, neighbours: int, wanted: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 [N, G] each, of N pairs: index of an observed row, and bits."""
        seen = list(self._neighbourhoods(neighbours))
        grids = {
            (index, bits): self.layout.grid(*self._range(method, *seen[index], bits), bits)
            for index, bits in dict.fromkeys(wanted)
        }
        return _stacked([grids[pair] for pair in wanted])

    def _neighbourhoods(self, neighbours: int) -> Iterator[tuple[list[int], Tensor]]:
        """Each observed row with its `neighbours` on either side, and the values recorded there, float [G, n]."""
        rows = self.observations.rows
        recorded = [self.observations.values(row) for row in rows]
        for index in range(len(rows)):
            near = slice(max(0, index - neighbours), index + neighbours + 1)
            yield rows[near], torch.cat(recorded[near], dim=1)

    def _range(self, method: ActivationRange, rows: list[int], values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The range, float [G] twice, of `values`, float [G, n], which were observed in `rows`."""
        if method == "moving-average" and bits > SEARCHED_BELOW and not self.layout.unsigned:
            return self._moving_average(rows)
        if method == "deviations" and self.layout.kind != "affine":
            deviations = SILU_DEVIATIONS if self.layout.kind == "silu" else DEVIATIONS
            high = values.mean(dim=1) + deviations * values.std(dim=1)
            return -high, high
        search: Range = method if callable(method) or method == "minmax" else "least-error"
        low, high = self.observations.low[rows].amin(0), self.observations.high[rows].amax(0)
        if self.layout.unsigned:
            low = torch.zeros_like(low)
        return find_range(self._thinned(values), bits, search, low=low, high=high)

    def _moving_average(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of the first samples, then averaged with those of batches of as many."""
        ends = self.observations.ends(rows).split(FIRST_SAMPLES)
        low, high = ends[0][..., 0].amin(dim=0), ends[0][..., 1].amax(dim=0)
        for batch in ends[1:]:
            low = torch.lerp(batch[..., 0].amin(dim=0), low, MOMENTUM)
            high = torch.lerp(batch[..., 1].amax(dim=0), high, MOMENTUM)
        return low, high

    def _thinned(self, values: Tensor) -> Tensor:
        """About `SEARCHED_VALUES` of the values at most: float [G, n]."""
        return values[:, :: math.ceil(values.shape[1] / SEARCHED_VALUES)]


def _stacked(grids: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 [G] each -> [N, G] each."""
    scale, zero_point = (torch.stack(values) for values in zip(*grids, strict=True))
    return scale, zero_point
