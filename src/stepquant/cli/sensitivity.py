"""``stepquant sensitivity``: which layers and steps suffer from quantization, and which to spare within a budget."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from stepquant.cli.options import Model, Prompts, Seed, at_least_one, check_writable_folder, console, progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stepquant.calibration.sensitivity import Sensitivity

MEANING = {
    "alone": "relative squared error of the output while one layer is quantized",
    "relief": "fall of the output's relative squared error when one layer keeps full precision",
}
LAYERS_SHOWN = 20
ROW_HEIGHT = 0.13
"""Of the heat map, inches a layer."""
DECADES = 4
"""From the darkest color to the brightest."""


def sensitivity(
    model: Model,
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, such as w4a8, w4a4, w4a16.")] = "w4a8",
    how: Annotated[
        str, typer.Option(metavar="alone|relief", help="Quantize one layer alone, or all layers but one.")
    ] = "alone",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps of the calibration trajectories.")] = 50,
    budget: Annotated[
        str | None, typer.Option(metavar="BITS", help="Mean weight bits, such as 4.5bits: says which layers keep 8.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for sensitivity.json and sensitivity.png.")] = Path("sensitivity"),
    seed: Seed = 0,
    prompts: Prompts = None,
) -> None:
    """Rank the layers and steps of a model by the error that quantizing them causes.

    Interrupted, the same command continues where it stopped; with another budget it answers from what it kept.
    """
    import stepquant
    from stepquant.api import check_quantizable
    from stepquant.calibration.allocation import exact_name, mean_weight_bits, parse_budget, within_budget
    from stepquant.calibration.sensitivity import check_how
    from stepquant.config import LayerBits, QuantSpec
    from stepquant.files import write_atomic
    from stepquant.loading import resolve_pipeline
    from stepquant.pipelines.generate import read_prompts

    at_least_one("samples", samples)
    at_least_one("steps", steps)
    wanted = check_how(how)
    spec = QuantSpec.parse(bits)
    budget_bits = None if budget is None else parse_budget(budget)
    lines = read_prompts(prompts) if prompts else None
    pipeline = resolve_pipeline(model)
    check_quantizable(pipeline, spec, budget_bits)
    check_writable_folder(out)

    measured = stepquant.sensitivity(
        pipeline,
        spec,
        workspace=out / ".work",
        how=wanted,
        samples=samples,
        steps=steps,
        prompts=lines,
        seed=seed,
        progress=progress(),
    )
    overrides = {} if budget_bits is None else within_budget(spec, measured, budget_bits).overrides
    layers = measured.bits.items()
    kept = [name for name, _ in layers if exact_name(name) in overrides]
    console().print(_table(measured, kept))
    asked = {"model": model, "bits": spec.bits, "how": how, "samples": samples, "steps": steps, "seed": seed}
    budgeted = {} if budget_bits is None else {"budget": budget_bits, "overrides": overrides}
    figures = json.dumps(asked | budgeted | _figures(measured), indent=2) + "\n"
    write_atomic(out / "sensitivity.json", lambda draft: draft.write_text(figures))
    typer.echo(f"figures: {out / 'sensitivity.json'}")
    if find_spec("matplotlib") is None:
        typer.echo("no image of layers and steps: it needs matplotlib, pip install 'stepquant[figures]'")
    else:
        heat_map = _heat_map(measured, f"{model} at {spec}, {samples} samples, seed {seed}", kept)
        write_atomic(out / "sensitivity.png", lambda draft: heat_map.savefig(draft, format="png"))
        typer.echo(f"layers and steps: {out / 'sensitivity.png'}")
    if budget_bits is not None:
        bits_kept = {name: LayerBits.parse(overrides.get(exact_name(name), str(own))) for name, own in layers}
        mean = mean_weight_bits(bits_kept, measured.sizes)
        typer.echo(f"{len(kept)} of {len(layers)} layers keep 8 bits, {mean:.3f} bits a weight. Quantize with:")
        options = [f"--override {shlex.quote(f'{pattern}={other}')}" for pattern, other in overrides.items()]
        typer.echo(" \\\n".join([f"stepquant quantize {shlex.quote(model)} --bits {spec}", *options]))


def _table(measured: Sensitivity, kept: Collection[str]) -> Table:
    """The most sensitive layers."""
    mean, order = measured.mean, measured.ranking()[:LAYERS_SHOWN]
    rows = dict(zip(measured.bits, measured.errors.tolist(), strict=True))
    table = Table(
        title=f"{len(order)} of {len(mean)} layers: {MEANING[measured.how]}",
        caption=f"with every layer quantized: {float(measured.whole.mean()):.2e}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    for column in ("bits", "weights", "error", "most at steps"):
        table.add_column(column, justify="right")
    if kept:
        table.add_column("keeps 8")
    for name in order:
        worst = rows[name].index(max(rows[name]))
        most = f"{_span(measured.steps[worst])}: {rows[name][worst]:.2e}"
        cells = [name, str(measured.bits[name]), f"{measured.sizes[name]:,}", f"{mean[name]:.2e}", most]
        table.add_row(*cells, *(["yes" if name in kept else ""] if kept else []))
    return table


def _figures(measured: Sensitivity) -> dict[str, Any]:
    """All that was measured, as JSON holds it."""
    mean = measured.mean
    return {
        "step_groups": measured.steps,
        "every_layer": measured.whole.tolist(),
        "layers": [
            {"name": name, "bits": str(bits), "weights": measured.sizes[name], "error": mean[name], "errors": errors}
            for (name, bits), errors in zip(measured.bits.items(), measured.errors.tolist(), strict=True)
        ],
    }


def _heat_map(measured: Sensitivity, title: str, kept: Collection[str]) -> Figure:
    """Layers in execution order, from top to bottom, by groups of steps; those that keep 8 bits in bold."""
    from matplotlib.colors import LogNorm, SymLogNorm
    from matplotlib.figure import Figure

    values = measured.errors.numpy()
    largest = max(float(abs(values).max()), 1e-12)
    least = largest / 10**DECADES
    layers, groups = values.shape
    figure = Figure(figsize=(8, 1.6 + ROW_HEIGHT * layers), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if measured.how == "alone":
        image = axes.imshow(values.clip(min=least), aspect="auto", cmap="magma", norm=LogNorm(least, largest))
    else:
        norm = SymLogNorm(largest / 100, vmin=-largest, vmax=largest)
        image = axes.imshow(values, aspect="auto", cmap="RdBu_r", norm=norm)
    axes.set_title(f"{title}\n{MEANING[measured.how]}", fontsize=8)
    axes.set_xlabel("denoising steps, from noise to image" + ("; in bold: keeps 8 bits" if kept else ""), fontsize=7)
    axes.set_xticks(range(groups), [_span(ends) for ends in measured.steps], fontsize=6)
    axes.set_yticks(range(layers), list(measured.bits), fontsize=5)
    for label, name in zip(axes.get_yticklabels(), measured.bits, strict=True):
        label.set_fontweight("bold" if name in kept else "normal")
    figure.colorbar(image, shrink=min(1.0, 40 / layers), aspect=40).ax.tick_params(labelsize=6)
    return figure


def _span(ends: tuple[int, int]) -> str:
    """``(5, 9)`` -> ``"5-9"``."""
    first, last = ends
    return str(first) if first == last else f"{first}-{last}"
