"""The ``stepquant`` command: parse, call the library, draw progress, say in one line what went wrong."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from stepquant import __version__
from stepquant.cli.bench import bench
from stepquant.cli.compare import compare
from stepquant.cli.evaluate import evaluate
from stepquant.cli.export import export
from stepquant.cli.inspect import inspect
from stepquant.cli.lists import recipes, zoo
from stepquant.cli.quantize import quantize
from stepquant.cli.report import report
from stepquant.cli.sample import sample
from stepquant.cli.sensitivity import sensitivity
from stepquant.cli.study import study
from stepquant.cli.train import train
from stepquant.cli.ui import ui
from stepquant.distributed import Ranks, joined
from stepquant.errors import StepquantError
from stepquant.quiet import silence_libraries

USAGE_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _one_line(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with a user's error told in one line and no traceback."""

    @functools.wraps(command)  # typer reads the signature
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with joined() as ranks, _only_main_speaks(ranks):
                command(*args, **kwargs)
        except StepquantError as error:
            _say(str(error))
            raise typer.Exit(USAGE_ERROR) from None
        except KeyboardInterrupt:
            _say("interrupted; what is finished is kept, run the same command again to continue.")
            raise typer.Exit(INTERRUPTED) from None

    return run


@contextmanager
def _only_main_speaks(ranks: Ranks) -> Iterator[None]:
    """Of several processes, keep the results of all but the main one off standard output."""
    if ranks.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123 - no file
        yield


def _say(message: str) -> None:
    typer.echo(f"stepquant: {' '.join(message.split())}", err=True)


for command in (
    quantize,
    train,
    sample,
    evaluate,
    bench,
    export,
    compare,
    report,
    inspect,
    sensitivity,
    study,
    ui,
    recipes,
    zoo,
):
    app.command()(_one_line(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepquant {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Quantize diffusion models, per denoising step, and run them in integers."""
    silence_libraries()


def main() -> None:
    """Entry point: exit code 0 done, 2 bad input (one line on standard error), 130 interrupted."""
    app()


if __name__ == "__main__":
    main()
