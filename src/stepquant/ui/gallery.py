"""Quantize a model, unless it is cached, and generate images with both models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import stepquant
from stepquant.checkpoint import is_checkpoint
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.evaluation import EvaluationResult, evaluate
from stepquant.images import grid, stills
from stepquant.loading import resolve_pipeline
from stepquant.pipelines.call import kind_of
from stepquant.progress import Progress
from stepquant.recipes import RECIPES

SAMPLES = 64
"""Calibration samples: few, since the gallery is for quick comparisons."""
ITERATIONS = 30
MAX_IMAGES = 64
MAX_STEPS = 1000


@dataclass(frozen=True)
class Job:
    """The inputs of one comparison.

    Attributes:
        model: a name in `Gallery.models`.
        prompt: for a text-to-image model; "" uses the prompts of the model.
        seed, steps, count: of the images; image i starts from the noise of seed + i.
    """

    model: str
    recipe: str
    bits: str
    prompt: str = ""
    seed: int = 0
    steps: int = 20
    count: int = 4


@dataclass(frozen=True)
class Result:
    """Image grids of both models, and the rows of a table: name, full precision, quantized."""

    full_precision: Image.Image
    quantized: Image.Image
    rows: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Gallery:
    """Comparisons of full-precision and quantized models.

    Attributes:
        models: name -> model for `stepquant.loading`; the only models that a request can name.
        folder: cache of quantized models.
    """

    models: dict[str, str]
    folder: Path

    def run(self, job: Job, progress: Progress | None = None) -> Result:
        """Quantize if necessary, generate and compare.

        Raises:
            StepquantError: for an unknown name, or a value out of bounds.
        """
        progress = progress or Progress()
        if job.model not in self.models:
            raise StepquantError(f"model {job.model!r} does not exist; expected one of {', '.join(self.models)}.")
        for name, value, most in (("count", job.count, MAX_IMAGES), ("steps", job.steps, MAX_STEPS)):
            if not 1 <= value <= most:
                raise StepquantError(f"{name} is {value}; expected 1 to {most}.")
        if job.seed < 0:
            raise StepquantError(f"seed is {job.seed}; expected 0 or more.")
        source = self.models[job.model]
        folder = self.quantized(job, progress)
        text = kind_of(resolve_pipeline(source)) == "text"
        evaluated = evaluate(
            folder,
            source,
            count=job.count,
            steps=job.steps,
            seed=job.seed,
            prompts=[job.prompt] if text and job.prompt.strip() else None,
            progress=progress,
        )
        full_precision, quantized = (
            grid(stills(images, source)) for images in (evaluated.full_precision, evaluated.quantized)
        )
        return Result(full_precision, quantized, _rows(evaluated.result))

    def quantized(self, job: Job, progress: Progress) -> Path:
        """The folder of the quantized model, created if necessary."""
        # Only names: a request must not reach other files or run a recipe from a file.
        if job.recipe not in RECIPES:
            raise StepquantError(f"recipe {job.recipe!r} does not exist; expected one of {', '.join(RECIPES)}.")
        recipe, spec = RECIPES[job.recipe], QuantSpec.parse(job.bits.strip())
        folder = self.folder / f"{job.model}-{recipe.name}-{spec}-{job.steps}"
        if not is_checkpoint(folder):
            overrides = {"iterations": ITERATIONS} if "iterations" in recipe.fields() else {}
            quantized = stepquant.quantize(
                resolve_pipeline(self.models[job.model]),
                spec,
                recipe=recipe,
                calibration=stepquant.Calibration(samples=SAMPLES, steps=job.steps),
                progress=progress,
                source=self.models[job.model],
                hyperparameters=overrides,
            )
            stepquant.save(quantized, folder, overwrite=True)
        return folder


def _rows(result: EvaluationResult) -> list[tuple[str, str, str]]:
    ratio = result.denoiser_bytes / result.denoiser_bytes_fp32
    return [
        (f"PSNR to full precision, {result.count} images", "", f"{result.psnr_db:.2f} dB"),
        ("SSIM to full precision", "", "" if result.ssim is None else f"{result.ssim:.4f}"),
        (
            f"latency per step, batch of {result.batch_size}",
            f"{result.seconds_per_step_fp32 * 1e3:.1f} ms",
            f"{result.seconds_per_step * 1e3:.1f} ms ({result.speedup:.2f}x speed)",
        ),
        (
            "peak memory, whole process",
            f"{result.peak_memory_bytes_fp32 / 1e6:.0f} MB",
            f"{result.peak_memory_bytes / 1e6:.0f} MB",
        ),
        (
            "size of the denoiser",
            f"{result.denoiser_bytes_fp32 / 1e6:.2f} MB",
            f"{result.denoiser_bytes / 1e6:.2f} MB ({ratio:.3f}x)",
        ),
    ]
