"""`minmax`: round to nearest, static ranges from the smallest and largest value. The baseline to beat."""

from __future__ import annotations

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import uniform_steps
from stepquant.recipes.job import Job


def minmax(job: Job) -> CalibrationModel:
    """Round to nearest with static min-max ranges; nothing is learned.

    1. Collect samples at evenly spread steps of the full-precision sampler.
    2. Weights: per output channel, from min and max, rounded to nearest.
    3. Activations: one range a tensor for all steps, from min and max over the samples.
    """
    steps = uniform_steps(job.calibration.samples, job.request.steps, job.generator())
    samples = job.collect(steps)
    model = job.instrument(weight_range="minmax")
    job.calibrate_ranges(model, samples, "minmax")
    return model
