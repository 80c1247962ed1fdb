"""Quantize the denoisers of a pipeline: open the workspace, run the recipe on each, assemble and check the pipeline."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stepquant import provenance
from stepquant.assembly import assemble
from stepquant.calibration.allocation import parse_budget
from stepquant.calibration.image_folder import ImageFolder
from stepquant.calibration.placement import check_device
from stepquant.calibration.samples import Calibration
from stepquant.check.diagnosis import Finished
from stepquant.check.result import make_policy
from stepquant.check.run import checked_pipeline, placed_all
from stepquant.config import QuantSpec
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.integrations.components import Also, check_components, quantize_component
from stepquant.layers.install import Quantization
from stepquant.models import primary_denoisers
from stepquant.pipelines.inputs import Inputs
from stepquant.pipelines.request import make_request
from stepquant.planning import make_plan
from stepquant.progress import Progress
from stepquant.recipes import Context, Recipe
from stepquant.recipes.recipe import check_recipe, run_recipe
from stepquant.recipes.sensitivity import output_correction, spec_within_budget, step_bits_within_budget
from stepquant.recipes.stages import AllocateSteps
from stepquant.runtime import Backend
from stepquant.targets import Spec, check_quantizable, check_spec, parse_specs
from stepquant.workspace import Workspace


@contextmanager
def opened(
    pipeline: Any,
    specs: Mapping[str, QuantSpec],
    budget: float | None,
    calibration: Calibration,
    seed: int,
    *,
    recipe: Recipe | None = None,
    images: ImageFolder | None = None,
    prompts: Sequence[str] | None,
    guidance: float | None,
    inputs: Inputs | None,
    workspace: Path | str | None,
    cache: Path | str | None,
    progress: Progress | None,
    device: torch.device | str | None,
) -> Iterator[list[Context]]:
    """Check everything and take hold of the workspace, until the context ends."""
    if not isinstance(seed, int) or seed < 0:
        raise StepquantError(f"seed is {seed!r}: expected a whole number, 0 or more.")
    for name, spec in specs.items():
        check_quantizable(pipeline, name, spec)
    where = check_device(device)
    request = make_request(
        pipeline, calibration.steps, prompts=prompts, guidance=guidance, size=calibration.size, inputs=inputs
    )
    ranks = Ranks.current()
    with tempfile.TemporaryDirectory(prefix="stepquant-", ignore_cleanup_errors=True) as temporary:  # mapped on Windows
        kept = Workspace(Path(workspace or temporary), ranks)
        # Not entered: its stages are whole files, nothing to lock.
        shared = Workspace(Path(cache), ranks) if cache else None
        contexts = [
            Context(
                pipeline, name, spec, calibration, request, seed, kept, progress or Progress(), shared, where, images
            )
            for name, spec in specs.items()
        ]
        for context in contexts:
            if recipe is not None:
                check_recipe(recipe, context)
            check_spec(context.denoiser, context.description, context.spec, budget)
        with kept:
            yield contexts


def quantize_denoisers(
    pipeline: Any,
    spec: Spec,
    recipe: Recipe,
    images: ImageFolder | None,
    named: dict[str, Any],
    *,
    budget: float | str | None,
    activation_budget: float | None,
    correction: bool,
    also: Also | None,
    calibration: Calibration,
    seed: int,
    backend: Backend,
    source: str | None,
    check: bool,
    on_low_quality: str,
    **conditions: Any,
) -> Any:
    """`stepquant.quantize` with its recipe found; `named` is how it was named."""
    policy = make_policy(on_low_quality, check=check, correction=correction, raises=recipe.raises, target=recipe.target)
    specs = parse_specs(pipeline, spec)
    most = parse_budget(budget) if isinstance(budget, str) else budget
    others = check_components(pipeline, also or {}, specs)
    primary = list(primary_denoisers(pipeline))
    several = len(primary) > 1 or list(specs) != primary
    named |= {
        "budget": most,
        "activation_budget": activation_budget,
        "correction": correction,
        "prompts": conditions["prompts"],
        "components": {name: given.model_dump(mode="json") for name, given in specs.items()} if several else None,
    }
    with opened(pipeline, specs, most, calibration, seed, recipe=recipe, images=images, **conditions) as contexts:
        with placed_all(contexts):
            results = [
                _calibrated(context, recipe, most, activation_budget, correction, check=check) for context in contexts
            ]
        quantized = pipeline
        finished: Sequence[Finished] = []
        for context, quantization in results:
            record = provenance.record(context, recipe, source, named | {"requested": specs[context.component]})
            if others:
                record["also"] = {name: config.spec.model_dump(mode="json") for name, config in others.items()}
            quantized = assemble(quantized, context.component, quantization, context.spec, record, backend)
            finished = [*finished, Finished(context, quantization, getattr(quantized, context.component), record)]
        if check:
            quantized, finished = checked_pipeline(quantized, finished, policy, backend)
    for each in finished:
        recipe.accept(each.context, each.quantization)
    for name, config in others.items():
        quantized.register_modules(**{name: quantize_component(getattr(quantized, name), config, backend)})
    return quantized


def _calibrated(
    context: Context,
    recipe: Recipe,
    budget: float | None,
    activation_budget: float | None,
    correction: bool,
    *,
    check: bool,
) -> tuple[Context, Quantization]:
    """Run the recipe on one denoiser; returns the context with the spec that fits the budgets."""
    before = [] if activation_budget is None else [AllocateSteps(budget=activation_budget)]
    context.progress.plan(lambda: make_plan(context, recipe, before, check=check))
    recipe, context = recipe.search(context)
    if budget is not None:
        context = dataclasses.replace(context, spec=spec_within_budget(context, budget))
    if activation_budget is not None:
        context = dataclasses.replace(context, spec=step_bits_within_budget(context, activation_budget))
    model = run_recipe(recipe, context)
    quantization = model.to_quantized()
    if correction:
        quantization = dataclasses.replace(quantization, correction=output_correction(context, model))
    return context, quantization
