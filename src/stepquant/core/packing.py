"""Pack codes into bytes: codes of up to 4 bits two per byte, others one per byte.

Codes of 5 to 7 bits take a byte each, so that kernels read them directly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.errors import StepquantError


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count + 1) // 2 if bits <= 4 else count


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes of any shape -> uint8 [packed_bytes]; with two to a byte, the earlier code is the low nibble."""
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}, expected uint8")
    flat = codes.reshape(-1)
    if bits > 4:
        return flat.clone()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    low, high = flat.view(-1, 2).unbind(1)
    return low | (high << 4)


def unpack(packed: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """Inverse of `pack`: uint8 codes of `shape`.

    Raises:
        StepquantError: if `packed` is not exactly the bytes that `shape` needs, or a code has more than `bits` bits.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_bytes(count, bits):
        raise StepquantError(
            f"packed codes are {packed.dtype} {list(packed.shape)}, but {list(shape)} at {bits} bits takes "
            f"{packed_bytes(count, bits)} bytes: the checkpoint is damaged, quantize the model again."
        )
    codes = torch.stack([packed & 0xF, packed >> 4], dim=1).view(-1)[:count] if bits <= 4 else packed
    if bits not in (4, 8) and count and int(codes.max()) >> bits:
        raise StepquantError(f"a code exceeds {bits} bits: the checkpoint is damaged, quantize the model again.")
    return codes.reshape(tuple(shape)).clone()
