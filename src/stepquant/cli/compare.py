"""``stepquant compare``: several quantized models and their origin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stepquant.cli.options import Guidance, Seed, Steps, at_least_one, check_page, console, progress

if TYPE_CHECKING:
    from stepquant.report.comparison import Comparison


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders written by stepquant quantize.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Their full-precision origin; default: the one they name.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    count: Annotated[int, typer.Option(help="Images.")] = 16,
    steps: Steps = 50,
    seed: Seed = 0,
    guidance: Guidance = None,
) -> None:
    """Compare quantized models of one origin: a table, and a page with a Pareto figure and images."""
    from stepquant.report import origin_of
    from stepquant.report.comparison import compare as evaluate_all
    from stepquant.report.comparison import write_comparison

    at_least_one("count", count)
    at_least_one("steps", steps)
    check_page(out, folders)
    origin = against or origin_of(folders[0])
    comparison = evaluate_all(
        folders, origin, count=count, steps=steps, seed=seed, guidance=guidance, progress=progress()
    )
    console().print(_table(comparison))
    write_comparison(comparison, out)
    typer.echo(f"{len(folders)} models against {origin}: {out}")


def _table(comparison: Comparison) -> Table:
    first = comparison.contenders[0].figures
    title = f"{first.count} images of {first.steps} steps, seed {first.seed}"
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold")
    for column in ("recipe", "bits"):
        table.add_column(column)
    for column in ("PSNR, dB", "SSIM", "size, MB", "ms a step", "speed"):
        table.add_column(column, justify="right")
    size, time = f"{first.denoiser_bytes_fp32 / 1e6:.2f}", f"{first.seconds_per_step_fp32 * 1e3:.1f}"
    table.add_row(comparison.against, "", "float32", "", "", size, time, "1.00x")
    for one in comparison.contenders:
        figures = one.figures
        table.add_row(
            one.name,
            one.recipe,
            one.bits,
            f"{figures.psnr_db:.2f}",
            f"{figures.ssim:.4f}",
            f"{figures.denoiser_bytes / 1e6:.2f}",
            f"{figures.seconds_per_step * 1e3:.1f}",
            f"{figures.speedup:.2f}x",
        )
    return table
