"""The uniform affine quantizer.

    code = clamp(round(x * (1 / scale)) + zero_point, 0, 2^bits - 1)
    x'   = (code - zero_point) * scale

Rounding is half to even. The reciprocal is taken once, in float32: that is what integer kernels do, so that
simulation and kernels agree on every code. Scale and zero point broadcast against x, and so do bits that differ, which
are an integer tensor.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-8
"""Scales are kept at or above this, so that a constant or all-zero tensor still quantizes without dividing by 0."""


@overload
def largest_code(bits: int) -> int: ...
@overload
def largest_code(bits: Tensor) -> Tensor: ...
@overload
def largest_code(bits: int | Tensor) -> int | Tensor: ...
def largest_code(bits: int | Tensor) -> int | Tensor:
    """The largest unsigned code of `bits` bits, 2^bits - 1; int32 for a tensor."""
    return (1 << bits) - 1 if isinstance(bits, int) else (1 << bits.int()) - 1


def clamp_codes(codes: Tensor, bits: int | Tensor) -> Tensor:
    """Limit `codes` to 0 to 2^bits - 1, in place unless bits differ."""
    top = largest_code(bits)
    return codes.clamp_(0, top) if isinstance(top, int) else torch.minimum(codes.clamp_(min=0), top)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor) -> Tensor:
    """Codes of x, integers held in x's floating dtype (callers cast where they store them)."""
    return clamp_codes(torch.round(x * scale.reciprocal()) + zero_point, bits)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of codes; computed in the dtype of `scale`."""
    return (codes.to(scale.dtype) - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor) -> Tensor:
    """The value that the codes of x stand for: ``dequantize(quantize(x))``."""
    return (quantize(x, scale, zero_point, bits) - zero_point) * scale


def affine_from_range(
    low: Tensor, high: Tensor, bits: int | Tensor, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid spans [low, high]; the range is first widened to hold 0 exactly.

    Args:
        low, high: float tensors of one shape.
        bits: 2 to 8; a tensor broadcasts against `low`.
        symmetric: zero point fixed at 2^(bits-1); the grid then reaches from -2^(bits-1) to 2^(bits-1) - 1 steps.

    Returns:
        ``(scale, zero_point)``, both of the shape of `low`; the zero point is an integer in the float dtype.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        half = (largest_code(bits) + 1) // 2
        scale = torch.maximum(-low / half, high / (half - 1)).clamp(min=SMALLEST_SCALE)
        return scale, torch.ones_like(scale) * half
    top = largest_code(bits)
    spread = high - low
    # The spread of a range that uses all of the dtype is beyond it.
    scale = torch.where(spread.isfinite(), spread / top, high / top - low / top).clamp(min=SMALLEST_SCALE)
    return scale, clamp_codes(torch.round(-low / scale), bits)
