"""`ptq4dm`: PTQ4DM (Shang et al., CVPR 2023, arXiv 2211.15736): where the calibration samples come from."""

from __future__ import annotations

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import normal_steps
from stepquant.recipes.job import Job


def ptq4dm(job: Job, *, mean: float = 0.5, deviation: float = 0.35) -> CalibrationModel:
    """Normally distributed timesteps, ranges of least error; nothing is learned.

    1. Collect samples of the denoising process at timesteps ``t ~ N(mean T, (deviation T)^2)`` (section 3.3); the
       defaults are those of the authors' public code.
    2. Weights: per output channel, the range of least ``|w - w'|^2.4``, rounded to nearest.
    3. Activations: one such range a tensor, for all steps.
    """
    steps = normal_steps(job.calibration.samples, job.request.steps, job.generator(), mean, deviation)
    samples = job.collect(steps)
    model = job.instrument(weight_range="least-error")
    job.calibrate_ranges(model, samples, "least-error")
    return model
