"""The kernels as torch operators, ``torch.ops.stepquant.*``, for torch.compile and CUDA graphs: they never synchronize
with the device, where the step's row lies.

Shared arguments:
    row: int64 [n], table rows: one for all samples, or one for each n-th part of the batch.
    scale, zero_point: float32 and int32 [R, G], the activation's table, zero points less 128.
    group: column of the table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from stepquant.core.affine import largest_code
from stepquant.runtime.cuda.codes import group_norm_kernel, quantize_kernel
from stepquant.runtime.cuda.products import convolution_kernel, matmul_kernel
from stepquant.runtime.cuda.tuning import bucket, chosen

ELEMENTS = 4096
"""Values that one program quantizes."""
WIDEST = 128
"""Maximum channels that one program quantizes."""


def _grid(rows: int, columns: int, parts: int) -> Any:
    """Launch grid of a product, as a function of its tile."""
    return lambda tile: (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"]), parts)


@torch.library.custom_op("stepquant::quantize", mutates_args=())
def quantize(
    x: Tensor,
    row: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: int,
    bits: int,
    smoothing: Tensor | None,
    multiply: Tensor | None,
    add: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Quantize ``silu(x * multiply + add)``.

    Args:
        x: float [B, pixels, C] with adjacent channels.
        bits: bits of the codes.
        smoothing: float32 [C], or None.
        multiply, add: float32 [B, C], or None.

    Returns:
        Codes less 128, int8, contiguous, of x's shape; and float32 [B], NaN for samples with NaN, else 0.
    """
    batch, pixels, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    invalid = torch.zeros(batch, dtype=torch.float32, device=x.device)
    rows = batch * pixels
    if codes.numel() == 0:
        return codes, invalid
    wide = min(triton.next_power_of_2(channels), WIDEST)
    high = ELEMENTS // wide
    with torch.cuda.device_of(x):
        quantize_kernel[(triton.cdiv(rows, high), triton.cdiv(channels, wide))](
            x, multiply, add, smoothing, row, scale[:, group], zero_point[:, group], codes, invalid,
            rows, channels, x.stride(0), x.stride(1), 0 if multiply is None else multiply.stride(0),
            pixels, rows // row.shape[0], scale.stride(0), largest_code(bits), silu, high, wide,
        )  # fmt: skip
    return codes, invalid


@quantize.register_fake
def _(x, *_grid_and_norm):  # type: ignore[no-untyped-def]
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
    )


@torch.library.custom_op("stepquant::group_norm", mutates_args=())
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Group normalization of x, float [B, pixels, C], as ``x * multiply + add``: float32 [B, C] each."""
    batch, pixels, channels = x.shape
    multiply, add = (torch.empty(batch, channels, dtype=torch.float32, device=x.device) for _ in range(2))
    width = channels // groups
    wide = triton.next_power_of_2(width)
    high = max(1, ELEMENTS // wide)
    with torch.cuda.device_of(x):
        group_norm_kernel[(batch, groups)](
            x, weight, bias, multiply, add, pixels, channels, x.stride(0), x.stride(1), eps, width, high, wide,
        )  # fmt: skip
    return multiply, add


@group_norm.register_fake
def _(x, *_norm):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(x.shape[0], x.shape[2], dtype=torch.float32, device=x.device) for _ in range(2))


@torch.library.custom_op("stepquant::matmul", mutates_args=())
def matmul(
    codes: Tensor,
    invalid: Tensor,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    row: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: int,
    residual: Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """``((codes - zero_point) weight^T * scales + bias + residual) * factor``: `dtype` [M, N].

    Args:
        codes: int8 [M, K]; invalid: float32 [B], as `quantize` returns them.
        weight: int8 [N, K]; or uint8 [N, half of K] and `weight_zero_point`: int8 [N], see `products`.
        weight_sum: int32 [N], sum of the integer weight; weight_scale, bias: float32 [N].
        residual: float [M, N], contiguous, or None.
    """
    rows, inputs = codes.shape
    outputs = weight.shape[0]
    y = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(codes):
        matmul_kernel[_grid(rows, outputs, 1)](
            codes, invalid, weight, weight_zero_point, weight_sum, weight_scale, bias, row, scale[:, group],
            zero_point[:, group], residual, y, rows, outputs, inputs, weight.shape[1], rows // invalid.shape[0],
            rows // row.shape[0], factor, bucket(rows), scale.stride(0), **chosen(),
        )  # fmt: skip
    return y


@matmul.register_fake
def _(codes, _invalid, weight, *scaling_and_residual):  # type: ignore[no-untyped-def]
    return torch.empty(codes.shape[0], weight.shape[0], dtype=scaling_and_residual[-1], device=codes.device)


@torch.library.custom_op("stepquant::convolution", mutates_args=())
def convolution(
    codes: Tensor,
    invalid: Tensor,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    row: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: int,
    channel_add: Tensor | None,
    residual: Tensor | None,
    factor: float,
    kernel_width: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    parts: int,
    upsample: int,
    output: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Convolution of the image that `codes` represent: `dtype` [B, *output, out], scaled as by `matmul`.

    Args:
        codes: int8 [B, H, W, C]; every pixel is repeated `upsample` times in each direction. invalid: float32 [B].
        weight: int8 [out, taps, C / parts]; or uint8, the last halved, and `weight_zero_point`: int8 [out].
        channel_add: float32 [B, out], or None.
        residual: float [B, *output, out], contiguous, or None.
        parts: groups of the convolution.
        output: height and width; windows that reach beyond the padded image see zeros.
    """
    batch, height, width, channels = codes.shape
    outputs, taps = weight.shape[:2]
    y = torch.empty(batch, *output, outputs, dtype=dtype, device=codes.device)
    rows = batch * output[0] * output[1]
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(codes):
        convolution_kernel[_grid(rows, outputs // parts, parts)](
            codes, invalid, weight, weight_zero_point, weight_sum, weight_scale, bias, row, scale[:, group],
            zero_point[:, group], channel_add, residual, y, rows, outputs // parts, channels // parts,
            weight.shape[2], height, width, *output, rows // row.shape[0], factor, bucket(rows), *stride, *padding,
            *dilation, kernel_width, taps, upsample, scale.stride(0), parts, **chosen(),
        )  # fmt: skip
    return y


@convolution.register_fake
def _(codes, _invalid, weight, *scaling_and_geometry):  # type: ignore[no-untyped-def]
    *_, output, dtype = scaling_and_geometry
    return torch.empty(codes.shape[0], *output, weight.shape[0], dtype=dtype, device=codes.device)
