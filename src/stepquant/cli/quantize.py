"""``stepquant quantize``: from a pipeline to a quantized checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.checkpoint import write_checkpoint
from stepquant.cli.options import (
    Bits,
    Budget,
    Device,
    DType,
    ExactTime,
    FloatType,
    Model,
    Out,
    Override,
    Overwrite,
    Prompts,
    Seed,
    Size,
    pairs_from,
)
from stepquant.cli.output import check_writable_file, progress, write_json
from stepquant.progress import Stopwatch


def quantize(
    model: Model,
    out: Out,
    recipe: Annotated[
        str, typer.Option(help="A recipe that stepquant recipes lists, or path.py:ClassName.")
    ] = "q-diffusion",
    bits: Bits = "w8a8",
    effort: Annotated[
        str, typer.Option(help="Samples, steps and iterations at once: quick, standard or thorough.")
    ] = "standard",
    samples: Annotated[
        int | None, typer.Option(help="Calibration samples; default: depends on --effort.", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps while calibrating; default: depends on --effort.", min=1)
    ] = None,
    size: Size = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations per block, for recipes that learn.")] = None,
    budget: Budget = None,
    seed: Seed = 0,
    prompts: Prompts = None,
    override: Override = None,
    exact_time: ExactTime = False,
    smoothing: Annotated[
        bool | None,
        typer.Option(
            "--smoothing/--no-smoothing",
            help="Move outlier channels of activations into the weights; default: depends on the recipe.",
        ),
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct", help="Correct, per step, the error that is proportional to the output (PTQD).")
    ] = False,
    dtype: DType = FloatType.float32,
    device: Device = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BITS",
            help="Round the weights of another model, such as text_encoder=w8a16; can be repeated.",
        ),
    ] = None,
    times: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the duration of each stage to this file.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantize a diffusion model and write it as a diffusers folder.

    After an interruption the same command continues.
    """
    arguments = {name: str(value) for name, value in locals().items() if name not in ("overwrite", "times")}
    import torch

    import stepquant
    from stepquant.api import check_device, check_quantizable
    from stepquant.calibration.allocation import parse_budget
    from stepquant.config import QuantSpec
    from stepquant.distributed import Ranks
    from stepquant.integrations.components import check_components
    from stepquant.pipelines.request import make_request, read_prompts
    from stepquant.planning import make_plan
    from stepquant.recipes import find_effort, find_recipe
    from stepquant.report.times import Times

    preset = find_effort(effort)
    given: dict[str, Any] = {} if iterations is None else {"iterations": iterations}
    chosen = find_recipe(recipe, None, given, effort)
    overrides = pairs_from(override, "REGEX=BITS, such as mid_block=w8a8")
    spec = QuantSpec.parse({"bits": bits, "overrides": overrides, "exact_time": exact_time, "smoothing": smoothing})
    others = pairs_from(also, "NAME=BITS, such as text_encoder=w8a16")
    budget_bits = None if budget is None else parse_budget(budget)
    lines = read_prompts(prompts) if prompts else None
    calibration = stepquant.Calibration(samples=samples or preset.samples, steps=steps or preset.steps, size=size)
    check_device(device)
    check_writable_file(times)
    stopwatch = Stopwatch(progress())

    def run(pipeline: Any, workspace: Path) -> Any:
        check_quantizable(pipeline, spec, budget_bits)
        check_components(pipeline, others)
        request = make_request(pipeline, calibration.steps, prompts=lines, size=size)
        typer.echo(str(make_plan(pipeline, request, calibration, chosen)), err=True)
        return stepquant.quantize(
            pipeline,
            spec,
            budget=budget_bits,
            correction=correct,
            also=others,
            device=device,
            recipe=recipe,
            effort=effort,
            hyperparameters=given,
            calibration=calibration,
            seed=seed,
            prompts=lines,
            workspace=workspace,
            progress=stopwatch,
            source=model,
        )

    done = f"{model} quantized to {spec} with {recipe}"
    seconds = write_checkpoint(run, model, out, arguments=arguments, overwrite=overwrite, done=done, dtype=dtype.value)
    if times is not None and seconds is not None and Ranks.current().is_main:
        stages = {name: round(value, 1) for name, value in stopwatch.seconds.items()}
        threads = torch.get_num_threads()
        write_json(times, Times(out=out.resolve().name, seconds=round(seconds, 1), stages=stages, threads=threads))
