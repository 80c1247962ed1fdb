"""``stepquant study``: a grid of models, recipes, bits and seeds, one cell at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stepquant.cli.output import check_writable_file

if TYPE_CHECKING:
    from stepquant.studies.run import Outcome


def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study, such as benchmarks/studies/papers.toml.")],
    jobs: Annotated[int, typer.Option(help="Cells at a time, each in a process with one thread.")] = 1,
    models: Annotated[list[str] | None, typer.Option(help="Only this model; can be repeated.")] = None,
    bits: Annotated[list[str] | None, typer.Option(help="Only these bits; can be repeated.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Only this seed; can be repeated.")] = None,
    recipes: Annotated[list[str] | None, typer.Option(help="Only this recipe; can be repeated.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="JSON lines to append to; default: ../results/NAME.jsonl beside the study.")
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Folder of full-precision images and calibration samples that cells share.")
    ] = Path("out/study-cache"),
    table: Annotated[bool, typer.Option("--table", help="Print the results as Markdown and run nothing.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw the results to this file and run nothing.")] = None,
) -> None:
    """Run the cells of a study that have no results yet.

    You can stop it at any time: the same command continues.
    """
    from stepquant.studies import draw_figure, markdown_tables, read_study, run_study
    from stepquant.studies.run import missing

    part = read_study(file).only(models, bits, seeds, recipes)
    lines = results or file.parent.parent / "results" / f"{file.stem}.jsonl"
    if table:
        typer.echo(markdown_tables(part, lines))
    if figure is not None:
        check_writable_file(figure)
        draw_figure(part, lines, figure)
        typer.echo(f"figure: {figure}")
    if table or figure is not None:
        return
    check_writable_file(lines)
    typer.echo(f"{sum(1 for _ in missing(part, lines))} cells to do: {lines}")
    failed = run_study(part, lines, cache, jobs=jobs, tell=_print_outcome)
    if failed:
        typer.echo(f"stepquant: {failed} cells failed and have no line; the same command tries them again.", err=True)
        raise typer.Exit(1)


def _print_outcome(outcome: Outcome) -> None:
    cell, line = outcome.cell, outcome.line
    name = f"{cell.model:14} {cell.bits} seed {cell.seed} {cell.label:28}"
    if line is None:
        typer.echo(f"stepquant: {' '.join(name.split())} failed: {outcome.problem}", err=True)
    else:
        typer.echo(f"{name} {line['psnr_db']:6.2f} dB {line['quantize_seconds']:6.0f} s   {outcome.left} left")
