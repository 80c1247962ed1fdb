"""``stepquant inspect``: the layers of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from stepquant.cli.options import AnyModel
from stepquant.cli.output import print_table, table_of

if TYPE_CHECKING:
    from stepquant.models import ModelDescription


def inspect(model: AnyModel) -> None:
    """Show the layers of a model and how it was quantized."""
    from stepquant.evaluation.cost import float32_bytes, folder_bytes
    from stepquant.layers.correction import correction_of
    from stepquant.layers.quantized import quantized_modules
    from stepquant.loading import locate, resolve_pipeline
    from stepquant.models import denoiser_name
    from stepquant.pipelines.call import kind_of
    from stepquant.pipelines.description import describe_component
    from stepquant.pipelines.request import make_request
    from stepquant.runtime import summary
    from stepquant.saving import provenance_of

    folder = locate(model)
    pipeline = resolve_pipeline(model)
    name = denoiser_name(pipeline)
    denoiser = getattr(pipeline, name)
    quantized = bool(quantized_modules(denoiser))
    described = {}
    if quantized:
        print_table(_quantized_table(denoiser))
    else:
        description = describe_component(pipeline, name, make_request(pipeline, steps=2))
        for table in _float_tables(denoiser, description):
            print_table(table)
        described = {
            "first": ", ".join(description.firsts),
            "last": ", ".join(description.lasts),
            "middle": description.middle,
            "timestep": f"{description.timestep}, in units of {description.time_unit:g} timesteps of the scheduler",
        }
    stored = folder_bytes(folder / name) / 1e6
    lines = {
        "pipeline": f"{type(pipeline).__name__}, {kind_of(pipeline)}, {type(pipeline.scheduler).__name__}",
        "denoiser": f"{type(denoiser).__name__}, {stored:.2f} MB on disk",
    } | described
    correction = correction_of(denoiser)
    if correction is not None:
        gain, residual = correction.gain, correction.variance.sqrt()
        lines["output correction"] = (
            f"{len(gain)} steps, output scaled by {gain.min():.3f} to {gain.max():.3f}, "
            f"residual standard deviation {residual.min():.3f} to {residual.max():.3f}"
        )
    if quantized:
        lines["runtime"] = summary(denoiser)
        lines |= {key: json.dumps(value) for key, value in provenance_of(denoiser).items()}
    else:
        lines["denoiser"] += f", {float32_bytes(denoiser) / 1e6:.2f} MB in float32"
    for key, value in lines.items():
        typer.echo(f"{key}: {value}")


def _float_tables(denoiser: Any, description: ModelDescription) -> Iterator[Table]:
    """Layers of a full-precision denoiser, by block, and what cannot be quantized."""
    table = table_of(
        f"{description.family}: {len(description.blocks)} blocks, {len(description.layers)} layers",
        ("block", "layer", "kind", "weight", "notes"),
    )
    roles = {"first": description.firsts, "last": description.lasts, "timestep only": description.time_layers}
    for layer in description.layers:
        block = next(block for block in description.blocks if f"{layer}.".startswith(f"{block}."))
        module = denoiser.get_submodule(layer)
        notes = [role for role, names in roles.items() if layer in names]
        if layer in description.skip_splits:
            notes.append(f"skip from channel {description.skip_splits[layer]}")
        kind = type(module).__name__
        table.add_row(block, layer.removeprefix(f"{block}."), kind, _shape(module.weight.shape), ", ".join(notes))
    yield table
    attentions = table_of(f"{len(description.attentions)} attentions", ("attention", "kind"))
    for name in description.attentions:
        attentions.add_row(name, type(denoiser.get_submodule(name)).__name__)
    yield attentions
    if description.unquantized:
        yield _unquantized_table(denoiser, description.unquantized)


def _unquantized_table(denoiser: Any, reasons: dict[str, str]) -> Table:
    """Layers and attentions that stay in floating point, and why."""
    table = table_of(f"{len(reasons)} layers and attentions stay in floating point", ("name", "kind", "reason"))
    for name, reason in reasons.items():
        table.add_row(name, type(denoiser.get_submodule(name)).__name__, reason)
    return table


def _quantized_table(denoiser: Any) -> Table:
    """Layers and attentions of a quantized denoiser."""
    from stepquant.layers.interception import quantized_attentions
    from stepquant.layers.quantized import quantized_modules

    layers = quantized_modules(denoiser)
    columns = ("layer", "kind", "weight", "bits", "groups", "table rows", "notes")
    table = table_of(f"{len(layers)} quantized layers", columns)
    for name, module in layers.items():
        layer = module.format
        bits = f"w{layer.weight.bits}a{16 if layer.input is None else layer.input.bits}"
        rows = "" if layer.input is None else str(layer.input.rows)
        groups = str(max(1, len(layer.weight.groups)))
        notes = [transform.kind for transform in layer.transforms]
        notes += ["cached per timestep"] * (module.time_cache is not None)
        table.add_row(name, type(module).__name__, _shape(module.weight_shape), bits, groups, rows, ", ".join(notes))
    for name, attention in quantized_attentions(denoiser).items():
        bits = ", ".join(f"{operand} {grid.bits}" for operand, grid in attention.formats.items())
        table.add_row(name, "attention", "", bits, "", "", "")
    return table


def _shape(shape: Any) -> str:
    return " x ".join(str(size) for size in shape)
