"""`pqd`: PQD (arXiv 2501.00124, WACV workshop 2025). No public code; the text leaves these open, and here they are:

- mean and deviation of the timesteps: 0.4 and 0.4 of T, so a little nearer the image than PTQ4DM's.
- "time-aware" ranges: every sample enters the search with equally many values, so a timestep weighs by its share of
  the drawn samples.
- QDrop: with ``rounding="adaround"`` elements stay in full precision with probability 0.5 while learning. Compensated
  weights fit the quantized inputs that this would take from them (``docs/quality.md``): nothing is dropped then, unless
  `drop_probability` says so.
- iterations: a budget that two cores finish in minutes; `iterations` asks for more. Skip connections are split, as in
  `q-diffusion`, so that the two recipes differ in their samples alone.
"""

from __future__ import annotations

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import normal_steps
from stepquant.optimize.blocks import Rounding, Settings
from stepquant.recipes.job import Job


def pqd(
    job: Job,
    *,
    mean: float = 0.4,
    deviation: float = 0.4,
    iterations: int = 500,
    batch_size: int = 16,
    rounding: Rounding = "gptq",
    rounding_rate: float = 3e-2,
    scale_rate: float = 1e-3,
    drop_probability: float | None = None,
    rounding_weight: float = 0.1,
) -> CalibrationModel:
    """Normally distributed timesteps with the model's conditions, then QDrop reconstruction block by block.

    1. Collect samples of the denoising process, with the prompts or classes the model will see and, under guidance,
       with the empty condition as well.
    2. Their timesteps are ``t ~ N(mean T, (deviation T)^2)``.
    3. Activation ranges of least error over the samples, weighted by their timesteps' share.
    4. Weights rounded, then weights and activation scales learned together, each block on the quantized network's own
       inputs.
    5. VAE and text encoder of a latent model stay as they are.
    """
    steps = normal_steps(job.calibration.samples, job.request.steps, job.generator(), mean, deviation)
    samples = job.collect(steps)
    model = job.instrument(weight_range="least-error", split_skips=True)
    settings = Settings(
        iterations=iterations,
        batch_size=batch_size,
        rounding=rounding,
        rounding_rate=rounding_rate,
        scale_rate=scale_rate,
        drop_probability=drop_probability,
        rounding_weight=rounding_weight,
    )
    job.reconstruct(model, samples, settings)
    return model
