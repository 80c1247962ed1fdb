"""torch.compile with its default backend on a quantized UNet: equal output, compile time and latency.

    python benchmarks/compiled.py --json benchmarks/results/compiled.json      # minutes

torch.compile calls the integer kernels as they are and compiles the operations between them and weight-only layers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

import stepquant
from stepquant.config import QuantSpec
from stepquant.integrations.weight_only import quantize_weights
from stepquant.runtime import prepare

MODEL = "zoo:fashion-ddpm"
REPEATS = 20


def denoisers() -> dict[str, Any]:
    """Full precision, integers with per-step scales, and quantized weights only."""
    from stepquant.loading import resolve_pipeline

    pipeline = resolve_pipeline(MODEL)
    calibration = stepquant.Calibration(samples=16, steps=4)
    integers = stepquant.quantize(pipeline, "w8a8", recipe=stepquant.recipes.TDQ(iterations=1), calibration=calibration)
    weights = resolve_pipeline(MODEL).unet
    quantize_weights(weights, QuantSpec.parse("w8a16"))
    prepare(weights)
    return {"float32": pipeline.unet, "w8a8, a scale a step": integers.unet, "w8a16": weights}


@torch.no_grad()
def measured(unet: Any, x: torch.Tensor) -> dict[str, float]:
    def seconds(model: Any) -> float:
        start = time.perf_counter()
        for step in range(REPEATS):
            model(x, torch.tensor(999 - 40 * step))
        return (time.perf_counter() - start) / REPEATS

    expected = unet(x, torch.tensor(500)).sample
    plain = seconds(unet)
    torch.compiler.reset()
    compiled = torch.compile(unet)
    start = time.perf_counter()
    produced = compiled(x, torch.tensor(500)).sample
    first = time.perf_counter() - start
    compiled(x, torch.tensor(480))
    return {
        "milliseconds": round(1000 * plain, 2),
        "compiled_milliseconds": round(1000 * seconds(compiled), 2),
        "compiling_seconds": round(first, 1),
        "largest_difference": float((produced - expected).abs().max()),
        "largest_output": float(expected.abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    figures: dict[str, Any] = {"model": MODEL, "batch": 4, "threads": torch.get_num_threads()}
    figures["versions"] = {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__}
    models = denoisers()
    config = models["float32"].config
    x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size)
    for name, unet in models.items():
        figures[name] = measured(unet, x)
        print(name, figures[name], flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
