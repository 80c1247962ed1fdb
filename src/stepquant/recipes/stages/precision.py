"""Measure what activation bits at single steps do to the final image, and choose them within a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.layers import Point
from stepquant.calibration.model import calibrate_ranges
from stepquant.calibration.sensitivity import layer_points
from stepquant.errors import StepquantError
from stepquant.quality.precision import (
    Part,
    SwitchedBits,
    Trajectories,
    check_activation_budget,
    choose,
    measure_effects,
    split_into_parts,
    step_rules,
)
from stepquant.recipes.context import Context
from stepquant.recipes.stage import Cost, Stage, State, Workload
from stepquant.settings import Positive

HIGH = 8
"""Activation bits of what is raised."""
LOW = 4
"""Activation bits of what is lowered where the spec has `HIGH`."""
SEED_OFFSET = 2_000_125_000
"""Added to the seed of the images: an eighth of a million from the noise of every other use of the seed."""


class AllocateSteps(Stage):
    """Choose the steps, and the parts of the denoiser in them, whose activations have 8 bits.

    The mean over steps, weighted equally, and over layers with quantized activations, weighted by multiply-adds, is at
    most `budget`.
    """

    version = 1

    budget: float
    """Mean activation bits."""
    intervals: Positive = 10
    """Intervals that the steps are divided into, at most."""
    parts: Positive = 2
    """Parts that the denoiser is divided into, at most."""
    images: Positive = 4
    """Images whose trajectories are measured."""

    def cost(self, workload: Workload) -> Cost:
        units = min(self.intervals, workload.calibration.steps) * self.parts
        # Twice for each unit, half a trajectory on average; then the candidates.
        passes = self.images * workload.calibration.steps * (units + 5)
        return Cost(f"search activation bits by step on {self.images} images", passes)

    def run(self, context: Context, state: State) -> None:
        """Set `state.step_bits`."""
        layers = movable_layers(context)
        low, high = bits_between(context)
        points = {name: found for name, found in layer_points(state.model).items() if name in layers}
        grids = {bits: _grids(context, state, points, bits) for bits in (low, high)}
        for layer in state.model.layers.values():
            layer.weight_point.bypassed = True
        rows = torch.tensor(state.samples.times(state.model.clock.timesteps, context.steps))
        switched = SwitchedBits(points, grids, (rows * context.steps).long())
        images = range(context.calibration.images, context.calibration.images + self.images)
        with _counting(context.denoiser) as sizes:
            seed = context.seed + SEED_OFFSET
            trajectories = Trajectories(context.pipeline, context.component, context.request, images, seed)
        quantized = {name: layer.bits.activation for name, layer in state.model.layers.items() if layer.input_point}
        total = sum(sizes[name] for name in quantized)
        parts = split_into_parts({name: sizes[name] for name in layers}, total, self.parts)
        fixed = sum(sizes[name] * bits for name, bits in quantized.items() if name not in layers) / total
        least, most = (fixed + bits * sum(part.share for part in parts) for bits in (low, high))
        check_activation_budget(self.budget, least, most)
        count = min(self.intervals, context.steps)
        bounds = tuple(index * context.steps // count for index in range(count + 1))
        with context.progress.task("Searching activation bits by step", 2 * len(parts) * count + 5) as advance:
            model = state.model.model
            effects = measure_effects(trajectories, model, switched, parts, bounds, partial(advance, 1))
            widths = torch.tensor(bounds, dtype=torch.float64).diff() / context.steps
            costs = (high - low) * torch.tensor([part.share for part in parts], dtype=torch.float64)[:, None] * widths
            plans = []
            for values in effects.rankings():
                chosen = sorted(choose(values, costs, self.budget - least))
                switched.set(_raised(chosen, parts, bounds))
                plans.append((trajectories.error(model), chosen))
                advance(1)
        error, units = min(plans)
        raised = low == context.spec.default_bits.activation
        other = {(part, index) for part in range(len(parts)) for index in range(count)} - set(units)
        state.step_bits = step_rules(units if raised else other, parts, bounds, high if raised else low)
        mean = least + float(sum(costs[unit] for unit in units))
        found = (*effects.error, error)
        context.progress.note(_described(units, parts, bounds, (low, high), mean, found))


def movable_layers(context: Context) -> tuple[str, ...]:
    """Layers whose activation bits may depend on the step; raises `StepquantError` if there are none."""
    spec, description = context.spec, context.description
    low, high = bits_between(context)
    probe = spec.model_copy(update={"step_bits": {"0-1": low if spec.default_bits.activation == high else high}})
    names = tuple(
        name
        for name, bits in description.quantized_bits(spec).items()
        if description.activation_bits(probe, name, bits.activation, [0.5]) != [bits.activation]
    )
    if not names:
        raise StepquantError(
            f"an activation budget is given, but no layer has the activation bits of {spec}. Leave the budget out."
        )
    return names


def bits_between(context: Context) -> tuple[int, int]:
    """The lower and the higher activation bits that are chosen from."""
    default = context.spec.default_bits.activation
    return (LOW, HIGH) if default == HIGH else (default, HIGH)


def _grids(
    context: Context, state: State, points: dict[str, list[Point]], bits: int
) -> dict[Point, tuple[Tensor, Tensor]]:
    """Grids of these bits, searched on what the samples make of the full-precision network."""
    chosen = [point for each in points.values() for point in each if isinstance(point, ActivationPoint)]
    for point in chosen:
        point.layout = replace(point.layout, bits=bits, row_bits=None)
    calibrate_ranges(
        state.model, state.samples, "least-error", context.chunk, context.progress, ranks=context.workspace.ranks
    )
    return {point: (point.scale, point.zero_point) for point in chosen}


def _raised(units: list[tuple[int, int]], parts: list[Part], bounds: tuple[int, ...]) -> dict[str, list[int]]:
    """Layer -> steps with the higher bits."""
    steps: dict[str, list[int]] = {}
    for part, index in units:
        for name in parts[part].layers:
            steps.setdefault(name, []).extend(range(bounds[index], bounds[index + 1]))
    return steps


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """Multiply-adds of each linear and convolution for one sample, counted in its first call."""
    sizes: dict[str, int] = {}

    def count(name: str, module: Any, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.setdefault(name, module.weight[0].numel() * output[0].numel())

    handles = [
        module.register_forward_hook(partial(count, name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
    ]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _described(
    units: list[tuple[int, int]],
    parts: list[Part],
    bounds: tuple[int, ...],
    bits: tuple[int, int],
    mean: float,
    errors: tuple[float, float, float],
) -> str:
    """The plan in a line for each part: its bits in each interval, first steps first."""
    decibels = [10 * float(torch.tensor(4 / max(error, 1e-10)).log10()) for error in errors]
    lines = [
        f"activation bits over {bounds[-1]} steps in {len(bounds) - 1} intervals, {mean:.3g} on average: "
        f"{decibels[2]:.1f} dB with full-precision weights ({decibels[0]:.1f} dB with {bits[0]} bits, "
        f"{decibels[1]:.1f} dB with {bits[1]})"
    ]
    for index, part in enumerate(parts):
        row = "".join(str(bits[(index, interval) in units]) for interval in range(len(bounds) - 1))
        lines.append(f"  {row}  {part.layers[0]} to {part.layers[-1]}")
    return "\n".join(lines)
