"""Figures for claims of the papers at W4A4, on zoo:fashion-class and zoo:emoji-ldm.

    python benchmarks/paper_figures.py tdq      # intervals over time: generator, free table, static
    python benchmarks/paper_figures.py quest    # effect of finetuning on activation ranges
    python benchmarks/paper_figures.py emoji    # images from text: rows of full precision, minmax, quest

The script writes images to docs/images/ and their data to benchmarks/results/.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import stepquant
from stepquant.images import grid, save_image
from stepquant.layers.quantized import quantized_modules
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

ROOT = Path(__file__).parents[1]
MODEL, BITS, GUIDANCE, STEPS = "zoo:fashion-class", "w4a4", 4.0, 20
CALIBRATION = stepquant.Calibration(samples=128, steps=STEPS, trajectories=32)
SEED = 100
PANELS = 6


def quantized(recipe: str, model: str = MODEL, guidance: float = GUIDANCE, **arguments: Any) -> Any:
    return stepquant.quantize(
        resolve_pipeline(model),
        BITS,
        recipe=recipe,
        calibration=CALIBRATION,
        guidance=guidance,
        seed=SEED,
        cache=ROOT / "out" / "study-cache",
        hyperparameters=arguments,
    )


def scales(pipeline: Any) -> dict[str, Tensor]:
    """Layer -> scale of its input in each table row, relative to its mean: float32 [R]."""
    modules = quantized_modules(getattr(pipeline, denoiser_name(pipeline)))
    tables = {name: module.input_scale[:, 0, 0] for name, module in modules.items() if hasattr(module, "input_scale")}
    return {name: table / table.mean() for name, table in tables.items()}


def total_variation(values: Tensor) -> float:
    """Total variation of a curve, relative to its range."""
    rise = float(values.max() - values.min())
    return float(values.diff().abs().sum()) / rise if rise > 0 else 1.0


def tdq() -> None:
    generator, table = (
        scales(quantized("tdq", iterations=50, intervals=intervals)) for intervals in ("generator", "table")
    )
    moving = sorted(generator, key=lambda name: float(generator[name].max() - generator[name].min()), reverse=True)
    variation = {
        kind: statistics.median(total_variation(curves[name]) for name in moving[: len(moving) // 2])
        for kind, curves in (("generator", generator), ("free table", table))
    }
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    grid: Any = figure.subplots(2, PANELS // 2, sharex=True)
    for axes, name in zip(grid.flat, moving[:: max(1, len(moving) // 2 // PANELS)][:PANELS], strict=True):
        axes.plot(table[name], color="#c44e52", linewidth=0.9, label="free table")
        axes.plot(generator[name], color="#3366aa", linewidth=1.8, label="generator (TDQ)")
        axes.axhline(1.0, color="grey", linestyle=":", linewidth=1, label="static")
        axes.set_title(name, fontsize=7)
        axes.tick_params(labelsize=7)
    grid[0][0].legend(fontsize=7)
    figure.supxlabel("timestep, from image to noise", fontsize=8)
    figure.supylabel("interval, relative to its mean over time", fontsize=8)
    save(figure, "tdq-intervals", {"layers": len(moving), "median_total_variation_over_rise": variation})


def quest() -> None:
    arguments = {"rounding_iterations": 0}
    before = ranges(quantized("quest", **arguments, time_iterations=0, iterations=0))
    after = ranges(quantized("quest", **arguments, time_iterations=25, iterations=50))
    ratios = sorted(after[name] / before[name] for name in before)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(ratios, ".", color="#3366aa")
    axes.axhline(1.0, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("layers, in order", fontsize=8)
    axes.set_ylabel("range of the input after / before finetuning", fontsize=8)
    statistics_of_ratios = {
        "layers": len(ratios),
        "geometric_mean_ratio": math.exp(statistics.mean(math.log(ratio) for ratio in ratios)),
        "share_narrower": sum(ratio < 1 for ratio in ratios) / len(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    save(figure, "quest-ranges", statistics_of_ratios)


def emoji() -> None:
    """Images from text at W4A4, with the budget and guidance of the study."""
    model, guidance, count = "zoo:emoji-ldm", 5.0, 12
    pipelines = {
        "full precision": resolve_pipeline(model),
        "minmax": quantized("minmax", model, guidance),
        "quest": quantized("quest", model, guidance, rounding_iterations=0, time_iterations=25, iterations=50),
    }
    rows = []
    for pipeline in pipelines.values():
        rows.append(generate(pipeline, make_request(pipeline, STEPS, guidance=guidance), range(count), SEED))
    save_image(grid(torch.cat(rows), columns=count), ROOT / "docs" / "images" / "emoji-w4a4.png")


@torch.no_grad()
def ranges(pipeline: Any) -> dict[str, float]:
    """Layer -> range of its input during the generation of 16 images."""
    modules = quantized_modules(getattr(pipeline, denoiser_name(pipeline)))
    ends: dict[str, tuple[float, float]] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = ends.get(name, (math.inf, -math.inf))
            ends[name] = (min(low, float(inputs[0].amin())), max(high, float(inputs[0].amax())))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    generate(pipeline, make_request(pipeline, STEPS, guidance=GUIDANCE), range(16), SEED, decode=False)
    for handle in handles:
        handle.remove()
    return {name: high - low for name, (low, high) in ends.items() if high > low}


def save(figure: Figure, name: str, values: dict[str, Any]) -> None:
    figure.savefig(ROOT / "docs" / "images" / f"{name}.png", dpi=120)
    settings = {"model": MODEL, "bits": BITS, "seed": SEED, "calibration": CALIBRATION.model_dump()}
    (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(settings | values, indent=2) + "\n")
    print(name, values)


if __name__ == "__main__":
    figures = {"tdq": tdq, "quest": quest, "emoji": emoji}
    if len(sys.argv) != 2 or sys.argv[1] not in figures:
        sys.exit("usage: python benchmarks/paper_figures.py tdq|quest|emoji")
    figures[sys.argv[1]]()
