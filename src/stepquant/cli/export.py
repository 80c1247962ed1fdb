"""``stepquant export``: a quantized denoiser for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import check_writable_folder
from stepquant.errors import StepquantError


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize.")],
    to: Annotated[str, typer.Option("--to", help="Format: openvino.")],
    out: Annotated[Path, typer.Option(help="Folder to write the network into.")],
) -> None:
    """Write a quantized denoiser as a network of another runtime, each step's scales inside."""
    from stepquant.api import load
    from stepquant.bench.networks import example
    from stepquant.export.openvino import export_openvino
    from stepquant.models import denoiser_name

    if to != "openvino":
        raise StepquantError(f"format {to!r} is not known: expected openvino.")
    pipeline = load(folder, backend="reference")
    check_writable_folder(out)
    component = denoiser_name(pipeline)
    path = out / f"{component}.xml"
    denoiser = getattr(pipeline, component)
    left = export_openvino(denoiser, example(denoiser, 2), path)
    if left:
        typer.echo(f"{len(left)} layers stay in floating point: {', '.join(left[:5])}")
    typer.echo(f"network: {path}, weights: {path.with_suffix('.bin')}")
