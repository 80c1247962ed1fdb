"""A recipe of your own: samples as EDA-DM selects them, ranges as TDQ learns them, finetuning as QuEST does it.

python examples/best.py zoo:fashion-class w4a4 out/best
"""

import sys

import stepquant
from stepquant.calibration.instrument import Instrumented
from stepquant.loading import resolve_pipeline
from stepquant.reconstruction.blocks import Settings
from stepquant.reconstruction.network import Finetuning


def best(job: stepquant.recipes.Job, *, iterations: int = 50, rate: float = 5e-3) -> Instrumented:
    """Dense and diverse samples, a scale a step, compensated rounding; then critical layers and all scales aligned."""
    samples = job.collect(job.dense_and_diverse_steps(diversity_weight=1.0))
    timesteps = samples.tensors["timestep"].float().unique()
    model = job.instrument(weight_range="least-error", split_skips=True, timesteps=timesteps)
    job.reconstruct(model, samples, Settings(iterations=0))
    critical = tuple(name for name in model.layers if name in job.description.time_layers or ".to_" in name)
    job.finetune(
        model,
        samples,
        Finetuning(weights=critical, aligned=critical, iterations=iterations, global_weight=2.0, weight_rate=rate),
    )
    return model


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/best.py MODEL BITS FOLDER")
    model, bits, folder = sys.argv[1:]
    stepquant.save(stepquant.quantize(resolve_pipeline(model), bits, recipe=best), folder)
