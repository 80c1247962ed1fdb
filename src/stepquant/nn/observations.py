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
        self._rows: list[Tensor] = []
        self._values: list[Tensor] = []
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
        count = min(self._kept, *(group.shape[1] for group in groups))
        self._rows.append(rows)
        self._values.append(torch.stack([group[:, self._places_in(group.shape[1])[:count]] for group in groups]).cpu())
        self._bound()

    def values(self, row: int | None = None) -> Tensor:
        """What is kept of one table row, or of all: float32 [S, n]."""
        if row is None:
            return torch.cat([values.flatten(1) for values in self._values], dim=1)
        parts = [values[:, rows == row].flatten(1) for rows, values in zip(self._rows, self._values, strict=True)]
        return torch.cat(parts, dim=1)

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """Rows and values as they are kept, for `merge`."""
        return list(zip(self._rows, self._values, strict=True))

    def merge(self, others: list[tuple[Tensor, Tensor, int, list[tuple[Tensor, Tensor]]]]) -> None:
        """Become what one would be that had seen all that `others` saw, in their order; see `parts`."""
        self._rows, self._values = [], []
        for low, high, kept, state in others:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self._kept = min(self._kept, kept)
            self._rows += [rows for rows, _ in state]
            self._values += [values for _, values in state]
        self._values = [values[..., : self._kept] for values in self._values]
        self._bound()

    def parts(self) -> tuple[Tensor, Tensor, int, list[tuple[Tensor, Tensor]]]:
        """Everything, to be sent to another process and merged there."""
        return self.low, self.high, self._kept, self.state()

    def _bound(self) -> None:
        while self._kept > 1 and sum(values[0].numel() for values in self._values) > self._most:
            self._kept //= 2
            self._values = [values[..., : self._kept].clone() for values in self._values]

    def _places_in(self, size: int) -> Tensor:
        """Places of a sample of `size` values, in the order in which they are kept: the earlier, the longer."""
        if size not in self._places:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
            self._places[size] = order[:VALUES_A_SAMPLE].clone()
        return self._places[size]
