"""GPTQ: the error of rounding one input channel is compensated by the channels that are not rounded yet."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.affine import largest_code

DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean (GPTQ's public code)."""

COLUMNS = 64
"""Columns whose errors reach the rest of the weight in one product: the order of additions, and nothing else."""

MOST_ROWS = 1 << 15
"""Rows of second moments worth adding up: neighbouring positions of an image say nearly the same."""

MOST_INPUTS = 4608
"""Inputs of a layer (channels times the size of the kernel) gptq-rounded together. Solving takes their third power
in time and their second in memory: minutes and 20 GB for the 23,040 of Stable Diffusion's widest convolution."""

RIDGE = 1.0
"""How strongly an aligned weight is drawn to the original one, as a share of the mean second moment: with a hundred
samples, 0.01 fits their noise (``docs/results/defaults.md``)."""


def gptq_weight(weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The weight that, rounded to nearest, has the least output error GPTQ finds (arXiv 2210.17323, algorithm 1).

    Minimises ``|(W' - W) X|^2`` greedily: input by input, each is rounded and its error spread over the rest by the
    inverse of the second moments; inputs of large moments go first. Returned are the unrounded weights at the moment
    each was rounded, so that learned rounding can go on from there.

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
    """The weight W' of least ``|W' X' - W X|^2``: the layer's own output, from the inputs X' that it gets now.

    Undoes, as far as a linear map can, what quantization has done to the input so far (GPTAQ, arXiv 2504.02692, has
    the same aim). Ridge regression towards W.

    Args:
        weight: W, float [out, in].
        moments: ``X' X'^T``, float [in, in].
        cross: ``X X'^T``, float [in, in].

    Returns:
        float32 [out, in].
    """
    mean = moments.diagonal().mean().double()
    ridge = RIDGE * mean * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    target = weight.double() @ (cross.double() + ridge)
    return torch.linalg.solve(moments.double() + ridge, target.t()).t().float()


def parts_of_inputs(channels: int, taps: int) -> list[slice]:
    """The columns of a flattened weight, [out, channels * taps], in parts of at most `MOST_INPUTS` and whole channels.

    Each part is aligned and gptq-rounded for itself, as if the second moments between parts were zero.
    """
    count = math.ceil(channels / max(1, MOST_INPUTS // taps))
    each = math.ceil(channels / count)
    return [slice(start * taps, min(start + each, channels) * taps) for start in range(0, channels, each)]


def sparser(samples: int, x: Tensor, module: nn.Linear | nn.Conv2d) -> int:
    """The least step between positions at which `samples` inputs of the shape of x give at most `MOST_ROWS` rows."""
    if isinstance(module, nn.Linear):
        rows = samples * x[0, ..., 0].numel()
        return math.ceil(rows / MOST_ROWS)
    rows = samples * x.shape[-2] * x.shape[-1] // math.prod(module.stride)
    return math.ceil(math.sqrt(rows / MOST_ROWS))


def input_rows(x: Tensor, module: nn.Linear | nn.Conv2d, step: int = 1) -> Tensor:
    """The rows that a linear or an ungrouped convolution multiplies with its flattened weight: float [rows, in].

    Args:
        x: the layer's input, float [B, ..., in] or [B, C, H, W]; then in is C times the size of the kernel.
        step: take every `step`-th row of a linear, or position of a convolution in both directions.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[::step]
    assert not isinstance(module.padding, str)
    stride = tuple(step * size for size in module.stride)
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])
