"""A quantized pipeline against its full-precision origin: fidelity, distribution and cost, as one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.evaluation.cost import float32_bytes, folder_bytes, peak_memory_bytes
from stepquant.evaluation.features import FolderPictures
from stepquant.evaluation.fidelity import Shadow, psnr, ssim
from stepquant.evaluation.intervals import mean_interval
from stepquant.evaluation.metrics import Figure, Judged, check_wanted, measure
from stepquant.evaluation.proxy import ClassifierProxy
from stepquant.layers.install import quantized_modules
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import BATCH_SIZE, Request, batches, generate, generate_many, kind_of, make_request
from stepquant.progress import Progress
from stepquant.runtime.files import resolve_backend

SHADOWED = 32
"""Images, at least, that each step is compared on; the error of a step is a mean over so many values that more of
them would only cost time."""


class EvaluationResult(BaseModel):
    """The figures of one evaluation.

    Attributes:
        psnr_db: mean over images of each one's PSNR to the full-precision image of the same noise, dB; peak-to-peak
            2, each at most 100.
        psnr_db_lowest: of the worst image.
        psnr_db_interval: 95 % confidence interval of the mean over images; None for a single one.
        ssim: mean structural similarity to the same images.
        ssim_interval: its interval.
        step_error: relative L2 error of the denoiser's output at each step along the full-precision trajectory, over
            the first images (at least 32, if as many are drawn).
        frechet_classifier: Frechet distance to the data between the features of a zoo classifier; None where there is
            no classifier for the data, or too few images. Not an FID.
        frechet_classifier_fp32: the same of the full-precision images.
        frechet_note: why the two are None.
        denoiser_bytes: all files of the quantized denoiser.
        denoiser_bytes_fp32: the origin's parameters in float32.
        peak_memory_bytes: highest resident memory of a process that loads the quantized model and draws one batch.
        peak_memory_bytes_fp32: the same of the origin.
        seconds_per_step: median time of the quantized denoiser in one step of one batch.
        seconds_per_step_fp32: the same of the origin, measured alternately in the same run.
        speedup: seconds_per_step_fp32 / seconds_per_step.
        metrics: those that were asked for, see `stepquant.evaluation.metrics`.
        count, steps, seed, guidance, batch_size: what was drawn; image i starts from the noise of seed + i.
        threads: CPU threads of torch.
        versions: of the packages that the figures depend on.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    against: str
    psnr_db: float
    psnr_db_lowest: float
    psnr_db_interval: tuple[float, float] | None = None
    ssim: float
    ssim_interval: tuple[float, float] | None = None
    step_error: list[float]
    frechet_classifier: float | None
    frechet_classifier_fp32: float | None
    frechet_note: str | None
    denoiser_bytes: int
    denoiser_bytes_fp32: int
    peak_memory_bytes: int
    peak_memory_bytes_fp32: int
    seconds_per_step: float
    seconds_per_step_fp32: float
    speedup: float
    metrics: dict[str, Figure] = Field(default_factory=dict)
    count: int
    steps: int
    seed: int
    guidance: float | None
    batch_size: int
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """The figures, and the images they were taken from: float32 [count, C, H, W] in [-1, 1]."""

    result: EvaluationResult
    full_precision: Tensor
    quantized: Tensor


def evaluate(
    folder: Path,
    against: str,
    *,
    count: int = 128,
    steps: int = 50,
    seed: int = 0,
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
    backend: str = "auto",
    memory: str = "unpacked",
    metrics: dict[str, str] | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw the same images with both pipelines and compare them; processes of one group share the drawing.

    Args:
        folder: a quantized pipeline; run with the given `backend` and `memory`, see `stepquant.runtime.prepare`.
        against: its full-precision origin: a folder, a hub id or ``zoo:NAME``.
        backend: one of ``stepquant.runtime.BACKENDS``, or ``path.py:function``.
        metrics: further metrics, name -> what it needs (`stepquant.evaluation.metrics.NAMES`).
        data: folder with images of the data, for those that compare with it.
        cache: folder that keeps features of images for other evaluations.

    Raises:
        StepquantError: if one of them cannot be loaded, `folder` is not quantized or `against` is, the one is not made
            from the other, or a metric lacks what it needs.
    """
    progress = progress or Progress()
    if count < 1:
        raise StepquantError(f"count is {count}: expected at least 1 image.")
    wanted = metrics or {}
    check_wanted(wanted, data)
    real = None if data is None else FolderPictures(data)
    quantized, original = resolve_pipeline(str(folder), resolve_backend(backend), memory), resolve_pipeline(against)
    denoiser = _check_same(folder, quantized, against, original)
    _check_quantized(folder, getattr(quantized, denoiser), against, getattr(original, denoiser))
    request = make_request(original, steps, prompts=prompts, guidance=guidance)

    ranks = Ranks.current()
    shadow = Shadow(getattr(original, denoiser), getattr(quantized, denoiser))
    reference = _draw_shadowed(original, request, count, seed, shadow, progress, ranks)
    images = generate_many(quantized, request, count, seed, progress, "Drawing quantized", ranks=ranks)
    decibels, similarity = psnr(images, reference), ssim(images, reference)
    drawn_prompts = [str(request.condition(index)) for index in range(count)] if kind_of(original) == "text" else []
    figures = measure(wanted, Judged(against, images, reference, drawn_prompts, real, cache), progress)
    seconds_fp32, seconds = shadow.seconds
    classifier = ClassifierProxy.of(against)
    note = f"there is no classifier for the data of {against}" if classifier is None else classifier.too_few(count)
    batch_size = min(count, BATCH_SIZE)
    with progress.task("Measuring memory", 2) as advance:
        peak = ranks.broadcast(peak_memory_bytes(str(folder), batch_size, backend, memory) if ranks.is_main else None)
        advance(1)
        peak_fp32 = ranks.broadcast(peak_memory_bytes(against, batch_size) if ranks.is_main else None)
        advance(1)
    result = EvaluationResult(
        model=str(folder),
        against=against,
        psnr_db=float(decibels.mean()),
        psnr_db_lowest=float(decibels.min()),
        psnr_db_interval=mean_interval(decibels).interval,
        ssim=float(similarity.mean()),
        ssim_interval=mean_interval(similarity).interval,
        step_error=shadow.step_error,
        frechet_classifier=classifier.frechet(images) if classifier else None,
        frechet_classifier_fp32=classifier.frechet(reference) if classifier else None,
        frechet_note=note,
        denoiser_bytes=folder_bytes(folder / denoiser),
        denoiser_bytes_fp32=float32_bytes(getattr(original, denoiser)),
        peak_memory_bytes=peak,
        peak_memory_bytes_fp32=peak_fp32,
        seconds_per_step=seconds,
        seconds_per_step_fp32=seconds_fp32,
        speedup=seconds_fp32 / seconds,
        metrics=figures,
        count=count,
        steps=steps,
        seed=seed,
        guidance=guidance,
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("stepquant", "torch", "diffusers")},
    )
    return Evaluation(result, reference, images)


def _draw_shadowed(
    pipeline: Any, request: Request, count: int, seed: int, shadow: Shadow, progress: Progress, ranks: Ranks
) -> Tensor:
    parts = batches(count)
    compared = [indices for indices in parts if indices.start < SHADOWED]
    with progress.task("Drawing full precision", count * request.steps) as advance:

        def images_of(indices: range) -> Tensor:
            return generate(pipeline, request, indices, seed, on_step=partial(advance, len(indices)))

        images = []
        for indices in compared:  # by every process: each has its own times, and the errors are few
            with shadow:
                images.append(images_of(indices))
        images += ranks.map(images_of, parts[len(compared) :])
    return torch.cat(images)


def _check_same(folder: Path, quantized: Any, against: str, original: Any) -> str:
    """Name of the denoiser in both pipelines; raises `StepquantError` where one cannot be made from the other."""
    denoiser = denoiser_name(original)
    same = denoiser_name(quantized) == denoiser and kind_of(quantized) == kind_of(original)
    if same:
        ours, theirs = (getattr(pipeline, denoiser).config for pipeline in (quantized, original))
        same = all(ours.get(key) == theirs.get(key) for key in ("sample_size", "in_channels", "out_channels"))
    if not same:
        raise StepquantError(f"{folder} is not made from {against}: the two draw different kinds of images.")
    return denoiser


def _check_quantized(folder: Path, quantized: nn.Module, against: str, original: nn.Module) -> None:
    """Raise `StepquantError` unless the first denoiser is quantized, and the second is not."""
    if not quantized_modules(quantized):
        raise StepquantError(f"{folder} is not quantized: expected a folder that stepquant quantize wrote.")
    if quantized_modules(original):
        raise StepquantError(f"{against} is quantized: compare with the full-precision model that it was made from.")
