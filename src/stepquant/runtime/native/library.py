"""The structures that the C++ functions take, field for field, and tensors turned into them."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""dtypes that activations may have."""


ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "geglu": 4}
"""What may be applied before values are quantized. Of ``geglu`` x has twice the channels, values and then gates."""


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Plane = _structure(
    "Plane", image_bytes=c_int64, row_pixels=c_int64, top=c_int64, bottom=c_int64, left=c_int64
)  # fmt: skip
Source = _structure(
    "Source", type=c_int32, scale=c_int32, image=c_int64, row=c_int64, pixel=c_int64, batch=c_int64, height=c_int64,
    width=c_int64, channels=c_int64, gate=c_int64,
)  # fmt: skip
Layer = _structure(
    "Layer", weight=c_void_p, zero_point=c_void_p, weight_sum=c_void_p, weight_scale=c_void_p, bias=c_void_p,
    taps=c_void_p, tap_count=c_int64, pieces=c_int64, outputs=c_int64,
)  # fmt: skip
Positions = _structure(
    "Positions", batch=c_int64, image_bytes=c_int64, row_bytes=c_int64, pixel_bytes=c_int64, height=c_int64,
    width=c_int64, flat=c_int64,
)  # fmt: skip
Call = _structure(
    "Call", x=c_void_p, scale=c_void_p, zero_point=c_void_p, multiply=c_void_p, add=c_void_p, codes=c_void_p,
    y=c_void_p, channel_add=c_void_p, gate=c_void_p, residual=c_void_p, smoothing=c_void_p, source=Source, plane=Plane,
    layer=Layer, positions=Positions, per_sample=c_int32, top=c_int32, norm_image=c_int64, epsilon=c_float,
    activation=c_int32, y_type=c_int32, residual_type=c_int32, factor=c_float, amx=c_int32, threads=c_int32,
)  # fmt: skip
Grid = _structure("Grid", values=c_void_p, zero_point=c_void_p, per_sample=c_int32, top=c_int32)
Heads = _structure("Heads", x=c_void_p, type=c_int32, image=c_int64, row=c_int64, head=c_int64)
Attention = _structure(
    "Attention", query=Heads, key=Heads, value=Heads, grids=Grid * 4, mask=c_void_p, mask_image=c_int64,
    mask_head=c_int64, mask_row=c_int64, y=c_void_p, y_type=c_int32, y_image=c_int64, y_row=c_int64, y_head=c_int64,
    batch=c_int64, heads=c_int64, length=c_int64, key_length=c_int64, size=c_int64, factor=c_float, amx=c_int32,
    threads=c_int32,
)  # fmt: skip
GroupNorm = _structure(
    "GroupNorm", x=c_void_p, weight=c_void_p, bias=c_void_p, multiply=c_void_p, add=c_void_p, type=c_int32,
    epsilon=c_float, image=c_int64, pixel=c_int64, batch=c_int64, pixels=c_int64, channels=c_int64, groups=c_int64,
    threads=c_int32,
)  # fmt: skip
Join = _structure(
    "Join", x=c_void_p * 2, y=c_void_p, bytes=c_int64 * 2, pixels=c_int64, threads=c_int32
)  # fmt: skip
Step = _structure("Step", kind=c_int64, at=c_int64)
Pointer = _structure("Pointer", at=c_int64, slot=c_int64, offset=c_int64, by_row=c_int64)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take, so that pointers are not cut to 32 bits."""
    for name in ("sq_codes", "sq_layer", "sq_group_norm", "sq_attention", "sq_join"):
        getattr(library, name).argtypes = [c_void_p]
    library.sq_replay.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64]
    for name in ("sq_codes", "sq_layer", "sq_group_norm", "sq_attention", "sq_join", "sq_replay"):
        getattr(library, name).restype = None
    return library


def pack_columns(weight: Tensor) -> Tensor:
    """int8 [out, taps, run] -> the tiles of ``product.h``: [tiles of 16 outputs, even][taps][pieces][16][16][4]."""
    out, taps, run = weight.shape
    tiles, pieces = (out + 31) // 32 * 2, (run + 63) // 64
    padded = weight.new_zeros(tiles * 16, taps, pieces * 64)
    padded[:out, :, :run] = weight
    return padded.view(tiles, 16, taps, pieces, 16, 4).permute(0, 2, 3, 4, 1, 5).contiguous()


def unpack_columns(tiles: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Inverse of `pack_columns`: int8 of `shape`, [out, taps, run]."""
    out, taps, run = shape
    return tiles.permute(0, 4, 1, 2, 3, 5).reshape(tiles.shape[0] * 16, taps, -1)[:out, :, :run]


def pack_nibbles(tiles: Tensor, zero_point: Tensor) -> Tensor:
    """Tiles of `pack_columns` as codes of 4 bits: byte i of each 32 holds those of weights i (low) and i + 32 (high).

    Args:
        zero_point: uint8 [tiles * 16], one a column; the code of a weight is weight + zero point.
    """
    codes = (tiles + zero_point.view(torch.int8).view(-1, 1, 1, 1, 16, 1)).view(torch.uint8).view(-1, 2, 32)
    return codes[:, 0] | (codes[:, 1] << 4)


def unpack_nibbles(nibbles: Tensor, zero_point: Tensor, taps: int) -> Tensor:
    """Inverse of `pack_nibbles`."""
    codes = torch.stack([nibbles & 0xF, nibbles >> 4], dim=1).view(torch.int8)
    tiles = codes.view(zero_point.shape[0] // 16, taps, -1, 16, 16, 4)
    return tiles - zero_point.view(torch.int8).view(-1, 1, 1, 1, 16, 1)


def padded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[out] -> [out rounded up to 32], the rest 0."""
    result = torch.zeros((values.shape[0] + 31) // 32 * 32, dtype=dtype, device=values.device)
    result[: values.shape[0]] = values
    return result
