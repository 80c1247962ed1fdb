"""Recipes against each other on the reference models, cell by cell.

    python benchmarks/study.py benchmarks/studies/papers.toml            # run what is missing
    python benchmarks/study.py benchmarks/studies/papers.toml --table    # what there is, as Markdown

A cell is a model, a recipe with its hyperparameters (under its own name, or under another with ``recipe = ...`` among
them), bits and a seed. Its line goes to ``benchmarks/results/STUDY.jsonl``; a cell that is there
already is skipped, so a study can be stopped at any time, and two processes can share one (`--models`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepquant
from stepquant.evaluation.fidelity import psnr
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name
from stepquant.models.description import main_tensor
from stepquant.pipelines import Request, draw_many, make_request
from stepquant.progress import Progress

RESULTS = Path(__file__).parent / "results"


class Reference:
    """A full-precision model, its pictures, and what its denoiser was asked and answered on the way to them."""

    def __init__(self, model: str, guidance: float | None, count: int, steps: int) -> None:
        self.pipeline = resolve_pipeline(f"zoo:{model}")
        self.request: Request = make_request(self.pipeline, steps, guidance=guidance)
        self.count = count
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        denoiser = getattr(self.pipeline, denoiser_name(self.pipeline))

        def keep(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.calls.append((args, kwargs, main_tensor(output)))

        handle = denoiser.register_forward_hook(keep, with_kwargs=True)
        self.pictures = self.draw(self.pipeline)
        handle.remove()

    def draw(self, pipeline: Any) -> Tensor:
        return draw_many(pipeline, self.request, self.count, 0, Progress(), "", batch_size=self.count)

    @torch.no_grad()
    def step_errors(self, quantized: Any) -> list[float]:
        """Relative L2 error of the denoiser's output at each step, in per cent, on the full-precision trajectory."""
        denoiser = getattr(quantized, denoiser_name(quantized))
        errors = []
        for args, kwargs, target in self.calls:
            output = main_tensor(denoiser(*args, **kwargs))
            errors.append(round(100 * float((output - target).norm() / target.norm()), 2))
        return errors


def run(study: dict[str, Any], models: list[str], results: Path) -> None:
    """Compute the cells of `models` that `results` does not have."""
    for seed in study["seeds"]:
        for model in models:
            reference = None
            for bits in study["bits"]:
                for label, arguments in study["recipes"].items():
                    cell = {"model": model, "bits": bits, "recipe": label, "seed": seed, "arguments": arguments}
                    if any(cell.items() <= line.items() for line in read(results)):
                        continue
                    guidance = study["guidance"].get(model)
                    reference = reference or Reference(model, guidance, **study["evaluation"])
                    start = time.monotonic()
                    quantized = stepquant.quantize(
                        reference.pipeline,
                        bits,
                        calibration=stepquant.Calibration(**study["calibration"]),
                        guidance=guidance,
                        seed=seed,
                        **{"recipe": label, **arguments},
                    )
                    seconds = time.monotonic() - start
                    decibels = psnr(reference.draw(quantized), reference.pictures)
                    cell |= {
                        "psnr_db": round(float(decibels.mean()), 2),
                        "step_error_percent": reference.step_errors(quantized),
                        "quantize_seconds": round(seconds),
                        "threads": torch.get_num_threads(),
                        "evaluation": study["evaluation"],
                        "calibration": study["calibration"],
                    }
                    with results.open("a") as file:
                        file.write(json.dumps(cell) + "\n")
                    print(f"{model:14} {bits} {label:24} {cell['psnr_db']:6.2f} dB {seconds:5.0f} s", flush=True)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(study: dict[str, Any], results: Path) -> str:
    """Mean PSNR over seeds, one Markdown table a model; a figure from several seeds has its standard deviation."""
    lines = read(results)
    out = []
    for model in study["models"]:
        out += [f"| {model} | " + " | ".join(bits.upper() for bits in study["bits"]) + " |"]
        out += ["|---" * (1 + len(study["bits"])) + "|"]
        for label, arguments in study["recipes"].items():
            row = [f"`{label}`"]
            for bits in study["bits"]:
                cell = {"model": model, "bits": bits, "recipe": label, "arguments": arguments}
                values = [line["psnr_db"] for line in lines if cell.items() <= line.items()]
                text = f"{statistics.mean(values):.2f}" if values else ""
                row.append(text + (f" ± {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else ""))
            out.append("| " + " | ".join(row) + " |")
        out.append("")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--bits", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--recipes", nargs="+", help="only these")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    study = tomllib.loads(options.study.read_text())
    for name in ("bits", "seeds"):
        study[name] = getattr(options, name) or study[name]
    if options.recipes:
        study["recipes"] = {name: study["recipes"][name] for name in options.recipes}
    RESULTS.mkdir(exist_ok=True)
    results = RESULTS / f"{options.study.stem}.jsonl"
    if options.table:
        print(table(study, results))
    else:
        run(study, options.models or study["models"], results)


if __name__ == "__main__":
    main()
