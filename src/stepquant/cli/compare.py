"""``stepquant compare``: several quantized models beside their full-precision model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stepquant.cli.options import Against, Count, Guidance, Inputs, Seed, Steps, inputs_from
from stepquant.cli.output import check_page, print_table, progress, table_of

if TYPE_CHECKING:
    from stepquant.report.comparison import Comparison


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders written by stepquant quantize.")],
    against: Against = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    count: Count = 16,
    steps: Steps = 50,
    seed: Seed = 0,
    guidance: Guidance = None,
    inputs: Inputs = None,
) -> None:
    """Compare quantized models with their full-precision model.

    It prints a table and writes a page with a Pareto plot and images.
    """
    from stepquant.files import write_text
    from stepquant.report import comparison as reports
    from stepquant.report import origin_of

    check_page(out, folders)
    against = against or origin_of(folders[0])
    comparison = reports.compare(
        folders,
        against,
        count=count,
        steps=steps,
        seed=seed,
        guidance=guidance,
        inputs=inputs_from(inputs),
        progress=progress(),
    )
    print_table(_table(comparison))
    write_text(out, reports.render_comparison(comparison))
    typer.echo(f"{len(folders)} models against {against}: {out}")


def _table(comparison: Comparison) -> Table:
    first = comparison.contenders[0].figures
    title = f"{first.count} images, {first.steps} steps, seed {first.seed}"
    table = table_of(title, ("model", "recipe", "bits"), ("PSNR, dB", "SSIM", "size, MB", "ms per step", "speed"))
    size, time = f"{first.denoiser_bytes_fp32 / 1e6:.2f}", f"{first.seconds_per_step_fp32 * 1e3:.1f}"
    table.add_row(comparison.against, "", "float32", "", "", size, time, "1.00x")
    for one in comparison.contenders:
        figures = one.figures
        table.add_row(
            one.name,
            one.recipe,
            one.bits,
            f"{figures.psnr_db:.2f}",
            "" if figures.ssim is None else f"{figures.ssim:.4f}",
            f"{figures.denoiser_bytes / 1e6:.2f}",
            f"{figures.seconds_per_step * 1e3:.1f}",
            f"{figures.speedup:.2f}x",
        )
    return table
