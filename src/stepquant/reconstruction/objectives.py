"""What a block's reconstruction minimises."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
"""``objective(quantized, target) -> scalar``; both float [B, ...]."""


def block_error(quantized: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the block's output (BRECQ, arXiv 2102.05426, Fisher matrix taken as identity)."""
    return (quantized - target).square().mean()
