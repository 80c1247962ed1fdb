"""A Pareto figure: what models cost against how good they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stepquant.report.figures import Tick, round_numbers

WIDTH, HEIGHT = 360, 220


@dataclass(frozen=True)
class Dot:
    """A model: its place in px from the upper left corner, and whether none is both cheaper and better."""

    x: float
    y: float
    label: str
    best: bool


@dataclass(frozen=True)
class Scatter:
    """Models by cost, rightwards, and quality, upwards.

    Attributes:
        alt: the figure in words.
        front: the staircase along the models that none dominates, as an SVG polyline has it.
    """

    alt: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    dots: list[Dot]
    front: str
    width: int = WIDTH
    height: int = HEIGHT


def pareto(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the models that no other one beats or equals in both while beating it in one; cheapest first."""
    points = list(zip(costs, qualities, strict=True))
    front = [
        index
        for index, (cost, quality) in enumerate(points)
        if not any(
            other <= cost and better >= quality and (other, better) != (cost, quality) for other, better in points
        )
    ]
    return sorted(front, key=lambda index: points[index])


def scatter(
    costs: Sequence[float], qualities: Sequence[float], labels: Sequence[str], x_label: str, y_label: str
) -> Scatter:
    """The figure of some models; costs from zero on."""
    front = pareto(costs, qualities)
    x_ticks = round_numbers(0.0, max(costs))
    low, high = min(qualities), max(qualities)
    y_ticks = round_numbers(low, high if high > low else low + 1)

    def across(cost: float) -> float:
        return round(cost / x_ticks[-1] * WIDTH, 2)

    def down(quality: float) -> float:
        return round((y_ticks[-1] - quality) / (y_ticks[-1] - y_ticks[0]) * HEIGHT, 2)

    stairs: list[tuple[float, float]] = []
    for index in front:
        if stairs:
            stairs.append((across(costs[index]), stairs[-1][1]))
        stairs.append((across(costs[index]), down(qualities[index])))
    best = ", ".join(labels[index] for index in front)
    return Scatter(
        alt=f"{len(labels)} models by {x_label} and {y_label}; none is both cheaper and better than {best}.",
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(across(tick), f"{tick:.6g}") for tick in x_ticks],
        y_ticks=[Tick(down(tick), f"{tick:.4g}") for tick in y_ticks if math.isfinite(tick)],
        dots=[
            Dot(across(cost), down(quality), label, index in front)
            for index, (cost, quality, label) in enumerate(zip(costs, qualities, labels, strict=True))
        ],
        front=" ".join(f"{x},{y}" for x, y in stairs),
    )
