"""A recipe of your own: samples as EDA-DM selects them, intervals as TDQ learns them, finetuning as QuEST does it.

python examples/best.py zoo:fashion-class w4a4 out/best
"""

import sys

import stepquant
from stepquant.calibration.instrument import Instrumented
from stepquant.loading import resolve_pipeline
from stepquant.recipes import Job
from stepquant.reconstruction.blocks import Settings
from stepquant.reconstruction.network import Finetuning


def best(job: Job, *, iterations: int = 300, finetuning: int = 300, rate: float = 1e-3) -> Instrumented:
    """Dense and diverse samples, balanced channels, intervals over time, blocks rebuilt, critical layers aligned."""
    samples = job.collect(job.dense_and_diverse_steps(diversity_weight=1.0))  # EDA-DM's TDAC
    model = job.instrument("least-error", split_skips=True, timesteps=job.training_timesteps())
    if job.spec.default_bits.activation < 8:  # at 8 bits, activations have no difficulty to hand on to the weights
        job.balance(model, samples)
    job.reconstruct(model, samples, Settings(iterations=iterations, over_time="generator"))  # TDQ
    critical = tuple(name for name in model.layers if name in job.description.time_layers or ".to_" in name)
    settings = Finetuning(
        critical, critical, iterations=finetuning, weight_rate=rate, global_weight=2.0, over_time=True
    )
    job.finetune(model, samples, settings)  # QuEST's TLA and CMA together
    return model


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/best.py MODEL BITS FOLDER")
    model, bits, folder = sys.argv[1:]
    stepquant.save(stepquant.quantize(resolve_pipeline(model), bits, recipe=best), folder)
