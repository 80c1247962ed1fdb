"""Memory of quantizing and sampling: anonymous memory, without mapped files.

    python benchmarks/trust/memory.py --json benchmarks/results/trust-memory.json

Quantizes a small model with some samples and with four times as many, and samples 1,000 steps with the result.
Memory is the anonymous resident set, polled every few milliseconds; the system can reclaim mapped files.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import stepquant
from stepquant.loading import resolve_pipeline
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.quiet import silence_libraries
from stepquant.recipes import MinMax, QDiffusion, Recipe


def anonymous_bytes() -> int:
    """Return the resident anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024


@contextmanager
def peak() -> Iterator[list[int]]:
    """Yield a list whose one entry is the largest increase of `anonymous_bytes` within the context."""
    gc.collect()
    start, highest, done = anonymous_bytes(), [0], threading.Event()

    def poll() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous_bytes() - start)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def quantizing(model: str, samples: int, recipe: Recipe) -> int:
    """Peak bytes of quantizing `model` with `samples` samples."""
    pipeline = resolve_pipeline(model)
    calibration = stepquant.Calibration(samples=samples, steps=4, trajectories=16)
    with tempfile.TemporaryDirectory() as workspace, peak() as highest:
        stepquant.quantize(pipeline, "w4a8", recipe=recipe, calibration=calibration, workspace=workspace)
    return highest[0]


def sampling(model: str, steps: int) -> tuple[int, int]:
    """Increase in bytes after `steps` steps, and after twice as many."""
    pipeline = resolve_pipeline(model)
    calibration = stepquant.Calibration(samples=8, steps=2)
    quantized = stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=calibration)
    generate(quantized, make_request(quantized, 10), range(2), 0)
    held = []
    gc.collect()
    start = anonymous_bytes()
    for _ in range(2):
        generate(quantized, make_request(quantized, steps), range(2), 0)
        gc.collect()
        held.append(anonymous_bytes() - start)
    return held[0], held[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="zoo:fashion-ddpm")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    silence_libraries()
    few, many = arguments.samples, 4 * arguments.samples
    quantizing(arguments.model, 8, MinMax())  # memory that libraries keep after first use is not counted
    result: dict[str, object] = {"model": arguments.model, "torch": torch.__version__.partition("+")[0]}
    for name, recipe in {"minmax": MinMax(), "q-diffusion": QDiffusion(iterations=4)}.items():
        result[f"{name}_peak_bytes"] = {count: quantizing(arguments.model, count, recipe) for count in (few, many)}
    half = arguments.steps // 2
    result["bytes_held_after_steps"] = dict(zip((half, 2 * half), sampling(arguments.model, half), strict=True))
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
