"""Normalizations as a layer's pass over its input takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.runtime.native.build import library
from stepquant.runtime.native.library import TYPES


class Norm(NamedTuple):
    """``x * multiply + add`` before a layer: float32 [B, C] each, or [1, C] for all samples.

    With an epsilon, each position's channels are first normalized (layer normalization); without, `multiply` and `add`
    are all of a group normalization.
    """

    multiply: Tensor
    add: Tensor
    epsilon: float = 0.0


def dense(x: Tensor, *, image: bool) -> Tensor:
    """x itself where the kernels can read it, else a copy: channels adjacent, a linear's rows one after the other."""
    if x.dtype not in TYPES:
        x = x.float()
    if image:
        return (
            x
            if x.stride(1) == 1 or (x.shape[1] == 1 and x.is_contiguous())
            else x.contiguous(memory_format=torch.channels_last)
        )
    return x.contiguous()


def layer_norm(norm: nn.LayerNorm, multiply: Tensor | None = None, add: Tensor | None = None) -> Norm:
    """A layer normalization over the last dimension, then ``* multiply + add``, float32 [B, C] each."""
    size = norm.normalized_shape[-1]
    if norm.elementwise_affine:
        weight = norm.weight.float()[None]
        bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.float()[None]
    else:
        weight, bias = torch.ones(1, size), torch.zeros(1, size)
    if multiply is not None:
        weight, bias = weight * multiply, bias * multiply
    if add is not None:
        bias = bias + add
    return Norm(weight.contiguous(), bias.contiguous(), norm.eps)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Norm:
    """The normalization of x, float [B, C, H, W] or [B, N, C], as a scale and a shift of each sample's channels."""
    image = x.dim() == 4
    x = dense(x, image=image)
    batch, channels = x.shape[0], x.shape[1 if image else 2]
    pixels = x.shape[2] * x.shape[3] if image else x.shape[1]
    multiply, add = torch.empty(batch, channels), torch.empty(batch, channels)
    weight, bias = norm.weight.float(), norm.bias.float()
    library().sq_group_norm(
        x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(3 if image else 1), batch, pixels, channels,
        norm.num_groups, norm.eps, weight.data_ptr(), bias.data_ptr(), multiply.data_ptr(), add.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return Norm(multiply, add)


def is_present(norm: Any) -> bool:
    """Whether its parameters are there to be read: offloaded, they come back only while the norm itself runs."""
    return norm.weight is None or not norm.weight.is_meta
