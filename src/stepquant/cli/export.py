"""``stepquant export``: a quantized denoiser for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Folder
from stepquant.cli.output import check_writable_folder
from stepquant.errors import StepquantError

SUFFIXES = {"openvino": ".xml", "onnx": ".onnx", "gguf": ".gguf"}
"""Format -> suffix of the network's file."""


def export(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help="Format: openvino, onnx or gguf.")],
    out: Annotated[Path, typer.Option(help="Folder to write the file to.")],
) -> None:
    """Export a quantized denoiser to another runtime."""
    from stepquant.export.gguf import export_gguf
    from stepquant.export.network import example_arguments
    from stepquant.export.onnx import export_onnx
    from stepquant.export.openvino import export_openvino
    from stepquant.models.denoisers import quantized_denoisers
    from stepquant.saving import load

    if to not in SUFFIXES:
        raise StepquantError(f"format {to!r} is unknown; expected one of {', '.join(SUFFIXES)}.")
    pipeline = load(folder)
    check_writable_folder(out)
    components = quantized_denoisers(pipeline)
    for component in components if to == "gguf" else list(components)[:1]:
        denoiser, path = getattr(pipeline, component), out / f"{component}{SUFFIXES[to]}"
        if to == "gguf":
            in_float = export_gguf(denoiser, path)
        else:
            write = {"openvino": export_openvino, "onnx": export_onnx}[to]
            in_float = write(denoiser, example_arguments(pipeline), path)
        if in_float:
            typer.echo(f"{len(in_float)} layers stay in floating point: {', '.join(in_float[:5])}")
        typer.echo(f"network: {path}" + (f", weights: {path.with_suffix('.bin')}" if to == "openvino" else ""))
