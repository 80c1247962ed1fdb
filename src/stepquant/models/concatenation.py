"""Concatenations along channels, followed until a layer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

MIXING = ("addmm", "baddbmm", "bmm", "cat", "convolution", "embedding", "linear", "matmul", "mm", "stack")
"""Operations whose output channels are not their input channels, even where their number is the same."""


@dataclass(frozen=True)
class Concatenation:
    """A tensor whose dimension `dim` is the concatenation of a trunk and a skip connection.

    Attributes:
        split: number of channels of the trunk, which comes first.
        dim: 0 or greater.
        before: the outermost module that finished last before the concatenation; None if there is none.
    """

    split: int
    dim: int
    before: str | None = None

    def after(self, operation: str, args: Sequence[Any], given: Sequence[int], made: Sequence[int]) -> Any:
        """Return the concatenation of an operation's output; None if its channels are not those of the input.

        Args:
            operation: name of an ATen operation.
            args: its positional arguments.
            given, made: shapes of the concatenated input and of the output.
        """
        dim, rank = self.dim, len(given)
        if operation in MIXING:
            return None
        if operation == "permute":
            return replace(self, dim=[axis % rank for axis in args[1]].index(dim))
        if operation in ("transpose", "t"):
            one, other = (axis % rank for axis in args[1:3]) if operation == "transpose" else (0, 1)
            return replace(self, dim={one: other, other: one}.get(dim, dim))
        if len(made) == rank:
            return self if made[dim] == given[dim] else None
        if list(made[: dim + 1]) == list(given[: dim + 1]):  # dimensions after it are merged or divided
            return self
        behind = rank - dim
        if list(made[-behind:]) == list(given[-behind:]):  # dimensions before it are
            return replace(self, dim=len(made) - behind)
        return None
