"""The library's interface: quantize a pipeline, train one, rank its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepquant.calibration.allocation import parse_budget
from stepquant.calibration.image_folder import open_images
from stepquant.calibration.samples import Calibration
from stepquant.calibration.sensitivity import Method, Sensitivity, check_method
from stepquant.check import OnLowQuality
from stepquant.config import FLOAT_BITS
from stepquant.errors import StepquantError
from stepquant.integrations.components import Also
from stepquant.pipelines.inputs import Inputs
from stepquant.progress import Progress
from stepquant.quantizing import opened, quantize_denoisers
from stepquant.recipes import QAT, Recipe, find_effort, find_recipe, published_calibration, with_target
from stepquant.recipes.sensitivity import RANKING, rank_layers
from stepquant.runtime import Backend
from stepquant.targets import Spec, parse_specs


def quantize(
    pipeline: Any,
    spec: Spec,
    *,
    recipe: str | type[Recipe] | Recipe | None = None,
    target: Mapping[str, float | str] | None = None,
    preset: str | None = None,
    effort: str = "standard",
    hyperparameters: Mapping[str, Any] | None = None,
    budget: float | str | None = None,
    activation_budget: float | None = None,
    correction: bool = False,
    also: Also | None = None,
    calibration: Calibration | dict[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    inputs: Inputs | None = None,
    seed: int = 0,
    workspace: Path | str | None = None,
    cache: Path | str | None = None,
    progress: Progress | None = None,
    backend: Backend = "auto",
    device: torch.device | str | None = None,
    source: str | None = None,
    check: bool = True,
    on_low_quality: OnLowQuality = "warn",
) -> Any:
    """Quantize the denoiser of a diffusers pipeline; returns a new pipeline of the same class that runs in integers.

    Within a process group of torch (``torchrun``, ``accelerate launch``) the processes share the work, and each returns
    the same pipeline.

    The given pipeline is not changed; the new one has its own denoiser, scheduler and tokenizers, and shares the other
    components. Its ``save_pretrained(folder)`` writes a checkpoint that `stepquant.load` reads.

    Args:
        pipeline: a full-precision pipeline with a denoiser: a component whose forward takes a timestep. In bfloat16 or
            float16 its weights stay so while they are calibrated, at half the memory, and so does what the quantized
            pipeline keeps of it.
        spec: bits such as ``"w4a8"``, or a `QuantSpec`, for every denoiser of the pipeline but ControlNets; or one for
            each: ``{"transformer": "w4a8", "transformer_2": "w4a8", "controlnet": "w8a8"}``. Each is calibrated on the
            calls that it gets.
        recipe: a recipe with its hyperparameters, such as ``stepquant.recipes.QuEST(iterations=50)``; its name in
            ``stepquant.recipes.RECIPES``; or a custom class, also as ``"path.py:ClassName"``. By default
            ``"q-diffusion"``, and ``"auto"`` with a target.
        target: of the recipe ``"auto"``: ``{"psnr": 30}`` for as few bits as reach that many dB, ``{"size": "0.2x"}``
            for the best at that size relative to float32, or both.
        preset: of a recipe by name: ``"fast"``, the default, or ``"paper"``.
        effort: ``"quick"``, ``"standard"`` or ``"thorough"``: number of calibration samples and steps, unless
            `calibration` is given, and the factor of the recipe's iteration counts. Of the preset ``"paper"``,
            ``"thorough"`` is the published budget, and the others are parts of it.
        hyperparameters: of the recipe, with other values than preset and effort give them.
        budget: most bits of a weight, on average, as 4.5 or ``"4.5bits"``: the layers that suffer most keep 8 within it
            (see `sensitivity`).
        activation_budget: most bits of an activation, on average over steps, weighted equally, and over layers with
            quantized activations, weighted by multiply-adds: 8 bits where they help the final image most within it,
            else those of `spec` (4 if those are 8). The steps are written to the spec's `step_bits`.
        correction: undo, step by step, the part of the error that follows the denoiser's output (PTQD); composes with
            every recipe and costs one multiplication of the output.
        also: other models of the pipeline and the bits of their weights, ``{"text_encoder": "w8a16", "vae": "w8a16"}``;
            rounded to nearest, with activations in floating point. By default they stay as they are.
        calibration: how many samples, over how many steps: a `Calibration`, or a dictionary of its attributes.
        prompts: calibrate on these; by default the model's own examples.
        guidance: scale of classifier-free guidance while calibrating; by default the pipeline's.
        inputs: what else the pipeline's call needs, such as the `image` of an inpainting or ControlNet pipeline: a
            dictionary of values that all samples share, or of lists with one entry per prompt; or a list of
            dictionaries, one per sample, used in turn.
        seed: 0 or more; same seed, same machine, same versions: same integers.
        workspace: folder that keeps finished stages, so that the same call continues after an interruption; by
            default a temporary one.
        cache: folder of calibration samples that several calls, also at the same time, share: those of the same model,
            conditions and seed are collected once, whatever the bits. By default they lie in the workspace.
        progress: receives the progress of each task.
        backend: the runtime, one of ``stepquant.runtime.BACKENDS`` or a custom function (``KernelFactory``).
        device: where to compute, such as ``"cuda"``, one block at a time, so that the denoiser need not fit; by default
            where the pipeline is.
        source: what to call the model in the provenance; by default its hub id, or the name of its folder without the
            path, which says nothing on another machine.
        check: compare images that nothing was fitted to with full precision (`stepquant.check`); the result is in
            the provenance and on the model card.
        on_low_quality: what to do below the floor of these bits: ``"warn"`` (`LowQualityWarning`), ``"raise-bits"`` of
            the layers to blame until the floor holds, or ``"error"``.

    Raises:
        StepquantError: for a spec, recipe or pipeline that does not work, in one sentence; or for low quality.
    """
    recipe, values = with_target(recipe, target)
    chosen = find_recipe(recipe, preset, {**(hyperparameters or {}), **values}, effort)
    named = {"preset": None if isinstance(recipe, Recipe) else preset or "fast", "effort": effort}
    return quantize_denoisers(
        pipeline, spec, chosen, None, named, budget=budget, activation_budget=activation_budget, correction=correction,
        also=also, backend=backend,
        calibration=_calibration(calibration, effort, published_calibration(recipe, preset)), seed=seed,
        source=source, prompts=prompts, guidance=guidance, inputs=inputs, workspace=workspace, cache=cache,
        progress=progress, device=device, check=check, on_low_quality=on_low_quality,
    )  # fmt: skip


def train(
    pipeline: Any,
    spec: Spec,
    *,
    data: Path | str | None = None,
    distill: bool = False,
    recipe: QAT | None = None,
    preset: str | None = None,
    effort: str = "standard",
    hyperparameters: Mapping[str, Any] | None = None,
    budget: float | str | None = None,
    correction: bool = False,
    also: Also | None = None,
    calibration: Calibration | dict[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    inputs: Inputs | None = None,
    seed: int = 0,
    workspace: Path | str | None = None,
    cache: Path | str | None = None,
    progress: Progress | None = None,
    backend: Backend = "auto",
    source: str | None = None,
    check: bool = True,
    on_low_quality: OnLowQuality = "warn",
) -> Any:
    """Quantize by training: weights, their scales and the activations' intervals together (TDQ, arXiv 2306.02316).

    Returns the same as `quantize`.

    Args:
        data: folder of images (`stepquant.calibration.image_folder.open_images`); trained on with the diffusion loss.
        distill: learn what full precision answers instead; on `data` if there is any, else on trajectories of the
            pipeline's own sampler, as many at a time as `calibration` has images.
        recipe: hyperparameters as one object, such as ``stepquant.recipes.QAT(iterations=500)``.
        preset: instead of a recipe: ``"fast"``, the default, or ``"paper"``.
        hyperparameters: those with other values than the recipe and effort give them.
        calibration: of the ranges that training starts at.
        pipeline, spec, effort, budget, correction, also, prompts, guidance, inputs, seed, workspace, cache, progress,
            backend, source, check, on_low_quality: as for `quantize`.

    Raises:
        StepquantError: if there is nothing to learn from, or for a spec, folder or pipeline that does not work.
    """
    if data is None and not (distill or (recipe and recipe.distill)):
        raise StepquantError(
            "training has nothing to learn from: expected a folder of images as `data`, or `distill=True`, "
            "which needs none."
        )
    images = None if data is None else open_images(data, pipeline)
    fixed: dict[str, Any] = {"distill": True} if distill else {}
    if all(given.default_bits.activation == FLOAT_BITS for given in parse_specs(pipeline, spec).values()):
        fixed["intervals"] = "static"  # no activation has an interval
    chosen = find_recipe(recipe or QAT, preset, {**(hyperparameters or {}), **fixed}, effort)
    named = {"preset": preset, "effort": effort}
    return quantize_denoisers(
        pipeline, spec, chosen, images, named, budget=budget, activation_budget=None, correction=correction, also=also,
        backend=backend,
        calibration=_calibration(calibration, effort), seed=seed, source=source, prompts=prompts, guidance=guidance,
        inputs=inputs, workspace=workspace, cache=cache, progress=progress, device=None, check=check,
        on_low_quality=on_low_quality,
    )  # fmt: skip


def sensitivity(
    pipeline: Any,
    spec: Spec,
    *,
    method: Method = "one-at-a-time",
    budget: float | str | None = None,
    calibration: Calibration | dict[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    inputs: Inputs | None = None,
    seed: int = 0,
    workspace: Path | str | None = None,
    cache: Path | str | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> Sensitivity:
    """Rank the layers and steps of a diffusers pipeline, which is not changed, by the error that quantizing causes.

    Weights are rounded to nearest and activations have one static range: what a recipe learns later is not in it.

    Args:
        method: quantize one layer (``"one-at-a-time"``), or all but one (``"leave-one-out"``).
        budget: only checked, before the ranking starts; the ranking does not depend on it.
        calibration: by default 64 samples of 16 images: the order of layers needs fewer than their ranges do.
        pipeline, spec, prompts, guidance, inputs, seed, workspace, cache, progress, device: as for `quantize`.

    Raises:
        StepquantError: for a spec or a pipeline that does not work, in one sentence.
    """
    given = RANKING if calibration is None else Calibration.parse(calibration)
    most = parse_budget(budget) if isinstance(budget, str) else budget
    specs = parse_specs(pipeline, spec)
    if len(specs) > 1:
        raise StepquantError(
            f"spec is for {' and '.join(specs)}; expected one denoiser, whose layers are ranked. Give its name, such "
            f"as {{{next(iter(specs))!r}: 'w4a8'}}."
        )
    with opened(
        pipeline, specs, most, given, seed, prompts=prompts, guidance=guidance, inputs=inputs,
        workspace=workspace, cache=cache, progress=progress, device=device,
    ) as (context,), context.placed():  # fmt: skip
        return rank_layers(context, check_method(method))


def _calibration(
    calibration: Calibration | dict[str, Any] | None, effort: str, published: Calibration | None = None
) -> Calibration:
    """The calibration as given; what is left out is up to the effort, and to the preset's published one."""
    if isinstance(calibration, dict) or calibration is None:
        return Calibration.parse(find_effort(effort).calibration(published) | (calibration or {}))
    return Calibration.parse(calibration)
