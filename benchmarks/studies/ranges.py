"""Block reconstruction with the activation ranges of one's choice, for `ranges.toml`."""

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import uniform_steps
from stepquant.core.ranges import RangeMethod
from stepquant.optimize.blocks import Settings
from stepquant.recipes import Job


def reconstructed(job: Job, *, activation_range: RangeMethod = "least-error", iterations: int = 50) -> CalibrationModel:
    """`q-diffusion`, its activation ranges found by `activation_range`."""
    steps = uniform_steps(job.calibration.samples, job.request.steps, job.generator())
    samples = job.collect(steps)
    model = job.instrument(weight_range="least-error", split_skips=True)
    job.reconstruct(model, samples, Settings(iterations=iterations, activation_range=activation_range))
    return model
