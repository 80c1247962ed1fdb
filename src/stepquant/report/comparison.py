"""Comparison page of several quantized models of one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stepquant.checkpoint import read_manifest
from stepquant.errors import StepquantError
from stepquant.evaluation import EvaluationResult, evaluate
from stepquant.images import SMALLEST_SIDE, grid, stills
from stepquant.pipelines.inputs import Inputs
from stepquant.progress import Progress
from stepquant.report.figures import png_uri, scatter
from stepquant.report.page import render_template

MAX_IMAGES = 8


@dataclass(frozen=True)
class Contender:
    """One quantized model.

    Attributes:
        recipe, bits: from its manifest, not validated.
        images: float32 [N, C, H, W] in [-1, 1], N <= `MAX_IMAGES`.
    """

    name: str
    recipe: str
    bits: str
    figures: EvaluationResult
    images: Tensor


@dataclass(frozen=True)
class Comparison:
    """The models, and the images of their source from the same noise."""

    against: str
    contenders: list[Contender]
    full_precision: Tensor


def compare(
    folders: Sequence[Path],
    against: str,
    *,
    count: int = 16,
    steps: int = 50,
    seed: int = 0,
    guidance: float | None = None,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate each folder on the same noise; the arguments are those of `stepquant.evaluation.evaluate`.

    Raises:
        StepquantError: for a duplicate folder, or one without a quantized model made from `against`.
    """
    duplicates = [folder for folder in folders if list(folders).count(folder) > 1]
    if duplicates:
        raise StepquantError(f"{duplicates[0]} is given twice; expected each model once.")
    manifests = [read_manifest(folder) for folder in folders]  # before the long work
    names = [folder.resolve().name for folder in folders]
    contenders, full_precision = [], None
    for folder, manifest, name in zip(folders, manifests, names, strict=True):
        evaluated = evaluate(
            folder, against, count=count, steps=steps, seed=seed, guidance=guidance, inputs=inputs, progress=progress
        )
        spec = manifest.provenance.get("spec")
        contenders.append(
            Contender(
                name=name if names.count(name) == 1 else str(folder),
                recipe=str(manifest.provenance.get("recipe", "")),
                bits=str(spec.get("bits", "")) if isinstance(spec, dict) else "",
                figures=evaluated.result,
                images=stills(evaluated.quantized[:MAX_IMAGES], name),
            )
        )
        full_precision = stills(evaluated.full_precision[:MAX_IMAGES], against)
    assert full_precision is not None, "at least one folder"
    return Comparison(against, contenders, full_precision)


def render_comparison(comparison: Comparison) -> str:
    """Render the page, self-contained like a report and under the same policy."""
    contenders = comparison.contenders
    quality = [one.figures.psnr_db for one in contenders]
    labels = [one.name for one in contenders]
    sizes = [one.figures.denoiser_bytes / 1e6 for one in contenders]
    times = [one.figures.seconds_per_step * 1e3 for one in contenders]
    rows = [(comparison.against, comparison.full_precision)] + [(one.name, one.images) for one in contenders]
    return render_template(
        "compare.html",
        comparison=comparison,
        first=contenders[0].figures,
        by_size=scatter(sizes, quality, labels, "size of the denoiser, MB", "PSNR, dB"),
        by_time=scatter(times, quality, labels, "latency per step, ms", "PSNR, dB"),
        rows=[(name, [png_uri(grid(image[None])) for image in images]) for name, images in rows],
        small=min(comparison.full_precision.shape[-2:]) < SMALLEST_SIDE,
        frechet=any(one.figures.frechet_classifier is not None for one in contenders),
    )
