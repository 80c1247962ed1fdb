"""Tiles of the products: autotuned once per shape on a GPU, fixed in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from stepquant.runtime.cuda.device import interpreted

INTERPRETED = interpreted()

TILES = [
    # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
    (256, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 128, 128, 8, 3),
    (128, 128, 64, 4, 4),
    (128, 64, 128, 4, 4),
    (64, 128, 128, 4, 4),
    (64, 64, 128, 4, 4),
    (64, 32, 128, 4, 5),
    (32, 64, 128, 4, 5),
    (16, 64, 128, 4, 5),
    (16, 128, 64, 4, 5),
]
HIGH = 8
"""Row tiles whose column tiles are computed together, so that both operands stay in the L2 cache."""
INTERPRETED_TILE = {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32, "HIGH": 2}


def configs() -> list[triton.Config]:
    """Candidates of the autotuner."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "HIGH": HIGH}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in TILES
    ]


def fitting(tried: list[triton.Config], sizes: dict[str, Any], **_more: Any) -> list[triton.Config]:
    """Tiles of which less than half lies outside the product, or else the smallest.

    Args:
        sizes: the kernel's arguments: ``M`` and ``N``, rows and columns of the product.
    """

    def overhang(config: triton.Config) -> int:
        return max(config.kwargs["BLOCK_M"] - 2 * sizes["M"], config.kwargs["BLOCK_N"] - 2 * sizes["N"])

    return [config for config in tried if overhang(config) < 0] or [min(tried, key=overhang)]


def tuned(key: list[str]) -> Callable[[Any], Any]:
    """Decorator: autotune a kernel's tile for each value of the arguments in `key`."""
    if INTERPRETED:
        return lambda kernel: kernel
    return triton.autotune(configs(), key, prune_configs_by={"early_config_prune": fitting})


def chosen() -> dict[str, int]:
    """The tile as launch arguments, if it is not autotuned."""
    return INTERPRETED_TILE if INTERPRETED else {}


def bucket(rows: int) -> int:
    """Round up the rows, so that similar batch sizes share a tile."""
    return triton.next_power_of_2(rows)
