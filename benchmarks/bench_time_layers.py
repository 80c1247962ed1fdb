"""Time that caching the outputs of time layers saves, compared with computing them at every step.

    python benchmarks/bench_time_layers.py [--model fashion-ddpm] [--batch 16] [--runs 25] [--threads 1]

The model is quantized to w8a8 with `minmax`, once with its time layers in int8 and once with them in floating point
(``exact_time``). Three denoisers run in turns on the same inputs: computed in int8, computed in floating point, cached.
All twenty timesteps are visited once before the measurement. The script prints the medians of the CPU time, on which
other load has little effect; the times of several threads add up. It appends one line of JSON to
``benchmarks/results/time_layers.jsonl``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

import stepquant
from stepquant.loading import resolve_pipeline
from stepquant.pipelines.description import describe_component
from stepquant.pipelines.request import make_request

RESULTS = Path(__file__).parent / "results" / "time_layers.jsonl"
STEPS = 20


def computing(model: nn.Module, names: list[str]) -> nn.Module:
    """Return a copy that computes its time layers at every call."""
    copied = copy.deepcopy(model)
    for name in names:
        copied.get_submodule(name).time_cache = lambda x, _time, _layer, compute: compute(x)
    return copied


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-ddpm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = resolve_pipeline(f"zoo:{options.model}")
    calibration = stepquant.Calibration(samples=16, steps=4)
    quantized, exact = (
        stepquant.quantize(
            pipeline, {"bits": "w8a8", "exact_time": exact}, recipe="minmax", calibration=calibration
        ).unet
        for exact in (False, True)
    )
    description = describe_component(pipeline, "unet", make_request(pipeline, steps=4))
    names = description.time_layers_in(description.layers)
    models = {
        "computed in int8": computing(quantized, names),
        "computed in float32": computing(exact, names),
        "looked up": exact,
    }
    sample = torch.randn(options.batch, pipeline.unet.config["in_channels"], *[pipeline.unet.config["sample_size"]] * 2)
    timesteps = torch.linspace(999, 0, STEPS).long().tolist()
    for timestep in timesteps:
        exact(sample, timestep)
    times: dict[str, list[float]] = {label: [] for label in models}
    for run in range(options.runs):
        for label, model in models.items():
            start = time.process_time()
            model(sample, timesteps[run % STEPS])
            times[label].append(time.process_time() - start)
    line = {
        "model": options.model,
        "batch": options.batch,
        "threads": options.threads,
        "time_layers": len(names),
        "milliseconds_per_step": {label: round(median(values) * 1e3, 2) for label, values in times.items()},
    }
    print(json.dumps(line, indent=2))
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
