"""What is measured around a recipe: before it the ranking of layers for a budget, after it the correction."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import Tensor

from stepquant.calibration.allocation import weight_sizes, within_budget
from stepquant.calibration.correction import estimate_correction
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import Calibration
from stepquant.calibration.selection import uniform_steps
from stepquant.calibration.sensitivity import Method, Sensitivity
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.files import digest
from stepquant.layers.correction import Correction
from stepquant.recipes.context import Context
from stepquant.recipes.stage import State
from stepquant.recipes.stages import AddQuantizers, AllocateSteps, CalibrateRanges, CollectSamples, RankLayers, Smooth
from stepquant.recipes.stages.precision import movable_layers
from stepquant.recipes.stages.samples import collect_samples

RANKING = Calibration(samples=64, trajectories=16)
"""Calibration of a ranking: the order of layers needs fewer samples than their ranges do."""
CORRECTION_OFFSET = 3_000_500_000
"""Added to the seed of the images that a correction is estimated on: some half a million from every multiple of
`TRAJECTORIES_OFFSET`, and far behind calibration and evaluation; all of them modulo 2^32, which is what generators on
the CPU take of a seed."""


def rank_layers(context: Context, method: Method) -> Sensitivity:
    """Rank layers before anything is learned: weights rounded to nearest, one static range per activation."""
    stages = [
        CollectSamples(),
        AddQuantizers(split_skips=True),
        Smooth(),
        CalibrateRanges(),
        RankLayers(method=method, samples=context.calibration.samples),
    ]

    def measured() -> dict[str, Tensor]:
        state = State()
        for stage in stages:
            stage.run(context, state)
            state.history.append(stage.identity())
        ranking = state.ranking
        return {"steps": torch.tensor(ranking.steps), "errors": ranking.errors, "whole": ranking.whole}

    found = context.cached(f"ranking-{digest([context.key, [stage.identity() for stage in stages]])[:16]}", measured)
    bits = context.description.quantized_bits(context.spec)
    ends = tuple((first, last) for first, last in found["steps"].tolist())
    return Sensitivity(method, bits, weight_sizes(context.denoiser, bits), ends, found["errors"], found["whole"])


def spec_within_budget(context: Context, budget: float) -> QuantSpec:
    """The spec with 8 bits for the layers that suffer most, within mean weight bits of `budget`."""
    few = {"samples": RANKING.samples, "trajectories": RANKING.trajectories}
    calibration = context.calibration.model_copy(update=few)
    ranking = rank_layers(replace(context, calibration=calibration), "one-at-a-time")
    spec = within_budget(context.spec, ranking, budget)
    kept = len(spec.overrides) - len(context.spec.overrides)
    context.progress.note(f"{kept} of {len(ranking.bits)} layers keep 8 bits within {budget:g} bits a weight.")
    return spec


def step_bits_within_budget(context: Context, budget: float) -> QuantSpec:
    """The spec with more activation bits in the steps that need them, within mean activation bits of `budget`.

    See `AllocateSteps`.

    Raises:
        StepquantError: if the spec has `step_bits`, no activation can have others, or the budget is out of range.
    """
    if context.spec.step_bits:
        raise StepquantError("`activation_budget` and `step_bits` are given; expected one of them. Leave one out.")
    if context.calls is not None:
        raise StepquantError(
            "an activation budget is given for a denoiser without a pipeline, which generates no images to choose by. "
            "Give `step_bits` in its place."
        )
    movable_layers(context)
    stages = [
        CollectSamples(),
        AddQuantizers(split_skips=True, rows="calibrated"),
        Smooth(),
        AllocateSteps(budget=budget),
    ]

    def chosen() -> dict[str, Tensor]:
        state = State()
        for stage in stages:
            stage.run(context, state)
            state.history.append(stage.identity())
        return {"rules": torch.frombuffer(bytearray(json.dumps(state.step_bits).encode()), dtype=torch.uint8)}

    name = f"step-bits-{digest([context.key, [stage.identity() for stage in stages]])[:16]}"
    rules = json.loads(bytes(context.cached(name, chosen)["rules"].tolist()))
    return context.spec.model_copy(update={"step_bits": rules})


def output_correction(context: Context, model: CalibrationModel) -> Correction:
    """Estimate, by step, how the error of a finished quantization depends on the output (`calibration.correction`).

    Uses separate trajectories: on the calibration samples, which the weights are fitted to, the error is smaller.
    """
    other = replace(context, seed=context.seed + CORRECTION_OFFSET)
    steps = uniform_steps(context.calibration.samples, context.steps, other.generator())
    samples = collect_samples(other, steps)
    return estimate_correction(context.reference, model, samples, context.chunk, context.progress)
