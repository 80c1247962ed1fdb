"""``stepquant recipes`` and ``stepquant zoo``: lists of what is available."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stepquant.cli.output import print_table, table_of


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A recipe, or path.py:ClassName; default: all recipes.")
    ] = None,
) -> None:
    """List the recipes, or the hyperparameters of one."""
    from stepquant.recipes import QAT, RECIPES, find_class

    if name is not None:
        _print_recipe(QAT if name == QAT.name else find_class(name))
        return
    for recipe in RECIPES.values():
        typer.echo(f"{recipe.name}: {recipe.summary()}")
        for preset, values in _differences(recipe).items():
            typer.echo(f"    {preset}: " + ", ".join(f"{key}={value}" for key, value in values.items()))


def _differences(recipe: Any) -> dict[str, dict[str, Any]]:
    """Preset -> the hyperparameters whose values differ between presets."""
    names = [name for name in recipe.model_fields if any(name in changed for changed in recipe.PRESETS.values())]
    presets = {preset: recipe.preset(preset) for preset in recipe.PRESETS} if names else {}
    return {preset: {name: getattr(values, name) for name in names} for preset, values in presets.items()}


def _print_recipe(recipe: Any) -> None:
    presets = {preset: recipe.preset(preset) for preset in recipe.PRESETS}
    table = table_of(f"{recipe.called()}: {recipe.summary()}", ("hyperparameter", *presets, "expected", "description"))
    for name, field in recipe.fields().items():
        values = (str(getattr(values, name)) for values in presets.values())
        table.add_row(name, *values, field.expected, " ".join(field.description.split()))
    print_table(table)


def zoo() -> None:
    """List the reference models that are part of stepquant."""
    from stepquant import zoo as models

    for name in models.names():
        lines = [line for line in models.card(name).splitlines() if line and not line.startswith("#")]
        megabytes = sum(file.stat().st_size for file in models.path(name).rglob("*") if file.is_file()) / 1e6
        typer.echo(f"zoo:{name} ({megabytes:.1f} MB)\n    {lines[0].replace('``', '')}")


def reproduce(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize or train.")],
) -> None:
    """Print the command that makes a quantized model again."""
    from pathlib import Path

    from stepquant.checkpoint import read_manifest
    from stepquant.provenance import command

    typer.echo(command(read_manifest(Path(folder)).provenance))
