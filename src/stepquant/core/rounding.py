"""Learned rounding: AdaRound for weights, straight-through estimates and LSQ gradients for activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.core.affine import clamp_codes, largest_code

# AdaRound stretches the sigmoid to [-0.1, 1.1] and clips it, so that 0 and 1 are reached exactly
# (arXiv 2004.10568, section 3.3).
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1

EDGE = 1e-3
"""Margin, in steps, by which a value outside the range still gets a gradient, so that a weight at the end can move."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)``, added to the floor of a weight (AdaRound, eq. 23)."""
    return (torch.sigmoid(v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The v with ``rectified_sigmoid(v) == h``, for h in [0, 1]."""
    return torch.logit((h - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))


def rounding_regularizer(v: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h(v) - 1|^beta)``: zero when every h is 0 or 1 (AdaRound, eq. 24)."""
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def annealed_beta(progress: float, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """Exponent of the regularizer at `progress` in [0, 1]: cosine from `start` to `end` after the warm-up."""
    if progress < warmup:
        return start
    phase = (progress - warmup) / (1 - warmup)
    return end + 0.5 * (start - end) * (1 + float(torch.cos(torch.tensor(phase * torch.pi))))


def linear_beta(progress: float, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """As `annealed_beta`, falling along a line (BRECQ's public code)."""
    return start if progress < warmup else end + (start - end) * (1 - (progress - warmup) / (1 - warmup))


def round_straight_through(x: Tensor) -> Tensor:
    """x rounded, exactly, with the gradient of x."""
    return torch.round(x).detach() + (x - x.detach())


class _LearnedQuantize(torch.autograd.Function):
    """Fake quantization whose gradient reaches x (straight through, clipped), the scale (LSQ, arXiv 1902.08153) and the
    zero point (LSQ+, arXiv 2004.09576: minus the scale where x is clipped, else 0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor) -> Tensor:
        # Codes are found in the scale's float32, also under bfloat16 autocast.
        steps = x * scale.reciprocal() if x.dtype == scale.dtype else x.to(scale.dtype).mul_(scale.reciprocal())
        codes = clamp_codes(torch.round(steps).add_(zero_point), bits).sub_(zero_point)
        ctx.save_for_backward(steps, codes, scale, zero_point)
        ctx.largest_code = largest_code(bits)
        return (codes * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        steps, codes, scale, zero_point = ctx.saved_tensors
        grad_out, dtype = grad.to(scale.dtype), grad.dtype
        reached, top = steps + zero_point, ctx.largest_code
        # The gradient where x is inside the range, else 0, in one pass over memory instead of five.
        if isinstance(top, int):
            grad_x = torch.ops.aten.hardtanh_backward(grad_out, reached, -EDGE, top + EDGE)
        else:
            grad_x = grad_out * ((reached > -EDGE) & (reached < top + EDGE))
        grad_scale = grad_zero = None
        values_a_scale = grad_out.numel() / scale.numel()
        if ctx.needs_input_grad[1]:
            # d x'/d s is code - x/s where x is inside the range, and the end of the range where it is clipped.
            slope = (grad_out * codes).addcmul_(grad_x, steps, value=-1)
            grad_scale = slope.sum_to_size(scale.shape) / (values_a_scale * top) ** 0.5
        if ctx.needs_input_grad[2]:
            slope = (grad_x - grad_out) * scale
            grad_zero = slope.sum_to_size(zero_point.shape) / (values_a_scale * top) ** 0.5
        return grad_x.to(dtype), grad_scale, grad_zero, None


def learned_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor) -> Tensor:
    """`fake_quantize` with gradients to x and, times LSQ's ``1 / sqrt(numel * qmax)``, to scale and zero point.

    Args:
        x: float, any shape.
        scale, zero_point: broadcast against x, with as many dimensions.
        bits: a tensor broadcasts against scale.
    """
    return _LearnedQuantize.apply(x, scale, zero_point, bits)
