"""Geometry of the figures: values in, positions and labels out. The templates turn them into SVG."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from stepquant.report.sensitivity import SensitivityFile
from stepquant.report.structure import ActivationRange

Anchors = tuple[tuple[int, int, int], ...]

RANGE_COLORS: Anchors = ((27, 18, 75), (84, 34, 130), (164, 52, 124), (232, 100, 86), (252, 178, 88), (252, 246, 190))
"""From the smallest to the largest: ever brighter, so that they read in grey too."""
CHANGE_COLORS: Anchors = ((33, 84, 160), (140, 178, 220), (240, 240, 240), (236, 158, 118), (178, 48, 32))
"""From half to double, through no change."""

CELL_HEIGHT = 13
MAP_WIDTH = 480
COLUMN_WIDTH = 90
"""Of a map with a single column."""
LEGEND_SAMPLES = 64
MOST_TICKS = 7
MOST_COLUMNS = 200
"""Timesteps that are drawn; of longer tables, such as TDQ's of every training timestep, evenly spread ones."""
DECADES = 4
"""Of errors that have a color of their own; smaller ones are as dark as nothing."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: how far along it, px, and what it says."""

    position: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """One curve. Positions are px in the plotting area, whose origin is its upper left corner.

    Attributes:
        alt: the figure in words.
        points: as an SVG polyline has them.
    """

    alt: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: str
    width: int = 360
    height: int = 180


@dataclass(frozen=True)
class Layer:
    """One coloring of a map's cells, which all lie on top of each other.

    Attributes:
        name: of its CSS class.
        title: what the colors stand for.
        cells: as an image, a pixel a cell (data URI).
        legend: data URI of the color scale.
        ticks: below the scale; positions from 0 to 1.
    """

    name: str
    title: str
    cells: str
    legend: str
    ticks: list[Tick]


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells with a label before and a text behind each, all of them `cell_height` px high.

    Attributes:
        layers: the first is shown, the others can be chosen.
        row_labels, row_notes: beside the cells.
        columns: ticks below them; positions from 0 to 1.
        x_label: below the ticks.
        width: px of all cells of a row, where there is room for them.
    """

    alt: str
    layers: list[Layer]
    row_labels: list[str]
    row_notes: list[str]
    columns: list[Tick]
    x_label: str
    width: int
    cell_height: int = CELL_HEIGHT


def line_chart(
    x: Sequence[float], y: Sequence[float], alt: str, x_label: str, y_label: str, percent: bool
) -> LineChart:
    """A curve through (x, y) in the order given; the x axis runs from the first value to the last.

    Logarithmic in y where all of it is positive and spans more than a decade.
    """
    low, high = min(y), max(y)
    logarithmic = low > 0 and high / low > 10
    ticks = _decades(low, high) if logarithmic else round_numbers(min(0.0, low), high or 1.0)
    map_y = math.log if logarithmic else float
    bottom, top = map_y(min(low, *ticks)), map_y(max(high, *ticks))
    start, span = x[0], (x[-1] - x[0]) or 1.0
    chart = LineChart(alt, x_label, y_label, [], [], "")

    def across(value: float) -> float:
        return round((value - start) / span * chart.width, 2)

    def down(value: float) -> float:
        return round((top - map_y(value)) / (top - bottom) * chart.height, 2)

    return LineChart(
        alt,
        x_label,
        y_label,
        [Tick(across(x[index]), f"{x[index]:g}") for index in _spread(len(x), MOST_TICKS)],
        [Tick(down(tick), f"{tick * 100:.3g} %" if percent else f"{tick:.3g}") for tick in ticks],
        " ".join(f"{across(a)},{down(b)}" for a, b in zip(x, y, strict=True)),
    )


def range_map(activations: list[ActivationRange], timesteps: Tensor) -> HeatMap:
    """Ranges of activations, a row each, over the timesteps in the order of sampling: noise left, image right.

    Colored by the range, logarithmic; where rows change over time, also by the range over the row's own mean.
    """
    drawn = drawn_rows(max(len(activation.scale) for activation in activations))
    rows = len(drawn)
    width = torch.stack([activation.width.expand(drawn[0] + 1)[drawn] for activation in activations])
    smallest, largest = float(width.min()), float(width.max())
    layers = [_logarithmic("ranges", "range", width, smallest, largest)]
    if rows > 1:
        change = (width / width.mean(dim=1, keepdim=True)).log2().clamp(-1, 1)
        ticks = [Tick(0.0, "half"), Tick(0.5, "mean"), Tick(1.0, "double")]
        cells, legend = _cells((change + 1) / 2, CHANGE_COLORS), _legend(CHANGE_COLORS)
        layers.append(Layer("changes", "range over its mean", cells, legend, ticks))
    notes = [
        f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        for low, high in zip(width.amin(1).tolist(), width.amax(1).tolist(), strict=True)
    ]
    moments = timesteps[drawn].tolist() if rows > 1 else []
    return HeatMap(
        alt=f"Range of {len(activations)} activations at {rows} timesteps, from {smallest:.3g} to {largest:.3g}; "
        "the figures stand behind the rows.",
        layers=layers,
        row_labels=[activation.name for activation in activations],
        row_notes=notes,
        columns=[Tick((index + 0.5) / rows, f"{moments[index]:g}") for index in _spread(len(moments), MOST_TICKS)],
        x_label="timestep: noise left, image right" if rows > 1 else "all steps",
        width=MAP_WIDTH if rows > 1 else COLUMN_WIDTH,
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
        f"the most sensitive layer is {worst.name}. The figures stand behind the rows.",
        layers=[_logarithmic("errors", "error", errors.clamp(min=smallest), smallest, largest)],
        row_labels=[layer.name for layer in measured.layers],
        row_notes=[f"{layer.error:.2g}" for layer in measured.layers],
        columns=[Tick((index + 0.5) / len(groups), groups[index]) for index in _spread(len(groups), MOST_TICKS)],
        x_label="denoising step: noise left, image right",
        width=MAP_WIDTH,
    )


def _logarithmic(name: str, title: str, values: Tensor, smallest: float, largest: float) -> Layer:
    position = (values / smallest).log() / math.log(largest / smallest if largest > smallest else math.e)
    ticks = [Tick(part, f"{smallest * (largest / smallest) ** part:.2g}") for part in (0.0, 0.5, 1.0)]
    return Layer(name, title, _cells(position, RANGE_COLORS), _legend(RANGE_COLORS), ticks)


def _legend(anchors: Anchors) -> str:
    return _cells(torch.linspace(0, 1, LEGEND_SAMPLES)[None], anchors)


def drawn_rows(rows: int) -> list[int]:
    """Which rows of a table are drawn, in the order of sampling: the last first."""
    return torch.linspace(rows - 1, 0, min(rows, MOST_COLUMNS)).round().long().tolist()


def png_uri(image: Image.Image) -> str:
    """An image as a ``data:`` URI."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


def _cells(position: Tensor, anchors: Anchors) -> str:
    """A pixel each for positions from 0 to 1, float [rows, columns], on the color scale through `anchors`."""
    colors = torch.tensor(anchors, dtype=torch.float32)
    place = position.clamp(0, 1) * (len(anchors) - 1)
    below = place.floor().long().clamp(max=len(anchors) - 2)
    mixed = torch.lerp(colors[below], colors[below + 1], (place - below)[..., None])
    return png_uri(Image.fromarray(mixed.round().to(torch.uint8).numpy()))


def _spread(count: int, most: int) -> range:
    """At most `most` of the indices below `count`, equally far apart, the first among them."""
    return range(0, count, max(1, math.ceil(count / most)))


def round_numbers(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, three to seven of them, that enclose `low` to `high`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose `low` to `high`; the powers alone where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine, coarse = ([factor * 10.0**power for power in powers for factor in factors] for factors in ((1, 2, 5), (1,)))
    enclosing = [_enclosing(ticks, low, high) for ticks in (fine, coarse)]
    return enclosing[0] if len(enclosing[0]) <= MOST_TICKS else enclosing[1]


def _enclosing(ticks: list[float], low: float, high: float) -> list[float]:
    below, above = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
    return [tick for tick in ticks if below <= tick <= above]
