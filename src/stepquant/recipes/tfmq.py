"""`tfmq`: TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503): the layers that know the time, kept faithful first.

What differs: the time layers have one static activation range each, as all layers have, where the paper calibrates one
for each of the finitely many timesteps; their block comes last and not first (see 3 below).
"""

from __future__ import annotations

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import uniform_steps
from stepquant.optimize.blocks import Rounding, Settings
from stepquant.optimize.network import Finetuning
from stepquant.recipes.job import Job


def tfmq(
    job: Job,
    *,
    iterations: int = 500,
    time_iterations: int = 150,
    batch_size: int = 16,
    rounding: Rounding = "gptq",
    rounding_rate: float = 3e-2,
    scale_rate: float = 1e-3,
    weight_rate: float = 1e-3,
    rounding_weight: float = 0.1,
) -> CalibrationModel:
    """Reconstruct what depends on the timestep alone, over the finite set of timesteps; then block by block.

    1. Collect samples at evenly spread steps; the time layers see no other inputs than those steps'.
    2. Blocks as in `q-diffusion`.
    3. Temporal information block (section 4.1): time embedding and every projection of it, together, against their
       own outputs in full precision. It comes last here, because the blocks hold the projections and would undo it.
    """
    job.needs_the_whole("tfmq")
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
    description = job.description
    time_layers = tuple(name for name in description.layers if name in description.time_layers and name in model.layers)
    temporal = Finetuning(
        name="Temporal information block",
        weights=time_layers,
        aligned=time_layers,
        scales=time_layers,
        iterations=time_iterations,
        batch_size=batch_size,
        weight_rate=weight_rate,
        scale_rate=scale_rate,
        global_weight=0.0,
    )
    job.finetune(model, samples, temporal)
    return model
