"""``stepquant sample``: a grid of generated images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import AnyModel, Backend, Count, Guidance, Inputs, Memory, Seed, Steps, inputs_from
from stepquant.cli.output import check_writable_file, progress


def sample(
    model: AnyModel,
    out: Annotated[Path, typer.Option(help="The image grid to write.")] = Path("grid.png"),
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt of a text-to-image model; can be repeated.")] = None,
    label: Annotated[
        list[int] | None, typer.Option(help="Label of a class-conditional model; can be repeated.")
    ] = None,
    count: Count = 16,
    steps: Steps = 50,
    seed: Seed = 0,
    guidance: Guidance = None,
    inputs: Inputs = None,
    backend: Backend = "auto",
    memory: Memory = "unpacked",
) -> None:
    """Generate images and write them as one grid."""
    from stepquant.distributed import Ranks
    from stepquant.images import grid, image_format, save_image, stills
    from stepquant.loading import resolve_pipeline
    from stepquant.models.denoisers import quantized_denoisers
    from stepquant.pipelines.generate import generate_many
    from stepquant.pipelines.request import make_request
    from stepquant.runtime import check_memory, resolve_backend, summary

    check_memory(memory)
    image_format(out)
    check_writable_file(out)
    pipeline = resolve_pipeline(model, resolve_backend(backend), memory)
    ranks = Ranks.current()
    for denoiser in quantized_denoisers(pipeline).values():
        typer.echo(f"runtime: {summary(denoiser)}")
    request = make_request(pipeline, steps, prompts=prompt, labels=label, guidance=guidance, inputs=inputs_from(inputs))
    images = generate_many(pipeline, request, count, seed, progress(), "Generating", ranks=ranks)
    if ranks.is_main:
        save_image(grid(stills(images, model)), out)
    typer.echo(f"{count} images, {steps} steps, seed {seed}: {out}")
