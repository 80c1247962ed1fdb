"""``stepquant report``: a page about a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Seed, Steps, at_least_one, check_writable_file, progress
from stepquant.errors import StepquantError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Its full-precision origin; default: the one it names.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    count: Annotated[int, typer.Option(help="Pictures.")] = 16,
    steps: Steps = 50,
    seed: Seed = 0,
    sensitivity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The sensitivity.json of its origin, to be shown too.")
    ] = None,
) -> None:
    """Write a page about a quantized model: what was done, what it costs, what it changed."""
    from stepquant import report as page

    at_least_one("count", count)
    at_least_one("steps", steps)
    _check_out(out, folder)
    origin = against or page.origin_of(folder)
    gathered = page.gather(
        folder, origin, count=count, steps=steps, seed=seed, sensitivity=sensitivity, progress=progress()
    )
    page.write(gathered, out)
    typer.echo(f"{folder} against {origin}: {out}")


def _check_out(out: Path, folder: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise StepquantError(f"the report cannot be written to {out}: expected a file name that ends in .html.")
    if folder.resolve() in out.resolve().parents[1:]:
        raise StepquantError(f"{out} lies inside the checkpoint, which must stay as it is: choose another folder.")
    check_writable_file(out)
