"""Description of a denoiser by a call that its pipeline makes."""

from __future__ import annotations

from typing import Any

import torch

from stepquant.models import ModelDescription, describe
from stepquant.pipelines.recording import record_calls
from stepquant.pipelines.request import Request


def describe_component(pipeline: Any, component: str, request: Request, seed: int = 0) -> ModelDescription:
    """Run the pipeline up to the first call of a denoiser, and describe the denoiser by it, see `describe`.

    Args:
        component: name of the denoiser among the components of the pipeline.

    Raises:
        StepquantError: if the pipeline cannot run, does not call the denoiser, or the denoiser has no timestep.
    """
    call = record_calls(pipeline, component, request, [0], seed)[0]
    return describe(getattr(pipeline, component), call.arguments, _latest_time(pipeline))


def _latest_time(pipeline: Any) -> float | None:
    """The largest timestep of the schedule that the pipeline has just set."""
    timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
    return None if timesteps is None or len(timesteps) == 0 else float(torch.as_tensor(timesteps).max())
