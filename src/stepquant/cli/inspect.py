"""``stepquant inspect``: the layers of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from stepquant.cli.options import AnyModel, Inputs, inputs_from
from stepquant.cli.output import print_table, table_of

if TYPE_CHECKING:
    from torch import nn

    from stepquant.models import ModelDescription


def inspect(model: AnyModel, inputs: Inputs = None) -> None:
    """Show the layers of a model and how it was quantized.

    A full-precision model runs up to one call of each denoiser, whose data flow shows what its layers do.
    """
    from stepquant.loading import locate, resolve_pipeline
    from stepquant.models import denoisers
    from stepquant.pipelines.call import kind_of

    folder, given = locate(model), inputs_from(inputs)
    pipeline = resolve_pipeline(model)
    scheduler = getattr(pipeline, "scheduler", None)
    kinds = [type(pipeline).__name__, kind_of(pipeline), *([type(scheduler).__name__] if scheduler else [])]
    lines = {"pipeline": ", ".join(kinds)}
    found = denoisers(pipeline)
    for name in found:
        prefix = f"{name}, " if len(found) > 1 else ""
        lines |= {f"{prefix}{key}": value for key, value in _inspected(pipeline, name, folder / name, given).items()}
    for key, value in lines.items():
        typer.echo(f"{key}: {value}")


def _inspected(pipeline: Any, name: str, folder: Path, inputs: Any) -> dict[str, str]:
    """Print the tables of one denoiser; return what else there is to say, by name."""
    from stepquant.evaluation.cost import float32_bytes, folder_bytes
    from stepquant.layers.quantized import quantized_modules
    from stepquant.pipelines.description import describe_component
    from stepquant.pipelines.request import make_request

    denoiser = getattr(pipeline, name)
    size = f"{type(denoiser).__name__}, {folder_bytes(folder) / 1e6:.2f} MB on disk"
    if quantized_modules(denoiser):
        print_table(_quantized_table(denoiser))
        _print_reasons(denoiser, _left_in_float(denoiser))
        return {"denoiser": size} | _quantized_facts(denoiser)
    description = describe_component(pipeline, name, make_request(pipeline, steps=2, inputs=inputs))
    print_table(_layer_table(denoiser, description))
    print_table(_attention_table(denoiser, description))
    _print_reasons(denoiser, description.unquantized)
    return {
        "denoiser": f"{size}, {float32_bytes(denoiser) / 1e6:.2f} MB in float32",
        "first": ", ".join(description.firsts),
        "last": ", ".join(description.lasts),
        "middle": description.middle,
        "timestep": f"{description.timestep}, in units of {description.time_unit:g} timesteps of the scheduler",
    }


def _layer_table(denoiser: nn.Module, description: ModelDescription) -> Table:
    """Layers of a full-precision denoiser, by block."""
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
        shape = _shape(module.weight.shape)
        table.add_row(block, layer.removeprefix(f"{block}."), type(module).__name__, shape, ", ".join(notes))
    return table


def _attention_table(denoiser: nn.Module, description: ModelDescription) -> Table:
    """Attentions of a full-precision denoiser that can be quantized, and by what."""
    from stepquant.layers.attention import can_quantize_attention

    table = table_of(f"{len(description.attentions)} attentions", ("attention", "kind", "quantized by"))
    for name in description.attentions:
        module = denoiser.get_submodule(name.partition(":")[0])
        how = "its processor" if can_quantize_attention(module) else "its calls of scaled_dot_product_attention"
        table.add_row(name, type(module).__name__, how)
    return table


def _print_reasons(denoiser: nn.Module, reasons: dict[str, str]) -> None:
    """Print layers and attentions that stay in floating point, and why."""
    table = table_of(f"{len(reasons)} layers and attentions stay in floating point", ("name", "kind", "reason"))
    for name, reason in reasons.items():
        table.add_row(name, type(denoiser.get_submodule(name)).__name__, reason)
    if reasons:
        print_table(table)


def _left_in_float(denoiser: nn.Module) -> dict[str, str]:
    """Layers and attentions of a quantized denoiser that are in floating point -> reason, as far as it shows."""
    from stepquant.layers.interception import quantized_attentions
    from stepquant.layers.quantized import can_quantize, kept_in_float32
    from stepquant.models.dataflow import is_layer

    kept, attentions = kept_in_float32(denoiser), quantized_attentions(denoiser)
    reasons = {}
    for name, module in denoiser.named_modules():
        if name in kept:
            reasons[name] = f"{type(denoiser).__name__} keeps it in float32"
        elif is_layer(module):
            reasons[name] = "left out by the spec, or was not called" if can_quantize(module) else "no quantized form"
        elif hasattr(module, "to_q") and not {name, f"{name}.processor"} & set(attentions):
            reasons[name] = "left out by the spec, or no scaled_dot_product_attention"
    return reasons


def _quantized_table(denoiser: nn.Module) -> Table:
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
        how = "products in floating point" if attention.kernel is None else "products in integers"
        table.add_row(name, "attention", "", bits, "", "", how)
    return table


def _quantized_facts(denoiser: nn.Module) -> dict[str, str]:
    """Correction, runtime and provenance of a quantized denoiser."""
    from stepquant.layers.correction import correction_of
    from stepquant.runtime import summary
    from stepquant.saving import provenance_of

    facts = {}
    correction = correction_of(denoiser)
    if correction is not None:
        gain, residual = correction.gain, correction.variance.sqrt()
        facts["output correction"] = (
            f"{len(gain)} steps, output scaled by {gain.min():.3f} to {gain.max():.3f}, "
            f"residual standard deviation {residual.min():.3f} to {residual.max():.3f}"
        )
    facts["runtime"] = summary(denoiser)
    return facts | {key: json.dumps(value) for key, value in provenance_of(denoiser).items()}


def _shape(shape: Any) -> str:
    return " x ".join(str(size) for size in shape)
