"""Results of a study as Markdown tables, and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepquant.errors import StepquantError
from stepquant.files import write_atomic
from stepquant.studies.run import Line, finished
from stepquant.studies.spec import Study


class Metric(NamedTuple):
    """A metric of a cell; of a list, its geometric mean; divided by `unit`."""

    name: str
    title: str
    decimals: int
    unit: float = 1.0

    def of(self, line: Line, suffix: str = "") -> float | None:
        value = line.get(self.name + suffix)
        if isinstance(value, list):
            value = statistics.geometric_mean(value)
        return None if value is None else value / self.unit


PSNR = Metric("psnr_db", "PSNR to full precision, dB", 2)
ERROR = Metric("step_error_percent", "error of the denoiser's output on the full-precision trajectory, %", 2)
METRICS = (
    PSNR,
    ERROR,
    Metric("frechet_classifier", "Frechet distance to the data, classifier features (not FID)", 2),
    Metric("class_agreement", "share of images of the requested class, by the classifier", 3),
    Metric("quantize_seconds", "CPU seconds to quantize", 0),
    Metric("peak_memory_bytes", "peak memory of quantization, GB, libraries included", 2, 1e9),
)
SUFFIXES = (".png", ".svg", ".pdf")

Values = dict[tuple[str, str], list[float]]
"""(label of a recipe, bits) -> the values of all seeds."""


def markdown_tables(study: Study, results: Path) -> str:
    """A table of recipes x bits per model and metric: mean over seeds ± standard deviation (seeds); then the pairs."""
    lines = finished(results)
    out = []
    for model in study.models:
        for metric in METRICS:
            values, full = _collect(study, lines, model, metric)
            if values:
                suffix = f"; full precision {_text(full, metric.decimals)}" if full else ""
                rows = [
                    [f"`{label}`", *(_text(values.get((label, bits), []), metric.decimals) for bits in study.bits)]
                    for label in study.recipes
                ]
                out.append(f"**{model}**: {metric.title}{suffix}")
                out.append(_table(["recipe", *(bits.upper() for bits in study.bits)], rows))
    return "\n\n".join(out + _pairs(study, lines))


def _pairs(study: Study, lines: dict[str, Line]) -> list[str]:
    """The difference in PSNR and the relative error of each pair, a table per number of bits.

    Seeds generate other images, so that differences are taken within seeds, of those that have both.
    """
    out: list[str] = []
    for bits in study.bits if study.pairs else ():
        measured: dict[tuple[str, str], dict[int, Line]] = {}
        for cell in study.only(bits=[bits]).cells():
            if cell.identity in lines:
                measured.setdefault((cell.model, cell.label), {})[cell.seed] = lines[cell.identity]
        rows = [
            [
                f"`{label}` over `{baseline}`",
                *(
                    _difference(measured.get((model, label), {}), measured.get((model, baseline), {}))
                    for model in study.models
                ),
            ]
            for label, baseline in study.pairs
        ]
        out.append(f"**{bits.upper()}**: difference in PSNR, and in error relative to the baseline, within seeds")
        out.append(_table(["", *study.models], rows))
    return out


def _difference(lines: dict[int, Line], baseline: dict[int, Line]) -> str:
    """Text such as ``+0.9 ± 0.3 dB, -12 ± 1 % (3)``, of lines by seed."""
    seeds = sorted(set(lines) & set(baseline))
    if not seeds:
        return ""
    gains = [_value(PSNR, lines[seed]) - _value(PSNR, baseline[seed]) for seed in seeds]
    excess = [100 * (_value(ERROR, lines[seed]) / _value(ERROR, baseline[seed]) - 1) for seed in seeds]
    decibels, percent = f"{statistics.mean(gains):+.1f}", f"{statistics.mean(excess):+.0f}"
    if len(seeds) > 1:
        decibels += f" ± {statistics.stdev(gains):.1f}"
        percent += f" ± {statistics.stdev(excess):.0f}"
    return f"{decibels} dB, {percent} % ({len(seeds)})"


def _value(metric: Metric, line: Line) -> float:
    value = metric.of(line)
    assert value is not None, "every line has it"
    return value


def draw_figure(study: Study, results: Path, path: Path) -> None:
    """Draw the PSNR of each recipe, a panel per model and bits: mean and standard deviation; PNG, SVG or PDF.

    Raises:
        StepquantError: if there are no results, or the file cannot be written.
    """
    from matplotlib.figure import Figure  # not in the workers, whose memory is measured

    if path.suffix not in SUFFIXES:
        raise StepquantError(f"{path} is not a chart; expected a file name that ends in {', '.join(SUFFIXES)}.")
    lines = finished(results)
    rows, columns, labels = len(study.models), len(study.bits), list(study.recipes)
    figure = Figure(figsize=(1.5 + 2.2 * columns, 0.8 + (0.7 + 0.22 * len(labels)) * rows), layout="constrained")
    panels: Any = figure.subplots(rows, columns, sharey=True, squeeze=False)
    drawn = 0
    for row, model in enumerate(study.models):
        values, _ = _collect(study, lines, model, PSNR)
        drawn += len(values)
        for column, bits in enumerate(study.bits):
            axes = panels[row][column]
            for place, label in enumerate(labels):
                if seeds := values.get((label, bits)):
                    spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
                    axes.errorbar(statistics.mean(seeds), place, xerr=spread, fmt="o", ms=4, capsize=2, color="#3366aa")
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.grid(axis="x", linewidth=0.4)
            axes.tick_params(axis="x", labelsize=7)
        panels[row][0].set_yticks(range(len(labels)), labels, fontsize=8)
        panels[row][0].set_ylabel(model)
    for axes, bits in zip(panels[0], study.bits, strict=True):
        axes.set_title(bits.upper(), fontsize=9)
    if not drawn:
        raise StepquantError(f"{results} has no results of this study. Run the study first.")
    figure.supxlabel("PSNR to full precision, dB:\nmean and standard deviation over seeds", fontsize=8)
    write_atomic(path, lambda draft: figure.savefig(draft, format=path.suffix[1:], dpi=150))


def _collect(study: Study, lines: dict[str, Line], model: str, metric: Metric) -> tuple[Values, list[float]]:
    """Values of a metric by recipe and bits, and the values of full precision over the seeds."""
    values: Values = {}
    full: dict[int, float] = {}
    for cell in study.only(models=[model]).cells():
        line = lines.get(cell.identity, {})
        if (value := metric.of(line)) is not None:
            values.setdefault((cell.label, cell.bits), []).append(value)
        if (original := metric.of(line, "_fp32")) is not None:
            full[cell.seed] = original
    return values, list(full.values())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(values: list[float], decimals: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f} ({len(values)})"
