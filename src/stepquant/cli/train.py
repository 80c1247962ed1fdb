"""``stepquant train``: quantization-aware training of a pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.checkpoint import write_checkpoint
from stepquant.cli.options import Bits, ExactTime, Model, Out, Override, Overwrite, Prompts, Seed, Steps, pairs_from
from stepquant.cli.output import progress
from stepquant.errors import StepquantError

DISK_FACTOR = 6
"""Disk space relative to the weights: the network, Adam's moments and the average, twice while they are replaced."""


def train(
    model: Model,
    out: Out,
    bits: Bits = "w4a4",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of images: classes in subfolders, captions in a metadata.jsonl."),
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the full-precision model; works with and without --data.")
    ] = False,
    intervals: Annotated[
        str, typer.Option(help="How activation scales depend on the timestep: generator (TDQ), static, or table.")
    ] = "generator",
    iterations: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(help="Images, or points of trajectories, per optimizer step.", min=1)] = 16,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the weights, relative to their size; decays to zero.")
    ] = 1e-3,
    ema_decay: Annotated[float, typer.Option(help="Decay of the moving average of the weights; 0: none.")] = 0.0,
    steps: Steps = 50,
    seed: Seed = 0,
    prompts: Prompts = None,
    override: Override = None,
    exact_time: ExactTime = False,
    overwrite: Overwrite = False,
) -> None:
    """Quantize a diffusion model by training weights, their scales and activation ranges together.

    It learns from images (--data), from the full-precision model (--distill), or both. After an interruption the same
    command continues.
    """
    arguments = {name: str(value) for name, value in locals().items() if name != "overwrite"}
    import stepquant
    from stepquant.config import QuantSpec
    from stepquant.pipelines.request import read_prompts
    from stepquant.recipes import QAT

    if data is None and not distill:
        raise StepquantError("there is nothing to learn from; expected --data FOLDER, --distill, or both.")
    if not 0 <= learning_rate < math.inf:
        raise StepquantError(f"--learning-rate is {learning_rate}; expected a finite number, 0 or more.")
    if not 0 <= ema_decay < 1:
        raise StepquantError(f"--ema-decay is {ema_decay}; expected at least 0 and less than 1.")
    values: dict[str, Any] = {
        "intervals": intervals,
        "iterations": iterations,
        "batch_size": batch_size,
        "weight_rate": learning_rate,
        "ema_decay": ema_decay,
    }
    recipe = QAT(**values)
    overrides = pairs_from(override, "REGEX=BITS, such as mid_block=w8a8")
    spec = QuantSpec.parse({"bits": bits, "overrides": overrides, "exact_time": exact_time})
    lines = read_prompts(prompts) if prompts else None

    def run(pipeline: Any, workspace: Path) -> Any:
        return stepquant.train(
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
            recipe=recipe,
        )

    write_checkpoint(
        run,
        model,
        out,
        arguments=arguments,
        overwrite=overwrite,
        done=f"{model} trained to {spec} with {intervals} intervals",
        disk_factor=DISK_FACTOR,
    )
