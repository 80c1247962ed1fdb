"""Activation bits as a function of the denoising step, chosen by their effect on the final image.

A unit is a part of the denoiser in an interval of steps. Its effect is measured twice, on a few trajectories with the
same noise as full precision: how much the error of the final images falls if it alone has the higher bits, and how much
it rises if it alone has the lower ones. Steps before the unit's do not change: their outputs are taken from the
trajectory that is compared with. Weights are in full precision, so that the error is that of the activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.assembly import pipeline_with
from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import FixedGrid
from stepquant.calibration.fake_quant.layers import Point
from stepquant.calibration.placement import answering
from stepquant.core.row_bits import column
from stepquant.errors import StepquantError
from stepquant.layers.clock import TimestepReader
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import Request
from stepquant.pipelines.steps import StepCounter
from stepquant.quality.mixing import INSIDE, parts_of

Unit = tuple[int, int]
"""Index of a part of the denoiser, and of an interval of steps."""


class Part(NamedTuple):
    """Consecutive layers of the denoiser.

    Attributes:
        pattern: regular expression that matches their names.
        layers: their names.
        share: of the multiply-adds of all layers whose activations are quantized.
    """

    pattern: str
    layers: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Effects:
    """What other bits of single units do to the final images.

    Attributes:
        intervals: first step of each interval, and the number of steps at the end.
        gains: float64 [P, I], by how much the mean squared error falls if the unit alone has the higher bits.
        losses: float64 [P, I], by how much it rises if the unit alone has the lower bits.
        error: mean squared error with the lower bits everywhere, and with the higher bits everywhere.
    """

    intervals: tuple[int, ...]
    gains: Tensor
    losses: Tensor
    error: tuple[float, float]

    def rankings(self) -> list[Tensor]:
        """Ways to value the higher bits of a unit: what it does first, what it does last, and both."""
        scale = self.gains.clamp(min=0).sum(), self.losses.clamp(min=0).sum()
        both = self.gains / scale[0].clamp(min=1e-30) + self.losses / scale[1].clamp(min=1e-30)
        return [self.gains, self.losses, both]


def split_into_parts(layers: Mapping[str, int], total: int, count: int) -> list[Part]:
    """Group layers, name -> multiply-adds in the order of execution, by the modules they are in, to `count` parts.

    Args:
        total: multiply-adds of all layers whose activations are quantized.
    """
    groups = list(parts_of(layers).items())
    whole, done = sum(layers.values()), 0
    assigned = []
    for prefix, names in groups:
        size = sum(layers[name] for name in names)
        assigned.append((min(count - 1, int(count * (done + size / 2) / max(1, whole))), prefix, names))
        done += size
    parts = []
    for _, members in groupby(assigned, key=lambda each: each[0]):
        inside = [(prefix, names) for _, prefix, names in members]
        found = tuple(name for _, names in inside for name in names)
        ends = (f"{re.escape(prefix)}{'$' if prefix in layers else INSIDE}" for prefix, _ in inside)
        parts.append(Part(f"^(?:{'|'.join(ends)})", found, sum(layers[name] for name in found) / total))
    return parts


def choose(values: Tensor, costs: Tensor, spare: float) -> set[Unit]:
    """Greedy: units of the largest value per cost, as long as they fit; those without value are left out.

    Args:
        values, costs: float64 [P, I]; a cost is in mean activation bits.
        spare: sum of costs that is allowed.
    """
    chosen = set()
    for index in (values / costs).flatten().argsort(descending=True, stable=True).tolist():
        unit = divmod(index, values.shape[1])
        if values[unit] > 0 and float(costs[unit]) <= spare + 1e-9:
            spare -= float(costs[unit])
            chosen.add(unit)
    return chosen


def step_rules(units: Collection[Unit], parts: Sequence[Part], intervals: Sequence[int], bits: int) -> dict[str, int]:
    """`QuantSpec.step_bits` that give these units `bits`; adjoining intervals are joined."""
    last, rules = len(intervals) - 1, {}
    whole = [index for index in range(last) if all((part, index) in units for part in range(len(parts)))]
    chosen_by_pattern = {"": whole}
    for index, part in enumerate(parts):
        chosen_by_pattern[f":{part.pattern}"] = [
            row for row in range(last) if (index, row) in units and row not in whole
        ]
    for pattern, chosen in chosen_by_pattern.items():
        for _, run in groupby(enumerate(chosen), key=lambda pair: pair[1] - pair[0]):
            inside = [index for _, index in run]
            start, stop = (intervals[index] / intervals[-1] for index in (inside[0], inside[-1] + 1))
            rules[f"{start:.5g}-{stop:.5g}{pattern}"] = bits
    return rules


class SwitchedBits:
    """Switches the activations of a denoiser in simulation between lower and higher bits, row by row.

    Args:
        points: name of a layer -> the points that take its bits.
        grids: bits -> point -> scale and zero point, float32 [R, G] twice; of points with stored grids.
        steps: int64 [R], the sampler's step of each table row.
    """

    def __init__(
        self,
        points: Mapping[str, Sequence[Point]],
        grids: Mapping[int, Mapping[Point, tuple[Tensor, Tensor]]],
        steps: Tensor,
    ) -> None:
        self.points, self.grids, self.steps = points, grids, steps
        self.low, self.high = min(grids), max(grids)

    def set(self, raised: Mapping[str, Collection[int]]) -> None:
        """Give layers the higher bits in these steps, and the lower ones in all others."""
        for name, points in self.points.items():
            inside = torch.isin(self.steps, torch.tensor(sorted(raised.get(name, ())), dtype=torch.long))
            for point in points:
                self._set(point, inside)

    def _set(self, point: Point, raised: Tensor) -> None:
        bits = torch.where(raised, self.high, self.low).tolist()
        most, row_bits = column(bits)
        if not isinstance(point, ActivationPoint):
            point.grid = replace(point.grid, bits=most, row_bits=row_bits)
            return
        scale, zero_point = (
            torch.where(raised[:, None].to(low.device), high, low)
            for low, high in zip(self.grids[self.low][point], self.grids[self.high][point], strict=True)
        )
        layout = replace(point.layout, bits=most, row_bits=row_bits)
        point.quantizer = FixedGrid(layout, scale, zero_point)


class Trajectories:
    """Generates a few images with any denoiser in the place of one, and compares them with full precision.

    Args:
        indices: of the images, which select noise and conditions.
    """

    def __init__(self, pipeline: Any, component: str, request: Request, indices: Sequence[int], seed: int) -> None:
        self.component, self.request, self.indices, self.seed = component, request, indices, seed
        self.pipeline = pipeline
        self.reference = generate(pipeline, request, indices, seed)

    def error(self, model: nn.Module, recorded: list[Any] | None = None, *, until: int = 0) -> float:
        """Mean squared error of the images.

        Args:
            recorded: outputs of `model` in each call, with its step: filled if it is empty, else those of the steps
                before `until` are taken from it.
        """
        pipeline = pipeline_with(self.pipeline, {self.component: model})
        with self._answering(model, recorded, until):
            images = generate(pipeline, self.request, self.indices, self.seed)
        return float((images.double() - self.reference.double()).square().mean())

    @contextmanager
    def _answering(self, model: nn.Module, recorded: list[Any] | None, until: int) -> Iterator[None]:
        if recorded is None:
            yield
            return
        counter, timestep_of, forward = StepCounter(), TimestepReader.of(model), model.forward
        answers = iter([output for step, output in recorded if step < until])
        filling = not recorded

        @wraps(forward)  # whose parameters are looked at
        def answer(*args: Any, **kwargs: Any) -> Any:
            counter.see(timestep_of(args, kwargs))
            output = None if filling else next(answers, None)
            if output is None:
                output = forward(*args, **kwargs)
            if filling:
                recorded.append((counter.step, output))
            return output

        with answering({model: answer}):
            yield


def measure_effects(
    trajectories: Trajectories,
    model: nn.Module,
    switched: SwitchedBits,
    parts: Sequence[Part],
    intervals: Sequence[int],
    advance: Callable[[], None] = lambda: None,
) -> Effects:
    """Measure the effects of all units; `intervals` as in `Effects`."""
    every = range(intervals[-1])
    steps = [range(start, stop) for start, stop in pairwise(intervals)]

    def run(raised: Mapping[str, Collection[int]], recorded: list[Any], until: int) -> float:
        switched.set(raised)
        error = trajectories.error(model, recorded, until=until)
        advance()
        return error

    names = [name for part in parts for name in part.layers]
    low_outputs: list[Any] = []
    high_outputs: list[Any] = []
    low = run({}, low_outputs, 0)
    high = run(dict.fromkeys(names, every), high_outputs, 0)
    gains, losses = (torch.zeros(len(parts), len(steps), dtype=torch.float64) for _ in range(2))
    for index, inside in enumerate(steps):
        rest = [step for step in every if step not in inside]
        for row, part in enumerate(parts):
            gains[row, index] = low - run(dict.fromkeys(part.layers, inside), low_outputs, inside.start)
            lowered = dict.fromkeys(names, every) | dict.fromkeys(part.layers, rest)
            losses[row, index] = run(lowered, high_outputs, inside.start) - high
    return Effects(tuple(intervals), gains, losses, (low, high))


def check_activation_budget(budget: float, least: float, most: float) -> None:
    """Raise `StepquantError` for a budget outside of the bits that can be chosen."""
    if not least <= budget <= most:
        raise StepquantError(
            f"an activation budget of {budget:g} bits cannot be met; expected {least:.3g}, the mean activation bits "
            f"without it, to {most:.3g}."
        )
