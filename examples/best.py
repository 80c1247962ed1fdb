"""A recipe of your own: samples as EDA-DM selects them, intervals as TDQ learns them, finetuning as QuEST does it.

python examples/best.py zoo:fashion-class w4a4 out/best
"""

import sys
from typing import Literal

import stepquant
from stepquant.calibration.model import CalibrationModel
from stepquant.loading import resolve_pipeline
from stepquant.optimize.blocks import Settings
from stepquant.optimize.network import Finetuning
from stepquant.recipes import Job
from stepquant.recipes.quest import SMOOTHED_BELOW, most_relieving

RANKED_SAMPLES = 32
"""Of the calibration samples, how many the ranking of layers looks at."""


def best(
    job: Job,
    *,
    intervals: Literal["table", "generator"] = "table",
    iterations: int = 300,
    finetuning: int = 300,
    rate: float = 1e-3,
) -> CalibrationModel:
    """Dense and diverse samples, smoothed channels, intervals over time, blocks rebuilt, critical layers aligned.

    `intervals`: a grid for every calibrated step, shaped by its neighbours' samples as well, or TDQ's generator.
    """
    samples = job.collect(job.dense_and_diverse_steps(diversity_weight=1.0))  # EDA-DM's TDAC
    model = job.instrument("least-error", split_skips=True, timesteps=job.training_timesteps())
    if job.spec.default_bits.activation < SMOOTHED_BELOW:
        job.smoothing(model, samples)
    job.reconstruct(model, samples, Settings(iterations=iterations, over_time=intervals, neighbours=2))  # TDQ
    time_layers = tuple(name for name in model.layers if name in job.description.time_layers)
    ranking = job.rank_layers(model, samples.first(RANKED_SAMPLES), "relief")
    aligned = time_layers + most_relieving(ranking, 0.05, time_layers)
    generated = intervals == "generator"
    settings = Finetuning(
        aligned, aligned, iterations=finetuning, weight_rate=rate, global_weight=2.0, over_time=generated
    )
    job.finetune(model, samples, settings)  # QuEST's TLA and CMA together
    return model


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/best.py MODEL BITS FOLDER")
    model, bits, folder = sys.argv[1:]
    stepquant.save(stepquant.quantize(resolve_pipeline(model), bits, recipe=best), folder)
