"""``stepquant train``: from a pipeline to a small checkpoint, by training it in its quantized form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.finished import clear, is_finished, mark_finished
from stepquant.cli.options import (
    Model,
    Prompts,
    Seed,
    at_least_one,
    check_space,
    check_writable_folder,
    pairs_from,
    progress,
    workspace_of,
)
from stepquant.cli.quantize import parameter_bytes
from stepquant.errors import StepquantError

BYTES_A_PARAMETER = 6
"""Times the weights: kept on disk are the network, Adam's moments and the average, twice while they change."""


def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, such as w4a8, w4a4, w3a3.")] = "w4a4",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of images: classes in subfolders, captions in a metadata.jsonl."),
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn what full precision answers; needs no data, but may have some.")
    ] = False,
    intervals: Annotated[
        str, typer.Option(help="How activation scales depend on the timestep: generator (TDQ), static, or table.")
    ] = "generator",
    iterations: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Images, or points of trajectories, in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of the weights, relative to their size; falls to zero.")] = 1e-3,
    ema_decay: Annotated[float, typer.Option(help="Of the moving average that ships; 0 for none.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Denoising steps of the trajectories, from half to twice as many.")] = 50,
    seed: Seed = 0,
    prompts: Prompts = None,
    override: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=BITS", help="Other bits for some layers; may be repeated.")
    ] = None,
    exact_time: Annotated[
        bool, typer.Option("--exact-time", help="Leave the layers that depend on the timestep alone in floating point.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what the folder holds.")] = False,
) -> None:
    """Quantize a diffusion model by training it: weights, their scales and the activations' intervals together.

    It learns from images (--data), or from the full-precision model (--distill). Interrupted, the same command
    continues where it stopped.
    """
    asked = {name: str(value) for name, value in locals().items() if name != "overwrite"}
    import stepquant
    from stepquant.checkpoint import check_out
    from stepquant.config import QuantSpec
    from stepquant.loading import resolve_pipeline
    from stepquant.pipelines.generate import read_prompts
    from stepquant.recipes import hyperparameters
    from stepquant.recipes.qat import qat

    if data is None and not distill:
        raise StepquantError(
            "training has nothing to learn from: give a folder of images with --data, "
            "or --distill to learn from the full-precision model without any."
        )
    for name, value in (("iterations", iterations), ("batch-size", batch_size), ("steps", steps)):
        at_least_one(name, value)
    if not 0 <= learning_rate < math.inf:
        raise StepquantError(f"learning-rate is {learning_rate}: expected a finite number, 0 or more.")
    if not 0 <= ema_decay < 1:
        raise StepquantError(f"ema-decay is {ema_decay}: expected 0 or more, and less than 1.")
    arguments: dict[str, Any] = {
        "intervals": intervals,
        "iterations": iterations,
        "batch_size": batch_size,
        "weight_rate": learning_rate,
        "ema_decay": ema_decay,
    }
    hyperparameters(qat, arguments)
    overrides = pairs_from(override, "override", "REGEX=BITS, as in mid_block=w8a8")
    spec = QuantSpec.parse({"bits": bits, "overrides": overrides, "exact_time": exact_time})
    lines = read_prompts(prompts) if prompts else None
    workspace = workspace_of(out)
    said = f"{model} trained to {spec} with {intervals} intervals: {out}"
    if is_finished(workspace, out, asked):
        typer.echo(said)
        clear(workspace)
        return
    check_out(out, overwrite=overwrite)
    check_writable_folder(out.parent)
    pipeline = resolve_pipeline(model)
    check_space(out.parent, BYTES_A_PARAMETER * parameter_bytes(pipeline))

    quantized = stepquant.train(
        pipeline,
        spec,
        data=data,
        distill=distill,
        calibration=stepquant.Calibration(steps=steps),
        seed=seed,
        prompts=lines,
        workspace=workspace,
        progress=progress(),
        source=model,
        **arguments,
    )
    mark_finished(workspace, asked, quantized)
    stepquant.save(quantized, out, overwrite=overwrite)
    typer.echo(said)
    clear(workspace)
