"""What the gallery does: quantize what is asked for unless it is there, and draw with both models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import stepquant
from stepquant.checkpoint import is_checkpoint
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.evaluation import EvaluationResult, evaluate
from stepquant.images import grid
from stepquant.loading import resolve_pipeline
from stepquant.pipelines.request import kind_of
from stepquant.progress import Progress
from stepquant.recipes import RECIPES, find_class

SAMPLES = 64
"""Calibration samples: the gallery is for looking, not for figures."""
ITERATIONS = 30
MOST_PICTURES = 64
MOST_STEPS = 1000


@dataclass(frozen=True)
class Wanted:
    """One press of the button.

    Attributes:
        model: a name in `Gallery.models`.
        prompt: for a model of text; "" takes the model's own prompts.
        seed, steps, count: what is drawn; image i starts from the noise of seed + i.
    """

    model: str
    recipe: str
    bits: str
    prompt: str = ""
    seed: int = 0
    steps: int = 20
    count: int = 4


@dataclass(frozen=True)
class Shown:
    """Images of both models, as grids, and the rows of a table: what, full precision, quantized."""

    full_precision: Image.Image
    quantized: Image.Image
    rows: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Gallery:
    """Quantized models are kept in `folder`, so that each is made once.

    Attributes:
        models: name -> model as `stepquant.loading` takes it. No other can be asked for.
    """

    models: dict[str, str]
    folder: Path

    def show(self, wanted: Wanted, progress: Progress | None = None) -> Shown:
        """Quantize if need be, draw, compare.

        Raises:
            StepquantError: for anything that does not exist or is out of bounds.
        """
        progress = progress or Progress()
        if wanted.model not in self.models:
            raise StepquantError(f"there is no model {wanted.model!r}: expected one of {', '.join(self.models)}.")
        for name, value, most in (("count", wanted.count, MOST_PICTURES), ("steps", wanted.steps, MOST_STEPS)):
            if not 1 <= value <= most:
                raise StepquantError(f"{name} is {value}: expected 1 to {most}.")
        if wanted.seed < 0:
            raise StepquantError(f"seed is {wanted.seed}: expected 0 or more.")
        source = self.models[wanted.model]
        folder = self.quantized(wanted, progress)
        text = kind_of(resolve_pipeline(source)) == "text"
        evaluated = evaluate(
            folder,
            source,
            count=wanted.count,
            steps=wanted.steps,
            seed=wanted.seed,
            prompts=[wanted.prompt] if text and wanted.prompt.strip() else None,
            progress=progress,
        )
        return Shown(grid(evaluated.full_precision), grid(evaluated.quantized), _rows(evaluated.result))

    def quantized(self, wanted: Wanted, progress: Progress) -> Path:
        """The folder of the quantized model, made if it is not there."""
        find_class(wanted.recipe)
        # From here on both are names that this package made up: nothing a browser sends becomes a path.
        spec, recipe = QuantSpec.parse(wanted.bits.strip()), next(name for name in RECIPES if name == wanted.recipe)
        folder = self.folder / f"{wanted.model}-{recipe}-{spec}-{wanted.steps}"
        if not is_checkpoint(folder):
            learned = {"iterations": ITERATIONS} if "iterations" in RECIPES[recipe].fields() else {}
            made = stepquant.quantize(
                resolve_pipeline(self.models[wanted.model]),
                spec,
                recipe=recipe,
                calibration=stepquant.Calibration(samples=SAMPLES, steps=wanted.steps),
                progress=progress,
                source=self.models[wanted.model],
                hyperparameters=learned,
            )
            stepquant.save(made, folder, overwrite=True)
        return folder


def _rows(result: EvaluationResult) -> list[tuple[str, str, str]]:
    ratio = result.denoiser_bytes / result.denoiser_bytes_fp32
    return [
        (f"PSNR to full precision, {result.count} images", "", f"{result.psnr_db:.2f} dB"),
        ("SSIM to full precision", "", f"{result.ssim:.4f}"),
        (
            f"time of a step, batch of {result.batch_size}",
            f"{result.seconds_per_step_fp32 * 1e3:.1f} ms",
            f"{result.seconds_per_step * 1e3:.1f} ms ({result.speedup:.2f}x as fast)",
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
