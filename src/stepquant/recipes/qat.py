"""`stepquant.train`: TDQ's quantization-aware training (So et al., NeurIPS 2023, arXiv 2306.02316).

Against the paper: weights have a scale per output channel, where the public code has one a tensor; grids are affine
with the zero point of the static range, which covers the paper's signed, unsigned and shifted grids alike; training
starts at gptq-rounded weights and ranges of least error, since minutes and not days follow, and for the same reason
generators are trained without dropout.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from stepquant.calibration.fake_quant.generator import TURNS
from stepquant.calibration.image_folder import ImageFolder
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import uniform_steps
from stepquant.files import digest
from stepquant.optimize.batches import Batches, TrajectoryBatches, image_batches
from stepquant.optimize.blocks import Settings
from stepquant.optimize.qat import Training, train
from stepquant.recipes.job import Job


def qat(
    job: Job,
    images: ImageFolder | None,
    *,
    distill: bool = False,
    data: str | None = None,
    intervals: Literal["generator", "static", "table"] = "generator",
    iterations: int = 2000,
    batch_size: int = 16,
    weight_rate: float = 1e-3,
    scale_rate: float = 1e-3,
    generator_rate: float = 1e-3,
    ema_decay: float = 0.0,
    refresh: int = 500,
) -> CalibrationModel:
    """Weights, their scales and the activations' intervals trained together, from the pretrained model.

    1. Start after training: ranges of least error, weights rounded with compensation, on the sampler's own inputs.
    2. Every activation gets a generator that turns the timestep into its interval (section 3.3).
    3. Train on the diffusion loss over `images`, or by distillation from full precision: on the same noised images,
       or without any on trajectories of the sampler with half to twice the calibration's steps.
    4. Tabulate at every timestep of training and drop the networks (section 3.4).

    `distill` and `data`, the name of the folder, say in the provenance what was learned from. `intervals` has the
    ablations: ``"static"`` is LSQ, ``"table"`` learns each timestep's interval on its own. `refresh` is the number of
    iterations after which other trajectories are drawn; 0 keeps the first.
    """
    job.needs_the_whole("training")
    steps = uniform_steps(job.calibration.samples, job.request.steps, job.generator())
    samples = job.collect(steps)
    timesteps = None if intervals == "static" else job.training_timesteps()
    model = job.instrument(weight_range="least-error", split_skips=True, timesteps=timesteps)
    start = Settings(iterations=0, over_time="generator" if intervals == "generator" else "table")
    job.reconstruct(model, samples, start)

    training = Training(
        iterations=iterations,
        weight_rate=weight_rate,
        scale_rate=scale_rate,
        generator_rate=generator_rate,
        over_time=intervals == "generator",
        # Noised images come at every timestep, and the paper's features serve; trajectories leave some out.
        turns=TURNS if images is None else None,
        ema_decay=ema_decay,
    )
    batches: Batches
    if images is None:
        batches, learned_from = TrajectoryBatches(lru_cache(1)(job.trajectories), refresh, batch_size), "trajectories"
    else:
        learned_from = images.key()
        batches = image_batches(
            job.pipeline,
            job.reference,
            images,
            lambda compute: job.kept(f"latents-{digest([job.sampling_key, learned_from])[:16]}", compute)["latents"],
            size=batch_size,
            distill=distill,
            progress=job.progress,
        )
    train(
        model,
        batches,
        training,
        workspace=job.workspace,
        key=digest([job.key, intervals, batch_size, refresh, learned_from, distill]),
        seed=job.seed,
        progress=job.progress,
    )
    return model
