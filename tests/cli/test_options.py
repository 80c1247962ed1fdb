"""Library errors name Python parameters; the command names its options."""

import pytest
import typer
from typer.testing import CliRunner

from stepquant.cli.errors import Command
from stepquant.errors import StepquantError


@pytest.mark.parametrize(
    ("library", "command"),
    [
        ("steps is 0; expected at least 1.", "--steps is 0; expected at least 1."),
        ("steps are 0; the steps of `steps` count.", "--steps are 0; the steps of --steps count."),
        ("give another `out`, or `overwrite=True`.", "give another --out, or --overwrite."),
        ("give overwrite=True or smoothing=False.", "give --overwrite or --no-smoothing."),
        ("no `correction` with batch_size=8, `batch_size=...`", "no --correct with --batch-size 8, --batch-size ..."),
        ('use out="auto" or `out="x"`', "use --out auto or --out x"),
        ("the steps are few; use `unknown=True`.", "the steps are few; use `unknown=True`."),
        ("`model` is the argument itself", "`model` is the argument itself"),
    ],
)
def test_parameters_become_options(library, command):
    app = typer.Typer()

    @app.command(cls=Command)
    def run(
        model: str, out: str = "", steps: int = 1, batch_size: int = 1, overwrite: bool = typer.Option(False),
        smoothing: bool = typer.Option(True, "--smoothing/--no-smoothing"),
        correct: bool = typer.Option(False, "--correct"),
    ) -> None:  # fmt: skip
        raise StepquantError(library)

    result = CliRunner().invoke(app, ["zoo:some"])
    assert result.exit_code == 2
    assert result.stderr == f"stepquant: {command}\n"
