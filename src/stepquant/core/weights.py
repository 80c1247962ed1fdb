"""Weights without calibration: groups of input channels, and rounding to nearest on a min-max grid."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.core.affine import affine_from_range
from stepquant.core.affine import quantize as quantize_values
from stepquant.core.qtensor import Grid, QTensor, expand_groups, stored_zero_point
from stepquant.core.ranges import minmax_range


def group_channels(channels: int, split: int | None, group_size: int | None) -> tuple[int, ...]:
    """Sizes of the groups of input channels: the sides of a `split`, divided by `group_size` if it divides both.

    A layer whose channels `group_size` does not divide keeps one group per side.
    """
    sides = (channels,) if split is None else (split, channels - split)
    if group_size is None or any(side % group_size for side in sides):
        return sides
    return tuple(group_size for side in sides for _ in range(side // group_size))


def round_to_nearest(weight: Tensor, bits: int, group_sizes: tuple[int, ...]) -> QTensor:
    """Quantize a weight on the grid between the smallest and the largest value of each output channel and group.

    Args:
        weight: float [out, in, *kernel].
        bits: 2 to 8; the grid is symmetric at 8 bits and affine below.
        group_sizes: sizes of consecutive groups of input channels; they sum to `in`.

    Returns:
        The quantized weight, on the CPU.
    """
    weight = weight.detach().float()
    groups = weight.split(group_sizes, dim=1)
    grids = [affine_from_range(*minmax_range(group.flatten(1)), bits, symmetric=bits == 8) for group in groups]
    scale, zero_point = (torch.stack(values) for values in zip(*grids, strict=True))
    spread = (-1, weight.shape[1], *(1,) * (weight.dim() - 2))
    along = [expand_groups(values, group_sizes).t().reshape(spread) for values in (scale, zero_point)]
    codes = quantize_values(weight, along[0], along[1], bits).to(torch.uint8)
    return QTensor(codes.cpu(), Grid(scale[None].cpu(), stored_zero_point(zero_point)[None], bits, group_sizes))
