"""What a study found: Markdown tables, and a figure."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from stepquant.errors import StepquantError
from stepquant.files import write_atomic
from stepquant.studies.run import Line, finished
from stepquant.studies.spec import Study


class Metric(NamedTuple):
    """A figure of a cell that tables are made of; of a list, its geometric mean; divided by `unit`."""

    name: str
    title: str
    decimals: int
    unit: float = 1.0

    def of(self, line: Line, suffix: str = "") -> float | None:
        value = line.get(self.name + suffix)
        if isinstance(value, list):
            value = statistics.geometric_mean(value)
        return None if value is None else value / self.unit


METRICS = (
    Metric("psnr_db", "PSNR to full precision, dB", 2),
    Metric("step_error_percent", "error of the denoiser's output at full precision's own steps, %, geometric mean", 2),
    Metric("frechet_classifier", "Frechet distance to the data, classifier features (not FID)", 2),
    Metric("class_agreement", "images of the class that was asked for, by the classifier", 3),
    Metric("quantize_seconds", "seconds of a processor to quantize", 0),
    Metric("peak_memory_bytes", "peak memory while quantizing, GB, libraries included", 2, 1e9),
)

Values = dict[tuple[str, str], list[float]]
"""(recipe's label, bits) -> the figure of each seed."""


def markdown_tables(study: Study, results: Path) -> str:
    """A table a model and metric, recipes x bits: mean over seeds ± standard deviation (how many seeds); then pairs."""
    lines = finished(results)
    out = []
    for model in study.models:
        for metric in METRICS:
            values, full = _collect(study, lines, model, metric)
            if not values:
                continue
            origin = f"; full precision {_text(full, metric.decimals)}" if full else ""
            out += [f"**{model}**: {metric.title}{origin}", ""]
            out.append(f"| recipe | {' | '.join(bits.upper() for bits in study.bits)} |")
            out.append("|---" * (1 + len(study.bits)) + "|")
            for label in study.recipes:
                cells = [_text(values.get((label, bits), []), metric.decimals) for bits in study.bits]
                out.append(f"| `{label}` | {' | '.join(cells)} |")
            out.append("")
    return "\n".join(out + _pairs(study, lines)).rstrip()


def _pairs(study: Study, lines: dict[str, Line]) -> list[str]:
    """By how much the first of each pair is above the second in PSNR, and its error relative to the second's; by bits.

    Seeds draw other images, so differences are taken within each, of the seeds that have both.
    """
    if not study.pairs:
        return []
    quality, error = METRICS[:2]
    out = []
    for bits in study.bits:
        out += [f"**{bits.upper()}**: difference in PSNR, and in error relative to the second's, within seeds", ""]
        out += [f"| | {' | '.join(study.models)} |", "|---" * (1 + len(study.models)) + "|"]
        found: dict[tuple[str, str], dict[int, Line]] = {}
        for cell in study.only(bits=[bits]).cells():
            if cell.identity in lines:
                found.setdefault((cell.model, cell.label), {})[cell.seed] = lines[cell.identity]
        for label, baseline in study.pairs:
            texts = []
            for model in study.models:
                first, second = found.get((model, label), {}), found.get((model, baseline), {})
                seeds = sorted(set(first) & set(second))
                gains = [_of(quality, first[seed]) - _of(quality, second[seed]) for seed in seeds]
                excess = [100 * (_of(error, first[seed]) / _of(error, second[seed]) - 1) for seed in seeds]
                texts.append(_difference(gains, excess))
            out.append(f"| `{label}` over `{baseline}` | {' | '.join(texts)} |")
        out.append("")
    return out


def draw_figure(study: Study, results: Path, path: Path) -> None:
    """PSNR of each recipe, a panel a model and bits, a dot a mean and a bar its standard deviation; PNG, SVG or PDF.

    Raises:
        StepquantError: if matplotlib is not installed, there is nothing to draw, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StepquantError("figures need matplotlib: install it with pip install 'stepquant[figures]'.") from None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise StepquantError(f"a figure cannot be written to {path}: expected a file name that ends in .png.")
    lines = finished(results)
    rows, columns, labels = len(study.models), len(study.bits), list(study.recipes)
    figure = Figure(figsize=(1.5 + 2.2 * columns, 0.8 + (0.7 + 0.22 * len(labels)) * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, sharey=True, squeeze=False)
    found = False
    for row, model in enumerate(study.models):
        values, _ = _collect(study, lines, model, METRICS[0])
        found = found or bool(values)
        for column, bits in enumerate(study.bits):
            axes = grid[row][column]
            for place, label in enumerate(labels):
                seeds = values.get((label, bits))
                if seeds:
                    spread = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
                    axes.errorbar(statistics.mean(seeds), place, xerr=spread, fmt="o", ms=4, capsize=2, color="#3366aa")
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.grid(axis="x", linewidth=0.4)
            if column == 0:
                axes.set_yticks(range(len(labels)), labels, fontsize=8)
                axes.set_ylabel(model)
            if row == 0:
                axes.set_title(bits.upper(), fontsize=9)
            axes.tick_params(axis="x", labelsize=7)
    if not found:
        raise StepquantError(f"{results} has no results of this study yet: run it first.")
    figure.supxlabel("PSNR to full precision, dB:\nmean over seeds and standard deviation", fontsize=8)
    write_atomic(path, lambda draft: figure.savefig(draft, format=path.suffix[1:], dpi=150))


def _collect(study: Study, lines: dict[str, Line], model: str, metric: Metric) -> tuple[Values, list[float]]:
    """A metric of each recipe and bits, and of full precision over the seeds."""
    values: Values = {}
    full: dict[int, float] = {}
    for cell in study.only(models=[model]).cells():
        line = lines.get(cell.identity)
        value = None if line is None else metric.of(line)
        if line is None or value is None:
            continue
        values.setdefault((cell.label, cell.bits), []).append(value)
        original = metric.of(line, "_fp32")
        if original is not None:
            full[cell.seed] = original
    return values, list(full.values())


def _of(metric: Metric, line: Line) -> float:
    value = metric.of(line)
    assert value is not None, "every cell has it"
    return value


def _difference(gains: list[float], excess: list[float]) -> str:
    """Such as ``+0.9 ± 0.3 dB, -12 ± 1 % (3)``."""
    if not gains:
        return ""
    decibels, percent = f"{statistics.mean(gains):+.1f}", f"{statistics.mean(excess):+.0f}"
    if len(gains) > 1:
        decibels += f" ± {statistics.stdev(gains):.1f}"
        percent += f" ± {statistics.stdev(excess):.0f}"
    return f"{decibels} dB, {percent} % ({len(gains)})"


def _text(values: list[float], decimals: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f} ({len(values)})"
