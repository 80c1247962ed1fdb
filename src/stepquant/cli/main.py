"""The ``stepquant`` command: it parses options, calls the library and draws progress."""

from __future__ import annotations

from typing import Annotated

import typer

from stepquant import __version__
from stepquant.cli.bench import bench
from stepquant.cli.compare import compare
from stepquant.cli.errors import Command, Commands
from stepquant.cli.evaluate import evaluate
from stepquant.cli.export import export
from stepquant.cli.inspect import inspect
from stepquant.cli.lists import recipes, reproduce, zoo
from stepquant.cli.quantize import quantize
from stepquant.cli.report import report
from stepquant.cli.sample import sample
from stepquant.cli.sensitivity import sensitivity
from stepquant.cli.study import study
from stepquant.cli.train import train
from stepquant.cli.ui import ui
from stepquant.quiet import silence_libraries

COMMANDS = (
    quantize, train, sample, evaluate, bench, export, compare, report, inspect, sensitivity, reproduce, study, ui,
    recipes, zoo,
)  # fmt: skip

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
for command in COMMANDS:
    app.command(cls=Command)(command)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"stepquant {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize diffusion models with per-step scales and run them in integers."""
    silence_libraries()


def main() -> None:
    """Run the command; exit code 0 is success, 2 bad input (one line on standard error), 130 an interruption."""
    app()


if __name__ == "__main__":
    main()
