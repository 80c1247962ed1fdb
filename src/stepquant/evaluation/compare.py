"""Comparison of a quantized pipeline with its full-precision source: fidelity, distribution and cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.evaluation.cost import float32_bytes, folder_bytes, peak_memory_bytes
from stepquant.evaluation.features import DataImages
from stepquant.evaluation.intervals import mean_interval
from stepquant.evaluation.metrics import MetricInputs, MetricValue, check_metrics, measure
from stepquant.evaluation.proxy import ClassifierProxy
from stepquant.evaluation.similarity import ssim
from stepquant.loading import resolve_pipeline
from stepquant.models.denoisers import denoiser_name, denoisers, quantized_denoisers
from stepquant.pipelines.call import kind_of
from stepquant.pipelines.generate import BATCH_SIZE, batches, generate, generate_many
from stepquant.pipelines.inputs import Inputs
from stepquant.pipelines.request import Request, make_request
from stepquant.progress import Progress
from stepquant.quality.fidelity import Shadow, psnr, snr
from stepquant.runtime import resolve_backend

Medium = Literal["image", "video", "audio"]

SHADOWED = 32
"""Minimum number of images for the error per step, a mean over so many values that more would only cost time."""


class EvaluationResult(BaseModel):
    """The values of one evaluation.

    Attributes:
        medium: ``"image"``, ``"video"`` or ``"audio"``.
        psnr_db: mean over images or videos of the PSNR to the full-precision one of the same noise, dB; peak-to-peak 2,
            at most 100 per image. Of audio the signal-to-noise ratio.
        psnr_db_lowest: PSNR of the worst image.
        psnr_db_interval: 95 % confidence interval of the mean over images; None for a single one.
        ssim: mean structural similarity to the same images; None for audio.
        ssim_interval: its interval.
        step_error: relative L2 error of the denoiser's output at each step along the full-precision trajectory, over
            the first images (at least 32, if there are as many); of several denoisers, one after the other.
        frechet_classifier: Frechet distance to the data between the features of a zoo classifier; None without a
            classifier for the data, or for too few images. Not an FID.
        frechet_classifier_fp32: Frechet distance of the full-precision images.
        frechet_note: why the two are None.
        denoiser_bytes: size of all files of the quantized denoisers.
        denoiser_bytes_fp32: size of the original parameters in float32.
        peak_memory_bytes: highest resident memory of a process that loads the quantized model and generates one batch.
        peak_memory_bytes_fp32: the same for the full-precision model.
        seconds_per_step: median latency of the quantized denoiser per step of one batch.
        seconds_per_step_fp32: the same for full precision, measured alternately in the same run.
        speedup: seconds_per_step_fp32 / seconds_per_step.
        metrics: optional metrics, see `stepquant.evaluation.metrics`.
        count, steps, seed, guidance, batch_size: of the generated images; image i starts from the noise of seed + i.
        threads: CPU threads of torch.
        versions: versions of the packages that the values depend on.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    against: str
    medium: Medium = "image"
    psnr_db: float
    psnr_db_lowest: float
    psnr_db_interval: tuple[float, float] | None = None
    ssim: float | None
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
    metrics: dict[str, MetricValue] = Field(default_factory=dict)
    count: int
    steps: int
    seed: int
    guidance: float | None
    batch_size: int
    threads: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """The values, and the images, video or audio they were computed from: float32 [count, C, ...]."""

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
    inputs: Inputs | None = None,
    backend: str = "auto",
    memory: str = "unpacked",
    metrics: dict[str, str] | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Generate the same images with both pipelines and compare them. Processes of one group share the work.

    Args:
        folder: a quantized pipeline; run with the given `backend` and `memory`, see `stepquant.runtime.prepare`.
        against: its full-precision source: a folder, a hub id or ``zoo:NAME``.
        inputs: further arguments of the pipelines' call, see `stepquant.pipelines.request.make_request`.
        backend: one of ``stepquant.runtime.BACKENDS``, or ``path.py:function``.
        metrics: optional metrics, name -> argument (`stepquant.evaluation.metrics.METRICS`).
        data: folder with images of the data, for metrics that compare with it.
        cache: folder for features of images, shared by evaluations.

    Raises:
        StepquantError: if a pipeline cannot be loaded, `folder` is not quantized or not made from `against`, `against`
            is quantized, or the requirements of a metric are missing.
    """
    progress, metrics = progress or Progress(), metrics or {}
    if count < 1:
        raise StepquantError(f"count is {count}; expected at least 1 image.")
    check_metrics(metrics, data)
    real = None if data is None else DataImages(data)
    quantized, original = resolve_pipeline(str(folder), resolve_backend(backend), memory), resolve_pipeline(against)
    names = list(quantized_denoisers(quantized)) or [denoiser_name(quantized)]
    _check_same(folder, quantized, against, original, names)
    _check_quantized(folder, quantized, against, original)
    request = make_request(original, steps, prompts=prompts, guidance=guidance, inputs=inputs)

    ranks = Ranks.current()
    shadows = [Shadow(getattr(original, name), getattr(quantized, name)) for name in names]
    reference = _generate_shadowed(original, request, count, seed, shadows, progress, ranks)
    if metrics and _medium(reference) != "image":
        raise StepquantError(
            f"metrics compare images, but {against} generates {_medium(reference)}. Leave out `metrics`."
        )
    images = generate_many(quantized, request, count, seed, progress, "Generating quantized images", ranks=ranks)
    used_prompts = [str(request.condition(index)) for index in range(count)] if kind_of(original) == "text" else []
    values = measure(metrics, MetricInputs(against, images, reference, used_prompts, real, cache), progress)
    batch_size = min(count, BATCH_SIZE)
    with progress.task("Measuring memory", 2) as advance:
        peak = ranks.broadcast(
            peak_memory_bytes(str(folder), batch_size, inputs, backend, memory) if ranks.is_main else None
        )
        advance(1)
        peak_fp32 = ranks.broadcast(peak_memory_bytes(against, batch_size, inputs) if ranks.is_main else None)
        advance(1)
    seconds_fp32, seconds = (mean(times) for times in zip(*(shadow.seconds for shadow in shadows), strict=True))
    result = EvaluationResult(
        model=str(folder),
        against=against,
        **_fidelity(images, reference),
        step_error=[error for shadow in shadows for error in shadow.step_error],
        **_frechet(against, images, reference),
        denoiser_bytes=sum(folder_bytes(folder / name) for name in names),
        denoiser_bytes_fp32=sum(float32_bytes(getattr(original, name)) for name in names),
        peak_memory_bytes=peak,
        peak_memory_bytes_fp32=peak_fp32,
        seconds_per_step=seconds,
        seconds_per_step_fp32=seconds_fp32,
        speedup=seconds_fp32 / seconds,
        metrics=values,
        count=count,
        steps=steps,
        seed=seed,
        guidance=guidance,
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("stepquant", "torch", "diffusers")},
    )
    return Evaluation(result, reference, images)


def _medium(samples: Tensor) -> Medium:
    media: dict[int, Medium] = {3: "audio", 4: "image", 5: "video"}
    if samples.dim() not in media:
        raise StepquantError(
            f"the pipeline generates samples of the shape {list(samples.shape[1:])}; expected images, video or audio. "
            "Evaluate the pipeline that uses them."
        )
    return media[samples.dim()]


def _fidelity(samples: Tensor, reference: Tensor) -> dict[str, Any]:
    medium = _medium(reference)
    decibels = (snr if medium == "audio" else psnr)(samples, reference)
    similarity = None if medium == "audio" else ssim(samples, reference)
    return {
        "medium": medium,
        "psnr_db": float(decibels.mean()),
        "psnr_db_lowest": float(decibels.min()),
        "psnr_db_interval": mean_interval(decibels),
        "ssim": None if similarity is None else float(similarity.mean()),
        "ssim_interval": None if similarity is None else mean_interval(similarity),
    }


def _frechet(model: str, images: Tensor, reference: Tensor) -> dict[str, Any]:
    classifier = ClassifierProxy.for_model(model)
    return {
        "frechet_classifier": classifier.frechet(images) if classifier else None,
        "frechet_classifier_fp32": classifier.frechet(reference) if classifier else None,
        "frechet_note": classifier.too_few(len(images)) if classifier else f"no classifier for the data of {model}",
    }


def _generate_shadowed(
    pipeline: Any,
    request: Request,
    count: int,
    seed: int,
    shadows: Sequence[Shadow],
    progress: Progress,
    ranks: Ranks,
) -> Tensor:
    parts = batches(count)
    compared = [indices for indices in parts if indices.start < SHADOWED]
    with progress.task("Generating full-precision images", count * request.steps) as advance:

        def images_of(indices: range) -> Tensor:
            return generate(pipeline, request, indices, seed, on_step=partial(advance, len(indices)))

        images = []
        for indices in compared:  # in every process: each measures its own times
            with ExitStack() as stack:
                for shadow in shadows:
                    stack.enter_context(shadow)
                images.append(images_of(indices))
        images += ranks.map(images_of, parts[len(compared) :])
    return torch.cat(images)


def _check_same(folder: Path, quantized: Any, against: str, original: Any, names: Sequence[str]) -> None:
    """Raise `StepquantError` unless the pipelines generate the same kind of images with denoisers of these names."""
    models, keys = denoisers(original), ("sample_size", "in_channels", "out_channels")
    same = kind_of(quantized) == kind_of(original) and all(name in models for name in names)
    for name in names if same else ():
        configs = [getattr(model, "config", {}) for model in (getattr(quantized, name), models[name])]
        same &= all(configs[0].get(key) == configs[1].get(key) for key in keys)
    if not same:
        raise StepquantError(f"{folder} is not made from {against}; expected pipelines of the same kind of images.")


def _check_quantized(folder: Path, quantized: Any, against: str, original: Any) -> None:
    """Raise `StepquantError` unless the first pipeline is quantized and the second is not."""
    if not quantized_denoisers(quantized):
        raise StepquantError(f"{folder} is not quantized; expected a folder that stepquant quantize wrote.")
    if quantized_denoisers(original):
        raise StepquantError(f"{against} is quantized; expected the full-precision model that {folder} was made from.")
