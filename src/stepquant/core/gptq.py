"""GPTQ: round one input channel at a time, and adjust those not rounded yet to reduce the output error."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.affine import largest_code

DAMPING = 0.01
"""Fraction of the mean of the second moments' diagonal that is added to it (as in GPTQ's public code)."""

COLUMNS = 64
"""Columns per block, whose errors update the rest of the weight in one matrix product."""

MOST_ROWS = 1 << 15
"""Maximum rows summed into second moments; neighbouring positions of an image carry nearly the same information."""

MOST_INPUTS = 4608
"""Maximum inputs (channels times kernel size) that are solved together. Time grows with their cube and memory with
their square: minutes and 20 GB for the 23,040 inputs of Stable Diffusion's widest convolution."""

RIDGE = 1.0
"""Ridge penalty of `aligned_weight`, as a fraction of the mean second moment. With a hundred samples, 0.01 overfits
(``docs/results/defaults.md``)."""


def gptq_weight(weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Compute the weight whose nearest codes are those of GPTQ (arXiv 2210.17323, algorithm 1).

    Minimizes ``|(W' - W) X|^2`` greedily: rounds one input at a time, those with large moments first, and distributes
    its error over the rest by the inverse of the second moments. The values returned are those just before each input
    was rounded, so that learned rounding can start from them.

    Args:
        weight: float [out, in].
        moments: float [in, in], ``X X^T`` over the inputs X that the layer sees.
        scale, zero_point: float [out, in], the grid of each weight.
        bits: 2 to 8.

    Returns:
        float32 [out, in].
    """
    order = moments.diagonal().argsort(descending=True)
    moments = moments.double()[order][:, order]
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    remaining = weight.double()[:, order].clone()
    scale, zero_point = scale.double()[:, order], zero_point.double()[:, order]
    top = largest_code(bits)
    for start in range(0, remaining.shape[1], COLUMNS):
        stop = min(start + COLUMNS, remaining.shape[1])
        errors = remaining.new_empty(remaining.shape[0], stop - start)
        for column in range(start, stop):
            steps = remaining[:, column] / scale[:, column]
            rounded = steps.round().clamp(-zero_point[:, column], top - zero_point[:, column]) * scale[:, column]
            error = (remaining[:, column] - rounded) / inverse[column, column]
            remaining[:, column + 1 : stop] -= error[:, None] * inverse[column, column + 1 : stop]
            errors[:, column - start] = error
        remaining[:, stop:] -= errors @ inverse[start:stop, stop:]
    result = torch.empty_like(remaining)
    result[:, order] = remaining
    return result.float()


def aligned_weight(weight: Tensor, moments: Tensor, cross: Tensor) -> Tensor:
    """Minimize ``|W' X' - W X|^2`` by ridge regression towards W, where X' is the quantized model's input.

    Compensates for the error that quantization of earlier layers left in the input (as GPTAQ, arXiv 2504.02692).

    Args:
        weight: W, float [out, in].
        moments: ``X' X'^T``, float [in, in].
        cross: ``X X'^T``, float [in, in].

    Returns:
        float32 [out, in].
    """
    mean = moments.diagonal().mean().double()
    if mean == 0:  # every input is zero
        return weight.float()
    ridge = RIDGE * mean * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    target = weight.double() @ (cross.double() + ridge)
    return torch.linalg.solve(moments.double() + ridge, target.t()).t().float()


def split_inputs(channels: int, taps: int) -> list[slice]:
    """Split the columns of a flattened weight, [out, channels * taps], between channels into parts of `MOST_INPUTS`.

    Each part is aligned and rounded independently, as if the second moments between parts were zero.
    """
    count = math.ceil(channels / max(1, MOST_INPUTS // taps))
    each = math.ceil(channels / count)
    return [slice(start * taps, min(start + each, channels) * taps) for start in range(0, channels, each)]


def row_step(samples: int, x: Tensor, module: Any) -> int:
    """Smallest step between positions for which `samples` inputs of the shape of x give at most `MOST_ROWS` rows."""
    if isinstance(module, nn.Linear):
        rows = samples * x[0, ..., 0].numel()
        return math.ceil(rows / MOST_ROWS)
    rows = samples * math.prod(x.shape[2:]) // math.prod(module.stride)
    return math.ceil((rows / MOST_ROWS) ** (1 / len(module.stride)))


def input_rows(x: Tensor, module: Any, step: int = 1) -> Tensor:
    """Rows that a linear or an ungrouped convolution multiplies with its flattened weight: float [rows, in].

    Args:
        x: the layer's input, float [B, ..., in] or [B, C, *size]; for the latter, in is C times the kernel size.
        step: stride between rows of a linear, or between positions of a convolution in every direction.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[::step]
    assert not isinstance(module.padding, str)
    stride = tuple(step * size for size in module.stride)
    if len(stride) == 2:
        columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    x = F.pad(x, [size for padding in reversed(module.padding) for size in (padding, padding)])
    for dim, (size, gap, each) in enumerate(zip(module.kernel_size, module.dilation, stride, strict=True), start=2):
        x = x.unfold(dim, (size - 1) * gap + 1, each)[..., ::gap]
    return x.movedim(1, len(stride) + 1).flatten(len(stride) + 1).flatten(0, len(stride))
