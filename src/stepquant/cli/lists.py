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
        rows = [row for row in recipe.compared() if row.differs]
        for index, preset in enumerate(recipe.PRESETS if rows else ()):
            typer.echo(f"    {preset}: " + ", ".join(f"{row.name}={row.values[index]}" for row in rows))


def _print_recipe(recipe: Any) -> None:
    import inspect

    presets = list(recipe.PRESETS)
    title = f"{recipe.called()}: {recipe.summary()}" + (" * differs between presets" if len(presets) > 1 else "")
    table = table_of(title, ("hyperparameter", *presets, "expected", "description"))
    for row in recipe.compared():
        mark = " *" if row.differs else ""
        table.add_row(row.name + mark, *row.values, row.expected, " ".join(row.description.split()))
    print_table(table)
    text = (inspect.getdoc(inspect.getmodule(recipe)) or "").partition("\n")[2].strip()
    typer.echo("\n".join(part for part in (inspect.getdoc(recipe) or "", "", text) if part or text))


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
