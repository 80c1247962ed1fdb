"""Everything that a report shows, gathered before a line of it is drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from stepquant.checkpoint import Manifest, load_pipeline, read_manifest
from stepquant.errors import StepquantError
from stepquant.evaluation import EvaluationResult, evaluate
from stepquant.evaluation.fidelity import psnr
from stepquant.loading import ZOO_PREFIX
from stepquant.pipelines.generate import kind_of, make_request
from stepquant.progress import Progress
from stepquant.report.sensitivity import SensitivityFile, read_sensitivity
from stepquant.report.structure import (
    ActivationRange,
    LayerRow,
    activation_ranges,
    bytes_by_content,
    layer_rows,
    timesteps_of,
)
from stepquant.report.times import Times, read_times

PICTURES_SHOWN = 16


@dataclass(frozen=True)
class Report:
    """What there is to say about one quantized model.

    Attributes:
        name: of its folder.
        component: name of the quantized denoiser in the pipeline.
        provenance: the manifest's: recipe with arguments, spec, calibration, seed, source, versions. Not validated:
            whoever wrote the folder chose what it says.
        figures: against full precision.
        full_precision, quantized: the images shown, float32 [N, C, H, W] in [-1, 1], N <= `PICTURES_SHOWN`.
        psnr_db: of each of them, [N].
        captions: what each of them shows, [N]; "" for an unconditional model.
        timesteps: what the rows of per-step tables stand for, float32 [R], ascending.
        activations: the range of every quantized activation.
        layers: every linear, convolution and quantized attention.
        component_bytes: top folder of the pipeline -> bytes of its files; those at the root are listed as such.
        content_bytes: what the denoiser's tensors hold -> bytes.
        sensitivity: of its origin's layers, where it was measured.
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
    """The full-precision origin that a quantized folder names, if it is at hand: ``zoo:NAME`` or a folder.

    A hub id is not taken from there: a file should not decide what is downloaded.

    Raises:
        StepquantError: if `folder` is no quantized model, or its origin has to be given.
    """
    source = read_manifest(folder).provenance.get("source")
    if isinstance(source, str) and (source.startswith(ZOO_PREFIX) or Path(source).is_dir()):
        return source
    raise StepquantError(f"{folder} was made from {source!r}, which is no folder here: give its origin with --against.")


def gather(
    folder: Path,
    against: str,
    *,
    count: int = 16,
    steps: int = 50,
    seed: int = 0,
    sensitivity: Path | None = None,
    times: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read the checkpoint in `folder`, draw the same images with it and its origin, and compare them.

    Args:
        against: the full-precision origin: a folder, a hub id or ``zoo:NAME``.
        count, steps, seed: what is drawn, see `stepquant.evaluation.evaluate`; with the guidance of the calibration.
        sensitivity: what ``stepquant sensitivity`` wrote about `against`.
        times: what ``stepquant quantize --times`` wrote about `folder`.

    Raises:
        StepquantError: if one of them cannot be loaded, or `folder` is not made from `against`, or `sensitivity` is
            about another model, or `times` about another folder.
    """
    pipeline, manifest = load_pipeline(folder)
    request = make_request(pipeline, steps)
    names = {label: name for name, label in (getattr(pipeline, "labels", None) or {}).items()}
    conditions = [request.condition(index) if request.conditions else "" for index in range(min(count, PICTURES_SHOWN))]
    denoiser = getattr(pipeline, manifest.component)
    timesteps, activations = timesteps_of(denoiser), activation_ranges(denoiser)
    layers, content_bytes = layer_rows(denoiser), bytes_by_content(denoiser)
    prompts = [str(prompt) for prompt in request.conditions] if kind_of(pipeline) == "text" else None
    measured = read_sensitivity(sensitivity, {layer.name for layer in layers}) if sensitivity else None
    took = read_times(times, folder) if times else None
    del pipeline, denoiser  # the evaluation loads its own
    evaluated = evaluate(
        folder,
        against,
        count=count,
        steps=steps,
        seed=seed,
        guidance=_guidance(manifest),
        prompts=prompts,
        progress=progress,
    )
    shown = slice(0, PICTURES_SHOWN)
    full_precision, quantized = evaluated.full_precision[shown], evaluated.quantized[shown]
    return Report(
        name=folder.resolve().name,
        component=manifest.component,
        provenance=manifest.provenance,
        figures=evaluated.result,
        full_precision=full_precision,
        quantized=quantized,
        psnr_db=psnr(quantized, full_precision).tolist(),
        captions=[names.get(condition, str(condition)) for condition in conditions],
        timesteps=timesteps,
        activations=activations,
        layers=layers,
        component_bytes=_component_bytes(manifest),
        content_bytes=content_bytes,
        sensitivity=measured,
        times=took,
    )


def _guidance(manifest: Manifest) -> float | None:
    """Of the calibration; None is the pipeline's own, and so is anything that is no number."""
    guidance = manifest.provenance.get("guidance")
    return float(guidance) if isinstance(guidance, int | float) and not isinstance(guidance, bool) else None


def _component_bytes(manifest: Manifest) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, file in manifest.files.items():
        parts = PurePosixPath(name).parts
        sizes[parts[0] if len(parts) > 1 else "at the root"] += file.bytes
    return dict(sizes.most_common())
