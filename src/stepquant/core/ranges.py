"""Clipping ranges: min-max, or the range with the smallest error |x - x'|^p.

Functions take values as [rows, n], one range per row, and return ``(low, high)``, float [rows].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stepquant.core.affine import affine_from_range, fake_quantize

RangeMethod = Literal["minmax", "least-error"]

Range = RangeMethod | Callable[[Tensor, int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A method, or a custom search ``(values, bits, low, high) -> (low, high)`` over values, float [rows, n], whose minimum
and maximum are `low` and `high`, float [rows]."""

AT_ONCE = 1 << 17
"""Values per step of the search, so that they stay in the CPU's cache."""

ERROR_POWER = 2.4
"""Exponent of the error that range search minimizes (BRECQ, arXiv 2102.05426, public code)."""


def minmax_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each row."""
    low, high = values.aminmax(dim=1)
    return low, high


def least_error_range(
    values: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    low: Tensor | None = None,
    high: Tensor | None = None,
    candidates: int = 100,
    power: float = ERROR_POWER,
) -> tuple[Tensor, Tensor]:
    """Search `candidates` shrunken copies of each row's full range for the smallest ``mean |x - x'|^power``.

    Args:
        values: float [rows, n]; a subset of the tensor's values if `low` and `high` are given.
        bits, symmetric: the grid (see `affine_from_range`).
        low, high: float [rows], minimum and maximum of the whole tensor; by default those of `values`.
    """
    if low is None or high is None:
        low, high = minmax_range(values)
    rows = max(1, AT_ONCE // values.shape[1])
    if rows < len(values):  # rows are independent
        parts = [
            least_error_range(some, bits, symmetric=symmetric, low=bottom, high=top, candidates=candidates, power=power)
            for some, bottom, top in zip(values.split(rows), low.split(rows), high.split(rows), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    ratios = torch.tensor([step / candidates for step in range(candidates, 0, -1)]).to(low)[:, None]
    lows, highs = low * ratios, high * ratios
    best = _least_error(values, *affine_from_range(lows, highs, bits, symmetric=symmetric), bits, power)[None]
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def _least_error(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int, power: float) -> Tensor:
    """Index of the first grid, of [candidates, rows], with the smallest ``mean |x - x'|^power``: int64 [rows]."""
    at_once = max(1, AT_ONCE // max(1, values.numel()))
    errors = []
    for scales, zero_points in zip(
        scale[:, :, None].split(at_once), zero_point[:, :, None].split(at_once), strict=True
    ):
        distance = fake_quantize(values, scales, zero_points, bits).sub_(values).abs_()
        errors.append(distance.log_().mul_(power).exp_().mean(dim=2))  # four times as fast as pow
    return torch.cat(errors).nan_to_num_(nan=torch.inf).argmin(dim=0)


GAINS = tuple(2.0 ** (step / 8) for step in range(-16, 13))
"""Candidates of `least_error_gain`."""


def least_error_gain(
    values: Tensor, scale: Tensor, zero_point: Tensor, bits: int, power: float = ERROR_POWER
) -> Tensor:
    """Search `GAINS` on the scale, at a fixed zero point, for the smallest ``mean |x - x'|^power``: float [rows].

    Args:
        values: float [rows, n].
        scale, zero_point: float [rows].
    """
    gains = torch.tensor(GAINS).to(scale)
    scales = scale * gains[:, None]
    return gains[_least_error(values, scales, zero_point.expand_as(scales), bits, power)]


def find_range(
    values: Tensor,
    bits: int,
    method: Range,
    *,
    symmetric: bool = False,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Range of each row of `values`, float [rows, n], by `method`; `low` and `high` as in `least_error_range`."""
    if low is None or high is None:
        low, high = minmax_range(values)
    if callable(method):
        return method(values, bits, low, high)
    if method == "least-error":
        return least_error_range(values, bits, symmetric=symmetric, low=low, high=high)
    return low, high
