"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stepquant.errors import StepquantError


class FloatType(StrEnum):
    """Floating-point types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, or zoo:NAME.")]
AnyModel = Annotated[str, typer.Argument(metavar="DIR_OR_MODEL", help="A quantized folder, or any MODEL.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize.")]
Against = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The full-precision model; default: the one the folder names.")
]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")]
Bits = Annotated[str, typer.Option(help="Bits of weights and activations, such as w8a8, w4a8, w4a16.")]
Override = Annotated[
    list[str] | None, typer.Option(metavar="REGEX=BITS", help="Other bits for some layers; can be repeated.")
]
ExactTime = Annotated[
    bool, typer.Option("--exact-time", help="Keep layers that depend on the timestep alone in floating point.")
]
Budget = Annotated[
    str | None,
    typer.Option(metavar="BITS", help="Mean bits per weight, such as 4.5bits; the most sensitive layers keep 8 bits."),
]
Count = Annotated[int, typer.Option(help="Number of images.", min=1)]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", min=0)]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; default: the pipeline's.")]
Prompts = Annotated[Path | None, typer.Option(help="File with one prompt per line; default: the model's own prompts.")]
Backend = Annotated[
    str, typer.Option(help="Runtime of a quantized model: auto, native, onednn, cuda, reference, or path.py:function.")
]
Memory = Annotated[
    str,
    typer.Option(help="How weights of up to 4 bits are held: unpacked, or packed (half the memory, 14 % slower)."),
]
Device = Annotated[
    str | None,
    typer.Option(help="Compute there, such as cuda, one block at a time: the model need not fit; default: the CPU."),
]
DType = Annotated[
    FloatType, typer.Option("--dtype", help="Type of the full-precision weights; 16 bits take half the memory.")
]
Size = Annotated[int | None, typer.Option(help="Height and width in pixels; default: the model's own.", min=1)]
Json = Annotated[Path | None, typer.Option(help="Write the figures to this file.")]


def pairs_from(options: Sequence[str] | None, form: str) -> dict[str, str]:
    """``["mid_block=w8a8"]`` -> ``{"mid_block": "w8a8"}``; the name may contain ``=``.

    Args:
        form: the expected form, for the error message.
    """
    pairs = {}
    for text in options or ():
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise StepquantError(f"{text!r} cannot be parsed; expected {form}.")
        pairs[name] = value
    return pairs
