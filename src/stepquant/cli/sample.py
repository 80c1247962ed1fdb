"""``stepquant sample``: a grid of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Backend, Guidance, Memory, Seed, Steps, at_least_one, check_writable_file, progress


def sample(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_MODEL", help="A quantized folder, or any MODEL.")],
    out: Annotated[Path, typer.Option(help="The image grid to write.")] = Path("grid.png"),
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt of a text-to-image model; may be repeated.")] = None,
    label: Annotated[
        list[int] | None, typer.Option(help="Label of a class-conditional model; may be repeated.")
    ] = None,
    count: Annotated[int, typer.Option(help="Images.")] = 16,
    steps: Steps = 50,
    seed: Seed = 0,
    guidance: Guidance = None,
    backend: Backend = "auto",
    memory: Memory = "unpacked",
) -> None:
    """Draw images and write them as one grid."""
    from stepquant.distributed import Ranks
    from stepquant.images import grid, image_format, save_image
    from stepquant.layers.quantized import quantized_modules
    from stepquant.loading import resolve_pipeline
    from stepquant.models import denoiser_name
    from stepquant.pipelines.generate import generate_many, make_request
    from stepquant.runtime import check_memory, summary
    from stepquant.runtime.files import resolve_backend

    check_memory(memory)
    at_least_one("count", count)
    at_least_one("steps", steps)
    image_format(out)
    check_writable_file(out)
    pipeline = resolve_pipeline(model, resolve_backend(backend), memory)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if quantized_modules(denoiser) and Ranks.current().is_main:
        typer.echo(f"runtime: {summary(denoiser)}")
    request = make_request(pipeline, steps, prompts=prompt, labels=label, guidance=guidance)
    images = generate_many(pipeline, request, count, seed, progress(), "Drawing", ranks=Ranks.current())
    if Ranks.current().is_main:
        save_image(grid(images), out)
    typer.echo(f"{count} images in {steps} steps, seed {seed}: {out}")
