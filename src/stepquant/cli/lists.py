"""``stepquant recipes`` and ``stepquant zoo``: lists of what is available."""

from __future__ import annotations

import typer


def recipes() -> None:
    """List the recipes and their hyperparameters."""
    from stepquant.recipes import RECIPES

    for name, recipe in RECIPES.items():
        typer.echo(f"{name}: {recipe.summary()}")
        values = [f"{key}={field.default}" for key, field in recipe.fields().items()]
        if values:
            typer.echo("    " + ", ".join(values))


def zoo() -> None:
    """List the reference models that are part of stepquant."""
    from stepquant import zoo as models

    for name in models.names():
        lines = [line for line in models.card(name).splitlines() if line and not line.startswith("#")]
        megabytes = sum(file.stat().st_size for file in models.path(name).rglob("*") if file.is_file()) / 1e6
        typer.echo(f"zoo:{name} ({megabytes:.1f} MB)\n    {lines[0].replace('``', '')}")
