"""Integer products in Triton: a matrix product, and a convolution as an implicit matrix product.

Both multiply int8 codes (`codes`) by 8-bit or 4-bit weights into int32, subtract the zero point by the weight's sums,
and apply scales, bias and residual in the epilogue.

4-bit weights are stored two per byte: channel j in the low half of byte j, channel j + half in the high half, where
half is half the channels, rounded up. So a tile of bytes is two tiles of weights without shuffling, each multiplied by
codes that are adjacent in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepquant.runtime.cuda.tuning import tuned


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HIGH: tl.constexpr):
    """Rows and columns of this program's tile, in an order that reuses the L2 cache."""
    program = tl.program_id(0)
    across = tl.cdiv(N, BLOCK_N)
    first = program // (HIGH * across) * HIGH
    high = min(tl.cdiv(M, BLOCK_M) - first, HIGH)
    within = program % (HIGH * across)
    rows = (first + within % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, within // high * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _finish(
    sums, rows, columns, valid, N, row, per_row, scale, zero_point, GROUPS, weight_sum, weight_scale, bias,
    invalid, channel_add, per_sample, residual, factor, y,
):  # fmt: skip
    """Store ``((sums - zero_point * weight_sum) * scale * weight_scale + bias + channel_add + residual) * factor``,
    and NaN for samples where `invalid` is NaN; it is 0 for the others."""
    step = tl.load(row + rows // per_row) * GROUPS
    inside = columns < N
    zero = tl.load(zero_point + step)
    sums -= zero[:, None] * tl.load(weight_sum + columns, mask=inside, other=0)[None, :]
    scales = tl.load(scale + step)[:, None] * tl.load(weight_scale + columns, mask=inside, other=0.0)[None, :]
    samples = (rows // per_sample).to(tl.int64)
    values = sums.to(tl.float32) * scales + tl.load(invalid + samples)[:, None]
    if bias is not None:
        values += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    if channel_add is not None:
        values += tl.load(channel_add + samples[:, None] * N + columns[None, :], mask=valid, other=0.0)
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    if residual is not None:
        values += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(y + at, (values * factor).to(y.dtype.element_ty), mask=valid)


@tuned(["BUCKET", "N", "K"])
@triton.jit
def matmul_kernel(
    codes, invalid, weight, weight_zero_point, weight_sum, weight_scale, bias, row, scale, zero_point, residual, y,
    M, N, K, RUN, per_sample, per_row, factor, BUCKET, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """codes: int8 [M, K]; weight: int8 [N, RUN], RUN = K; or uint8, RUN half of it, with a zero point; y: [M, N]."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, HIGH)
    inside = rows < M
    rows = tl.where(inside, rows, 0)  # rows that are not stored are computed from row 0
    channels = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    left = codes + rows[:, None].to(tl.int64) * K
    right = weight + columns[None, :].to(tl.int64) * RUN
    if weight_zero_point is None:
        for start in range(0, K, BLOCK_K):
            c = start + channels
            a = tl.load(left + c[None, :], mask=c[None, :] < K, other=0)
            b = tl.load(right + c[:, None], mask=(c[:, None] < K) & (columns[None, :] < N), other=0)
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    else:
        zero = tl.load(weight_zero_point + columns, mask=columns < N, other=0)[None, :]
        for start in range(0, RUN, BLOCK_K):
            c = start + channels
            pair = tl.load(right + c[:, None], mask=(c[:, None] < RUN) & (columns[None, :] < N), other=0)
            a = tl.load(left + c[None, :], mask=c[None, :] < RUN, other=0)
            sums = tl.dot(a, (pair & 15).to(tl.int8) - zero, sums, out_dtype=tl.int32)
            # Beyond the channels codes are 0, so the weight does not matter.
            a = tl.load(left + RUN + c[None, :], mask=c[None, :] < K - RUN, other=0)
            sums = tl.dot(a, (pair >> 4).to(tl.int8) - zero, sums, out_dtype=tl.int32)
    valid = inside[:, None] & (columns[None, :] < N)
    _finish(
        sums, rows, columns, valid, N, row, per_row, scale, zero_point, GROUPS, weight_sum, weight_scale, bias,
        invalid, None, per_sample, residual, factor, y,
    )  # fmt: skip


@triton.jit
def _window(left, pixels, present, pad, c, channels):
    """Codes of one tap's pixels and these channels; the zero point outside the image, 0 beyond the channels."""
    known = c[None, :] < channels
    values = tl.load(left + pixels[:, None] + c[None, :], mask=present[:, None] & known, other=0)
    return tl.where(known & (present[:, None] == 0), pad[:, None], values)


@tuned(["BUCKET", "N", "C", "KW", "TAPS"])
@triton.jit
def convolution_kernel(
    codes, invalid, weight, weight_zero_point, weight_sum, weight_scale, bias, row, scale, zero_point,
    channel_add, residual, y, M, N, C, RUN, H, W, OUT_H, OUT_W, per_row, factor, BUCKET,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KW: tl.constexpr, TAPS: tl.constexpr, UPSAMPLE: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """codes: int8 [B, H, W, PARTS * C]; weight: int8 [PARTS * N, TAPS, RUN], RUN = C, or uint8, RUN half of it, with a
    zero point; y: float [B, OUT_H, OUT_W, PARTS * N]. M = B * OUT_H * OUT_W; PARTS: groups of the convolution."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, HIGH)
    part = tl.program_id(1)
    inside = rows < M
    rows = tl.where(inside, rows, 0)
    known = columns < N
    columns = columns + part * N
    sample, position = rows // (OUT_H * OUT_W), rows % (OUT_H * OUT_W)
    top, leftmost = position // OUT_W * SH - PH, position % OUT_W * SW - PW
    # The zero point pads the image, so that padding contributes 0.
    pad = tl.load(zero_point + tl.load(row + rows // per_row) * GROUPS).to(tl.int8)
    offsets = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    left = codes + part * C
    pieces = tl.cdiv(RUN, BLOCK_K)
    if weight_zero_point is not None:
        zero = tl.load(weight_zero_point + columns, mask=known, other=0)[None, :]
    for index in range(TAPS * pieces):
        tap = index // pieces
        c = index % pieces * BLOCK_K + offsets
        y_in, x_in = top + tap // KW * DH, leftmost + tap % KW * DW
        present = (y_in >= 0) & (y_in < H * UPSAMPLE) & (x_in >= 0) & (x_in < W * UPSAMPLE)
        pixels = ((sample * H + y_in // UPSAMPLE) * W + x_in // UPSAMPLE).to(tl.int64) * (PARTS * C)
        right = weight + (columns[None, :].to(tl.int64) * TAPS + tap) * RUN
        b = tl.load(right + c[:, None], mask=(c[:, None] < RUN) & known[None, :], other=0)
        a = _window(left, pixels, present, pad, c, RUN)
        if weight_zero_point is None:
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(a, (b & 15).to(tl.int8) - zero, sums, out_dtype=tl.int32)
            a = _window(left + RUN, pixels, present, pad, c, C - RUN)
            sums = tl.dot(a, (b >> 4).to(tl.int8) - zero, sums, out_dtype=tl.int32)
    valid = inside[:, None] & known[None, :]
    _finish(
        sums, rows, columns, valid, N * PARTS, row, per_row, scale, zero_point, GROUPS, weight_sum, weight_scale, bias,
        invalid, channel_add, OUT_H * OUT_W, residual, factor, y,
    )  # fmt: skip
