"""Charts of a page: SVG by matplotlib, and heat maps as a strip of pixels per row. Colors follow the page's theme."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from torch import Tensor

from stepquant.report.inputs import SensitivityFile
from stepquant.report.structure import ActivationRange

INK, LINE, ACCENT, GROUND, SOFT = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Stand-ins for the colors of the theme, see `THEME`."""
THEME = {INK: "--ink", LINE: "--line", ACCENT: "--accent", GROUND: "--ground", SOFT: "--soft"}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "stepquant",  # the same report gives the same page
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.subplot.bottom": 0.2,
    "figure.subplot.left": 0.17,
    "figure.subplot.right": 0.96,
    "figure.subplot.top": 0.96,
    "grid.color": LINE,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
UNUSED = "|".join(
    (
        *(r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<clipPath.*?</clipPath>", r"<!--.*?-->", r"\n *"),
        *(r' id="[\w.]+_\d+"', r' clip-path="[^"]*"', r"font-family: [^;]*; ?"),
    )
)
"""Parts of matplotlib's SVG that a page does not need; nothing is drawn outside the axes."""
CHART_SIZE = (4.4, 2.5)
LEGEND_SIZE = (3.0, 0.42)
MAX_COLUMNS = 200
"""Timesteps in a figure; of longer tables, such as TDQ's with every training timestep, evenly spaced rows are drawn."""
MAX_LABELS = 7
DECADES = 4
"""Decades of errors with separate colors; smaller errors get the darkest color."""


@dataclass(frozen=True)
class Coloring:
    """One way to color the cells of a heat map.

    Attributes:
        name: suffix of its CSS class.
        title: meaning of the colors.
        legend: the color scale, an SVG.
        strips: the cells of each row, one pixel each, as ``data:`` URIs.
    """

    name: str
    title: str
    legend: Markup
    strips: list[str]


@dataclass(frozen=True)
class HeatMap:
    """Rows of colored cells, each between a label and a note.

    Attributes:
        colorings: the first one is visible, the others can be selected.
        columns: labels at the centers of equal parts of the x axis.
    """

    alt: str
    colorings: list[Coloring]
    labels: list[str]
    notes: list[str]
    columns: list[str]
    x_label: str


def line_chart(x: Sequence[float], y: Sequence[float], alt: str, x_label: str, y_label: str, percent: bool) -> Markup:
    """A curve through (x, y); the x axis runs from the first value to the last.

    The y axis is logarithmic if all values are positive and span more than a decade.
    """
    with _axes(alt, x_label, y_label) as (axes, svg):
        axes.plot(x, y, color=ACCENT, marker="o" if len(x) == 1 else None)
        axes.set_xlim(x[0], x[-1] if x[-1] != x[0] else x[0] + 1)
        low, high = min(y), max(y)
        if low > 0 and high / low > 10:
            axes.set_yscale("log")
            subs = (1, 2, 5) if high / low < 1000 else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=MAX_LABELS + 2))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(min(low, 0), high * 1.05 or 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %" if percent else f"{value:.3g}")
        return svg()


def scatter(
    costs: Sequence[float], qualities: Sequence[float], labels: Sequence[str], x_label: str, y_label: str
) -> Markup:
    """Models by cost and quality, with the staircase of those that no other one dominates."""
    front = pareto(costs, qualities)
    best = ", ".join(labels[index] for index in front)
    alt = f"{len(labels)} models by {x_label} and {y_label}; none is both cheaper and better than {best}."
    with _axes(alt, x_label, y_label) as (axes, svg):
        right = max(costs) * 1.1
        axes.step(
            *zip(*((costs[index], qualities[index]) for index in front), strict=True),
            where="post",
            color=SOFT,
            linestyle="--",
            linewidth=1,
        )
        for index, point in enumerate(zip(costs, qualities, strict=True)):
            axes.plot(*point, "o", color=ACCENT, markerfacecolor=ACCENT if index in front else GROUND)
            left = point[0] > right / 2
            axes.annotate(
                labels[index],
                point,
                (-7 if left else 7, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
            )
        axes.set_xlim(0, right)
        axes.margins(y=0.15)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        return svg()


def pareto(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the models that no other one dominates, cheapest first."""
    points = list(zip(costs, qualities, strict=True))
    front = [
        index
        for index, (cost, quality) in enumerate(points)
        if not any(
            other <= cost and better >= quality and (other, better) != (cost, quality) for other, better in points
        )
    ]
    return sorted(front, key=lambda index: points[index])


def range_map(activations: list[ActivationRange], timesteps: Tensor) -> HeatMap:
    """Ranges of activations, one row each, over the timesteps in the order of sampling.

    Colored by the range, logarithmic; where ranges change over time, also relative to the mean of the row.
    """
    rows = selected_rows(max(len(activation.scale) for activation in activations))
    width = torch.stack([activation.width.expand(rows[0] + 1)[rows] for activation in activations])
    smallest, largest = float(width.min()), float(width.max())
    colorings = [_coloring("ranges", "range", width, "magma", smallest, max(largest, smallest * 1.01))]
    if len(rows) > 1:
        change = width / width.mean(dim=1, keepdim=True)
        colorings.append(_coloring("changes", "range over its mean", change, "RdBu_r", 0.5, 2.0))
    extremes = zip(width.amin(1).tolist(), width.amax(1).tolist(), strict=True)
    return HeatMap(
        alt=f"Range of {len(activations)} activations at {len(rows)} timesteps, from {smallest:.3g} to {largest:.3g}",
        colorings=colorings,
        labels=[activation.name for activation in activations],
        notes=[f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}" for low, high in extremes],
        columns=_column_labels([f"{timestep:g}" for timestep in timesteps[rows].tolist()]) if len(rows) > 1 else [],
        x_label="timestep: noise left, image right" if len(rows) > 1 else "all steps",
    )


def sensitivity_map(measured: SensitivityFile) -> HeatMap:
    """Error of each layer in each group of sampler steps, logarithmic over `DECADES` below the largest."""
    errors = torch.tensor([layer.errors for layer in measured.layers])
    largest = max(float(errors.max()), 1e-12)
    smallest = largest / 10**DECADES
    groups = [str(first) if first == last else f"{first}-{last}" for first, last in measured.step_groups]
    worst = max(measured.layers, key=lambda layer: layer.error)
    return HeatMap(
        alt=f"Error of {len(measured.layers)} layers in {len(groups)} groups of steps, at most {largest:.2g}; "
        f"the most sensitive layer is {worst.name}",
        colorings=[_coloring("errors", "error", errors.clamp(min=smallest), "magma", smallest, largest)],
        labels=[layer.name for layer in measured.layers],
        notes=[f"{layer.error:.2g}" for layer in measured.layers],
        columns=_column_labels(groups),
        x_label="denoising step: noise left, image right",
    )


def selected_rows(rows: int) -> list[int]:
    """Indices of the table rows in a figure, in the order of sampling: the last first."""
    return torch.linspace(rows - 1, 0, min(rows, MAX_COLUMNS)).round().long().tolist()


def png_uri(image: Image.Image) -> str:
    """An image as a ``data:`` URI."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


def _column_labels(labels: list[str]) -> list[str]:
    """At most `MAX_LABELS` labels at the centers of equally wide parts."""
    parts = min(len(labels), MAX_LABELS)
    return [labels[int((part + 0.5) * len(labels) / parts)] for part in range(parts)]


def _coloring(name: str, title: str, values: Tensor, colormap: str, low: float, high: float) -> Coloring:
    """Logarithmic colors from `low` to `high`."""
    scale = ScalarMappable(LogNorm(low, high), colormap)
    pixels = scale.to_rgba(values.numpy(), bytes=True)[..., :3]
    strips = [png_uri(Image.fromarray(np.ascontiguousarray(row[None]))) for row in pixels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(LEGEND_SIZE)
        bar = figure.colorbar(scale, cax=figure.add_axes((0.08, 0.55, 0.84, 0.4)), orientation="horizontal")
        bar.solids.set_rasterized(True)  # type: ignore[union-attr]
        bar.outline.set_visible(False)
        ticks = [low, (low * high) ** 0.5, high]
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
        bar.minorticks_off()
        alt = f"Colors: {title} from {low:.3g} to {high:.3g}"
        return Coloring(name, title, _svg(figure, alt, f"legend map-{name}"), strips)


@contextmanager
def _axes(alt: str, x_label: str, y_label: str) -> Iterator[tuple[Axes, Callable[[], Markup]]]:
    """Axes to draw on, and a function that returns the chart."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(CHART_SIZE)
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.locator_params(nbins=6)
        yield axes, lambda: _svg(figure, alt, "chart")


def _svg(figure: Figure, alt: str, css_class: str) -> Markup:
    """The figure as an element for HTML, in the colors of the theme."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root, _, body = buffer.getvalue().partition("<svg")[2].partition(">")
    body = re.sub(UNUSED, "", body, flags=re.DOTALL)
    for color, name in THEME.items():
        body = body.replace(color, f"var({name})")
    view = re.search(r"viewBox=\"[^\"]*\"", root)
    assert view is not None
    head = Markup('<svg class="{}" role="img" aria-label="{}" {}>').format(css_class, alt, Markup(view[0]))
    return head + Markup(body)
