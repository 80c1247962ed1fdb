"""``stepquant report``: a page about a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Seed, Steps, at_least_one, check_page, progress


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Its full-precision origin; default: the one it names.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    count: Annotated[int, typer.Option(help="Images.")] = 16,
    steps: Steps = 50,
    seed: Seed = 0,
    sensitivity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The sensitivity.json of its origin, to be shown too.")
    ] = None,
    times: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What stepquant quantize --times wrote, to be shown too.")
    ] = None,
) -> None:
    """Write a page about a quantized model: what was done, what it costs, what it changed."""
    from stepquant import report as page

    at_least_one("count", count)
    at_least_one("steps", steps)
    check_page(out, [folder])
    origin = against or page.origin_of(folder)
    gathered = page.gather(
        folder,
        origin,
        count=count,
        steps=steps,
        seed=seed,
        sensitivity=sensitivity,
        times=times,
        progress=progress(),
    )
    page.write(gathered, out)
    typer.echo(f"{folder} against {origin}: {out}")
