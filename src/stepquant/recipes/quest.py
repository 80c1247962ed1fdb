"""`quest`: QuEST (Wang et al., ICCV 2025, arXiv 2402.03666): finetune few weights so that activations become easy.

What differs from the public code: ranges are searched (least error) for every calibrated step, at all bit widths,
instead of an average of min and max; where the code has a scale per input channel (4-bit activations), channels are
smoothed (below 8 bits): one static factor a channel, folded into the weight, since integer kernels cannot take a scale
per input channel out of a sum; errors are relative to full precision's power, so that layers of any size weigh alike;
learning rates of weights are in steps of their grid; the activation scales of the time layers learn on while critical
modules are aligned, where the paper leaves these layers as they are. Learning rates and iterations fit minutes on two
cores: `iterations` asks for more.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import uniform_steps
from stepquant.calibration.sensitivity import Sensitivity
from stepquant.errors import StepquantError
from stepquant.optimize.blocks import Rounding, Settings
from stepquant.optimize.network import Finetuning
from stepquant.recipes.job import Job

CRITICAL_LAYERS = {
    "attention": r"\.(to_q|to_k|to_v)$",
    "feed-forward": r"\.ff\.",
    "both": r"\.(to_q|to_k|to_v)$|\.ff\.",
}
"""The paper's lists of critical layers C_A, as regular expressions over layer names: ``attention`` for unconditional
latent models, ``feed-forward`` for Stable Diffusion, ``both`` (nearly) for class-conditional ImageNet."""

SMOOTHED_BELOW = 8
"""Activation bits below which channels are smoothed, unless the spec says otherwise."""

RANKED_SAMPLES = 64
"""Of the calibration samples, how many the ranking of critical layers looks at."""


def quest(
    job: Job,
    *,
    scales: Literal["per-step", "shared"] = "per-step",
    critical: Literal["ranked", "both", "attention", "feed-forward"] = "ranked",
    critical_share: float = 0.05,
    rounding_iterations: int = 300,
    time_iterations: int = 150,
    iterations: int = 300,
    batch_size: int = 16,
    rounding: Rounding = "gptq",
    rounding_rate: float = 3e-2,
    rounding_weight: float = 0.1,
    weight_rate: float = 1e-3,
    scale_rate: float = 1e-3,
    time_global_weight: float = 1.0,
    global_weight: float = 2.0,
) -> CalibrationModel:
    """One activation scale a step; then train the time-embedding layers, and after them the critical ones.

    1. Collect samples at evenly spread steps.
    2. Weights: rounded block by block while activations are in full precision (``rounding="adaround"`` for the paper's
       way); their scales stay from here on.
    3. Activations: a range for each calibrated step, or one shared by all (the paper's text has one, its code one a
       step).
    4. Temporal layer alignment (section 4.2): weights, biases and activation scales of the layers that depend on the
       timestep alone, ``L_TLA + time_global_weight L_G``.
    5. Critical module alignment (section 4.3): the critical layers' weights and all activation scales, those of the
       time layers too, network-wise, ``L_CMA + global_weight L_G``. Critical are the layers that relieve the output's
       error most when they alone keep full precision (``"ranked"``), up to `critical_share` of all weights, or one of
       the paper's lists by name.
    """
    job.needs_the_whole("quest")
    description = job.description
    steps = uniform_steps(job.calibration.samples, job.request.steps, job.generator())
    samples = job.collect(steps)
    timesteps = samples.tensors["timestep"].float().unique() if scales == "per-step" else None
    model = job.instrument(weight_range="least-error", split_skips=True, timesteps=timesteps)
    if job.spec.smoothing is None and job.spec.default_bits.activation < SMOOTHED_BELOW:
        job.smoothing(model, samples)
    reconstruction = Settings(
        iterations=rounding_iterations,
        batch_size=batch_size,
        rounding=rounding,
        rounding_rate=rounding_rate,
        rounding_weight=rounding_weight,
        drop_probability=0.0,
        learn_scales=False,
    )
    job.reconstruct(model, samples, reconstruction)
    job.calibrate_ranges(model, samples, "least-error", quantized_weights=True)
    time_layers = tuple(name for name in description.layers if name in description.time_layers and name in model.layers)
    alignment = Finetuning(
        name="Aligning time layers",
        weights=time_layers,
        aligned=time_layers,
        scales=time_layers,
        iterations=time_iterations,
        batch_size=batch_size,
        weight_rate=weight_rate,
        scale_rate=scale_rate,
        global_weight=time_global_weight,
    )
    job.finetune(model, samples, alignment)
    if critical == "ranked":
        ranking = job.rank_layers(model, samples.first(RANKED_SAMPLES), "relief")
        critical_layers = most_relieving(ranking, critical_share, time_layers)
        job.progress.note(
            "critical layers: " + ", ".join(f"{name} {ranking.mean[name]:.1%}" for name in critical_layers)
        )
    else:
        critical_layers = tuple(name for name in model.layers if re.search(CRITICAL_LAYERS[critical], name))
        if not critical_layers:
            raise StepquantError(f"no layer of the model is one of {critical!r}: choose another list with `critical`.")
    alignment = Finetuning(
        name="Aligning critical layers",
        weights=critical_layers,
        aligned=critical_layers,
        iterations=iterations,
        batch_size=batch_size,
        weight_rate=weight_rate,
        scale_rate=scale_rate,
        global_weight=global_weight,
    )
    job.finetune(model, samples, alignment)
    return model


def most_relieving(ranking: Sensitivity, share: float, excluded: Collection[str]) -> tuple[str, ...]:
    """The layers of most relief, that have at most `share` of all weights together; most relief first."""
    left = share * sum(ranking.sizes.values())
    chosen = []
    for name in ranking.ranking():
        if name not in excluded and ranking.sizes[name] <= left and ranking.mean[name] > 0:
            left -= ranking.sizes[name]
            chosen.append(name)
    return tuple(chosen)
