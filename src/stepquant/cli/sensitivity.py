"""``stepquant sensitivity``: the layers and steps that quantization harms most, and which to spare in a budget."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from stepquant.cli import options as o
from stepquant.cli.output import print_table, progress, table_of, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stepquant.calibration.sensitivity import Sensitivity

MEANING = {
    "one-at-a-time": "relative squared error of the output while one layer is quantized",
    "leave-one-out": "decrease of the output's relative squared error when one layer keeps full precision",
}
LAYERS_SHOWN = 20
ROW_HEIGHT = 0.13
"""Inches per layer of the heat map."""
DECADES = 4
"""Range of the heat map's colors."""


def sensitivity(
    model: o.Model,
    bits: o.Bits = "w4a8",
    component: Annotated[
        str | None, typer.Option(metavar="NAME", help="Denoiser to rank, such as transformer_2; default: the only one.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="one-at-a-time|leave-one-out", help="Quantize one layer, or all layers but one.")
    ] = "one-at-a-time",
    budget: o.Budget = None,
    out: Annotated[Path, typer.Option(help="Folder for sensitivity.json and sensitivity.png.")] = Path("sensitivity"),
    samples: Annotated[int, typer.Option(help="Calibration samples.", min=1)] = 64,
    steps: o.Steps = 50,
    size: o.Size = None,
    prompts: o.Prompts = None,
    guidance: o.Guidance = None,
    inputs: o.Inputs = None,
    seed: o.Seed = 0,
    dtype: o.DType = o.FloatType.float32,
    device: o.Device = None,
) -> None:
    """Rank layers and steps by their quantization error.

    After an interruption the same command continues; another budget reuses the finished ranking.
    """
    import stepquant
    from stepquant.calibration.allocation import exact_name, mean_weight_bits, parse_budget, within_budget
    from stepquant.calibration.sensitivity import check_method
    from stepquant.config import LayerBits, QuantSpec
    from stepquant.files import write_atomic
    from stepquant.loading import resolve_pipeline
    from stepquant.recipes.sensitivity import RANKING

    spec = QuantSpec.parse(bits)
    budget_bits = None if budget is None else parse_budget(budget)
    lines, further = o.prompts_from(prompts), o.inputs_from(inputs)
    pipeline = resolve_pipeline(model, dtype=dtype.torch)
    measured = stepquant.sensitivity(
        pipeline,
        spec if component is None else {component: spec},
        method=check_method(method),
        budget=budget_bits,
        calibration=RANKING.model_copy(update={"samples": samples, "steps": steps, "size": size}),
        prompts=lines,
        guidance=guidance,
        inputs=further,
        seed=seed,
        workspace=out / ".work",
        progress=progress(),
        device=device,
    )
    overrides = {} if budget_bits is None else within_budget(spec, measured, budget_bits).overrides
    layers = measured.bits.items()
    spared = [name for name, _ in layers if exact_name(name) in overrides]
    print_table(_table(measured, spared))
    arguments = {"model": model, "bits": spec.bits, "method": method, "samples": samples, "steps": steps, "seed": seed}
    budgeted = {} if budget_bits is None else {"budget": budget_bits, "overrides": overrides}
    write_json(out / "sensitivity.json", arguments | budgeted | _figures(measured))
    typer.echo(f"figures: {out / 'sensitivity.json'}")
    heat_map = _heat_map(measured, f"{model} at {spec}, {samples} samples, seed {seed}", spared)
    write_atomic(out / "sensitivity.png", lambda draft: heat_map.savefig(draft, format="png"))
    typer.echo(f"heat map: {out / 'sensitivity.png'}")
    if budget_bits is not None:
        bits_kept = {name: LayerBits.parse(overrides.get(exact_name(name), str(default))) for name, default in layers}
        mean = mean_weight_bits(bits_kept, measured.sizes)
        typer.echo(f"{len(spared)} of {len(layers)} layers keep 8 bits, {mean:.3f} bits per weight. Quantize with:")
        options = [f"--override {shlex.quote(f'{pattern}={other}')}" for pattern, other in overrides.items()]
        typer.echo(" \\\n".join([f"stepquant quantize {shlex.quote(model)} --bits {spec}", *options]))


def _table(measured: Sensitivity, spared: Collection[str]) -> Table:
    """The most sensitive layers."""
    mean, order = measured.mean, measured.ranking()[:LAYERS_SHOWN]
    rows = dict(zip(measured.bits, measured.errors.tolist(), strict=True))
    title = f"{len(order)} of {len(mean)} layers: {MEANING[measured.method]}"
    table = table_of(title, ("layer",), ("bits", "weights", "error", "largest at steps"))
    table.caption = f"with every layer quantized: {float(measured.whole.mean()):.2e}"
    if spared:
        table.add_column("keeps 8 bits")
    for name in order:
        worst = rows[name].index(max(rows[name]))
        most = f"{_span(measured.steps[worst])}: {rows[name][worst]:.2e}"
        cells = [name, str(measured.bits[name]), f"{measured.sizes[name]:,}", f"{mean[name]:.2e}", most]
        table.add_row(*cells, *(["yes" if name in spared else ""] if spared else []))
    return table


def _figures(measured: Sensitivity) -> dict[str, Any]:
    """The measurements, as JSON."""
    mean = measured.mean
    return {
        "step_groups": measured.steps,
        "every_layer": measured.whole.tolist(),
        "layers": [
            {"name": name, "bits": str(bits), "weights": measured.sizes[name], "error": mean[name], "errors": errors}
            for (name, bits), errors in zip(measured.bits.items(), measured.errors.tolist(), strict=True)
        ],
    }


def _heat_map(measured: Sensitivity, title: str, spared: Collection[str]) -> Figure:
    """Layers in execution order from top to bottom, groups of steps from left to right; spared layers in bold."""
    from matplotlib.colors import LogNorm, SymLogNorm
    from matplotlib.figure import Figure

    values = measured.errors.numpy()
    largest = max(float(abs(values).max()), 1e-12)
    smallest = largest / 10**DECADES
    layers, groups = values.shape
    figure = Figure(figsize=(8, 1.6 + ROW_HEIGHT * layers), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if measured.method == "one-at-a-time":
        image = axes.imshow(values.clip(min=smallest), aspect="auto", cmap="magma", norm=LogNorm(smallest, largest))
    else:
        norm = SymLogNorm(largest / 100, vmin=-largest, vmax=largest)
        image = axes.imshow(values, aspect="auto", cmap="RdBu_r", norm=norm)
    axes.set_title(f"{title}\n{MEANING[measured.method]}", fontsize=8)
    axes.set_xlabel("denoising steps, from noise to image" + ("; bold: keeps 8 bits" if spared else ""), fontsize=7)
    axes.set_xticks(range(groups), [_span(ends) for ends in measured.steps], fontsize=6)
    axes.set_yticks(range(layers), list(measured.bits), fontsize=5)
    for label, name in zip(axes.get_yticklabels(), measured.bits, strict=True):
        label.set_fontweight("bold" if name in spared else "normal")
    figure.colorbar(image, shrink=min(1.0, 40 / layers), aspect=40).ax.tick_params(labelsize=6)
    return figure


def _span(ends: tuple[int, int]) -> str:
    """``(5, 9)`` -> ``"5-9"``."""
    first, last = ends
    return str(first) if first == last else f"{first}-{last}"
