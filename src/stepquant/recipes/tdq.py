"""`tdq`: TDQ (So et al., NeurIPS 2023, arXiv 2306.02316): activation intervals as a function of the timestep.

The paper's post-training variant keeps the weights as they are; here they are rounded as in the other recipes, so that
these can be compared at equal effort. Open in the paper, and chosen here: 128 Fourier features; generators start at a
regression through the ranges found step by step and not at the static range, which a few hundred iterations would
hardly leave; weights have a scale per output channel, where the public code has one a tensor; grids are affine with the
zero point of the static range, where the paper's are symmetric, or behind a SiLU start at its smallest value.

What differs: the fastest Fourier feature turns four times over the table (`nn.intervals.TURNS`), where the paper's
turns every six timesteps; generators are trained without dropout, which tens of iterations would only be disturbed by;
and the free table has, besides its own interval, its own zero point for each calibrated step, where a generator has one
for all of them.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import normal_steps
from stepquant.optimize.blocks import Rounding, Settings
from stepquant.recipes.job import Job


def tdq(
    job: Job,
    *,
    intervals: Literal["generator", "table", "static"] = "generator",
    iterations: int = 500,
    batch_size: int = 16,
    rounding: Rounding = "gptq",
    rounding_rate: float = 3e-2,
    scale_rate: float = 1e-4,
    rounding_weight: float = 0.1,
) -> CalibrationModel:
    """A small network turns the timestep into each activation's interval; tabulated once it is trained.

    1. Collect samples of all steps (PTQ4DM's set).
    2. Every activation gets a generator that starts near the ranges of least error (section 3.3).
    3. Train the generators through the quantizers' straight-through gradients, block by block, each after its weights
       are rounded.
    4. Tabulate at every timestep of training and drop the networks: inference indexes a table once a step, with any
       sampler (section 3.4).

    `intervals` has the paper's ablations: ``"table"``, an interval learned freely for each timestep; ``"static"``,
    none of it.
    """
    steps = normal_steps(job.calibration.samples, job.request.steps, job.generator(), 0.5, 0.35)
    samples = job.collect(steps)
    timesteps = None if intervals == "static" else job.training_timesteps()
    model = job.instrument(weight_range="least-error", split_skips=True, timesteps=timesteps)
    settings = Settings(
        iterations=iterations,
        batch_size=batch_size,
        rounding=rounding,
        rounding_rate=rounding_rate,
        scale_rate=scale_rate,
        rounding_weight=rounding_weight,
        over_time="generator" if intervals == "generator" else "table",
    )
    job.reconstruct(model, samples, settings)
    return model
