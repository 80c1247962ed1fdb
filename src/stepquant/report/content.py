"""Content of a report, collected before rendering."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from stepquant.checkpoint import Manifest, load_pipeline, read_manifest
from stepquant.errors import StepquantError
from stepquant.evaluation import EvaluationResult, evaluate
from stepquant.images import stills
from stepquant.loading import ZOO_PREFIX
from stepquant.pipelines.call import kind_of
from stepquant.pipelines.inputs import Inputs
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.quality.fidelity import psnr
from stepquant.report.inputs import SensitivityFile, Times, read_sensitivity, read_times
from stepquant.report.structure import (
    ActivationRange,
    LayerRow,
    activation_ranges,
    bytes_by_content,
    layer_rows,
    timesteps_of,
)

MAX_IMAGES = 16


@dataclass(frozen=True)
class Report:
    """Content of a report about one quantized model.

    Attributes:
        name: name of its folder.
        component: name of the quantized denoiser in the pipeline.
        provenance: recipe, spec, calibration, seed, source and versions from the manifest, not validated.
        figures: comparison with full precision.
        full_precision, quantized: images, float32 [N, C, H, W] in [-1, 1], N <= `MAX_IMAGES`.
        psnr_db: PSNR of each image, [N].
        captions: condition of each image, [N]; "" for an unconditional model.
        timesteps: of the rows of per-step tables, float32 [R], ascending.
        activations: range of every quantized activation.
        layers: every linear, convolution and quantized attention.
        component_bytes: folder of the pipeline -> size of its files.
        content_bytes: kind of tensor in the denoiser -> size.
        sensitivity: sensitivity of the layers of its source, if measured.
        times: duration of the quantization, if recorded.
    """

    name: str
    component: str
    provenance: dict[str, Any]
    figures: EvaluationResult
    full_precision: Tensor
    quantized: Tensor
    psnr_db: list[float]
    captions: list[str]
    timesteps: Tensor
    activations: list[ActivationRange]
    layers: list[LayerRow]
    component_bytes: dict[str, int]
    content_bytes: dict[str, int]
    sensitivity: SensitivityFile | None = None
    times: Times | None = None


def origin_of(folder: Path) -> str:
    """The full-precision source that a quantized folder names, if it is a zoo model or a local folder.

    A hub id is not used: a file should not decide what is downloaded.

    Raises:
        StepquantError: if `folder` is not a quantized model, or its source is not available.
    """
    source = read_manifest(folder).provenance.get("source")
    if isinstance(source, str) and (source.startswith(ZOO_PREFIX) or Path(source).is_dir()):
        return source
    raise StepquantError(f"{folder} was made from {source!r}, not a local folder. Pass its source as `against`.")


def gather(
    folder: Path,
    against: str,
    *,
    count: int = 16,
    steps: int = 50,
    seed: int = 0,
    inputs: Inputs | None = None,
    sensitivity: Path | None = None,
    times: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read the checkpoint in `folder`, generate the same images with it and its source, and compare them.

    Args:
        against: the full-precision source: a folder, a hub id or ``zoo:NAME``.
        count, steps, seed, inputs: see `stepquant.evaluation.evaluate`; the guidance is that of the calibration.
        sensitivity: file that ``stepquant sensitivity`` wrote about `against`.
        times: file that ``stepquant quantize --times`` wrote about `folder`.

    Raises:
        StepquantError: if one of them cannot be loaded, or `folder` is not made from `against`, or `sensitivity` is
            about another model, or `times` about another folder.
    """
    pipeline, manifest = load_pipeline(folder)
    request = make_request(pipeline, steps, inputs=inputs)
    names = {label: name for name, label in (getattr(pipeline, "labels", None) or {}).items()}
    conditions = [request.condition(index) if request.conditions else "" for index in range(min(count, MAX_IMAGES))]
    denoiser = getattr(pipeline, manifest.component)
    timesteps, activations = timesteps_of(denoiser), activation_ranges(denoiser)
    layers, content_bytes = layer_rows(denoiser), bytes_by_content(denoiser)
    prompts = [str(prompt) for prompt in request.conditions] if kind_of(pipeline) == "text" else None
    measured = read_sensitivity(sensitivity, {layer.name for layer in layers}) if sensitivity else None
    duration = read_times(times, folder) if times else None
    del pipeline, denoiser  # the evaluation loads its own
    evaluated = evaluate(
        folder,
        against,
        count=count,
        steps=steps,
        seed=seed,
        guidance=_guidance(manifest),
        prompts=prompts,
        inputs=inputs,
        progress=progress,
    )
    shown = slice(0, MAX_IMAGES)
    full_precision, quantized = (
        stills(images[shown], against) for images in (evaluated.full_precision, evaluated.quantized)
    )
    return Report(
        name=folder.resolve().name,
        component=manifest.component,
        provenance=manifest.provenance,
        figures=evaluated.result,
        full_precision=full_precision,
        quantized=quantized,
        psnr_db=psnr(evaluated.quantized[shown], evaluated.full_precision[shown]).tolist(),
        captions=[names.get(condition, str(condition)) for condition in conditions],
        timesteps=timesteps,
        activations=activations,
        layers=layers,
        component_bytes=_component_bytes(manifest),
        content_bytes=content_bytes,
        sensitivity=measured,
        times=duration,
    )


def _guidance(manifest: Manifest) -> float | None:
    """Guidance of the calibration; None, the default of the pipeline, for anything but a number."""
    guidance = manifest.provenance.get("guidance")
    return float(guidance) if isinstance(guidance, int | float) and not isinstance(guidance, bool) else None


def _component_bytes(manifest: Manifest) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, file in manifest.files.items():
        parts = PurePosixPath(name).parts
        sizes[parts[0] if len(parts) > 1 else "top level"] += file.bytes
    return dict(sizes.most_common())
