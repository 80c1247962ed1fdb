"""Triton kernels that precede a product: group normalization statistics; and normalization, SiLU and quantization in
one pass over the activation.

Products take signed 8-bit codes, so codes and zero points here are 128 less than those of the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2**23)
"""Adding and subtracting it rounds a float32 below 2^22 half to even, since larger floats have no fraction bits."""


@triton.jit
def quantize_kernel(
    x, multiply, add, smoothing, row, scale, zero_point, codes, invalid,
    M, C, x_sample, x_pixel, norm_sample, per_sample, per_row,
    GROUPS: tl.constexpr, TOP: tl.constexpr, SILU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``code = clamp(round(silu(x * multiply + add) * (1 / (scale * smoothing))) + zero_point)``.

    x: float [B, pixels, C], strides of samples and pixels given; multiply, add: float32 [B, C]; codes: int8 [M, C].
    invalid: float32 [B], zeros; becomes NaN for samples with NaN, which codes cannot represent.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channels < C
    valid = (rows < M)[:, None] & known[None, :]
    rows = tl.where(rows < M, rows, 0)
    sample, pixel = (rows // per_sample).to(tl.int64), (rows % per_sample).to(tl.int64)
    at = sample * x_sample + pixel * x_pixel
    values = tl.load(x + at[:, None] + channels[None, :], mask=valid, other=0.0).to(tl.float32)
    if multiply is not None:
        of_norm = sample[:, None] * norm_sample + channels[None, :]
        values = values * tl.load(multiply + of_norm, mask=valid, other=0.0)
        values += tl.load(add + of_norm, mask=valid, other=0.0)
    if SILU:
        values = values * tl.sigmoid(values)
    has_nan = tl.max((values != values).to(tl.int32), 1) > 0
    tl.store(invalid + sample, float("nan"), mask=has_nan)
    step = tl.load(row + rows // per_row) * GROUPS
    size = tl.load(scale + step)[:, None]
    if smoothing is not None:
        size = size * tl.load(smoothing + channels, mask=known, other=1.0)[None, :]
    # div_rn rounds to nearest, as a CPU does; clamping before rounding keeps values in the range of ROUNDER.
    steps = tl.minimum(tl.maximum(values * tl.div_rn(1.0, size), -1024.0), 1024.0)
    found = ((steps + ROUNDER) - ROUNDER).to(tl.int32) + tl.load(zero_point + step)[:, None]
    found = tl.minimum(tl.maximum(found, -128), TOP - 128)
    tl.store(codes + rows[:, None].to(tl.int64) * C + channels[None, :], found.to(tl.int8), mask=valid)


@triton.jit
def group_norm_kernel(
    x, weight, bias, multiply, add, pixels, C, x_sample, x_pixel, eps,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Scale and shift of the WIDTH channels of one sample's group, in two passes."""
    sample, group = tl.program_id(0), tl.program_id(1)
    offsets, within = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_W)
    channels = group * WIDTH + within
    own = within < WIDTH
    start = x + sample.to(tl.int64) * x_sample + channels[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        p = first + offsets
        total += tl.load(
            start + p[:, None].to(tl.int64) * x_pixel, mask=(p < pixels)[:, None] & own[None, :], other=0.0
        )
    mean = tl.sum(tl.sum(total, 1), 0) / (pixels * WIDTH)
    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        p = first + offsets
        valid = (p < pixels)[:, None] & own[None, :]
        values = tl.load(start + p[:, None].to(tl.int64) * x_pixel, mask=valid, other=0.0).to(tl.float32)
        centred = tl.where(valid, values - mean, 0.0)
        total += centred * centred
    inverse = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(total, 1), 0) / (pixels * WIDTH) + eps)
    slope = tl.load(weight + channels, mask=own, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias + channels, mask=own, other=0.0).to(tl.float32) - mean * slope
    tl.store(multiply + sample * C + channels, slope, mask=own)
    tl.store(add + sample * C + channels, shift, mask=own)
