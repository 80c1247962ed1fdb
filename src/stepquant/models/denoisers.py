"""Find the denoisers among the components of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from diffusers import SchedulerMixin
from torch import nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import timestep_name
from stepquant.layers.quantized import quantized_modules

USUAL_NAMES = ("unet", "transformer")
"""Names that always denote a denoiser, even of a class whose forward hides its parameters."""
SECONDARY = ("controlnet", "adapter")
"""Beginnings of the names of models that guide a denoiser."""


def modules(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every component that is a model, each module once.

    Entries of the pipeline's configuration that hold values, such as the layer numbers of Krea 2, are not components.
    """
    seen: set[int] = set()
    names: Iterable[str] = getattr(pipeline, "config", None) or ()
    for name in dict.fromkeys([*names, *USUAL_NAMES]):
        part = None if name.startswith("_") else getattr(pipeline, name, None)
        if isinstance(part, nn.Module) and id(part) not in seen:
            seen.add(id(part))
            yield name, part


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Return every component whose forward takes a timestep, by name: denoisers, priors, decoders, ControlNets."""
    return {name: part for name, part in modules(pipeline) if name in USUAL_NAMES or timestep_name(part) is not None}


def primary_denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Return the denoisers without the models that guide them (ControlNets and adapters), by name.

    Raises:
        StepquantError: if there is none.
    """
    found = {name: part for name, part in denoisers(pipeline).items() if not name.startswith(SECONDARY)}
    if not found:
        raise StepquantError(
            f"{type(pipeline).__name__} has no denoiser; expected a component whose forward takes a timestep, such as "
            "a unet or a transformer."
        )
    return found


def denoiser_name(pipeline: Any) -> str:
    """Return the name of the first primary denoiser; raises `StepquantError` if there is none."""
    return next(iter(primary_denoisers(pipeline)))


def quantized_denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Return the denoisers that stepquant quantized, by name."""
    return {name: part for name, part in denoisers(pipeline).items() if quantized_modules(part)}


def schedulers(pipeline: Any) -> dict[str, Any]:
    """Return the schedulers of a pipeline by name: one, or one for each of prior and decoder."""
    names: Iterable[str] = getattr(pipeline, "config", None) or ()
    found = {name: getattr(pipeline, name, None) for name in dict.fromkeys([*names, "scheduler"]) if name[0] != "_"}
    return {name: part for name, part in found.items() if isinstance(part, SchedulerMixin)}


def scheduler_of(pipeline: Any, component: str) -> Any:
    """Return the scheduler of a denoiser: the one with its prefix (``prior_scheduler``), else the pipeline's."""
    found = schedulers(pipeline)
    prefix = component.split("_")[0]
    return found.get(f"{prefix}_scheduler", found.get("scheduler", next(iter(found.values()), None)))
