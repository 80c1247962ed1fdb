"""Normalizations as a layer's pass over its input takes them."""

from __future__ import annotations

from ctypes import byref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.runtime.native.build import library
from stepquant.runtime.native.library import TYPES, GroupNorm
from stepquant.runtime.native.recording import record

_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What the kernels take, whatever torch's defaults are."""


class Norm(NamedTuple):
    """``x * multiply + add`` before a layer: float32 [B, C] each, or [1, C] for all samples.

    With an epsilon, each position's channels are first normalized (layer normalization); without, `multiply` and `add`
    are all of a group normalization.
    """

    multiply: Tensor
    add: Tensor
    epsilon: float = 0.0


def dense(x: Tensor, *, image: bool) -> Tensor:
    """x itself where the kernels can read it, else a copy: channels adjacent, a linear's rows one after the other.

    Raises:
        StepquantError: if x is not in the processor's memory, or no image where it should be one.
    """
    if not x.is_cpu:
        raise StepquantError(f"a layer of the native runtime was given an input on {x.device}: expected it on cpu.")
    if image and x.dim() != 4:
        raise StepquantError(f"a layer was given an input of shape {list(x.shape)}: expected [B, C, H, W].")
    if x.dtype not in TYPES:
        x = x.float()
    if image:
        return (
            x
            if x.stride(1) == 1 or (x.shape[1] == 1 and x.is_contiguous())
            else x.contiguous(memory_format=torch.channels_last)
        )
    return x.contiguous()


def check_channels(shape: torch.Size, given: int, expected: int) -> None:
    """Raise `StepquantError` where an input of a shape has not as many channels as is expected."""
    if given != expected:
        raise StepquantError(f"a layer was given an input of shape {list(shape)}: expected {expected} channels.")


def layer_norm(norm: nn.LayerNorm, multiply: Tensor | None = None, add: Tensor | None = None) -> Norm:
    """A layer normalization over the last dimension, then ``* multiply + add``, float32 [B, C] each."""
    weight, bias = _affine(norm, norm.normalized_shape[-1])
    weight, bias = weight[None], bias[None]
    if multiply is not None:
        weight, bias = weight * multiply, bias * multiply
    if add is not None:
        bias = bias + add
    if len(bias) != len(weight):
        weight = weight.expand_as(bias)
    return Norm(weight.contiguous(), bias.contiguous(), norm.eps)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Norm:
    """The normalization of x, float [B, C, H, W] or [B, N, C], as a scale and a shift of each sample's channels."""
    image = x.dim() == 4
    x = dense(x, image=image)
    if image and x.shape[2] > 1 and x.shape[3] > 1 and x.stride(2) != x.shape[3] * x.stride(3):
        x = x.contiguous(memory_format=torch.channels_last)  # no gaps between rows
    shape, stride = x.shape, x.stride()
    pixel = stride[3] if image and shape[3] > 1 else stride[-2]
    batch, channels = shape[0], shape[1 if image else 2]
    check_channels(shape, channels, norm.num_channels)
    pixels = shape[2] * shape[3] if image else shape[1]
    weight, bias = _affine(norm, channels)
    multiply, add = torch.empty(2, batch, channels, **_FLOAT)
    call = GroupNorm(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), multiply.data_ptr(), add.data_ptr(), TYPES[x.dtype], norm.eps,
        stride[0], pixel, batch, pixels, channels, norm.num_groups, torch.get_num_threads(),
    )  # fmt: skip
    library().sq_group_norm(byref(call))
    record(call)
    return Norm(multiply, add)


def _affine(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias in float32, as they are where they are."""
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    return (
        torch.ones(channels, **_FLOAT) if weight is None else weight.detach().float(),
        torch.zeros(channels, **_FLOAT) if bias is None else bias.detach().float(),
    )


def is_present(norm: nn.Module) -> bool:
    """Whether its parameters are there to be read: offloaded, they come back only while the norm itself runs."""
    weight = norm._parameters["weight"]
    return weight is None or not weight.is_meta
