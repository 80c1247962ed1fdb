"""``stepquant quantize``: from a pipeline to a small checkpoint."""

from __future__ import annotations

import time
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
    check_writable_file,
    check_writable_folder,
    pairs_from,
    progress,
    workspace_of,
)
from stepquant.errors import StepquantError
from stepquant.progress import Stopwatch


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    recipe: Annotated[
        str, typer.Option(help="How to quantize, see: stepquant recipes; or path.py:function.")
    ] = "q-diffusion",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, such as w8a8, w4a8, w4a16.")] = "w8a8",
    effort: Annotated[
        str, typer.Option(help="Samples, steps and iterations at once: quick, standard or thorough.")
    ] = "standard",
    samples: Annotated[int | None, typer.Option(help="Calibration samples; default: up to the effort.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the calibration trajectories.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of their sides; default: the model's own size.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations a block, for recipes that learn.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="BITS", help="Mean weight bits, such as 4.5bits: the most sensitive layers keep 8."),
    ] = None,
    seed: Seed = 0,
    prompts: Prompts = None,
    override: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=BITS", help="Other bits for some layers; may be repeated.")
    ] = None,
    exact_time: Annotated[
        bool, typer.Option("--exact-time", help="Leave the layers that depend on the timestep alone in floating point.")
    ] = False,
    smoothing: Annotated[
        bool | None,
        typer.Option(
            "--smoothing/--no-smoothing",
            help="Smoothing channels between activation and weight; default: up to the recipe.",
        ),
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct", help="Undo the part of the error that follows the output, step by step (PTQD).")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(help="Type that full precision is held in: float32, or bfloat16 or float16 in half the memory."),
    ] = "float32",
    device: Annotated[
        str | None,
        typer.Option(help="Compute there, such as cuda, one block at a time: the model need not fit; default: here."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BITS", help="Round the weights of another model, such as text_encoder=w8a16; may be repeated."
        ),
    ] = None,
    times: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write how long each stage took to this file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the folder holds.")] = False,
) -> None:
    """Quantize a diffusion model and write it as a diffusers folder.

    Interrupted, the same command continues where it stopped.
    """
    asked = {name: str(value) for name, value in locals().items() if name not in ("overwrite", "times")}
    import torch

    import stepquant
    from stepquant.api import check_device, check_quantizable
    from stepquant.calibration.allocation import parse_budget
    from stepquant.checkpoint import check_out
    from stepquant.config import QuantSpec
    from stepquant.distributed import Ranks
    from stepquant.files import write_atomic
    from stepquant.integrations.components import check_components
    from stepquant.loading import DTYPES, resolve_pipeline
    from stepquant.pipelines.generate import make_request, read_prompts
    from stepquant.planning import EFFORTS, duration, make_plan
    from stepquant.recipes import hyperparameters
    from stepquant.recipes.files import resolve_recipe
    from stepquant.report.times import Times

    if effort not in EFFORTS:
        raise StepquantError(f"effort {effort!r} is unknown: expected one of {', '.join(EFFORTS)}.")
    if dtype not in DTYPES:
        raise StepquantError(f"dtype {dtype!r} is unknown: expected one of {', '.join(DTYPES)}.")
    preset = EFFORTS[effort]
    for name, value in (("samples", samples), ("steps", steps), ("size", size)):
        at_least_one(name, 1 if value is None else value)
    arguments: dict[str, Any] = {} if iterations is None else {"iterations": iterations}
    chosen = resolve_recipe(recipe) if ":" in recipe else recipe
    if iterations is None and effort != "standard" and "iterations" in hyperparameters(chosen):
        arguments["iterations"] = preset.iterations  # standard leaves it to the recipe
    values = hyperparameters(chosen, arguments)
    overrides = pairs_from(override, "override", "REGEX=BITS, as in mid_block=w8a8")
    spec = QuantSpec.parse({"bits": bits, "overrides": overrides, "exact_time": exact_time, "smoothing": smoothing})
    others = pairs_from(also, "option --also", "NAME=BITS, as in text_encoder=w8a16")
    budget_bits = None if budget is None else parse_budget(budget)
    lines = read_prompts(prompts) if prompts else None
    workspace = workspace_of(out)
    said = f"{model} quantized to {spec} with {recipe}"
    if is_finished(workspace, out, asked):
        typer.echo(f"{said}: {out}")
        clear(workspace)
        return
    check_out(out, overwrite=overwrite)
    check_writable_folder(out.parent)
    if times is not None:
        check_writable_file(times)
    check_device(device)
    pipeline = resolve_pipeline(model, dtype=DTYPES[dtype])
    check_quantizable(pipeline, spec, budget_bits)
    check_components(pipeline, others)
    check_space(out.parent, parameter_bytes(pipeline))

    calibration = stepquant.Calibration(samples=samples or preset.samples, steps=steps or preset.steps, size=size)
    request = make_request(pipeline, calibration.steps, prompts=lines, size=size)
    typer.echo(str(make_plan(pipeline, request, calibration, values)), err=True)
    start, stopwatch = time.perf_counter(), Stopwatch(progress())
    quantized = stepquant.quantize(
        pipeline,
        spec,
        budget=budget_bits,
        correction=correct,
        also=others,
        device=device,
        recipe=chosen,
        calibration=calibration,
        seed=seed,
        prompts=lines,
        workspace=workspace,
        progress=stopwatch,
        source=model,
        **arguments,
    )
    mark_finished(workspace, asked, quantized)
    stepquant.save(quantized, out, overwrite=overwrite)
    seconds = time.perf_counter() - start
    if times is not None and Ranks.current().is_main:
        took = {name: round(value, 1) for name, value in stopwatch.seconds.items()}
        written = Times(out=out.resolve().name, seconds=round(seconds, 1), stages=took, threads=torch.get_num_threads())
        write_atomic(times, lambda draft: draft.write_text(written.model_dump_json(indent=2) + "\n"))
    # Never in the checkpoint: of the same inputs it is the same bytes.
    typer.echo(f"{said} in {duration(seconds)}: {out}")
    clear(workspace)


def parameter_bytes(pipeline: Any) -> int:
    """Bytes of all weights as they are loaded: more than the checkpoint and the kept stages take together."""
    models = [part for part in pipeline.components.values() if hasattr(part, "parameters")]
    return sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())
