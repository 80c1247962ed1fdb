"""Recipes against each other on the reference models: PSNR to full precision from the same noise.

    python benchmarks/quality.py --models fashion-ddpm --bits w8a8 w4a8

Results are appended to ``benchmarks/results/quality.jsonl``, one line a cell; a cell that is there already is skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import stepquant
from stepquant.evaluation.fidelity import psnr
from stepquant.loading import resolve_pipeline
from stepquant.pipelines import draw_many, make_request
from stepquant.progress import Progress

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["fashion-ddpm", "fashion-class", "emoji-ldm"])
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--recipes", nargs="+", default=["minmax", "q-diffusion"])
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--calibration-steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exception", nargs="*", default=[], metavar="REGEX=BITS")
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    exceptions = dict(text.rsplit("=", 1) for text in options.exception)
    for model in options.models:
        pipeline = resolve_pipeline(f"zoo:{model}")
        request = make_request(pipeline, options.steps)
        full_precision = None
        for bits in options.bits:
            for recipe in options.recipes:
                cell = {
                    "model": model, "bits": bits, "recipe": recipe, "count": options.count, "steps": options.steps,
                    "samples": options.samples, "calibration_steps": options.calibration_steps,
                    "iterations": options.iterations if recipe != "minmax" else 0, "seed": options.seed,
                    "exceptions": exceptions,
                }  # fmt: skip
                if any(cell.items() <= other.items() for other in done):
                    continue
                if full_precision is None:
                    full_precision = _draw(pipeline, request, options.count)
                start = time.monotonic()
                quantized = stepquant.quantize(
                    pipeline,
                    {"bits": bits, "exceptions": exceptions},
                    recipe=recipe,
                    calibration=stepquant.Calibration(samples=options.samples, steps=options.calibration_steps),
                    seed=options.seed,
                    **({"iterations": options.iterations} if recipe != "minmax" else {}),
                )
                seconds = time.monotonic() - start
                values = psnr(_draw(quantized, request, options.count), full_precision)
                cell |= {"psnr_db": round(float(values.mean()), 2), "quantize_seconds": round(seconds)}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(cell) + "\n")
                print(f"{model:14} {bits} {recipe:12} PSNR {cell['psnr_db']:6.2f} dB   {seconds:4.0f} s", flush=True)


def _draw(pipeline: object, request: object, count: int) -> torch.Tensor:
    return draw_many(pipeline, request, count, 0, Progress(), "")


if __name__ == "__main__":
    main()
