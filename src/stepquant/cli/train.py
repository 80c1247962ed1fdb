"""``stepquant train``: quantization-aware training of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli import options as o
from stepquant.cli.checkpoint import write_checkpoint

DISK_FACTOR = 6
"""Disk space relative to the weights: the network, Adam's moments and the average, twice while they are replaced."""


def train(
    model: o.Model,
    out: o.Out,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of images: classes in subfolders, captions in a metadata.jsonl."),
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the full-precision model; works with and without --data.")
    ] = False,
    preset: Annotated[
        str | None, typer.Option(metavar="fast|paper", help="Hyperparameters to start from; default: fast.")
    ] = None,
    set_: o.Set = None,
    bits: o.Bits = "w4a4",
    component: o.Component = None,
    override: o.Override = None,
    exact_time: o.ExactTime = False,
    smoothing: o.Smoothing = None,
    group_size: o.GroupSize = None,
    budget: o.Budget = None,
    correct: o.Correct = False,
    also: o.Also = None,
    effort: o.Effort = o.EffortName.standard,
    samples: o.Samples = None,
    steps: o.CalibrationSteps = None,
    trajectories: o.Trajectories = None,
    size: o.Size = None,
    prompts: o.Prompts = None,
    guidance: o.Guidance = None,
    inputs: o.Inputs = None,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    variant: o.Variant = None,
    config: o.Config = None,
    dtype: o.DType = o.FloatType.float32,
    device: o.Device = None,
    check: o.Check = True,
    on_low_quality: o.LowQuality = o.LowQualityAction.warn,
    times: o.Times = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Quantize a diffusion model by training it.

    Weights, scales and activation ranges learn from images (--data), from the full-precision model (--distill), or
    both. The hyperparameters of --set are those of: stepquant recipes qat. After an interruption the same command
    continues.
    """
    options = locals()
    import stepquant
    from stepquant.recipes import QAT

    write_checkpoint(
        stepquant.train, QAT, options, disk_factor=DISK_FACTOR, data=data, distill=distill, preset=preset,
        move_to=device,
    )  # fmt: skip
