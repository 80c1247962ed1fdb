"""Normalizations in the form that is fused into a layer: a scale and a shift of each channel."""

from __future__ import annotations

from ctypes import byref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.runtime.native.build import library
from stepquant.runtime.native.library import TYPES, GroupNorm, no_memory
from stepquant.runtime.native.recording import record

_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What the kernels read, independent of torch's defaults."""


class Norm(NamedTuple):
    """``x * multiply + add`` before a layer.

    Attributes:
        multiply, add: float32 [B, C], or [1, C] for all samples; contiguous.
        epsilon: of a layer normalization, which normalizes the channels of each position first; 0 for a group
            normalization.
    """

    multiply: Tensor
    add: Tensor
    epsilon: float = 0.0


IMAGE = {1: "[B, C, L]", 2: "[B, C, H, W]", 3: "[B, C, T, H, W]"}
"""Inputs of convolutions over 1 to 3 dimensions."""


def dense(x: Tensor, *, dims: int) -> Tensor:
    """x if the kernels can read it, else a copy: channels adjacent, rows of a linear contiguous.

    Args:
        x: float [B, C, *size] with `dims` sizes, or [B, ..., C] if that is 0.

    Raises:
        StepquantError: if x is not in main memory, or not an image where one is expected.
    """
    if not x.is_cpu:
        raise StepquantError(f"a layer of the native runtime was given an input on {x.device}; expected cpu.")
    if dims and x.dim() != 2 + dims:
        raise StepquantError(f"a layer was given an input of shape {list(x.shape)}; expected {IMAGE[dims]}.")
    if x.dtype not in TYPES:
        x = x.float()
    if not dims:
        return x.contiguous()
    if x.stride(1) == 1 or (x.shape[1] == 1 and x.is_contiguous()):
        return x
    if dims == 2:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def check_channels(shape: torch.Size, given: int, expected: int) -> None:
    """Raise `StepquantError` if an input of shape `shape` has another number of channels than is expected."""
    if given != expected:
        raise StepquantError(f"a layer was given an input of shape {list(shape)}; expected {expected} channels.")


def layer_norm(norm: nn.LayerNorm, multiply: Tensor | None = None, add: Tensor | None = None) -> Norm:
    """A layer normalization over the last dimension, followed by ``* multiply + add``.

    Args:
        multiply, add: float32 [B, C].
    """
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
    """The group normalization of x as a scale and a shift of each sample's channels.

    Args:
        x: float [B, C, H, W] or [B, N, C].

    Raises:
        StepquantError: if x does not fit the normalization, or memory is not sufficient.
    """
    image = x.dim() == 4
    x = dense(x, dims=2 if image else 0)
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
    if library().sq_group_norm(byref(call)):
        raise no_memory()
    record(call)
    return Norm(multiply, add)


def _affine(norm: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a normalization, float32 [channels]; not copied if they are contiguous float32."""
    parts = []
    for name, missing in (("weight", 1.0), ("bias", 0.0)):
        part = norm._parameters[name]
        if part is None:
            parts.append(torch.full((channels,), missing, **_FLOAT))
            continue
        if part.numel() != channels or not part.is_cpu:
            raise StepquantError(
                f"the {name} of a normalization is {list(part.shape)} on {part.device}; expected [{channels}] on cpu."
            )
        parts.append(part.detach().float().contiguous())
    return parts[0], parts[1]


def is_present(norm: nn.Module) -> bool:
    """Whether the parameters of a normalization can be read: offloaded ones return only while the module runs."""
    weight = norm._parameters["weight"]
    return weight is None or not weight.is_meta
