"""The library's face: quantize a pipeline, train one, rank its layers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from stepquant.calibration.allocation import check_budget, parse_budget, weight_sizes
from stepquant.calibration.image_folder import open_images
from stepquant.calibration.model import CalibrationModel, check_overrides
from stepquant.calibration.placement import device_of, placed
from stepquant.calibration.samples import Calibration
from stepquant.calibration.sensitivity import How, Sensitivity, check_how
from stepquant.checkpoint.format import FORMAT_VERSION, QUANT_METHOD
from stepquant.config import FLOAT_BITS, QuantSpec
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError, first_line
from stepquant.integrations.components import Also, check_components, quantize_component
from stepquant.layers.install import Quantization, install
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name, describe
from stepquant.pipelines.corrected_scheduler import correct_sampler
from stepquant.pipelines.generate import check_dtype, make_request
from stepquant.progress import Progress
from stepquant.recipes import Job, Recipe, find_recipe, hyperparameters, name_of
from stepquant.recipes.job import RANKING_SAMPLES
from stepquant.recipes.qat import qat
from stepquant.runtime import Backend, prepare
from stepquant.saving import bound
from stepquant.version import __version__
from stepquant.workspace import Workspace


def quantize(
    pipeline: Any,
    spec: QuantSpec | str | dict[str, Any],
    *,
    budget: float | str | None = None,
    correction: bool = False,
    also: Also | None = None,
    recipe: str | Recipe = "q-diffusion",
    calibration: Calibration | dict[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
    workspace: Path | str | None = None,
    cache: Path | str | None = None,
    progress: Progress | None = None,
    backend: Backend = "auto",
    device: torch.device | str | None = None,
    source: str | None = None,
    **arguments: Any,
) -> Any:
    """Quantize the denoiser of a diffusers pipeline; returns a new pipeline of the same class that runs in integers.

    Within a process group of torch (``torchrun``, ``accelerate launch``) the processes share the work, and each returns
    the same pipeline.

    The given pipeline is not changed; the new one has a denoiser, scheduler and tokenizers of its own, and shares the
    other components. Its ``save_pretrained(folder)`` writes a checkpoint that `stepquant.load` reads.

    Args:
        pipeline: a full-precision pipeline with a UNet or a transformer. In bfloat16 or float16 its weights stay so
            while they are calibrated, at half the memory, and so does what the quantized pipeline keeps of it.
        spec: bits such as ``"w4a8"``, or a `QuantSpec`.
        budget: most bits of a weight, on average, as 4.5 or ``"4.5bits"``: the layers that suffer most keep 8 within it
            (see `sensitivity`).
        correction: undo, step by step, the part of the error that follows the denoiser's output (PTQD); composes with
            every recipe and costs one multiplication of the output.
        also: other models of the pipeline and the bits of their weights, ``{"text_encoder": "w8a16", "vae": "w8a16"}``;
            rounded to nearest, with activations in floating point. By default they stay as they are.
        recipe: name of a recipe (``stepquant.recipes.RECIPES``), or a function of your own that is one: it takes a
            `Job`, and its hyperparameters as keyword-only arguments.
        calibration: how many samples, over how many steps: a `Calibration`, or a dictionary of its attributes.
        prompts: calibrate on these; by default the model's own examples.
        guidance: scale of classifier-free guidance while calibrating; by default the pipeline's.
        inputs: what else the pipeline's call needs, such as the `image` of an inpainting or ControlNet pipeline.
        seed: 0 or more; same seed, same machine, same versions: same integers.
        workspace: folder that keeps finished stages, so that the same call continues after an interruption; by
            default a temporary one.
        cache: folder of calibration samples that several calls, also at the same time, share: those of the same model,
            conditions and seed are collected once, whatever the bits. By default they lie in the workspace.
        progress: is told how far the work is.
        backend: the runtime, one of ``stepquant.runtime.BACKENDS`` or a function of your own (``KernelFactory``).
        device: where to compute, such as ``"cuda"``, one block at a time, so that the denoiser need not fit; by default
            where the pipeline is.
        source: what to call the model in the provenance; by default its hub id, or the name of its folder without the
            path, which says nothing on another machine.
        arguments: hyperparameters of the recipe.

    Raises:
        StepquantError: for a spec, recipe or pipeline that does not work, in one sentence.
    """
    spec = QuantSpec.parse(spec)
    calibration = Calibration.parse(calibration)
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    _check_seed(seed)
    values = hyperparameters(recipe, arguments)
    denoiser = check_quantizable(pipeline, spec, budget)
    where = check_device(device)
    others = check_components(pipeline, also or {})
    request = make_request(
        pipeline, calibration.steps, prompts=prompts, guidance=guidance, size=calibration.size, inputs=inputs
    )
    ranks = Ranks.current()
    with (
        tempfile.TemporaryDirectory(prefix="stepquant-") as temporary,
        Workspace(Path(workspace or temporary), ranks) as kept,
        placed(denoiser, describe(denoiser).blocks, where),
    ):
        # Not entered: its stages are whole files, nothing to lock.
        shared = Workspace(Path(cache), ranks) if cache else None
        job = Job(pipeline, denoiser, spec, calibration, request, seed, kept, progress or Progress(), shared, where)
        if budget is not None:
            spec = job.within_budget(budget)
            job = dataclasses.replace(job, spec=spec)
        calibrated = find_recipe(recipe)(job, **values)
        if not isinstance(calibrated, CalibrationModel):
            raise StepquantError(
                f"recipe {name_of(recipe)} returned a {type(calibrated).__name__}: expected the model that "
                "job.instrument() gave it."
            )
        quantization = calibrated.to_quantized()
        if correction:
            quantization = dataclasses.replace(quantization, correction=job.correction(calibrated))
    provenance = {
        "source": source or _source_of(pipeline),
        "recipe": name_of(recipe),
        "arguments": values,
        "spec": spec.model_dump(mode="json"),
        "budget": budget,
        "correction": correction,
        "calibration": calibration.model_dump(mode="json"),
        "guidance": guidance,
        "seed": seed,
        "versions": _versions(),
    }
    if others:
        provenance["also"] = {name: config.spec.model_dump(mode="json") for name, config in others.items()}
    quantized = assemble(pipeline, quantization, spec, provenance, backend)
    for name, config in others.items():
        quantized.register_modules(**{name: quantize_component(getattr(pipeline, name), config, backend)})
    return quantized


def sensitivity(
    pipeline: Any,
    spec: QuantSpec | str | dict[str, Any],
    *,
    how: How = "alone",
    samples: int = RANKING_SAMPLES,
    steps: int = 50,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    workspace: Path | str | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Rank the layers and steps of a diffusers pipeline, which is not changed, by the error that quantizing causes.

    Weights are rounded to nearest and activations have one static range: what a recipe learns later is not in it.

    Args:
        how: quantize one layer ``"alone"``, or all but one (``"relief"``).
        samples, steps: calibration samples, and the denoising steps of the trajectories they come from.
        prompts, seed, workspace, progress: as for `quantize`.

    Raises:
        StepquantError: for a spec or a pipeline that does not work, in one sentence.
    """
    spec = QuantSpec.parse(spec)
    _check_seed(seed)
    calibration = Calibration.parse({"samples": samples, "steps": steps})
    denoiser = check_quantizable(pipeline, spec)
    request = make_request(pipeline, steps, prompts=prompts)
    with tempfile.TemporaryDirectory(prefix="stepquant-") as temporary, Workspace(Path(workspace or temporary)) as kept:
        job = Job(pipeline, denoiser, spec, calibration, request, seed, kept, progress or Progress())
        return job.rank_untrained(check_how(how), samples)


def check_quantizable(pipeline: Any, spec: QuantSpec, budget: float | None = None) -> nn.Module:
    """The pipeline's denoiser.

    Raises:
        StepquantError: if there is nothing to quantize, an exception matches no layer, or the budget is beyond it.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if quantized_modules(denoiser):
        raise StepquantError("the pipeline is quantized already: give the full-precision one.")
    check_dtype(pipeline)
    spec.check_quantizes()
    description = describe(denoiser)
    check_overrides(description, spec)
    if budget is not None:
        bits = description.quantized_bits(spec)
        check_budget(spec, bits, weight_sizes(denoiser, bits), budget)
    return denoiser


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int) or seed < 0:
        raise StepquantError(f"seed is {seed!r}: expected a whole number, 0 or more.")


def check_device(device: torch.device | str | None) -> torch.device | None:
    """The device that was asked for, with its number; raises `StepquantError` if it is none, or not here."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise StepquantError(
            f"device is {str(device)!r}, which cannot be used here ({first_line(error)}): leave it out, or give one "
            "that torch has."
        ) from None
    return found


def train(
    pipeline: Any,
    spec: QuantSpec | str | dict[str, Any],
    *,
    data: Path | str | None = None,
    distill: bool = False,
    **arguments: Any,
) -> Any:
    """Quantize by training: weights, their scales and the activations' intervals together (TDQ, arXiv 2306.02316).

    Returns the same as `quantize`.

    Args:
        pipeline, spec: as for `quantize`.
        data: folder of images, see `stepquant.calibration.image_folder.open_images`; trained on with the diffusion loss.
        distill: learn what full precision answers instead; on `data` if there is any, else on trajectories of the
            pipeline's own sampler, as many at a time as ``calibration`` has images.
        arguments: hyperparameters of `stepquant.recipes.qat.qat`, such as ``iterations``, and all other arguments of
            `quantize` but the recipe. ``calibration`` is of the ranges that training starts at.

    Raises:
        StepquantError: if there is nothing to learn from, or for a spec, folder or pipeline that does not work.
    """
    if data is None and not distill:
        raise StepquantError(
            "training has nothing to learn from: give a folder of images as data, "
            "or ask to distill full precision, which needs none."
        )
    images = None if data is None else open_images(data, pipeline)
    if QuantSpec.parse(spec).default_bits.activation == FLOAT_BITS:
        arguments["intervals"] = "static"  # no activation has an interval

    @functools.wraps(qat)
    def trained(job: Job, **values: Any) -> CalibrationModel:
        return qat(job, images, **values)

    named = None if images is None else images.folder.name
    return quantize(pipeline, spec, recipe=trained, distill=distill, data=named, **arguments)


def assemble(
    pipeline: Any, quantization: Quantization, spec: QuantSpec, provenance: dict[str, Any], backend: Backend = "auto"
) -> Any:
    """A copy of `pipeline` whose denoiser carries `quantization` and has its kernels."""
    component = denoiser_name(pipeline)
    original = getattr(pipeline, component)
    # What is replaced anyway is not copied: the copy gets layers without memory in those places.
    replaced = (original.get_submodule(name) for name in quantization.layers)
    denoiser = copy.deepcopy(original, {id(layer): copy.deepcopy(layer).to("meta") for layer in replaced})
    denoiser.eval().requires_grad_(False)
    install(denoiser, quantization)
    if device_of(original).type not in ("cpu", "meta"):
        denoiser.to(device_of(original))
    denoiser.register_to_config(
        quantization_config={
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "spec": spec.model_dump(mode="json"),
            "structure": quantization.structure(),
            "provenance": provenance,
        }
    )
    prepare(denoiser, backend)
    quantized = copy.copy(pipeline)
    # A scheduler knows how far it is, a tokenizer how it was last asked to pad and cut: with its own, the pipeline may
    # run beside the original.
    own = {
        name: copy.deepcopy(part)
        for name, part in pipeline.components.items()
        if name == "scheduler" or isinstance(part, PreTrainedTokenizerBase)
    }
    quantized.register_modules(**own | {component: denoiser})
    correct_sampler(quantized, denoiser)
    return bound(quantized)


def _source_of(pipeline: Any) -> str:
    given = str(getattr(pipeline.config, "_name_or_path", "") or type(pipeline).__name__)
    return Path(given).name if Path(given).is_dir() else given


def _versions() -> dict[str, str]:
    return {
        "stepquant": __version__,
        "torch": torch.__version__.partition("+")[0],
        "diffusers": diffusers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
