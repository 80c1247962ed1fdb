"""``stepquant evaluate``: a quantized model compared with its full-precision model, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stepquant.cli.options import Backend, Count, Folder, Guidance, Inputs, Json, Memory, Seed, Steps, inputs_from
from stepquant.cli.output import check_writable_file, print_table, progress, table_of, write_json

if TYPE_CHECKING:
    from stepquant.evaluation import EvaluationResult

IMAGES_SHOWN = 16


def evaluate(
    folder: Folder,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The full-precision model.")],
    json: Json = None,
    grid: Annotated[Path | None, typer.Option(help="Write images of both, side by side, to this file.")] = None,
    count: Count = 128,
    steps: Steps = 50,
    seed: Seed = 0,
    guidance: Guidance = None,
    inputs: Inputs = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="parti, a COCO captions JSON, or a file with one prompt per line; default: the model's own."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="METRIC=PATH", help="Another metric; can be repeated; --with help lists them."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of real images, for FID and similar metrics.")] = None,
    backend: Backend = "auto",
    memory: Memory = "unpacked",
) -> None:
    """Compare a quantized model with its full-precision model."""
    from stepquant import evaluation
    from stepquant.distributed import Ranks
    from stepquant.evaluation.metrics import METRICS
    from stepquant.evaluation.prompts import prompt_set
    from stepquant.images import image_format, save_image, side_by_side, stills

    if metric == ["help"]:
        typer.echo("\n".join(f"{name}: {needs}" for name, needs in METRICS.items()))
        return
    if grid is not None:
        image_format(grid)
    check_writable_file(json)
    check_writable_file(grid)
    evaluated = evaluation.evaluate(
        folder,
        against,
        count=count,
        steps=steps,
        seed=seed,
        guidance=guidance,
        inputs=inputs_from(inputs),
        prompts=prompt_set(prompts) if prompts else None,
        backend=backend,
        memory=memory,
        metrics={name: path for name, _, path in (text.partition("=") for text in metric or [])},
        data=data,
        cache=Path("out/features"),
        progress=progress(),
    )
    if not Ranks.current().is_main:
        return
    print_table(_table(evaluated.result))
    if json is not None:
        write_json(json, evaluated.result)
        typer.echo(f"figures: {json}")
    if grid is not None:
        shown = slice(0, IMAGES_SHOWN)
        captions = ("full precision", "quantized")
        left, right = (stills(images[shown], against) for images in (evaluated.full_precision, evaluated.quantized))
        save_image(side_by_side(left, right, captions), grid)
        typer.echo(f"images, full precision beside quantized: {grid}")


def _table(result: EvaluationResult) -> Table:
    from stepquant.evaluation.compare import SHADOWED

    title = f"{result.steps} steps, seed {result.seed}; in brackets: 95 % confidence interval over images"
    table = table_of(title, ("",), ("images", "full precision", "quantized"))
    count, compared = str(result.count), str(min(result.count, SHADOWED))
    psnr, errors = f"{result.psnr_db:.2f} dB", result.step_error
    ratio = "SNR" if result.medium == "audio" else "PSNR"
    table.add_row(f"{ratio} to full precision", count, "", _with_interval(psnr, result.psnr_db_interval, 2))
    table.add_row(f"{ratio} of the worst {result.medium}", count, "", f"{result.psnr_db_lowest:.2f} dB")
    if result.ssim is not None:
        similarity = _with_interval(f"{result.ssim:.4f}", result.ssim_interval, 4)
        table.add_row("SSIM to full precision", count, "", similarity)
    table.add_row("error per step, first / last", compared, "", f"{errors[0]:.2%} / {errors[-1]:.2%}")
    table.add_row("error per step, largest", compared, "", f"{max(errors):.2%}")
    if result.frechet_classifier is not None and result.frechet_classifier_fp32 is not None:
        distances = (f"{result.frechet_classifier_fp32:.3f}", f"{result.frechet_classifier:.3f}")
        table.add_row("Frechet distance to the data (classifier)", count, *distances)
    elif result.frechet_note:
        table.caption = f"no Frechet distance: {result.frechet_note}"
    for name, figure in result.metrics.items():
        images = str(figure.count) if figure.data_count is None else f"{figure.count} of {figure.data_count}"
        full = "" if figure.full_precision is None else f"{figure.full_precision:.4g}"
        table.add_row(name, images, full, _with_interval(f"{figure.value:.4g}", figure.interval, 4))
        if figure.note:
            table.add_row(f"    {figure.note}")
    size, size_fp32 = result.denoiser_bytes / 1e6, result.denoiser_bytes_fp32 / 1e6
    memory, memory_fp32 = result.peak_memory_bytes / 1e6, result.peak_memory_bytes_fp32 / 1e6
    time, time_fp32 = result.seconds_per_step * 1e3, result.seconds_per_step_fp32 * 1e3
    table.add_row("denoiser", "", f"{size_fp32:.2f} MB", f"{size:.2f} MB")
    table.add_row("    relative to float32", "", "", f"{size / size_fp32:.3f}x")
    table.add_row("peak memory", "", f"{memory_fp32:.0f} MB", f"{memory:.0f} MB")
    table.add_row(f"latency per step, batch of {result.batch_size}", "", f"{time_fp32:.1f} ms", f"{time:.1f} ms")
    table.add_row("    speed", "", "", f"{result.speedup:.2f}x")
    return table


def _with_interval(text: str, interval: tuple[float, float] | None, decimals: int) -> str:
    return text if interval is None else f"{text} [{interval[0]:.{decimals}f}, {interval[1]:.{decimals}f}]"
