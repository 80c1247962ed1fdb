"""Helpers shared by the kernels of several runtimes."""

from __future__ import annotations

import torch
from torch import Tensor


def along_channels(values: Tensor, dim: int, output_dims: int) -> Tensor:
    """Shape values, float [out] or [B, out], to broadcast against an output with channels at `dim`."""
    shape = [1] * output_dims
    shape[dim] = values.shape[-1]
    if values.dim() == 2:
        shape[0] = values.shape[0]
    return values.reshape(shape)


def bound(weight: Tensor, bits: int) -> int:
    """Largest absolute value of an accumulator for these integer weights and `bits`-bit activations."""
    return int(weight.flatten(1).to(torch.int64).abs().sum(dim=1).max()) * ((1 << bits) - 1)
