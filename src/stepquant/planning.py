"""Estimate time and memory of a quantization before it starts, from a measured call of the denoiser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from stepquant.memory import peak_resident_bytes, resident_bytes
from stepquant.pipelines.generate import generate
from stepquant.quality.held_out import CALLS, IMAGES
from stepquant.recipes import Context, Recipe
from stepquant.recipes.stage import Cost, Stage, Workload

QUANTIZED = 1.8
"""Memory beyond the loaded pipeline, in units of the denoiser's weights: codes, kernels, samples, work on a block."""
KEPT = 2.0
"""Activations that a backward pass needs, in units of the layers' outputs: includes their quantized inputs."""


@dataclass(frozen=True)
class Plan:
    """Stages and their cost; ``str`` is what the command prints.

    Attributes:
        family: of the denoiser.
        parameters: of the denoiser.
        stages: cost and estimated seconds of each stage that takes time.
        memory: estimated peak, bytes.
    """

    family: str
    parameters: int
    stages: tuple[tuple[Cost, float], ...]
    memory: int

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.stages)

    def __str__(self) -> str:
        stages = ", then ".join(f"{cost.what} (about {duration(seconds)})" for cost, seconds in self.stages)
        return (
            f"plan: {self.family}, {self.parameters / 1e6:.1f} M parameters; {stages}; "
            f"about {self.memory / 1e9:.1f} GB of memory"
        )


def make_plan(context: Context, recipe: Recipe, before: Sequence[Stage] = (), *, check: bool = False) -> Plan:
    """Time one call of the denoiser on one image, and multiply by what each stage of the recipe takes.

    Args:
        before: stages that run before those of the recipe.
        check: whether the result is checked on held-out samples.
    """
    description = context.description
    call, activations = _measure_call(context)
    workload = Workload(context.calibration, len(description.blocks), len(description.layers))
    costs = [
        cost
        for cost in (stage.cost(workload) for stage in (*before, *recipe.fitted(context).checked_stages()))
        if cost.passes
    ]
    if check:
        costs.append(Cost(f"check on {IMAGES} held-out samples", IMAGES * CALLS * context.steps))
    parameters = sum(parameter.numel() for parameter in context.denoiser.parameters())
    held = max((KEPT * cost.held * activations + 4 * cost.copies * parameters for cost in costs), default=0.0)
    return Plan(
        family=description.family,
        parameters=parameters,
        stages=tuple((cost, call * cost.passes) for cost in costs),
        memory=max(peak_resident_bytes(), resident_bytes() + int(QUANTIZED * 4 * parameters + held)),
    )


def _measure_call(context: Context) -> tuple[float, int]:
    """Seconds of one call for one image, and bytes that its layers put out.

    Of two steps the shorter counts: the first is slowed by what is set up once.
    """
    started: list[float] = []
    spent: list[float] = []
    size = 0

    def add(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal size
        if not spent and isinstance(output, Tensor):
            size += output.numel() * output.element_size()

    denoiser = context.denoiser
    handles = [module.register_forward_hook(add) for module in denoiser.modules() if not any(module.children())]
    handles += [
        denoiser.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        denoiser.register_forward_hook(lambda *_: spent.append(time.perf_counter() - started[-1])),
    ]
    try:
        generate(context.pipeline, replace(context.request, steps=2), [0], 0, decode=False)
    finally:
        for handle in handles:
            handle.remove()
    return min(spent), size


def duration(seconds: float) -> str:
    """Seconds for people, in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
