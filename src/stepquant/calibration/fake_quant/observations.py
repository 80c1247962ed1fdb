"""What a quantizer remembers of the activations it saw: the exact ends, and a bounded choice of values."""

from __future__ import annotations

import torch
from torch import Tensor

VALUES_A_SAMPLE = 1 << 12
"""Values kept of each sample and group, until there are too many samples for that."""
MOST_VALUES = 1 << 16
"""Values kept of each group, of all samples together, for a static table."""
MOST_ROWS = 8
"""A table of more rows keeps so many times as many values."""


class Observations:
    """Activations of many samples, in bounded memory; the same whatever batches the samples came in.

    From each sample the same number of values is kept, at places that are drawn once at random. As soon as all samples
    together hold more than the limit, every one of them gives up the later half of its values, so that all keep equal
    weight.

    Attributes:
        low, high: float32 [R, S], the ends of each table row and channel group; infinite where nothing was seen.
    """

    def __init__(self, rows: int, groups: int) -> None:
        self.low = torch.full((rows, groups), torch.inf)
        self.high = torch.full((rows, groups), -torch.inf)
        self._kept = VALUES_A_SAMPLE
        self._most = MOST_VALUES * min(rows, MOST_ROWS)
        # One block of memory, filled from the left. Many small ones, kept while activations come and go, would leave
        # holes that the allocator cannot give back: half a megabyte a sample.
        self._memory = torch.empty(groups, 0)
        self._rows: list[list[int]] = []
        self._counts: list[int] = []
        self._places: dict[int, Tensor] = {}

    @property
    def rows(self) -> list[int]:
        """Table rows that something was seen of, ascending."""
        return self.low.isfinite().all(dim=1).nonzero().flatten().tolist()

    def add(self, rows: Tensor, groups: list[Tensor]) -> None:
        """Remember some samples: int64 [B], the table row of each, and a float [B, n] for each channel group."""
        rows = rows.cpu()
        groups = [group.detach().float() for group in groups]
        ends = [group.aminmax(dim=1) for group in groups]
        index = rows[:, None].expand(-1, len(groups))
        self.low.scatter_reduce_(0, index, torch.stack([low for low, _ in ends], dim=1).cpu(), "amin")
        self.high.scatter_reduce_(0, index, torch.stack([high for _, high in ends], dim=1).cpu(), "amax")
        count = self._make_room(len(rows), min(group.shape[1] for group in groups))
        places = {group.shape[1]: self._places_in(group.shape[1])[:count] for group in groups}
        self._store(rows.tolist(), torch.stack([group[:, places[group.shape[1]]] for group in groups]).cpu())

    def values(self, row: int | None = None) -> Tensor:
        """What is kept of one table row, or of all: float32 [S, n]."""
        if row is None:
            return self._memory[:, : self._used(self._kept)].clone()
        parts = [
            values[:, torch.tensor([one == row for one in rows])].flatten(1)
            for rows, values in self.state()
            if row in rows
        ]
        return torch.cat([self._memory[:, :0], *parts], dim=1)

    def state(self) -> list[tuple[list[int], Tensor]]:
        """Of every time something was added: the rows of B samples, and float32 [S, B, n], what is kept of them."""
        result, at = [], 0
        for rows, count in zip(self._rows, self._counts, strict=True):
            size = len(rows) * count
            result.append((rows, self._memory[:, at : at + size].unflatten(1, (len(rows), count))))
            at += size
        return result

    def merge(self, others: list[tuple[Tensor, Tensor, int, list[tuple[list[int], Tensor]]]]) -> None:
        """Become what one would be that had seen all that `others` saw, in their order; see `parts`."""
        self._rows, self._counts = [], []
        for low, high, kept, _ in others:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self._kept = min(self._kept, kept)
        for _, _, _, state in others:
            for rows, values in state:
                count = self._make_room(len(rows), values.shape[2])
                self._store(rows, values[..., :count])

    def parts(self) -> tuple[Tensor, Tensor, int, list[tuple[list[int], Tensor]]]:
        """Everything, to be sent to another process and merged there."""
        return self.low, self.high, self._kept, [(rows, values.clone()) for rows, values in self.state()]

    def _used(self, kept: int) -> int:
        """Values of each group in memory, if no sample had more than `kept`."""
        return sum(len(rows) * min(count, kept) for rows, count in zip(self._rows, self._counts, strict=True))

    def _make_room(self, samples: int, size: int) -> int:
        """Forget as much as `samples` more of `size` values each make necessary; how many of each are to be kept."""
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
        """values: float32 [S, B, n]."""
        start = self._used(self._kept)
        stop = start + values[0].numel()
        if stop > self._memory.shape[1]:
            larger = torch.empty(len(values), max(stop, self._most))  # pages that nothing is written to take no memory
            larger[:, :start] = self._memory[:, :start]
            self._memory = larger
        self._memory[:, start:stop] = values.flatten(1)
        self._rows.append(rows)
        self._counts.append(values.shape[2])

    def _places_in(self, size: int) -> Tensor:
        """Places of a sample of `size` values, in the order in which they are kept: the earlier, the longer."""
        if size not in self._places:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
            self._places[size] = order[:VALUES_A_SAMPLE].clone()
        return self._places[size]
