"""Quantize a denoiser that belongs to no diffusers pipeline, such as a custom module with a plain loop."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from stepquant.assembly import quantized_copy
from stepquant.calibration.collection import samples_of_calls
from stepquant.calibration.placement import check_device
from stepquant.calibration.samples import Calibration, CalibrationSet
from stepquant.check.diagnosis import Finished
from stepquant.check.result import OnLowQuality, make_policy
from stepquant.check.run import checked_model
from stepquant.config import QuantSpec
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.models import describe
from stepquant.pipelines.recording import RecordedCall
from stepquant.pipelines.request import Request
from stepquant.progress import Progress
from stepquant.quality.held_out import IMAGES
from stepquant.recipes import Context, Recipe, find_recipe
from stepquant.recipes.recipe import run_recipe
from stepquant.runtime import Backend
from stepquant.targets import check_spec
from stepquant.workspace import Workspace

COMPONENT = "denoiser"


def quantize_model(
    model: nn.Module,
    calls: Iterable[RecordedCall | Mapping[str, Any]],
    spec: QuantSpec | str | dict[str, Any],
    recipe: str | type[Recipe] | Recipe = "q-diffusion",
    *,
    preset: str | None = None,
    effort: str = "standard",
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    workspace: Path | str | None = None,
    progress: Progress | None = None,
    backend: Backend = "auto",
    device: torch.device | str | None = None,
    check: bool = True,
    on_low_quality: OnLowQuality = "warn",
) -> Any:
    """Quantize a denoiser on recorded calls; returns a copy that runs in integers. The model is not changed.

    The copy of a diffusers model can be saved by its ``save_pretrained`` and loaded by ``from_pretrained``. Any other
    module is kept by your own means, such as quantizing again with the same arguments, which gives the same integers.

    Args:
        model: a module whose forward has a timestep, named ``timestep``, ``timesteps``, ``t`` or similar.
        calls: arguments of calls by name, from every part of the sampling loop, each with one or more samples. The
            first tensor, or list of tensors, holds the noisy samples along dimension 0. A call repeated with its
            samples doubled has to give every output twice: samples are independent. Of 16 samples or more a few are
            not calibrated on, but checked.
        recipe, preset, effort, hyperparameters, spec, seed, workspace, progress, backend, device, check,
            on_low_quality: as for `stepquant.quantize`. A recipe that generates samples itself needs a pipeline. The
            check compares outputs.

    Raises:
        StepquantError: for calls, a spec or a recipe that do not work, in one sentence.
    """
    wanted, chosen = QuantSpec.parse(spec), find_recipe(recipe, preset, hyperparameters, effort)
    policy = make_policy(on_low_quality, check=check, correction=False, raises=chosen.raises, target=chosen.target)
    wanted.check_quantizes()
    if quantized_modules(model):
        raise StepquantError("the model is quantized already: give the full-precision one.")
    where = check_device(device)
    with torch.no_grad():
        samples = samples_of_calls(model, calls)
        description = describe(model, samples.arguments(slice(0, 1)), float(samples.timesteps.max()))
    check_spec(model, description, wanted, None)
    fitted, checked = _split(samples) if check else (samples, samples)
    steps = int(samples.steps.max()) + 1
    folder = nullcontext(workspace) if workspace else tempfile.TemporaryDirectory(prefix="stepquant-")
    with folder as kept, Workspace(Path(kept), Ranks.current()) as opened:
        context = Context(
            _NoPipeline(model), COMPONENT, wanted, Calibration(samples=len(fitted), steps=steps), Request(steps=steps),
            seed, opened, progress or Progress(), device=where, calls=fitted, memo={"description": description},
        )  # fmt: skip
        with context.placed():
            fixed, context = chosen.search(context)
            quantization = run_recipe(fixed, context).to_quantized()
        record = {"recipe": chosen.called(), "seed": seed, "spec": context.spec.model_dump(mode="json")}
        denoiser = quantized_copy(model, quantization, context.spec, record, backend)
        finished = Finished(context, quantization, denoiser, record)
        if check:
            finished = checked_model(finished, checked, policy, backend)
    chosen.accept(finished.context, finished.quantization)
    return finished.denoiser


def _split(samples: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Samples to fit to, and `IMAGES` others, spread over the steps, to check; too few samples serve both."""
    order = samples.steps.argsort(stable=True)
    every = len(samples) // IMAGES
    if every < IMAGES:
        return samples, samples
    held = torch.zeros(len(samples), dtype=torch.bool)
    held[order[every // 2 :: every][:IMAGES]] = True
    return samples.subset((~held).nonzero().flatten()), samples.subset(held.nonzero().flatten())


class _NoPipeline:
    """Stands for the pipeline that a recipe might need, and says that there is none."""

    def __init__(self, model: nn.Module) -> None:
        setattr(self, COMPONENT, model)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise StepquantError(
            f"this recipe needs the {name} of a diffusers pipeline, but the model was given alone. Use a recipe that "
            "generates no samples, such as minmax or q-diffusion."
        )
