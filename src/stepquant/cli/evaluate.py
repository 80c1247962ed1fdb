"""``stepquant evaluate``: a quantized model against its origin, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stepquant.cli.options import (
    Backend,
    Guidance,
    Memory,
    Seed,
    Steps,
    at_least_one,
    check_writable_file,
    console,
    progress,
)

if TYPE_CHECKING:
    from stepquant.evaluation import EvaluationResult

SHADOWED = 32
"""As `stepquant.evaluation.compare` has it, which is not imported for a table."""
PICTURES_SHOWN = 16


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help="Its full-precision origin.")],
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Write images of both, side by side, to this file.")] = None,
    count: Annotated[int, typer.Option(help="Images.")] = 128,
    steps: Steps = 50,
    seed: Seed = 0,
    guidance: Guidance = None,
    prompts: Annotated[
        str | None, typer.Option(help="parti, a COCO captions JSON, or a file with a prompt a line; default: its own.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="METRIC=PATH", help="A further metric; may be repeated; help lists them."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with images of the data, for FID and its kin.")] = None,
    backend: Backend = "auto",
    memory: Memory = "unpacked",
) -> None:
    """Compare a quantized model with its full-precision origin."""
    from stepquant import evaluation
    from stepquant.distributed import Ranks
    from stepquant.evaluation.metrics import METRICS, check_metrics
    from stepquant.evaluation.prompts import prompt_set
    from stepquant.files import write_atomic
    from stepquant.images import image_format, save_image, side_by_side
    from stepquant.runtime import check_memory

    if metric == ["help"]:
        typer.echo("\n".join(f"{name}: {needs}" for name, needs in METRICS.items()))
        return
    wanted = {name: path for name, _, path in (text.partition("=") for text in metric or [])}
    check_metrics(wanted, data)
    check_memory(memory)
    at_least_one("count", count)
    at_least_one("steps", steps)
    if grid is not None:
        image_format(grid)
    for path in (json, grid):
        if path is not None:
            check_writable_file(path)
    evaluated = evaluation.evaluate(
        folder,
        against,
        count=count,
        steps=steps,
        seed=seed,
        guidance=guidance,
        prompts=prompt_set(prompts) if prompts else None,
        backend=backend,
        memory=memory,
        metrics=wanted,
        data=data,
        cache=Path("out/features"),
        progress=progress(),
    )
    if not Ranks.current().is_main:
        return
    result = evaluated.result
    console().print(_table(result))
    if json is not None:
        write_atomic(json, lambda draft: draft.write_text(result.model_dump_json(indent=2) + "\n"))
        typer.echo(f"figures: {json}")
    if grid is not None:
        shown = slice(0, PICTURES_SHOWN)
        captions = ("full precision", "quantized")
        save_image(side_by_side(evaluated.full_precision[shown], evaluated.quantized[shown], captions), grid)
        typer.echo(f"images, full precision beside quantized: {grid}")


def _table(result: EvaluationResult) -> Table:
    title = f"{result.steps} steps, seed {result.seed}; in brackets: 95 % confidence over images"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("images", "full precision", "quantized"):
        table.add_column(column, justify="right")
    count = str(result.count)
    table.add_row("PSNR to full precision", count, "", _between(f"{result.psnr_db:.2f} dB", result.psnr_db_interval, 2))
    table.add_row("PSNR of the worst image", count, "", f"{result.psnr_db_lowest:.2f} dB")
    table.add_row("SSIM to full precision", count, "", _between(f"{result.ssim:.4f}", result.ssim_interval, 4))
    errors, shadowed = result.step_error, str(min(result.count, SHADOWED))
    table.add_row("error of a step, first / last", shadowed, "", f"{errors[0]:.2%} / {errors[-1]:.2%}")
    table.add_row("error of a step, largest", shadowed, "", f"{max(errors):.2%}")
    if result.frechet_classifier is not None and result.frechet_classifier_fp32 is not None:
        distances = (f"{result.frechet_classifier_fp32:.3f}", f"{result.frechet_classifier:.3f}")
        table.add_row("Frechet distance to the data (classifier)", count, *distances)
    elif result.frechet_note:
        table.caption = f"no Frechet distance: {result.frechet_note}"
    for name, figure in result.metrics.items():
        data = "" if figure.data_count is None else f" of {figure.data_count}"
        full = "" if figure.full_precision is None else f"{figure.full_precision:.4g}"
        row = (name, f"{figure.count}{data}", full, _between(f"{figure.value:.4g}", figure.interval, 4))
        table.add_row(*row)
        if figure.note:
            table.add_row(f"    {figure.note}")
    size = (f"{result.denoiser_bytes_fp32 / 1e6:.2f} MB", f"{result.denoiser_bytes / 1e6:.2f} MB")
    table.add_row("denoiser", "", *size)
    ratio = result.denoiser_bytes / result.denoiser_bytes_fp32
    table.add_row("    of float32", "", "", f"{ratio:.3f}x")
    memory = f"{result.peak_memory_bytes_fp32 / 1e6:.0f} MB", f"{result.peak_memory_bytes / 1e6:.0f} MB"
    table.add_row("peak memory", "", *memory)
    times = (f"{result.seconds_per_step_fp32 * 1e3:.1f} ms", f"{result.seconds_per_step * 1e3:.1f} ms")
    table.add_row(f"time of a step, batch of {result.batch_size}", "", *times)
    table.add_row("    speed", "", "", f"{result.speedup:.2f}x")
    return table


def _between(text: str, interval: tuple[float, float] | None, decimals: int) -> str:
    return text if interval is None else f"{text} [{interval[0]:.{decimals}f}, {interval[1]:.{decimals}f}]"
