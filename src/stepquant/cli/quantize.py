"""``stepquant quantize``: from a pipeline to a quantized checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from stepquant.cli import options as o
from stepquant.cli.checkpoint import write_checkpoint


def quantize(
    model: o.Model,
    out: o.Out,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One that stepquant recipes lists, or path.py:ClassName; default: q-diffusion, or auto with --target.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="psnr=DB|size=0.2x", help="What recipe auto is to reach; can be given for both."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="fast|paper", help="Hyperparameters to start from; default: fast.")
    ] = None,
    set_: o.Set = None,
    bits: o.Bits = "w8a8",
    component: o.Component = None,
    override: o.Override = None,
    exact_time: o.ExactTime = False,
    smoothing: o.Smoothing = None,
    activations: o.Activations = o.ActivationName.static,
    group_size: o.GroupSize = None,
    budget: o.Budget = None,
    step_bits: o.StepBits = None,
    activation_budget: o.ActivationBudget = None,
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
    """Quantize a diffusion model and write it to a folder.

    After an interruption the same command continues.
    """
    options = locals()
    import stepquant
    from stepquant.recipes import find_class, with_target

    targets = o.pairs_from(target, "psnr=DB or size=0.2x") or None
    meant = with_target(recipe, targets)[0]
    write_checkpoint(
        stepquant.quantize, find_class(meant), options, recipe=meant, target=targets, preset=preset, device=device,
        activation_budget=activation_budget,
    )  # fmt: skip
