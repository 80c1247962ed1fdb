"""The arguments of the exported C++ functions, field for field as in ``source/call.h``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch

from stepquant.errors import StepquantError

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The dtypes that activations may have."""

ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "geglu": 4}
"""What may be applied before values are quantized. For ``geglu`` x has twice the channels: values, then gates."""


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Plane = _structure(
    "Plane", image_bytes=c_int64, row_pixels=c_int64, front=c_int64, back=c_int64, top=c_int64, bottom=c_int64,
    left=c_int64, nan=c_int64,
)  # fmt: skip
Source = _structure(
    "Source", type=c_int32, scale=c_int32, image=c_int64, frame=c_int64, row=c_int64, pixel=c_int64, batch=c_int64,
    frames=c_int64, height=c_int64, width=c_int64, channels=c_int64, gate=c_int64,
)  # fmt: skip
Grids = _structure("Grids", channels=c_int64, groups=c_int64, scale=c_int64, zero_point=c_int64)
Layer = _structure(
    "Layer", weight=c_void_p, zero_point=c_void_p, weight_sum=c_void_p, weight_scale=c_void_p, bias=c_void_p,
    taps=c_void_p, starts=c_void_p, runs=c_void_p, run_sum=c_void_p, run_scale=c_void_p, tap_count=c_int64,
    run_count=c_int64, pieces=c_int64, outputs=c_int64, fours=c_int64, largest=c_int64,
)  # fmt: skip
Positions = _structure(
    "Positions", batch=c_int64, frames=c_int64, image_bytes=c_int64, frame_bytes=c_int64, row_bytes=c_int64,
    pixel_bytes=c_int64, height=c_int64, width=c_int64, flat=c_int64,
)  # fmt: skip
Call = _structure(
    "Call", x=c_void_p, scale=c_void_p, zero_point=c_void_p, top=c_void_p, multiply=c_void_p, add=c_void_p,
    codes=c_void_p, y=c_void_p, channel_add=c_void_p, gate=c_void_p, residual=c_void_p, smoothing=c_void_p,
    source=Source, plane=Plane, grids=Grids, layer=Layer, positions=Positions, per_sample=c_int32, norm_image=c_int64,
    epsilon=c_float, activation=c_int32, y_type=c_int32, residual_type=c_int32, factor=c_float, extension=c_int32,
    threads=c_int32,
)  # fmt: skip
OperandGrid = _structure(
    "OperandGrid", scale=c_void_p, zero_point=c_void_p, top=c_void_p, per_sample=c_int32
)  # fmt: skip
Heads = _structure("Heads", x=c_void_p, type=c_int32, image=c_int64, row=c_int64, head=c_int64)
Attention = _structure(
    "Attention", query=Heads, key=Heads, value=Heads, grids=OperandGrid * 4, mask=c_void_p, mask_image=c_int64,
    mask_head=c_int64, mask_row=c_int64, y=c_void_p, y_type=c_int32, y_image=c_int64, y_row=c_int64, y_head=c_int64,
    batch=c_int64, heads=c_int64, length=c_int64, key_length=c_int64, size=c_int64, key_heads=c_int64, factor=c_float,
    extension=c_int32, threads=c_int32,
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


STRUCTURES = (
    Plane, Source, Grids, Layer, Positions, Call, GroupNorm, Join, Heads, OperandGrid, Attention, Step, Pointer,
)  # fmt: skip
FUNCTIONS = ("sq_codes", "sq_layer", "sq_group_norm", "sq_attention", "sq_join")
"""Each takes the address of its structure, and returns 0, or 1 if there is not enough memory."""


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the functions, and compare the structures with the compiled ones.

    Raises:
        StepquantError: if a structure differs.
    """
    for name in FUNCTIONS:
        getattr(library, name).argtypes = [c_void_p]
    library.sq_replay.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64]
    library.sq_layout.argtypes = [ctypes.c_char_p]
    library.sq_layout.restype = ctypes.c_char_p
    for structure in STRUCTURES:
        _check_layout(library, structure)
    return library


def _check_layout(library: ctypes.CDLL, structure: Any) -> None:
    """Compare size and fields of a structure with what the compiler made of it."""
    fields = [(name, getattr(structure, name)) for name, _ in structure._fields_]
    described = [str(ctypes.sizeof(structure)), *(f"{name}@{field.offset}+{field.size}" for name, field in fields)]
    if library.sq_layout(structure.__name__.encode()) != " ".join(described).encode():
        raise StepquantError(
            f"the structure {structure.__name__} of the native kernels has another layout in C++ than in Python; "
            "expected equal fields. Install stepquant again."
        )


def no_memory() -> StepquantError:
    """The error of an exported function that returned 1."""
    return StepquantError(
        "the native runtime has not enough memory for a layer. Generate fewer images at a time, or smaller ones."
    )
