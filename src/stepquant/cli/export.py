"""``stepquant export``: a quantized denoiser for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import check_writable_folder
from stepquant.errors import StepquantError

FORMATS = {"openvino": ".xml", "onnx": ".onnx"}
"""Format -> how the network's file ends."""


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize.")],
    to: Annotated[str, typer.Option("--to", help="Format: openvino or onnx.")],
    out: Annotated[Path, typer.Option(help="Folder to write the network into.")],
) -> None:
    """Write a quantized denoiser as a network of another runtime, each step's scales inside."""
    from stepquant.export.network import example_arguments
    from stepquant.export.onnx import export_onnx
    from stepquant.export.openvino import export_openvino
    from stepquant.models import denoiser_name
    from stepquant.saving import load

    if to not in FORMATS:
        raise StepquantError(f"format {to!r} is not known: expected {' or '.join(FORMATS)}.")
    write = {"openvino": export_openvino, "onnx": export_onnx}[to]
    pipeline = load(folder)
    check_writable_folder(out)
    component = denoiser_name(pipeline)
    path = out / f"{component}{FORMATS[to]}"
    left = write(getattr(pipeline, component), example_arguments(pipeline), path)
    if left:
        typer.echo(f"{len(left)} layers stay in floating point: {', '.join(left[:5])}")
    typer.echo(f"network: {path}" + (f", weights: {path.with_suffix('.bin')}" if to == "openvino" else ""))
