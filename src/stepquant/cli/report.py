"""``stepquant report``: a page about a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Against, Count, Folder, Inputs, Seed, Steps, inputs_from
from stepquant.cli.output import check_page, progress


def report(
    folder: Folder,
    against: Against = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    count: Count = 16,
    steps: Steps = 50,
    seed: Seed = 0,
    inputs: Inputs = None,
    sensitivity: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also show this sensitivity.json of the full-precision model.")
    ] = None,
    times: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also show what stepquant quantize --times wrote.")
    ] = None,
) -> None:
    """Write a page about a quantized model."""
    from stepquant import report as page

    check_page(out, [folder])
    against = against or page.origin_of(folder)
    content = page.gather(
        folder,
        against,
        count=count,
        steps=steps,
        seed=seed,
        inputs=inputs_from(inputs),
        sensitivity=sensitivity,
        times=times,
        progress=progress(),
    )
    page.write(content, out)
    typer.echo(f"{folder} against {against}: {out}")
