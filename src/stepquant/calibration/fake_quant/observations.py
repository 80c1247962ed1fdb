"""Statistics of an observed activation: its exact range, and a bounded sample of its values."""

from __future__ import annotations

import torch
from torch import Tensor

VALUES_PER_SAMPLE = 1 << 12
"""Values recorded per sample and group, as long as there is room."""
MOST_VALUES = 1 << 16
"""Values recorded per group over all samples, for a static grid."""
MOST_ROWS = 8
"""A table of R rows records min(R, MOST_ROWS) times as many values."""


class Observations:
    """Activations of many samples, in bounded memory; independent of how samples are batched.

    Each sample contributes the same number of values, at random positions that are drawn once. When all samples
    together exceed the limit, each drops the later half of its values, so that all keep equal weight.

    Attributes:
        low, high: float32 [R, G], range of each table row and channel group; infinite where nothing was observed.
    """

    def __init__(self, rows: int, groups: int) -> None:
        self.low = torch.full((rows, groups), torch.inf)
        self.high = torch.full((rows, groups), -torch.inf)
        self._kept = VALUES_PER_SAMPLE
        self._most = MOST_VALUES * min(rows, MOST_ROWS)
        # One block of memory, filled from the left: many small tensors between short-lived activations would fragment
        # the heap by half a megabyte per sample.
        self._memory = torch.empty(groups, 0)
        self._rows: list[list[int]] = []
        self._counts: list[int] = []
        self._ends: list[Tensor] = []
        self._positions: dict[int, Tensor] = {}

    @property
    def rows(self) -> list[int]:
        """Observed table rows, ascending."""
        return self.low.isfinite().all(dim=1).nonzero().flatten().tolist()

    def add(self, rows: Tensor, groups: list[Tensor]) -> None:
        """Record B samples: their table rows, int64 [B], and the values of each channel group, float [B, n]."""
        rows = rows.cpu()
        groups = [group.detach().float() for group in groups]
        ends = [group.aminmax(dim=1) for group in groups]
        index = rows[:, None].expand(-1, len(groups))
        low, high = (torch.stack(values, dim=1).cpu() for values in zip(*ends, strict=True))
        self.low.scatter_reduce_(0, index, low, "amin")
        self.high.scatter_reduce_(0, index, high, "amax")
        self._ends.append(torch.cat([rows[:, None, None].expand(-1, len(groups), 1), torch.stack([low, high], 2)], 2))
        count = self._make_room(len(rows), min(group.shape[1] for group in groups))
        positions = {group.shape[1]: self._positions_in(group.shape[1])[:count] for group in groups}
        self._store(rows.tolist(), torch.stack([group[:, positions[group.shape[1]]] for group in groups]).cpu())

    def ends(self, rows: list[int]) -> Tensor:
        """Minimum and maximum of each sample in some table rows, in the order observed: float32 [n, G, 2]."""
        every = torch.cat(self._ends)
        return every[torch.isin(every[:, 0, 0], torch.tensor(rows).float()), :, 1:]

    def values(self, row: int | None = None) -> Tensor:
        """Recorded values of one table row, or of all: float32 [G, n]."""
        if row is None:
            return self._memory[:, : self._used(self._kept)].clone()
        parts = [
            values[:, torch.tensor([one == row for one in rows])].flatten(1)
            for rows, values in self.state()
            if row in rows
        ]
        return torch.cat([self._memory[:, :0], *parts], dim=1)

    def state(self) -> list[tuple[list[int], Tensor]]:
        """For each call of `add`: the table rows of its B samples, and their recorded values, float32 [G, B, n]."""
        result, at = [], 0
        for rows, count in zip(self._rows, self._counts, strict=True):
            size = len(rows) * count
            result.append((rows, self._memory[:, at : at + size].unflatten(1, (len(rows), count))))
            at += size
        return result

    def merge(self, others: list[tuple[Tensor, Tensor, int, list[tuple[list[int], Tensor]], list[Tensor]]]) -> None:
        """Become the observations of all samples that `others` observed, in order; see `parts`."""
        self._rows, self._counts, self._ends = [], [], [ends for *_, part in others for ends in part]
        for low, high, kept, *_ in others:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self._kept = min(self._kept, kept)
        for _, _, _, state, _ in others:
            for rows, values in state:
                count = self._make_room(len(rows), values.shape[2])
                self._store(rows, values[..., :count])

    def parts(self) -> tuple[Tensor, Tensor, int, list[tuple[list[int], Tensor]], list[Tensor]]:
        """The whole state, to be sent to another process and merged there."""
        return self.low, self.high, self._kept, [(rows, values.clone()) for rows, values in self.state()], self._ends

    def _used(self, kept: int) -> int:
        """Values per group in memory with at most `kept` per sample."""
        return sum(len(rows) * min(count, kept) for rows, count in zip(self._rows, self._counts, strict=True))

    def _make_room(self, samples: int, size: int) -> int:
        """Drop values until `samples` more of `size` values fit; return how many to record of each."""
        kept = self._kept
        while kept > 1 and samples * min(kept, size) + self._used(kept) > self._most:
            kept //= 2
        if kept < self._kept:
            self._kept = kept
            state = [(rows, values[..., :kept].clone()) for rows, values in self.state()]
            self._rows, self._counts = [], []
            for rows, values in state:
                self._store(rows, values)
        return min(kept, size)

    def _store(self, rows: list[int], values: Tensor) -> None:
        """Append values, float32 [G, B, n], of samples with these table rows."""
        start = self._used(self._kept)
        stop = start + values[0].numel()
        if stop > self._memory.shape[1]:
            larger = torch.empty(len(values), max(stop, self._most))  # unwritten pages use no memory
            larger[:, :start] = self._memory[:, :start]
            self._memory = larger
        self._memory[:, start:stop] = values.flatten(1)
        self._rows.append(rows)
        self._counts.append(values.shape[2])

    def _positions_in(self, size: int) -> Tensor:
        """Random positions in a sample of `size` values, in order of priority."""
        if size not in self._positions:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
            self._positions[size] = order[:VALUES_PER_SAMPLE].clone()
        return self._positions[size]
