"""`q-diffusion`: Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304), the usual baseline of the four papers.

What differs from the authors' public settings, and why: they learn rounding (AdaRound) for 20,000 iterations a block.
In the minutes that two cores are given here that hardly differs from rounding to nearest, so weights are gptq-rounded in
closed form by default and then learn through the rounding (``docs/quality.md``); ``rounding="adaround"`` does it the
authors' way. Scales learn relative to their size.
"""

from __future__ import annotations

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import uniform_steps
from stepquant.optimize.blocks import Rounding, Settings
from stepquant.recipes.job import Job


def q_diffusion(
    job: Job,
    *,
    iterations: int = 500,
    batch_size: int = 16,
    rounding: Rounding = "gptq",
    rounding_rate: float = 3e-2,
    scale_rate: float = 1e-3,
    rounding_weight: float = 0.1,
) -> CalibrationModel:
    """Uniform timesteps, split skip connections, block reconstruction.

    1. Collect samples at evenly spread timesteps: neighbouring steps are alike, all of them matter (section 4.1).
    2. Split the layers behind skip concatenations: trunk and skip have ranges of their own (section 4.2).
    3. Weights: per output channel, the range of least ``|w - w'|^2.4``; then, block by block on the quantized
       network's own inputs: activation ranges likewise, weights rounded, weights and activation scales learned
       (sections 3 and 4.3).
    """
    steps = uniform_steps(job.calibration.samples, job.request.steps, job.generator())
    samples = job.collect(steps)
    model = job.instrument(weight_range="least-error", split_skips=True)
    settings = Settings(
        iterations=iterations,
        batch_size=batch_size,
        rounding=rounding,
        rounding_rate=rounding_rate,
        scale_rate=scale_rate,
        rounding_weight=rounding_weight,
    )
    job.reconstruct(model, samples, settings)
    return model
