"""The share of the sampler's steps that a denoiser takes part in."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import TimestepReader
from stepquant.models.denoisers import primary_denoisers
from stepquant.pipelines.call import call_parameters
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import Request
from stepquant.pipelines.steps import StepCounter


def own_steps(pipeline: Any, component: str, request: Request) -> int:
    """Return the number of steps in which a denoiser is called: about half of them for each expert of Wan 2.2.

    The only denoiser of a pipeline that starts from noise takes part in all. Otherwise, one sample is generated.

    Raises:
        StepquantError: if the denoiser is not called.
    """
    if list(primary_denoisers(pipeline)) == [component] and "strength" not in call_parameters(pipeline):
        return request.steps
    denoiser: nn.Module = getattr(pipeline, component)
    counter, timestep_of = StepCounter(), TimestepReader.of(denoiser)

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counter.see(timestep_of(args, kwargs))

    handle = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        generate(pipeline, request, [0], 0, decode=False)
    finally:
        handle.remove()
    if counter.step < 0:
        raise StepquantError(
            f"{type(pipeline).__name__} does not call its {component} in {request.steps} steps; expected at least one "
            "call. Use more steps, or leave the component out."
        )
    return counter.step + 1
